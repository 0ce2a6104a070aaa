/** Each call and each refusal, on a server in good health. */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import {
  AlreadyAssigned, DeadlineExceeded, DrawUnderWay, IdempotencyKeyReused, isDecided, MillraceError, NotCancellable,
  OrderFailed, PurchaseLimit, RateLimited, SaleClosed, SaleNotOpen, SalePaused, SoldOut, Unauthorized, UnknownOrder,
  UnknownSku, WaitlistFull, type Millrace,
} from '../src/index.js';
import { Server, until } from './server.js';

let server: Server;
let millrace: Millrace;

before(async () => {
  server = await Server.start();
  millrace = server.client();
});
after(() => server?.end());

/** The error that a call throws, checked to be of `type`. */
async function thrown<E extends Error>(type: abstract new (...args: never[]) => E, call: Promise<unknown>): Promise<E> {
  const error: unknown = await call.then(() => assert.fail('nothing was thrown'), (reason: unknown) => reason);
  assert.ok(error instanceof type, `${String(error)} is no ${type.name}`);
  return error;
}

test('an order is placed and is a row', async () => {
  await server.putSku('PLACED', { unit_price: 199_900, currency: 'CNY' });
  const request = { user_id: 'u-1', sku_id: 'PLACED', quantity: 2, adjustment: -900, attributes: { address_id: 'a-7' } };
  const { order, idempotencyKey, replayed, attempts } = await millrace.place(request);
  assert.equal(order.status, 'pending_payment');
  assert.equal(order.amount, 398_900);
  assert.equal(typeof order.order_id, 'string');
  assert.match(idempotencyKey, /^[!-~]{1,64}$/);
  assert.deepEqual([replayed, attempts], [false, 1]);
  assert.deepEqual(server.rows('PLACED'), new Map([['u-1', [order.order_id]]]));
});

test('the same click again is answered with the same order', async () => {
  await server.putSku('REPLAYED', {});
  const request = { user_id: 'u-1', sku_id: 'REPLAYED' };
  const first = await millrace.place(request);
  const again = await millrace.place(request, { idempotencyKey: first.idempotencyKey });
  assert.equal(again.order.order_id, first.order.order_id);
  assert.equal(again.replayed, true);
  const other = await millrace.place(request);
  assert.notEqual(other.order.order_id, first.order.order_id, 'another click is another order');
  assert.equal(server.rows('REPLAYED').get('u-1')?.length, 2);
});

test('a double click that is in flight twice has one order', async () => {
  await server.putSku('DOUBLE', {});
  const click = () => millrace.place({ user_id: 'u-1', sku_id: 'DOUBLE' }, { idempotencyKey: 'double' });
  const placed = await Promise.all([click(), click(), click()]);
  assert.equal(new Set(placed.map(({ order }) => order.order_id)).size, 1);
  assert.equal(placed.filter(({ replayed }) => !replayed).length, 1);
  assert.equal(server.rows('DOUBLE').get('u-1')?.length, 1);
});

test('sold out tells what is free', async () => {
  await server.putSku('FEW', { total: 3 });
  await millrace.place({ user_id: 'u-1', sku_id: 'FEW' });
  const error = await thrown(SoldOut, millrace.place({ user_id: 'u-2', sku_id: 'FEW', quantity: 3 }));
  assert.deepEqual([error.code, error.available, error.mayExist], ['sold_out', 2, false]);
  assert.ok(error.idempotencyKey);
});

test('the purchase limit', async () => {
  await server.putSku('LIMITED', { per_user_limit: 1 });
  await millrace.place({ user_id: 'u-1', sku_id: 'LIMITED' });
  const error = await thrown(PurchaseLimit, millrace.place({ user_id: 'u-1', sku_id: 'LIMITED' }));
  assert.equal(error.code, 'purchase_limit');
});

test('a sale that is not open, over or paused', async () => {
  const hour = (from_now: number) => new Date(Date.now() + from_now * 3_600_000).toISOString();
  await server.putSku('EARLY', { opens_at: hour(1) });
  await server.putSku('LATE', { closes_at: hour(-1) });
  await server.putSku('PAUSED', {});
  await server.operator().POST('/admin/v1/skus/{sku_id}/pause', { params: { path: { sku_id: 'PAUSED' } } });
  await thrown(SaleNotOpen, millrace.place({ user_id: 'u-1', sku_id: 'EARLY' }));
  await thrown(SaleClosed, millrace.place({ user_id: 'u-1', sku_id: 'LATE' }));
  await thrown(SalePaused, millrace.place({ user_id: 'u-1', sku_id: 'PAUSED' }));
});

test('an unknown SKU', async () => {
  const error = await thrown(UnknownSku, millrace.place({ user_id: 'u-1', sku_id: 'NONE' }));
  assert.deepEqual([error.code, error.problem?.status, error.mayExist], ['unknown_sku', 404, false]);
});

test('a key that came with another body', async () => {
  await server.putSku('REUSED', {});
  await millrace.place({ user_id: 'u-1', sku_id: 'REUSED' }, { idempotencyKey: 'reused' });
  const other = millrace.place({ user_id: 'u-1', sku_id: 'REUSED', quantity: 2 }, { idempotencyKey: 'reused' });
  const error = await thrown(IdempotencyKeyReused, other);
  assert.equal(error.mayExist, true, 'the order of the first body does');
});

test('any other refusal is the general error, with its code', async () => {
  await server.putSku('GENERAL', {});
  const error = await thrown(MillraceError, millrace.place({ user_id: 'u-1', sku_id: 'GENERAL', quantity: 10_001 }));
  assert.equal(error.constructor, MillraceError);
  assert.deepEqual([error.code, error.problem?.status], ['invalid_field', 400]);
});

test('respond-async returns an accepted order, which becomes a row', async () => {
  await server.putSku('ASYNC', {});
  const { order, idempotencyKey } = await millrace.place({ user_id: 'u-1', sku_id: 'ASYNC' }, { respondAsync: true });
  assert.equal(order.status, 'accepted');
  assert.equal(isDecided(order), false);
  assert.equal(typeof order.estimated_wait_ms, 'number');
  const decided = await millrace.waitUntilDecided(order.order_id);
  assert.deepEqual([decided.order_id, decided.status], [order.order_id, 'pending_payment']);
  assert.deepEqual(server.rows('ASYNC'), new Map([['u-1', [order.order_id]]]));
  const again = await millrace.place({ user_id: 'u-1', sku_id: 'ASYNC' }, { respondAsync: true, idempotencyKey });
  assert.deepEqual([again.order.order_id, again.replayed], [order.order_id, true]);
});

test('an accepted order whose row the database refuses is an error, and so is the same click again', async () => {
  await server.putSku('REFUSED', { total: 1 });
  server.sql("ALTER TABLE millrace.orders ADD CONSTRAINT refused CHECK (user_id <> 'u-refused') NOT VALID");
  const { order, idempotencyKey } = await millrace.place({ user_id: 'u-refused', sku_id: 'REFUSED' }, { respondAsync: true });
  const error = await thrown(OrderFailed, millrace.waitUntilDecided(order.order_id));
  assert.deepEqual([error.orderId, error.mayExist], [order.order_id, false]);
  await thrown(OrderFailed, millrace.place({ user_id: 'u-refused', sku_id: 'REFUSED' }, { idempotencyKey }));
  server.sql('ALTER TABLE millrace.orders DROP CONSTRAINT refused');
  await millrace.place({ user_id: 'u-2', sku_id: 'REFUSED' });
});

test('cancelling twice answers the same, and the unit is free again', async () => {
  await server.putSku('CANCELLED', { total: 1 });
  const { order } = await millrace.place({ user_id: 'u-1', sku_id: 'CANCELLED' });
  for (let times = 0; times < 2; times += 1) {
    assert.equal((await millrace.cancel(order.order_id)).status, 'cancelled');
  }
  await millrace.place({ user_id: 'u-2', sku_id: 'CANCELLED' });
});

test('the waiting list, from joining to paying', async () => {
  await server.putSku('WAITING', { total: 1, waitlist_max: 2 });
  const join = (user_id: string) => millrace.place({ user_id, sku_id: 'WAITING', waitlist: true });
  const { order: first } = await join('u-1');
  assert.equal(first.status, 'pending_payment', 'a unit was free');
  const { order: second, idempotencyKey } = await join('u-2');
  const { order: third } = await join('u-3');
  assert.deepEqual([second.status, second.position, second.receipt, second.expires_at], ['waitlisted', 1, null, null]);
  assert.deepEqual([third.status, third.position], ['waitlisted', 2]);
  const full = await thrown(WaitlistFull, join('u-4'));
  assert.deepEqual([full.code, full.mayExist], ['waitlist_full', false]);
  const late = await thrown(DeadlineExceeded, millrace.waitUntilAssigned(third.order_id, { deadlineMs: 500 }));
  assert.equal(late.orderId, third.order_id);

  const [assigned] = await Promise.all([millrace.waitUntilAssigned(second.order_id), millrace.cancel(first.order_id)]);
  assert.deepEqual([assigned.order_id, assigned.status], [second.order_id, 'pending_payment']);
  assert.ok(assigned.receipt && assigned.expires_at);
  const again = await millrace.place({ user_id: 'u-2', sku_id: 'WAITING', waitlist: true }, { idempotencyKey });
  assert.deepEqual([again.replayed, again.order.receipt], [true, assigned.receipt]);
  const stays = await thrown(AlreadyAssigned, millrace.cancel(second.order_id, { only: 'waitlisted' }));
  assert.equal(stays.orderId, second.order_id);
  for (let times = 0; times < 2; times += 1) {
    assert.equal((await millrace.cancel(third.order_id, { only: 'waitlisted' })).status, 'cancelled');
  }
  assert.equal((await millrace.waitUntilAssigned(third.order_id)).status, 'cancelled');
});

test('orders are refused while a draw is made', async () => {
  const at = (seconds: number) => new Date(Date.now() + seconds * 1_000).toISOString();
  const times = { opens_at: at(-3_600), draw_at: at(2), closes_at: at(3_600) };
  // Without its beacon the draw is never made.
  await server.putSku('DRAWN', { allocation: 'draw', draw_beacon: 'a lottery', ...times });
  let users = 0;
  await until('the end of the entries', async () => {
    const click = millrace.place({ user_id: `u-${users += 1}`, sku_id: 'DRAWN' });
    const error: unknown = await click.then(({ order }) => assert.equal(order.status, 'waitlisted'), (reason: unknown) => reason);
    assert.ok(error === undefined || (error instanceof DrawUnderWay && !error.mayExist), String(error));
    return error !== undefined;
  });
});

test('a paid order is not cancelled, and a replay of its click shows it as paid', async () => {
  await server.putSku('PAID', {});
  const { order, idempotencyKey } = await millrace.place({ user_id: 'u-1', sku_id: 'PAID' });
  await server.pay(order);
  const error = await thrown(NotCancellable, millrace.cancel(order.order_id));
  assert.deepEqual([error.orderId, error.mayExist], [order.order_id, true]);
  const again = await millrace.place({ user_id: 'u-1', sku_id: 'PAID' }, { idempotencyKey });
  assert.equal(again.order.status, 'paid');
});

test('an order that does not exist', async () => {
  const error = await thrown(UnknownOrder, millrace.waitUntilDecided('1'));
  assert.equal(error.orderId, '1');
  await thrown(UnknownOrder, millrace.cancel('1'));
});

test('a wrong token, and none', async () => {
  for (const token of ['wrong', undefined]) {
    const stranger = server.client({ token });
    const error = await thrown(Unauthorized, stranger.place({ user_id: 'u-1', sku_id: 'PLACED' }));
    assert.equal(error.problem?.status, 401);
  }
});

test('a number that would be off is refused, in the order and in the answer', async () => {
  await server.putSku('HUGE', { unit_price: Number.MAX_SAFE_INTEGER });
  for (const part of [{ quantity: 1.5 }, { adjustment: 2 ** 53 }]) {
    const error = await thrown(MillraceError, millrace.place({ user_id: 'u-1', sku_id: 'HUGE', ...part }));
    assert.deepEqual([error.code, error.orderId, error.mayExist], ['unsafe_integer', undefined, false]);
  }
  assert.equal(server.rows('HUGE').size, 0);
  const error = await thrown(MillraceError, millrace.place({ user_id: 'u-1', sku_id: 'HUGE', quantity: 2 }));
  assert.deepEqual([error.code, error.mayExist], ['unsafe_integer', true]);
  assert.deepEqual(server.rows('HUGE'), new Map([['u-1', [error.orderId]]]));
});

test('what cannot be sent is refused before anything is sent', async () => {
  for (const idempotencyKey of ['', 'two words', 'k'.repeat(65), 'ключ']) {
    const error = await thrown(MillraceError, millrace.place({ user_id: 'u-1', sku_id: 'PLACED' }, { idempotencyKey }));
    assert.equal(error.code, 'invalid_field');
  }
  const id = 7_346_012_345_678_901_248n as unknown as string;
  assert.equal((await thrown(MillraceError, millrace.waitUntilDecided(id))).code, 'invalid_field');
  assert.throws(() => server.client({ baseUrl: 'no address' }));
});

test('a rate limit says when to come again, and the same click then goes through', async () => {
  await server.kill('SIGTERM');
  await server.startAgain({ MILLRACE_RATE_LIMIT__PER_USER: '1/min' });
  await server.putSku('RATED', {});
  const placed = await millrace.place({ user_id: 'u-1', sku_id: 'RATED' });
  const error = await thrown(RateLimited, millrace.place({ user_id: 'u-1', sku_id: 'RATED' }));
  assert.ok(error.retryAfterMs >= 1_000, `${error.retryAfterMs}`);
  await server.kill('SIGTERM');
  await server.startAgain();
  const { order } = await millrace.place({ user_id: 'u-1', sku_id: 'RATED' }, { idempotencyKey: error.idempotencyKey });
  assert.notEqual(order.order_id, placed.order.order_id);
});

test('other calls of the document are typed and as they are', async () => {
  await server.putSku('OTHER', { total: 5 });
  const sku = await millrace.http.GET('/v1/skus/{sku_id}', { params: { path: { sku_id: 'OTHER' } } });
  assert.equal(sku.data?.free, 5);
  const none = await millrace.http.GET('/v1/skus/{sku_id}', { params: { path: { sku_id: 'NONE' } } });
  assert.equal(none.error?.code, 'unknown_sku');
});

test('the audit of all that agrees', () => server.assertAudit());
