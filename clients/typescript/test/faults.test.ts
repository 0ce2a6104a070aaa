/** One order a click while the database stands still and while the server is killed. */
import assert from 'node:assert/strict';
import { after, afterEach, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Aborted, DeadlineExceeded, isDecided, type Placed } from '../src/index.js';
import { Server, until } from './server.js';

let server: Server;

before(async () => {
  server = await Server.start();
});
afterEach(() => server?.continueDatabase());
after(() => server?.end());

const CLICKS = 300;
/** Between two clicks of the rush: 100 a second. */
const EVERY_MS = 10;

test('clicks go through once the database goes on, each with one order', async () => {
  await server.putSku('STOPPED', {});
  const client = server.client({ waitSeconds: 1 });
  server.stopDatabase();
  const placed: Promise<Placed>[] = [];
  const undecided = await server.answers('undecided', 'timed_out', 'overloaded');
  for (let user = 0; user < 10; user += 1) placed.push(client.place({ user_id: `u-${user}`, sku_id: 'STOPPED' }));
  // Each click has been answered once on average, and none by an order.
  await until('answers without an order', async () => (await server.answers('undecided', 'timed_out', 'overloaded')) >= undecided + 10);
  server.continueDatabase();
  const orders = await Promise.all(placed);
  assert.ok(orders.some(({ attempts }) => attempts > 1));
  const expected = orders.map(({ order }): [string, string[]] => [order.user_id, [order.order_id]]);
  assert.ok(orders.every(({ order }) => order.status === 'pending_payment'));
  assert.deepEqual(new Map([...server.rows('STOPPED')].sort()), new Map(expected.sort()));
});

test('after the deadline the error has the key, under which the click goes on', async () => {
  await server.putSku('DEADLINE', {});
  server.stopDatabase();
  const request = { user_id: 'u-1', sku_id: 'DEADLINE' };
  const late = server.client().place(request, { deadlineMs: 2_500 });
  const error: unknown = await late.catch((reason: unknown) => reason);
  assert.ok(error instanceof DeadlineExceeded, String(error));
  assert.ok(error.idempotencyKey);
  // An order that was named is the one that it becomes.
  if (error.orderId) assert.equal(error.mayExist, true);
  server.continueDatabase();
  const { order } = await server.client().place(request, { idempotencyKey: error.idempotencyKey });
  assert.deepEqual(server.rows('DEADLINE'), new Map([['u-1', [order.order_id]]]));
});

test('an accepted order is decided by long poll once the database goes on', async () => {
  await server.putSku('POLLED', {});
  const client = server.client({ waitSeconds: 1 });
  server.stopDatabase();
  const { order } = await client.place({ user_id: 'u-1', sku_id: 'POLLED' }, { respondAsync: true });
  assert.equal(order.status, 'accepted');
  const late: unknown = await client.waitUntilDecided(order.order_id, { deadlineMs: 1_500 }).catch((reason: unknown) => reason);
  assert.ok(late instanceof DeadlineExceeded, String(late));
  assert.deepEqual([late.orderId, late.mayExist], [order.order_id, true]);
  const decided = client.waitUntilDecided(order.order_id);
  server.continueDatabase();
  assert.equal((await decided).status, 'pending_payment');
  assert.deepEqual(server.rows('POLLED'), new Map([['u-1', [order.order_id]]]));
});

test('an order whose answer is lost is found by the next try, and so is a cancellation', async () => {
  await server.putSku('LOST', {});
  const placing = await server.losing(2);
  const { order, replayed, attempts } = await placing.client.place({ user_id: 'u-1', sku_id: 'LOST' });
  placing.end();
  assert.deepEqual([replayed, attempts], [true, 3]);
  assert.deepEqual(server.rows('LOST'), new Map([['u-1', [order.order_id]]]));
  const cancelling = await server.losing(1);
  assert.equal((await cancelling.client.cancel(order.order_id)).status, 'cancelled');
  cancelling.end();
});

test('if each answer is lost, the error says that the order may exist', async () => {
  await server.putSku('SILENT', {});
  const { client, end } = await server.losing(Number.POSITIVE_INFINITY);
  const error: unknown = await client.place({ user_id: 'u-1', sku_id: 'SILENT' }, { deadlineMs: 3_000 }).catch((reason: unknown) => reason);
  end();
  assert.ok(error instanceof DeadlineExceeded, String(error));
  assert.deepEqual([error.mayExist, error.orderId], [true, undefined]);
  const { order } = await server.client().place({ user_id: 'u-1', sku_id: 'SILENT' }, { idempotencyKey: error.idempotencyKey });
  assert.deepEqual(server.rows('SILENT'), new Map([['u-1', [order.order_id]]]));
});

test('if nothing listens, the error says that no order exists', async () => {
  // An address of its own: on a connection that is kept alive, a request may have been read before it was cut.
  const { client, end } = await server.losing(0);
  end();
  const error: unknown = await client.place({ user_id: 'u-1', sku_id: 'ANY' }, { deadlineMs: 1_000 }).catch((reason: unknown) => reason);
  assert.ok(error instanceof DeadlineExceeded, String(error));
  assert.deepEqual([error.mayExist, error.orderId], [false, undefined]);
  assert.ok(error.idempotencyKey);
});

test('an abort ends the call at once, and the click can be repeated', async () => {
  await server.putSku('ABORTED', {});
  const request = { user_id: 'u-1', sku_id: 'ABORTED' };
  const before: unknown = await server.client().place(request, { signal: AbortSignal.abort('gone') }).catch((reason: unknown) => reason);
  assert.ok(before instanceof Aborted, String(before));
  assert.deepEqual([before.mayExist, before.cause], [false, 'gone'], 'nothing was sent');
  server.stopDatabase();
  const controller = new AbortController();
  const placing = server.client().place(request, { signal: controller.signal }).catch((reason: unknown) => reason);
  await sleep(300);
  const aborted = performance.now();
  controller.abort('gone');
  const error = await placing;
  assert.ok(error instanceof Aborted, String(error));
  assert.ok(performance.now() - aborted < 5_000, 'before the server gives it up');
  assert.deepEqual([error.mayExist, error.cause], [true, 'gone']);
  assert.ok(error.idempotencyKey);
  server.continueDatabase();
  const { order } = await server.client().place(request, { idempotencyKey: error.idempotencyKey });
  assert.deepEqual(server.rows('ABORTED'), new Map([['u-1', [order.order_id]]]));
});

test('each click of a rush has one order though the server is killed in the middle', async () => {
  await server.putSku('RUSH', { total: CLICKS });
  const client = server.client();
  let answered = 0;
  const clicks = Array.from({ length: CLICKS }, async (_, user) => {
    await sleep(user * EVERY_MS);
    // Every other one is acknowledged from the queue, before it is a row.
    const placed = await client.place({ user_id: `u-${user}`, sku_id: 'RUSH' }, { respondAsync: user % 2 === 0 });
    answered += 1;
    return placed;
  });
  const rush = Promise.all(clicks);
  await until('a third of the answers', () => answered >= CLICKS / 3);
  await server.kill('SIGKILL');
  assert.ok(answered < CLICKS, 'in the middle');
  await server.startAgain();
  const placed = await rush;
  assert.ok(placed.some(({ attempts }) => attempts > 1));
  const orders = await Promise.all(placed.map(async ({ order }) => {
    return isDecided(order) ? order : client.waitUntilDecided(order.order_id);
  }));
  assert.ok(orders.every(({ status }) => status === 'pending_payment'));
  const expected = orders.map((order): [string, string[]] => [order.user_id, [order.order_id]]);
  assert.deepEqual(new Map([...server.rows('RUSH')].sort()), new Map(expected.sort()));
  await server.assertAudit();
});
