"""A shop's ordinary day: every answer that a click can get."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import SERVER_WAIT, TOKEN, Server, until

from millrace import (
    AlreadyAssigned,
    AsyncMillrace,
    DeadlineExceeded,
    DrawUnderWay,
    IdempotencyKeyReused,
    InvalidRequest,
    Millrace,
    NotCancellable,
    OrderStatus,
    PurchaseLimit,
    RateLimited,
    Refused,
    SaleClosed,
    SaleNotOpen,
    SalePaused,
    Sku,
    SoldOut,
    Unauthorized,
    UnknownOrder,
    UnknownSku,
    WaitlistFull,
)
from millrace.openapi.api.data_plane import get_sku, list_orders
from millrace.openapi.models import OrderList


def test_a_click_is_placed_and_its_repetition_is_the_same_order(server: Server, millrace: Millrace) -> None:
    sku = server.put_sku("placed", 10)
    first = millrace.place("u-1", sku, 2, adjustment=500, attributes={"address_id": "a-7"})
    assert first.order.status == OrderStatus.PENDING_PAYMENT and not first.replayed
    assert (first.order.amount, first.order.currency, first.order.quantity) == (2500, "EUR", 2)
    assert first.order.receipt
    again = millrace.place(
        "u-1", sku, 2, adjustment=500, attributes={"address_id": "a-7"}, idempotency_key=first.idempotency_key
    )
    assert again.replayed and again.order.order_id == first.order.order_id
    assert server.orders(sku) == {"u-1": 1}


def test_clicks_without_a_key_are_two_clicks(server: Server, millrace: Millrace) -> None:
    sku = server.put_sku("two-clicks", 10)
    one, two = millrace.place("u-1", sku), millrace.place("u-1", sku, idempotency_key=None)
    assert one.idempotency_key != two.idempotency_key
    assert server.orders(sku) == {"u-1": 2}


def test_sold_out_tells_how_many_are_free(server: Server, millrace: Millrace) -> None:
    sku = server.put_sku("sold-out", 3)
    millrace.place("u-1", sku)
    with pytest.raises(SoldOut) as refused:
        millrace.place("u-2", sku, 3, idempotency_key="click-2")
    assert refused.value.available == 2
    assert (refused.value.code, refused.value.status) == ("sold_out", 409)
    assert refused.value.idempotency_key == "click-2"


def test_each_rule_of_a_sale_has_its_exception(server: Server, millrace: Millrace) -> None:
    limited = server.put_sku("limited", 10, per_user_limit=1)
    millrace.place("u-1", limited)
    with pytest.raises(PurchaseLimit):
        millrace.place("u-1", limited)
    with pytest.raises(SaleNotOpen):
        millrace.place("u-1", server.put_sku("early", 10, opens_at="2999-01-01T00:00:00Z"))
    with pytest.raises(SaleClosed):
        millrace.place("u-1", server.put_sku("late", 10, closes_at="2001-01-01T00:00:00Z"))
    paused = server.put_sku("paused", 10)
    server.admin("POST", "skus/paused/pause")
    with pytest.raises(SalePaused) as refused:
        millrace.place("u-1", paused)
    assert isinstance(refused.value, Refused)


def test_mistakes_are_told_and_not_repeated(server: Server, millrace: Millrace, key: str) -> None:
    sku = server.put_sku("mistakes", 10)
    with pytest.raises(UnknownSku):
        millrace.place("u-1", "no-such-sku")
    with pytest.raises(UnknownOrder):
        millrace.wait_until_decided("1")
    with pytest.raises(UnknownOrder):
        millrace.cancel("1")
    with pytest.raises(InvalidRequest, match="quantity"):
        millrace.place("u-1", sku, 0)
    with pytest.raises(InvalidRequest) as refused:
        millrace.place("u-1", sku, idempotency_key="")
    assert refused.value.code == "invalid_idempotency_key"
    millrace.place("u-1", sku, idempotency_key=key)
    with pytest.raises(IdempotencyKeyReused):
        millrace.place("u-1", sku, 2, idempotency_key=key)
    for token in ("wrong", None):
        with server.client(token) as stranger, pytest.raises(Unauthorized):
            stranger.place("u-1", sku)
    assert server.orders(sku) == {"u-1": 1}


def test_a_rate_limit_is_raised_with_its_pause(server: Server, millrace: Millrace) -> None:
    sku = server.put_sku("rate", 1000)
    # As fast as it can: the limit is 20 a second.
    with ThreadPoolExecutor(8) as threads, pytest.raises(RateLimited) as limited:
        for click in [threads.submit(millrace.place, "u-fast", sku, respond_async=True) for _ in range(100)]:
            click.result()
    assert limited.value.retry_after is not None and limited.value.retry_after >= 1


def test_respond_async_is_accepted_and_becomes_a_row(server: Server, millrace: Millrace, key: str) -> None:
    sku = server.put_sku("async", 10)
    accepted = millrace.place("u-1", sku, idempotency_key=key, respond_async=True)
    assert accepted.order.status == OrderStatus.ACCEPTED and not accepted.replayed
    assert isinstance(accepted.order.estimated_wait_ms, int)
    decided = millrace.wait_until_decided(accepted.order.order_id)
    assert decided.status == OrderStatus.PENDING_PAYMENT
    until(lambda: server.orders(sku) == {"u-1": 1}, "the row")
    # The same click once more, and this time its caller wants to know.
    waited = millrace.place("u-1", sku, idempotency_key=key)
    assert waited.replayed and waited.order.status == OrderStatus.PENDING_PAYMENT
    assert waited.order.order_id == accepted.order.order_id


def test_cancelling_is_idempotent_and_returns_the_unit(server: Server, millrace: Millrace, key: str) -> None:
    sku = server.put_sku("cancelled", 1)
    placed = millrace.place("u-1", sku, idempotency_key=key)
    for _ in range(2):
        assert millrace.cancel(placed.order.order_id).status == OrderStatus.CANCELLED
    # A late repetition of the click is visible as what it is.
    late = millrace.place("u-1", sku, idempotency_key=key)
    assert late.replayed and late.order.status == OrderStatus.CANCELLED
    assert millrace.place("u-2", sku).order.status == OrderStatus.PENDING_PAYMENT


def test_the_waiting_list_from_joining_to_paying(server: Server, millrace: Millrace, key: str) -> None:
    sku = server.put_sku("waiting", 1, waitlist_max=2)
    first = millrace.place("u-1", sku, waitlist=True).order
    assert first.status == OrderStatus.PENDING_PAYMENT
    with pytest.raises(SoldOut):
        millrace.place("u-2", sku, idempotency_key=key)
    joined = [millrace.place(user, sku, idempotency_key=f"{key}-wait", waitlist=True) for user in ("u-2", "u-3")]
    second, third = (placed.order for placed in joined)
    assert (second.status, second.position, third.position) == (OrderStatus.WAITLISTED, 1, 2)
    assert second.receipt is None and second.expires_at is None
    with pytest.raises(WaitlistFull) as full:
        millrace.place("u-4", sku, waitlist=True)
    assert isinstance(full.value, Refused)
    with pytest.raises(DeadlineExceeded) as late:
        millrace.wait_until_assigned(third.order_id, deadline=0.5)
    assert late.value.order_id == third.order_id

    with ThreadPoolExecutor(1) as threads:
        assigned = threads.submit(millrace.wait_until_assigned, second.order_id, 60.0)
        millrace.cancel(first.order_id)
        second = assigned.result(60)
    assert second.status == OrderStatus.PENDING_PAYMENT and second.receipt and second.expires_at
    again = millrace.place("u-2", sku, idempotency_key=f"{key}-wait", waitlist=True)
    assert again.replayed and again.order.receipt == second.receipt
    with pytest.raises(AlreadyAssigned) as stays:
        millrace.cancel(second.order_id, only="waitlisted")
    assert stays.value.order_id == second.order_id
    for _ in range(2):
        assert millrace.cancel(third.order_id, only="waitlisted").status == OrderStatus.CANCELLED
    assert millrace.wait_until_assigned(third.order_id).status == OrderStatus.CANCELLED


def test_while_a_draw_is_made_orders_are_refused(server: Server, millrace: Millrace) -> None:
    times = zip(("opens_at", "draw_at", "closes_at"), (-3600, 2, 3600), strict=True)
    terms = {name: (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat() for name, seconds in times}
    # Without its beacon the draw is never made.
    sku = server.put_sku("drawn", 1, allocation="draw", draw_beacon="a lottery's numbers", **terms)
    users = itertools.count()

    def is_refused() -> bool:
        try:
            entry = millrace.place(f"u-{next(users)}", sku).order
        except DrawUnderWay as refused:
            return isinstance(refused, Refused)
        assert entry.status == OrderStatus.WAITLISTED and entry.entry_token and not entry.position
        return False

    until(is_refused, "the end of the entries")


def test_an_option_that_is_none_is_refused(server: Server, millrace: Millrace) -> None:
    place: Any = millrace.place
    with pytest.raises(TypeError, match="idempotency_keys"):
        place("u-1", server.put_sku("typo", 1), idempotency_keys="click-1")
    assert server.orders("typo") == {}


def test_a_paid_order_is_not_cancellable(server: Server, millrace: Millrace, key: str) -> None:
    sku = server.put_sku("paid", 1)
    placed = millrace.place("u-1", sku, idempotency_key=key)
    server.pay(placed.order.order_id, placed.order.amount)
    until(lambda: millrace.wait_until_decided(placed.order.order_id).status == OrderStatus.PAID, "paid")
    with pytest.raises(NotCancellable) as refused:
        millrace.cancel(placed.order.order_id)
    assert refused.value.order_id == placed.order.order_id
    assert millrace.place("u-1", sku, idempotency_key=key).order.status == OrderStatus.PAID


def test_the_generated_calls_read_what_is_there(server: Server, millrace: Millrace) -> None:
    sku_id = server.put_sku("read", 5)
    placed = millrace.place("u-reader", sku_id)
    sku = get_sku.sync(sku_id, client=millrace.api)
    assert isinstance(sku, Sku) and (sku.total, sku.free, sku.held) == (5, 4, 1)
    page = list_orders.sync("u-reader", client=millrace.api, limit=10)
    assert isinstance(page, OrderList) and [order.order_id for order in page.orders] == [placed.order.order_id]


def test_a_status_that_a_newer_server_added_is_no_error() -> None:
    status = OrderStatus("reserved")
    assert status == "reserved" and str(status) == "reserved" and status == OrderStatus("reserved")
    assert status not in set(OrderStatus) and OrderStatus("paid") is OrderStatus.PAID


def test_the_same_in_asyncio(server: Server) -> None:
    sku = server.put_sku("asyncio", 50)

    async def clicks() -> None:
        async with AsyncMillrace(server.url, TOKEN, server_wait=SERVER_WAIT, trust_env=False) as millrace:
            placed = await asyncio.gather(
                *(millrace.place(f"u-{user}", sku, idempotency_key="double") for user in range(5) for _ in range(2))
            )
            assert len({placement.order.order_id for placement in placed}) == 5
            assert sum(placement.replayed for placement in placed) == 5
            accepted = await millrace.place("u-5", sku, respond_async=True)
            decided = await millrace.wait_until_decided(accepted.order.order_id)
            assert decided.status == OrderStatus.PENDING_PAYMENT
            assert (await millrace.cancel(accepted.order.order_id)).status == OrderStatus.CANCELLED
            with pytest.raises(SoldOut):
                await millrace.place("u-6", sku, 46)
            waits = (await millrace.place("u-6", sku, 46, waitlist=True)).order
            assert waits.status == OrderStatus.WAITLISTED
            server.admin("POST", f"skus/{sku}/restock", {"quantity": 1})
            assigned = await millrace.wait_until_assigned(waits.order_id)
            assert assigned.status == OrderStatus.PENDING_PAYMENT
            with pytest.raises(AlreadyAssigned):
                await millrace.cancel(waits.order_id, only="waitlisted")
            sku_now = await get_sku.asyncio(sku, client=millrace.api)
            assert isinstance(sku_now, Sku) and sku_now.held == 51

    asyncio.run(clicks())
    assert server.orders(sku) == {f"u-{user}": 1 for user in range(7)}
