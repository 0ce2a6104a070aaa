"""Orders that are placed once: keys, retries and deadlines over the generated calls in `millrace.openapi`.

Each operation is one generator that yields requests and pauses. `Millrace` carries them out in the calling thread,
`AsyncMillrace` in asyncio's loop, so that no rule is written twice.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import httpx

from .errors import BY_CODE, MillraceError, UnknownOrder
from .openapi import Client
from .openapi.api.data_plane import cancel_order, get_order, place_order
from .openapi.models import (
    CancelOrderOnly,
    Order,
    OrderRequest,
    OrderRequestAttributesType0,
    OrderStatus,
    Problem,
)
from .openapi.types import UNSET

GRACE_S = 3.0  # an answer may take so much longer than the wait that the server was asked for
PAUSE_S, PAUSE_S_MAX = 0.1, 2.0  # before the first repetition on average, and at most; Retry-After is added
# 502 comes from proxies. Under a key, or for a GET or a cancellation, repeating is safe whatever became of the request.
REPEATED = {502, 503, 504}
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
UNDECIDED = {OrderStatus.UNDECIDED}
UNWRITTEN = UNDECIDED | {OrderStatus.ACCEPTED}
UNASSIGNED = UNWRITTEN | {OrderStatus.WAITLISTED}
Only = Literal["waitlisted"]
T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """An order that exists."""

    order: Order
    """As it stands now: look at its `status`. A replayed order may be paid, cancelled or expired by now."""
    idempotency_key: str
    """The click's key: the caller's, or the random one that was made for it."""
    replayed: bool
    """An earlier request under this key placed it; perhaps one of this very call, whose answer was lost."""


@dataclass(frozen=True)
class _Request:
    arguments: dict[str, Any]
    timeout: float


# Yields requests, and seconds to sleep; is sent the answers to the former.
_Steps = Generator[_Request | float, httpx.Response | httpx.TransportError | None, T]


class _Tries:
    """The tries of one call, until its deadline."""

    def __init__(self, deadline: float, server_wait: int, key: str | None = None, order_id: str | None = None) -> None:
        self.deadline, self.until = deadline, time.monotonic() + deadline
        self.server_wait, self.key, self.order_id, self.count = server_wait, key, order_id, 0

    def order(self, call: Callable[[int], dict[str, Any]]) -> _Steps[tuple[Order, httpx.Headers]]:
        """Sends `call`, made for seconds of waiting, until the answer is an order or a problem that would stay."""
        while True:
            left = self.until - time.monotonic()
            wait = max(1, min(int(left - GRACE_S), self.server_wait))
            reply = yield _Request(call(wait), timeout=max(1.0, min(wait + GRACE_S, left)))
            if isinstance(reply, httpx.Response):
                if reply.is_success:
                    try:
                        return Order.from_dict(reply.json()), reply.headers
                    except UNREADABLE as cause:
                        raise self.error_of(reply) from cause
                error = self.error_of(reply)
                if reply.status_code not in REPEATED:
                    raise error
                yield from self.pause(error, error.retry_after or 0.0)
            elif reply is not None:
                if isinstance(reply, (httpx.UnsupportedProtocol, httpx.LocalProtocolError)):
                    raise reply  # A mistake in the call, which repeating does not mend.
                yield from self.pause(reply)

    def pause(self, cause: Exception, at_least: float = 0.0) -> _Steps[None]:
        """Sleeps before the next try; raises if that would begin after the deadline."""
        self.count += 1
        pause = at_least + random.uniform(0, min(PAUSE_S_MAX, 2 * PAUSE_S * 2.0 ** min(self.count - 1, 9)))
        if time.monotonic() + pause >= self.until:
            why = str(cause) or type(cause).__name__
            raise self.error("deadline_exceeded", f"no outcome within {self.deadline:g} s; at last {why}") from cause
        yield pause

    def error_of(self, reply: httpx.Response) -> MillraceError:
        try:
            problem = Problem.from_dict(reply.json())
            kind = BY_CODE.get(problem.code, MillraceError)
        except UNREADABLE:
            return self.error("unexpected_answer", f"HTTP {reply.status_code}, {reply.text[:200]!r}", reply.status_code)
        retry_after = reply.headers.get("Retry-After", "")
        return kind(problem, self.key, self.order_id, float(retry_after) if retry_after.isdecimal() else None)

    def error(self, code: str, detail: str, status: int = 0) -> MillraceError:
        problem = Problem(type_="about:blank", title=code, status=status, detail=detail, code=code)
        return BY_CODE.get(code, MillraceError)(problem, self.key, self.order_id, None)


def _place(
    server_wait: int,
    user_id: str,
    sku_id: str,
    quantity: int,
    adjustment: int,
    attributes: Mapping[str, Any] | None,
    idempotency_key: str | None,
    respond_async: bool,
    waitlist: bool,
    deadline: float,
) -> _Steps[Placement]:
    key = uuid.uuid4().hex if idempotency_key is None else idempotency_key
    body = OrderRequest(user_id, sku_id, quantity=quantity, adjustment=adjustment)
    if attributes is not None:
        body.attributes = OrderRequestAttributesType0.from_dict(attributes)
    if waitlist:
        body.waitlist = True
    tries = _Tries(deadline, server_wait, key)

    def call(wait: int) -> dict[str, Any]:
        prefer = f"respond-async, wait={wait}" if respond_async else f"wait={wait}"
        return place_order._get_kwargs(body=body, idempotency_key=key, prefer=prefer)

    while True:
        order, headers = yield from tries.order(call)
        tries.order_id = order.order_id
        try:
            order = yield from _until(tries, order.order_id, UNDECIDED if respond_async else UNWRITTEN, order)
        except UnknownOrder as cause:
            # It was undecided, and was not written after all: the click is repeated under its key.
            tries.order_id = None
            yield from tries.pause(cause)
            continue
        if order.status == OrderStatus.FAILED:
            raise tries.error("order_failed", f"the database refused order {order.order_id}; it is not placed")
        return Placement(order, key, headers.get("Idempotency-Replayed") == "true")


def _until(tries: _Tries, order_id: str, passed: set[OrderStatus], order: Order | None = None) -> _Steps[Order]:
    """Polls until the order's status is none of `passed`; `order` is what is known of it."""
    while order is None or order.status in passed:
        if order is not None:  # A server that is about to end answers a long poll at once.
            yield from tries.pause(TimeoutError(f"order {order_id} is {order.status}"))
        order, _ = yield from tries.order(lambda wait: get_order._get_kwargs(order_id, wait=wait))
    return order


def _cancel(tries: _Tries, order_id: str, only: Only | None) -> _Steps[Order]:
    condition = UNSET if only is None else CancelOrderOnly(only)
    order, _ = yield from tries.order(lambda _wait: cancel_order._get_kwargs(order_id, only=condition))
    return order


class Millrace:
    """A client for threads: one for all of them. `http` are arguments of `httpx.Client`, such as `verify` or `limits`.

    `server_wait` is the server's `orders.timeout_ms` in whole seconds: requests time out a little later than that.
    """

    def __init__(self, url: str, token: str | None = None, *, server_wait: int = 7, **http: Any) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._server_wait = server_wait
        self._http = httpx.Client(base_url=url, headers=headers, timeout=server_wait + GRACE_S, **http)
        self.api = Client(base_url=url).set_httpx_client(self._http)
        """For the generated calls, for example `get_sku.sync("IPHONE-15", client=millrace.api)`."""

    def place(
        self,
        user_id: str,
        sku_id: str,
        quantity: int = 1,
        *,
        adjustment: int = 0,
        attributes: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        respond_async: bool = False,
        waitlist: bool = False,
        deadline: float = 30.0,
    ) -> Placement:
        """Places an order, once. Returns when its row is committed, or when it waits for units.

        `adjustment`: minor units that the shop adds or takes off. `attributes`: the shop's own, stored as it came; at most
        1,024 bytes of JSON. `idempotency_key`: one a click, 1 to 64 visible ASCII characters; a random one if it is left
        out. `respond_async`: return as soon as the order is durable, with status `accepted`, before it is a row.
        `waitlist`: join the waiting list if no units are free; the order is `waitlisted` then. `deadline`: seconds for all
        tries.
        """
        return self._run(
            _place(
                self._server_wait,
                user_id,
                sku_id,
                quantity,
                adjustment,
                attributes,
                idempotency_key,
                respond_async,
                waitlist,
                deadline,
            )
        )

    def wait_until_decided(self, order_id: str, deadline: float = 30.0) -> Order:
        """Polls an accepted or undecided order until it is neither."""
        return self._run(_until(_Tries(deadline, self._server_wait, order_id=order_id), order_id, UNWRITTEN))

    def wait_until_assigned(self, order_id: str, deadline: float = 30.0) -> Order:
        """Polls an order on the waiting list until it has left it: with units to pay, or `expired` or `cancelled`."""
        return self._run(_until(_Tries(deadline, self._server_wait, order_id=order_id), order_id, UNASSIGNED))

    def cancel(self, order_id: str, deadline: float = 30.0, *, only: Only | None = None) -> Order:
        """Cancels an unpaid order; an order that is cancelled already is answered like the first time.

        `only="waitlisted"`: an order that was assigned units meanwhile keeps them, and `AlreadyAssigned` is raised.
        """
        return self._run(_cancel(_Tries(deadline, self._server_wait, order_id=order_id), order_id, only))

    def _run(self, steps: _Steps[T]) -> T:
        reply: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, _Request):
                try:
                    reply = self._http.request(**step.arguments, timeout=step.timeout)
                except httpx.TransportError as error:
                    reply = error
            else:
                reply = None
                time.sleep(step)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncMillrace:
    """The same for asyncio."""

    def __init__(self, url: str, token: str | None = None, *, server_wait: int = 7, **http: Any) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._server_wait = server_wait
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=server_wait + GRACE_S, **http)
        self.api = Client(base_url=url).set_async_httpx_client(self._http)

    async def place(
        self,
        user_id: str,
        sku_id: str,
        quantity: int = 1,
        *,
        adjustment: int = 0,
        attributes: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        respond_async: bool = False,
        waitlist: bool = False,
        deadline: float = 30.0,
    ) -> Placement:
        return await self._run(
            _place(
                self._server_wait,
                user_id,
                sku_id,
                quantity,
                adjustment,
                attributes,
                idempotency_key,
                respond_async,
                waitlist,
                deadline,
            )
        )

    async def wait_until_decided(self, order_id: str, deadline: float = 30.0) -> Order:
        return await self._run(_until(_Tries(deadline, self._server_wait, order_id=order_id), order_id, UNWRITTEN))

    async def wait_until_assigned(self, order_id: str, deadline: float = 30.0) -> Order:
        return await self._run(_until(_Tries(deadline, self._server_wait, order_id=order_id), order_id, UNASSIGNED))

    async def cancel(self, order_id: str, deadline: float = 30.0, *, only: Only | None = None) -> Order:
        return await self._run(_cancel(_Tries(deadline, self._server_wait, order_id=order_id), order_id, only))

    async def _run(self, steps: _Steps[T]) -> T:
        reply: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, _Request):
                try:
                    reply = await self._http.request(**step.arguments, timeout=step.timeout)
                except httpx.TransportError as error:
                    reply = error
            else:
                reply = None
                await asyncio.sleep(step)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
