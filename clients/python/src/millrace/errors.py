"""What the calls of `millrace.client` raise: one class for each `code` that a shop treats in its own way."""

from __future__ import annotations

from .openapi.models import Problem


class MillraceError(Exception):
    """An answer without an order. It carries what is needed to ask again."""

    def __init__(
        self, problem: Problem, idempotency_key: str | None, order_id: str | None, retry_after: float | None
    ) -> None:
        super().__init__(f"{problem.code}: {problem.detail}")
        self.problem = problem
        self.code = problem.code
        """Stable, for programs. `unexpected_answer`: it was no problem at all, but a proxy's page, say."""
        self.status = problem.status
        """The HTTP status; 0 if no answer said so."""
        self.idempotency_key = idempotency_key
        """The click's key: also the random one that `place` made."""
        self.order_id = order_id
        """The order, if one is known."""
        self.retry_after = retry_after
        """Seconds, if the server named them."""


class Refused(MillraceError):
    """The sale's rules refuse the click (409): there is no order."""


class SoldOut(Refused):
    """`sold_out`"""

    @property
    def available(self) -> int:
        """Units that are free, fewer than were asked for."""
        return self.problem.available or 0


class PurchaseLimit(Refused):
    """`purchase_limit`: more units than one buyer may have."""


class SaleNotOpen(Refused):
    """`sale_not_open`"""


class SaleClosed(Refused):
    """`sale_closed`"""


class SalePaused(Refused):
    """`sale_paused`"""


class WaitlistFull(Refused):
    """`waitlist_full`: as many orders wait for units as may, or the SKU has no waiting list (`waitlist_max` is 0)."""


class DrawUnderWay(Refused):
    """`draw_under_way`: entries have ended, and the draw is not made yet; afterwards orders are taken again."""


class UnknownSku(MillraceError):
    """`unknown_sku`"""


class UnknownOrder(MillraceError):
    """`unknown_order`"""


class NotCancellable(MillraceError):
    """`not_cancellable`: the order is paid, say, or has expired."""


class AlreadyAssigned(MillraceError):
    """`already_assigned`: the order has units, or is about to; it does not wait, and was not cancelled."""


class IdempotencyKeyReused(MillraceError):
    """`idempotency_key_reused`: the key belongs to another order of this buyer."""


class RateLimited(MillraceError):
    """`rate_limited`: never repeated by the client, since that is the load that the limit is against."""


class Unauthorized(MillraceError):
    """`unauthorized`: the token is missing or wrong."""


class InvalidRequest(MillraceError):
    """The request is malformed (400); `str()` names the member."""


class OrderFailed(MillraceError):
    """`order_failed`: the database refused an order; it is not placed, its stock is back, an operator sees it."""


class DeadlineExceeded(MillraceError):
    """`deadline_exceeded`: no outcome in time. The order may exist: repeat the click under `idempotency_key`, or ask for
    `order_id` if it is known. `__cause__` is the last try's failure.
    """


BY_CODE: dict[str, type[MillraceError]] = {
    "sold_out": SoldOut,
    "purchase_limit": PurchaseLimit,
    "sale_not_open": SaleNotOpen,
    "sale_closed": SaleClosed,
    "sale_paused": SalePaused,
    "waitlist_full": WaitlistFull,
    "draw_under_way": DrawUnderWay,
    "unknown_sku": UnknownSku,
    "unknown_order": UnknownOrder,
    "not_cancellable": NotCancellable,
    "already_assigned": AlreadyAssigned,
    "idempotency_key_reused": IdempotencyKeyReused,
    "rate_limited": RateLimited,
    "unauthorized": Unauthorized,
    "bad_request": InvalidRequest,
    "invalid_field": InvalidRequest,
    "invalid_idempotency_key": InvalidRequest,
    "malformed_json": InvalidRequest,
    "unknown_field": InvalidRequest,
    "order_failed": OrderFailed,
    "deadline_exceeded": DeadlineExceeded,
}
"""Every other code is a plain `MillraceError`."""
