"""What happens in a sale's worst minutes: each click has exactly one order in the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import IMPATIENT, Seen, Server, until

from millrace import DeadlineExceeded, Millrace, MillraceError, OrderStatus, Placement


def test_clicks_that_meet_a_database_that_stands_still_are_decided_afterwards(server: Server, key: str) -> None:
    sku, seen, clicks = server.put_sku("frozen", 8), Seen(), range(8)
    client = server.client(server_wait=IMPATIENT, event_hooks=seen.hooks)
    with client as millrace, ThreadPoolExecutor(len(clicks)) as threads:
        with server.frozen_database():
            placing = [
                threads.submit(millrace.place, f"u-{n}", sku, idempotency_key=key, deadline=120.0) for n in clicks
            ]
            until(lambda: {202, 504} & set(seen.statuses), "a click without an outcome")
        for click in placing:
            assert click.result(120).order.status == OrderStatus.PENDING_PAYMENT
        assert {202, 504} & set(seen.statuses)
    assert server.orders(sku) == {f"u-{n}": 1 for n in clicks}


def test_after_the_deadline_the_key_and_the_order_are_known(server: Server, millrace: Millrace) -> None:
    sku = server.put_sku("deadline", 5)
    with server.frozen_database():
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded) as late:
            millrace.place("u-1", sku, deadline=6.0)
        assert time.monotonic() - began < 30
        assert late.value.idempotency_key and late.value.__cause__
    placed = millrace.place("u-1", sku, idempotency_key=late.value.idempotency_key, deadline=60.0)
    assert placed.order.status == OrderStatus.PENDING_PAYMENT
    if late.value.order_id == placed.order.order_id:
        assert millrace.wait_until_decided(placed.order.order_id) == placed.order
    assert server.orders(sku) == {"u-1": 1}


def test_an_accepted_order_is_awaited_over_its_deadline(server: Server, millrace: Millrace) -> None:
    sku = server.put_sku("accepted-late", 5)
    with server.frozen_database():
        accepted = millrace.place("u-1", sku, respond_async=True)
        assert accepted.order.status == OrderStatus.ACCEPTED
        with pytest.raises(DeadlineExceeded) as late:
            millrace.wait_until_decided(accepted.order.order_id, deadline=3.0)
        assert late.value.order_id == accepted.order.order_id
    assert millrace.wait_until_decided(accepted.order.order_id, 60.0).status == OrderStatus.PENDING_PAYMENT
    assert server.orders(sku) == {"u-1": 1}


def test_a_click_goes_on_over_a_drain_and_the_next_start(server: Server) -> None:
    sku, seen = server.put_sku("draining", 5), Seen()
    # A draining server answers on the connections that it has.
    kept = httpx.Limits(keepalive_expiry=50)
    second = server.client(event_hooks=seen.hooks, limits=kept)
    with server.client() as first, second, ThreadPoolExecutor(2) as threads:
        second.place("u-0", sku)
        with server.frozen_database():
            # An order in flight, so that the drain lasts.
            flying = threads.submit(first.place, "u-1", sku, deadline=180.0)
            until(lambda: server.held(sku) == 2, "an order in flight")
            server.terminate()
            click = threads.submit(second.place, "u-2", sku, deadline=180.0)
            until(lambda: 503 in seen.statuses or click.done(), "a click while draining")
        server.ended(120)
        server.start()
        for placing in (flying, click):
            assert placing.result(180).order.status == OrderStatus.PENDING_PAYMENT
    assert 503 in seen.statuses
    assert server.orders(sku) == {"u-0": 1, "u-1": 1, "u-2": 1}


def test_a_server_killed_in_a_rush_leaves_each_click_one_order(server: Server) -> None:
    threads, each = 8, 25
    # The network loses an answer now and then, too.
    sku, seen, placed = server.put_sku("rush", threads * each), Seen(lost=10), list[Placement]()

    def rush(thread: int) -> None:
        for n in range(each):
            click = f"u-{thread}-{n}"
            # The first half waits, the other is acknowledged; either counts only once it is decided.
            if n % 2:
                placement = millrace.place(click, sku, idempotency_key=click, deadline=180.0)
            else:
                placement = millrace.place(click, sku, idempotency_key=click, deadline=180.0, respond_async=True)
                order = millrace.wait_until_decided(placement.order.order_id, 180.0)
                assert order.status == OrderStatus.PENDING_PAYMENT
            placed.append(placement)
            time.sleep(0.05)

    with server.client(event_hooks=seen.hooks) as millrace, ThreadPoolExecutor(threads) as pool:
        rushing = [pool.submit(rush, thread) for thread in range(threads)]
        until(lambda: len(placed) >= threads * each // 3 or any(one.done() for one in rushing), "a third of the rush")
        server.kill()
        sent = seen.requests
        # Clicks meet nobody there, and are sent again.
        until(lambda: seen.requests >= sent + threads, "repetitions")
        server.start()
        for one in rushing:
            one.result(180)
    assert len({placement.order.order_id for placement in placed}) == threads * each
    orders = server.orders(sku)
    assert orders == {f"u-{thread}-{n}": 1 for thread in range(threads) for n in range(each)}


def test_an_undecided_click_whose_server_dies_is_placed_after_all(server: Server) -> None:
    sku, seen = server.put_sku("undecided", 5), Seen()
    client = server.client(server_wait=IMPATIENT, event_hooks=seen.hooks)
    with client as millrace, ThreadPoolExecutor(1) as threads:
        with server.frozen_database():
            click = threads.submit(millrace.place, "u-1", sku, deadline=180.0)
            until(lambda: 202 in seen.statuses or click.done(), "an undecided order")
            server.kill()
        server.start()
        placed = click.result(180)
    assert placed.order.status == OrderStatus.PENDING_PAYMENT
    assert server.orders(sku) == {"u-1": 1}


def test_a_lost_answer_is_replayed(server: Server) -> None:
    sku, seen = server.put_sku("lost", 5), Seen(lost=2)
    with server.client(event_hooks=seen.hooks) as millrace:
        assert not millrace.place("u-1", sku).replayed
        placed = millrace.place("u-2", sku)
        assert placed.replayed and placed.order.status == OrderStatus.PENDING_PAYMENT
        assert seen.statuses == [201, 200] and seen.answers == 3
        assert millrace.cancel(placed.order.order_id).status == OrderStatus.CANCELLED
        assert seen.statuses == [201, 200, 200] and seen.answers == 5
    assert server.orders(sku) == {"u-1": 1, "u-2": 1}


def test_double_clicks_at_once_are_one_order(server: Server, millrace: Millrace, key: str) -> None:
    sku, together = server.put_sku("double", 5), threading.Barrier(4)

    def click() -> Placement:
        together.wait()
        return millrace.place("u-1", sku, idempotency_key=key)

    with ThreadPoolExecutor(4) as threads:
        placed = [click.result() for click in [threads.submit(click) for _ in range(4)]]
    assert len({placement.order.order_id for placement in placed}) == 1
    assert sorted(placement.replayed for placement in placed) == [False, True, True, True]
    assert server.orders(sku) == {"u-1": 1}


def test_an_answer_that_is_no_problem_is_an_error_too(server: Server) -> None:
    # The control plane is a server that knows no orders.
    with Millrace(f"http://{server.control_plane}", trust_env=False) as lost, pytest.raises(MillraceError) as error:
        lost.place("u-1", "any")
    assert error.value.status == 404
