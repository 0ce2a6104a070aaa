/** A real Millrace with its own PostgreSQL, as a process of its own that can be killed and started again. */
import assert from 'node:assert/strict';
import { execFileSync, spawn, type ChildProcess } from 'node:child_process';
import { createHmac, randomUUID } from 'node:crypto';
import { chmodSync, existsSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import { connect, createServer, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import createClient, { type Client } from 'openapi-fetch';
import { Millrace, type ClientOptions, type components, type Order, type paths } from '../src/index.js';

/** `clients/typescript`. */
export const PACKAGE = resolve(fileURLToPath(new URL('../..', import.meta.url)));
const BINARY = process.env['MILLRACE_BINARY'] ?? resolve(PACKAGE, '../../target/debug/millrace');
const SECRET = Buffer.from('only for tests: 24 bytes').toString('base64');

/** What the data plane of each test server asks for. */
export const TOKEN = 'only-for-tests';
/** Bounds every wait on a condition. Nothing takes that long, even on a machine that is busy. */
export const PATIENCE_MS = 120_000;

/** Waits until `condition` holds. */
export async function until(what: string, condition: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = performance.now() + PATIENCE_MS;
  while (!(await condition())) {
    assert.ok(performance.now() < deadline, `waited in vain: ${what}`);
    await sleep(20);
  }
}

export class Server {
  readonly dir: string;
  data = '127.0.0.1:0';
  control = '127.0.0.1:0';
  #process: ChildProcess | undefined;
  #stopped: number[] = [];

  private constructor() {
    this.dir = mkdtempSync(join(tmpdir(), 'millrace-client-'));
    // As root, Millrace runs PostgreSQL as another user, who has to pass through.
    chmodSync(this.dir, 0o711);
  }

  static async start(settings: Record<string, string> = {}): Promise<Server> {
    assert.ok(existsSync(BINARY), `no ${BINARY}: build it with \`cargo build\`, or name another in MILLRACE_BINARY`);
    const server = new Server();
    try {
      await server.startAgain(settings);
    } catch (error) {
      await server.end();
      throw error;
    }
    return server;
  }

  /** Starts the process, at the addresses that it had before. */
  async startAgain(settings: Record<string, string> = {}): Promise<void> {
    const addresses = join(this.dir, 'addresses.json');
    rmSync(addresses, { force: true });
    const log = openSync(join(this.dir, 'millrace.log'), 'a');
    const child = spawn(BINARY, ['serve'], {
      cwd: this.dir,
      stdio: ['ignore', log, log],
      env: {
        PATH: process.env['PATH'],
        MILLRACE_DATA_DIR: this.dir,
        MILLRACE_DATA_PLANE__LISTEN: this.data,
        MILLRACE_DATA_PLANE__TOKEN: TOKEN,
        MILLRACE_CONTROL_PLANE__LISTEN: this.control,
        MILLRACE_DATABASE__EMBEDDED_WAL_BYTES: String(64 * 1024 * 1024),
        MILLRACE_PAYMENTS__STANDARD__SECRET: `whsec_${SECRET}`,
        ...settings,
      },
    });
    this.#process = child;
    const lives = () => assert.ok(child.exitCode === null && child.signalCode === null, `it ended:\n${this.log()}`);
    await until('the addresses', () => (lives(), existsSync(addresses)));
    const { data_plane, control_plane } = JSON.parse(readFileSync(addresses, 'utf8')) as Record<string, string>;
    assert.ok(data_plane && control_plane);
    [this.data, this.control] = [data_plane, control_plane];
    await until('ready', async () => {
      lives();
      return (await fetch(`http://${this.control}/readyz`).catch(() => undefined))?.ok ?? false;
    });
  }

  client(options: Partial<ClientOptions> = {}): Millrace {
    return new Millrace({ baseUrl: `http://${this.data}`, token: TOKEN, deadlineMs: PATIENCE_MS, ...options });
  }

  operator(): Client<paths> {
    return createClient<paths>({ baseUrl: `http://${this.control}` });
  }

  /** A way to the server on which the first `count` answers are lost. Each connection carries one request. */
  async losing(count: number): Promise<{ client: Millrace; end: () => void }> {
    let left = count;
    const [host, port] = this.data.split(':');
    const proxy = createServer((near) => {
      const far = connect(Number(port), host);
      near.on('error', () => far.destroy()).pipe(far);
      far.on('error', () => near.destroy()).on('data', (answer: Buffer) => {
        if (left > 0) {
          left -= 1;
          near.destroy();
          far.destroy();
        } else {
          near.end(answer);
        }
      });
    });
    await new Promise<void>((done) => proxy.listen(0, '127.0.0.1', done));
    const client = this.client({ baseUrl: `http://127.0.0.1:${(proxy.address() as AddressInfo).port}` });
    return { client, end: () => proxy.close() };
  }

  async putSku(sku_id: string, terms: Partial<components['schemas']['SkuRequest']>): Promise<void> {
    const body = { unit_price: 1_000, currency: 'EUR', total: 100, ...terms };
    const { response } = await this.operator().PUT('/admin/v1/skus/{sku_id}', { params: { path: { sku_id } }, body });
    assert.ok(response.ok, `PUT ${sku_id}: ${response.status}`);
  }

  /** What a payment platform that speaks Standard Webhooks would say. */
  async pay(order: Order): Promise<void> {
    const { order_id, amount, currency, receipt } = order;
    const body = JSON.stringify({
      type: 'payment.succeeded',
      data: { order_id, payment_id: `pay-${order_id}`, amount, currency, receipt },
    });
    const [id, at] = [randomUUID(), String(Math.floor(Date.now() / 1_000))];
    const signature = createHmac('sha256', Buffer.from(SECRET, 'base64')).update(`${id}.${at}.${body}`).digest('base64');
    const headers = {
      'Content-Type': 'application/json', 'webhook-id': id, 'webhook-timestamp': at, 'webhook-signature': `v1,${signature}`,
    };
    const answer = await fetch(`http://${this.data}/v1/payments/standard/notify`, { method: 'POST', headers, body });
    assert.equal(answer.status, 200);
  }

  /** Asks PostgreSQL itself. */
  sql(query: string): string {
    const connection = `host=${join(this.#postgres(), 'run')} user=millrace dbname=millrace`;
    return execFileSync('psql', ['--no-psqlrc', '-qAtF', '\t', '-c', query, connection], { encoding: 'utf8' });
  }

  /** The orders of a SKU that are rows, by buyer. */
  rows(sku_id: string): Map<string, string[]> {
    const out = this.sql(`SELECT user_id, order_id FROM millrace.order_list WHERE sku_id = '${sku_id}'`);
    const rows = new Map<string, string[]>();
    for (const line of out.split('\n').filter((one) => one !== '')) {
      const [user = '', order = ''] = line.split('\t');
      rows.set(user, [...(rows.get(user) ?? []), order]);
    }
    return rows;
  }

  /** A figure of `millrace_orders_total`, or the sum of several. */
  async answers(...outcomes: string[]): Promise<number> {
    const text = await (await fetch(`http://${this.control}/metrics`)).text();
    const figure = (outcome: string) => text.match(new RegExp(`^millrace_orders_total\\{outcome="${outcome}"\\} (\\d+)`, 'm'));
    return outcomes.reduce((sum, outcome) => sum + Number(figure(outcome)?.[1] ?? Number.NaN), 0);
  }

  async assertAudit(): Promise<void> {
    const { data } = await this.operator().GET('/admin/v1/audit');
    assert.equal(data?.ok, true, JSON.stringify(data));
  }

  /** SIGSTOP to every process of PostgreSQL, the one that starts others first. */
  stopDatabase(): void {
    const [postmaster] = readFileSync(join(this.#postgres(), 'data/postmaster.pid'), 'utf8').split('\n');
    const pid = Number(postmaster);
    process.kill(pid, 'SIGSTOP');
    this.#stopped = [pid];
    const processes = execFileSync('ps', ['-A', '-o', 'pid=,ppid='], { encoding: 'utf8' });
    for (const line of processes.trim().split('\n')) {
      const [child, parent] = line.trim().split(/\s+/).map(Number);
      if (child === undefined || parent !== pid) continue;
      try {
        process.kill(child, 'SIGSTOP');
        this.#stopped.push(child);
      } catch {
        // It has ended meanwhile.
      }
    }
  }

  continueDatabase(): void {
    for (const pid of this.#stopped.splice(0)) {
      try {
        process.kill(pid, 'SIGCONT');
      } catch {
        // Likewise.
      }
    }
  }

  /** Ends the process by `signal`; PostgreSQL outlives a SIGKILL, and the next start takes it over. */
  async kill(signal: NodeJS.Signals): Promise<void> {
    const child = this.#process;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    child.kill(signal);
    await until(`the end by ${signal}`, () => child.exitCode !== null || child.signalCode !== null);
  }

  /** Ends everything and deletes it. */
  async end(): Promise<void> {
    this.continueDatabase();
    const lives = this.#process?.exitCode === null && this.#process.signalCode === null;
    // Only Millrace itself knows how to end a PostgreSQL that a SIGKILL left behind.
    if (!lives && existsSync(this.#postgres())) await this.startAgain().catch(() => undefined);
    await this.kill('SIGTERM');
    const postgres = this.#postgres();
    rmSync(this.dir, { recursive: true, force: true });
    rmSync(postgres, { recursive: true, force: true });
  }

  log(): string {
    return readFileSync(join(this.dir, 'millrace.log'), 'utf8').slice(-4_000);
  }

  /** The home of the cluster: below `data_dir`, or where Millrace's pointer leads. */
  #postgres(): string {
    const pointer = join(this.dir, 'postgres.location');
    return existsSync(pointer) ? readFileSync(pointer, 'utf8').trim() : join(this.dir, 'postgres');
  }
}
