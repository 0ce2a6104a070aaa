/** The generated types are those of the server's document, and the README's example runs as it stands. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { PACKAGE, Server, TOKEN } from './server.js';

let server: Server;

before(async () => {
  server = await Server.start();
});
after(() => server?.end());

test('the types are those of the document that the server has', async () => {
  const document = join(server.dir, 'openapi.json');
  writeFileSync(document, await (await fetch(`http://${server.control}/openapi.json`)).text());
  const { scripts } = JSON.parse(readFileSync(join(PACKAGE, 'package.json'), 'utf8')) as { scripts: Record<string, string> };
  const [generator = '', , ...flags] = (scripts['generate'] ?? '').split(' ');
  const output = flags.indexOf('--output') + 1;
  const types = readFileSync(join(PACKAGE, flags[output] ?? ''), 'utf8');
  flags[output] = join(server.dir, 'openapi.ts');
  execFileSync(join(PACKAGE, 'node_modules/.bin', generator), [document, ...flags], { cwd: PACKAGE });
  assert.equal(readFileSync(flags[output], 'utf8'), types, 'the binary and src/openapi.ts are of different states of the tree');
});

test('the example of the README runs', async () => {
  await server.putSku('IPHONE-15', { unit_price: 199_900, currency: 'CNY', total: 1, per_user_limit: 1 });
  const [, example] = readFileSync(join(PACKAGE, 'README.md'), 'utf8').match(/^```ts\n(.*?)^```$/ms) ?? [];
  assert.ok(example);
  // In the package, so that its own name leads to it.
  const folder = join(PACKAGE, 'dist/example');
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'shop.ts'), example);
  const flags = ['--strict', '--target', 'es2022', '--module', 'nodenext', '--types', 'node', join(folder, 'shop.ts')];
  execFileSync(join(PACKAGE, 'node_modules/.bin/tsc'), flags, { cwd: PACKAGE, stdio: ['ignore', 'inherit', 'inherit'] });
  const env = { PATH: process.env['PATH'], MILLRACE_URL: `http://${server.data}`, MILLRACE_TOKEN: TOKEN };
  const out = execFileSync(process.execPath, [join(folder, 'shop.js')], { env, encoding: 'utf8' });
  assert.match(out, /^order \d+ of u-42: please pay 1999.00 CNY$/m);
  assert.match(out, /^u-42 clicked again: the same order$/m);
  assert.match(out, /^u-43: sold out, 0 left$/m);
  assert.match(out, /^u-43: waitlisted, number 1 in line\norder \d+: cancelled\norder \d+ of u-43: pending_payment$/m);
});
