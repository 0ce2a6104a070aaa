/**
 * A thin client of Millrace for a shop's backend. The types are generated from the service's OpenAPI document
 * (`openapi.ts`); this module adds the part that no generator knows: one order a click, whatever happens in between.
 *
 * ```text
 * place ─► POST under the click's key ─┬─ 200, 201, or 202 accepted with respondAsync ─► Placed
 *            ▲                         ├─ 409 and other refusals ─► a typed error
 *            └── pause, same key ◄─────┴─ 202 undecided, 408, 502, 503, 504, no answer, until the deadline
 * ```
 *
 * Repeating is safe because Millrace has at most one order for a key: if a try whose answer was lost did place the
 * order, the next one under the key finds it.
 */
import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import createClient, { type Client } from 'openapi-fetch';
import type { components, operations, paths } from './openapi.js';

export type { components, paths } from './openapi.js';
/** An order as Millrace answers it. `order_id` is a string: its 64 bits do not fit a number. */
export type Order = components['schemas']['Order'];
/** A problem as Millrace answers it (RFC 9457). */
export type Problem = components['schemas']['Problem'];
/** The order to place. Ids are strings; `quantity` and `adjustment` are safe integers. */
export type OrderRequest = { [K in keyof Wire]: K extends 'user_id' | 'sku_id' ? string : Wire[K] };
type Wire = components['schemas']['OrderRequest'];

/** `baseUrl` is the data plane's, `token` its `data_plane.token`. Defaults: 30,000 ms, and 7 s as the server's. */
export interface ClientOptions {
  baseUrl: string;
  token?: string | undefined;
  deadlineMs?: number | undefined;
  waitSeconds?: number | undefined;
}
/** `deadlineMs` bounds the call with all its tries. After `signal` a request that was sent may still be carried out. */
export interface CallOptions { deadlineMs?: number | undefined; signal?: AbortSignal | undefined }
/** The click's key (default: a random one), and whether an order that is durable in the queue is enough. */
export interface PlaceOptions extends CallOptions {
  idempotencyKey?: string | undefined;
  respondAsync?: boolean | undefined;
}
/** `only: 'waitlisted'`: an order that was assigned units meanwhile keeps them. */
export interface CancelOptions extends CallOptions { only?: 'waitlisted' | undefined }
/** `replayed`: another request under this key had placed it, of an earlier call or an earlier try of this one. */
export interface Placed { order: Order; idempotencyKey: string; replayed: boolean; attempts: number }
/** What is known of a click. `mayExist`: its order exists, or may: an answer was lost, or nothing is decided yet. */
export interface Click { idempotencyKey?: string; orderId?: string; mayExist: boolean }

interface Answer { data?: Order | undefined; error?: unknown; response: Response }
interface Outcome { order: Order; response: Response; attempts: number }
interface Details { problem?: Problem | undefined; retryAfterMs?: number; cause?: unknown }

/** Every error of this client. It carries the click, so that it can be repeated or looked up. */
export class MillraceError extends Error {
  readonly idempotencyKey: string | undefined;
  readonly orderId: string | undefined;
  readonly mayExist: boolean;
  readonly problem: Problem | undefined;
  readonly retryAfterMs: number;

  /** `code`: the problem's, or one of the client's own. Stable, for programs. */
  constructor(readonly code: string, detail: string, click: Click, { problem, retryAfterMs = 0, cause }: Details = {}) {
    super(`${code}: ${detail}`, { cause });
    this.name = new.target.name;
    [this.idempotencyKey, this.orderId, this.mayExist] = [click.idempotencyKey, click.orderId, click.mayExist];
    [this.problem, this.retryAfterMs] = [problem, retryAfterMs];
  }
}

// A code each, also because TypeScript tells classes apart by their members, not by their names.
export class SoldOut extends MillraceError {
  declare readonly code: 'sold_out';
  /** Units that are free. */
  get available(): number { return this.problem?.available ?? 0; }
}
export class PurchaseLimit extends MillraceError { declare readonly code: 'purchase_limit'; }
export class SaleNotOpen extends MillraceError { declare readonly code: 'sale_not_open'; }
export class SaleClosed extends MillraceError { declare readonly code: 'sale_closed'; }
export class SalePaused extends MillraceError { declare readonly code: 'sale_paused'; }
/** As many orders wait for units as may, or the SKU has no waiting list. */
export class WaitlistFull extends MillraceError { declare readonly code: 'waitlist_full'; }
/** Entries have ended, and the draw is not made yet. */
export class DrawUnderWay extends MillraceError { declare readonly code: 'draw_under_way'; }
export class UnknownSku extends MillraceError { declare readonly code: 'unknown_sku'; }
export class UnknownOrder extends MillraceError { declare readonly code: 'unknown_order'; }
export class NotCancellable extends MillraceError { declare readonly code: 'not_cancellable'; }
/** The order does not wait for units any more; with `only: 'waitlisted'` it was not cancelled. */
export class AlreadyAssigned extends MillraceError { declare readonly code: 'already_assigned'; }
export class IdempotencyKeyReused extends MillraceError { declare readonly code: 'idempotency_key_reused'; }
export class RateLimited extends MillraceError { declare readonly code: 'rate_limited'; }
export class Unauthorized extends MillraceError { declare readonly code: 'unauthorized'; }
/** The database refused the row of an order that was `accepted` or `undecided`: it is not placed, an operator sees it. */
export class OrderFailed extends MillraceError { declare readonly code: 'order_failed'; }
/** The deadline is over, or the next try would be after it. `cause` is the last failure, if that was one. */
export class DeadlineExceeded extends MillraceError { declare readonly code: 'deadline_exceeded'; }
/** The caller's signal; `cause` is its reason. */
export class Aborted extends MillraceError { declare readonly code: 'aborted'; }

const BY_CODE = new Map<string, typeof MillraceError>(Object.entries({
  sold_out: SoldOut, purchase_limit: PurchaseLimit, sale_not_open: SaleNotOpen, sale_closed: SaleClosed,
  sale_paused: SalePaused, waitlist_full: WaitlistFull, draw_under_way: DrawUnderWay, unknown_sku: UnknownSku,
  unknown_order: UnknownOrder, not_cancellable: NotCancellable, already_assigned: AlreadyAssigned,
  idempotency_key_reused: IdempotencyKeyReused, rate_limited: RateLimited, unauthorized: Unauthorized,
}));
/** Codes that say that no order is under the key. */
const NOT_PLACED = new Set([
  'timed_out', 'unknown_order', 'sold_out', 'purchase_limit', 'sale_not_open', 'sale_closed', 'sale_paused',
  'waitlist_full', 'draw_under_way',
]);
/** Statuses after which the same request is repeated: nothing is decided, or nothing was placed. */
const REPEATED = new Set([408, 502, 503, 504]);
/** Failures to connect: the request was never sent. */
const NEVER_SENT = new Set(['ECONNREFUSED', 'ENOTFOUND', 'EAI_AGAIN', 'UND_ERR_CONNECT_TIMEOUT']);
/** Time beyond the server's wait after which a connection counts as dead. */
const MARGIN_MS = 5_000;
/** Longest jitter before the second try, doubled for each further one up to the longest of all. */
const JITTER_MS = { first: 200, max: 2_000 };

/** Whether an order has become a row, or never will. One that waits for units is decided. */
export function isDecided(order: Order): boolean {
  return order.status !== 'accepted' && order.status !== 'undecided';
}

/** Whether an order has left the waiting list, or was never on it. */
function hasLeftTheList(order: Order): boolean {
  return isDecided(order) && order.status !== 'waitlisted';
}

/** A client of one Millrace. Share one in the whole process: it has no state but its connections. */
export class Millrace {
  /** Every call of the OpenAPI document, typed and as it is: no retries, no errors thrown for answers. */
  readonly http: Client<paths>;
  readonly #deadlineMs: number;
  readonly #waitSeconds: number;

  constructor({ baseUrl, token, deadlineMs = 30_000, waitSeconds = 7 }: ClientOptions) {
    // Checked here: in a call, an address or a token that cannot be sent would look like a lost connection.
    const headers = new Headers(token === undefined ? {} : { Authorization: `Bearer ${token}` });
    this.http = createClient<paths>({ baseUrl: new URL(baseUrl).href, headers, redirect: 'manual' });
    [this.#deadlineMs, this.#waitSeconds] = [deadlineMs, waitSeconds];
  }

  /** Places the order of one click, at most once, and waits until it is decided. */
  async place(request: OrderRequest, options: PlaceOptions = {}): Promise<Placed> {
    const { idempotencyKey = randomUUID(), respondAsync = false } = options;
    // A key of the caller may have come before, in a call whose answer was lost.
    const click: Click = { idempotencyKey, mayExist: options.idempotencyKey !== undefined };
    requireText('idempotencyKey', idempotencyKey, /^[!-~]{1,64}$/, click);
    requireText('user_id', request.user_id, /^[!-~]{1,48}$/, click);
    requireText('sku_id', request.sku_id, /^[!-~]{1,32}$/, click);
    requireSafe(request, ['quantity', 'adjustment'], click);
    // Written once, so that each try has the same body whatever becomes of the object meanwhile.
    const body = JSON.stringify(request);
    const isEnough = (order: Order) => isDecided(order) || (respondAsync && order.status === 'accepted');
    const { order, response, attempts } = await this.#until(isEnough, click, options, (wait, signal) => {
      const header: operations['placeOrder']['parameters']['header'] = {
        'Idempotency-Key': idempotencyKey,
        Prefer: respondAsync ? `respond-async, wait=${wait}` : `wait=${wait}`,
      };
      return this.http.POST('/v1/orders', { params: { header }, body: request, bodySerializer: () => body, signal });
    });
    return { order, idempotencyKey, replayed: response.headers.has('Idempotency-Replayed'), attempts };
  }

  /** Waits by long poll until an `accepted` or `undecided` order is decided. */
  waitUntilDecided(orderId: string, options: CallOptions = {}): Promise<Order> {
    return this.#poll(isDecided, orderId, options);
  }

  /** Waits by long poll until a `waitlisted` order has left the waiting list: with units to pay, or without any. */
  waitUntilAssigned(orderId: string, options: CallOptions = {}): Promise<Order> {
    return this.#poll(hasLeftTheList, orderId, options);
  }

  /** Cancels an unpaid order and returns its stock. Cancelling it again answers the same. */
  async cancel(orderId: string, options: CancelOptions = {}): Promise<Order> {
    const query = options.only === undefined ? {} : { only: options.only };
    const { order } = await this.#until(() => true, clickOf(orderId), options, (_wait, signal) =>
      this.http.POST('/v1/orders/{order_id}/cancel', { params: { path: { order_id: orderId }, query }, signal }));
    return order;
  }

  async #poll(isEnough: (order: Order) => boolean, orderId: string, options: CallOptions): Promise<Order> {
    const { order } = await this.#until(isEnough, clickOf(orderId), options, (wait, signal) =>
      this.http.GET('/v1/orders/{order_id}', { params: { path: { order_id: orderId }, query: { wait } }, signal }));
    return order;
  }

  /** Sends a request until its order is enough, it is refused, or the deadline is over. */
  async #until(
    isEnough: (order: Order) => boolean,
    click: Click,
    { deadlineMs = this.#deadlineMs, signal }: CallOptions,
    send: (wait: number, signal: AbortSignal) => Promise<Answer>,
  ): Promise<Outcome> {
    const deadline = performance.now() + deadlineMs;
    const left = () => Math.max(0, deadline - performance.now());
    for (let attempts = 1; ; attempts += 1) {
      if (signal?.aborted) throw new Aborted('aborted', outcome(click), click, { cause: signal.reason });
      let [cause, retryAfterMs]: [unknown, number] = [undefined, 0];
      // So that the server answers before the call ends: an answer to nobody would leave the outcome unknown.
      const wait = Math.max(1, Math.floor(Math.min(this.#waitSeconds, left() / 1_000 - 1)));
      const connection = new AbortController();
      const abort = () => connection.abort(new Error('no answer in time'));
      signal?.addEventListener('abort', abort);
      const timer = setTimeout(abort, Math.min(wait * 1_000 + MARGIN_MS, left()));
      try {
        const { data, error, response } = await send(wait, connection.signal);
        if (response.ok) {
          const order = checked(data, click);
          if (order.status === 'failed') {
            throw new OrderFailed('order_failed', `order ${order.order_id} is a dead letter`, { ...click, mayExist: false });
          }
          if (isEnough(order)) return { order, response, attempts };
        } else {
          retryAfterMs = retryAfter(response);
          cause = failure(response, error, retryAfterMs, click);
          if (!REPEATED.has(response.status)) throw cause;
        }
      } catch (error) {
        if (error instanceof MillraceError) throw error;
        cause = error;
        click.mayExist ||= !wasNeverSent(error);
      } finally {
        clearTimeout(timer);
        signal?.removeEventListener('abort', abort);
      }
      const pause = retryAfterMs + Math.random() * Math.min(JITTER_MS.max, JITTER_MS.first * 2 ** (attempts - 1));
      if (!signal?.aborted && pause >= left()) {
        const detail = `${outcome(click)} after ${deadlineMs} ms`;
        throw new DeadlineExceeded('deadline_exceeded', detail, click, { cause, retryAfterMs });
      }
      // An abort ends the pause, and the next turn throws.
      await sleep(pause, undefined, signal ? { signal } : {}).catch(() => undefined);
    }
  }
}

function outcome({ orderId, mayExist }: Click): string {
  return mayExist ? `${orderId ? `order ${orderId}` : 'the order'} is not known to be decided` : 'no order was placed';
}

function clickOf(orderId: string): Click {
  requireText('orderId', orderId, /^[1-9][0-9]{0,18}$/, { mayExist: true });
  return { orderId, mayExist: true };
}

function requireText(name: string, value: unknown, form: RegExp, click: Click): void {
  if (typeof value === 'string' && form.test(value)) return;
  throw new MillraceError('invalid_field', `${name}: must be a string that matches ${form}`, click);
}

function requireSafe<T>(from: T, names: (keyof T & string)[], click: Click): void {
  const name = names.find((one) => from[one] !== undefined && !Number.isSafeInteger(from[one]));
  if (name) throw new MillraceError('unsafe_integer', `${name}: is not an integer within ±(2^53 - 1)`, click);
}

/** The order of an answer. Any other body, such as a proxy's page, counts as no answer. */
function checked(data: Order | undefined, click: Click): Order {
  if (typeof data?.order_id !== 'string') throw new TypeError('the answer is not an order');
  [click.orderId, click.mayExist] = [data.order_id, true];
  requireSafe(data, ['amount', 'adjustment', 'quantity'], click);
  return data;
}

/** `Retry-After` in milliseconds: seconds, or a date (RFC 9110 10.2.3). */
function retryAfter(response: Response): number {
  const value = response.headers.get('Retry-After') ?? '0';
  return Math.max(0, /^\d+$/.test(value) ? Number(value) * 1_000 : Date.parse(value) - Date.now()) || 0;
}

/** The error for an answer that is no success; without a problem, as from a proxy, its code is `http_` and the status. */
function failure(response: Response, body: unknown, retryAfterMs: number, click: Click): MillraceError {
  const isProblem = typeof body === 'object' && body !== null && 'code' in body && 'detail' in body;
  const problem = isProblem ? (body as Problem) : undefined;
  const code = problem?.code ?? `http_${response.status}`;
  if (NOT_PLACED.has(code)) {
    click.mayExist = false;
    // An earlier try may have named an order that is none any more.
    if (click.idempotencyKey) delete click.orderId;
  } else if (!problem && response.status >= 500) {
    // A proxy may have sent the request on.
    click.mayExist = true;
  }
  const Class = BY_CODE.get(code) ?? MillraceError;
  return new Class(code, problem?.detail ?? 'an answer that is not of Millrace', click, { problem, retryAfterMs });
}

function wasNeverSent(error: unknown): boolean {
  const cause: unknown = error instanceof Error ? error.cause : undefined;
  return cause instanceof Error && 'code' in cause && NEVER_SENT.has(String(cause.code));
}
