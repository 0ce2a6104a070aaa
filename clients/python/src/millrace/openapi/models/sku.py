from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from attrs import define as _attrs_define

from ..models.sku_state import SkuState

T = TypeVar("T", bound="Sku")


@_attrs_define
class Sku:
    """total = free + held + sold in every answer.

    Attributes:
        sku_id (str):
        title (str):
        unit_price (int):
        currency (str): ISO 4217.
        total (int):
        free (int):
        held (int):
        sold (int):
        state (SkuState):
        opens_at (datetime.datetime | None):
        closes_at (datetime.datetime | None):
        per_user_limit (int | None):
        waiting (int): Orders that wait for units.
        waitlist_max (int):
        waitlist_skips (bool):
        waitlist_payment_ttl_ms (int | None):
        assign_between (list[str] | None):
        now (datetime.datetime): RFC 3339, UTC with milliseconds.
    """

    sku_id: str
    title: str
    unit_price: int
    currency: str
    total: int
    free: int
    held: int
    sold: int
    state: SkuState
    opens_at: datetime.datetime | None
    closes_at: datetime.datetime | None
    per_user_limit: int | None
    waiting: int
    waitlist_max: int
    waitlist_skips: bool
    waitlist_payment_ttl_ms: int | None
    assign_between: list[str] | None
    now: datetime.datetime

    def to_dict(self) -> dict[str, Any]:
        sku_id = self.sku_id

        title = self.title

        unit_price = self.unit_price

        currency = self.currency

        total = self.total

        free = self.free

        held = self.held

        sold = self.sold

        state = self.state.value

        opens_at: None | str
        if isinstance(self.opens_at, datetime.datetime):
            opens_at = self.opens_at.isoformat()
        else:
            opens_at = self.opens_at

        closes_at: None | str
        if isinstance(self.closes_at, datetime.datetime):
            closes_at = self.closes_at.isoformat()
        else:
            closes_at = self.closes_at

        per_user_limit: int | None
        per_user_limit = self.per_user_limit

        waiting = self.waiting

        waitlist_max = self.waitlist_max

        waitlist_skips = self.waitlist_skips

        waitlist_payment_ttl_ms: int | None
        waitlist_payment_ttl_ms = self.waitlist_payment_ttl_ms

        assign_between: list[str] | None
        if isinstance(self.assign_between, list):
            assign_between = self.assign_between

        else:
            assign_between = self.assign_between

        now = self.now.isoformat()

        field_dict: dict[str, Any] = {}

        field_dict.update(
            {
                "sku_id": sku_id,
                "title": title,
                "unit_price": unit_price,
                "currency": currency,
                "total": total,
                "free": free,
                "held": held,
                "sold": sold,
                "state": state,
                "opens_at": opens_at,
                "closes_at": closes_at,
                "per_user_limit": per_user_limit,
                "waiting": waiting,
                "waitlist_max": waitlist_max,
                "waitlist_skips": waitlist_skips,
                "waitlist_payment_ttl_ms": waitlist_payment_ttl_ms,
                "assign_between": assign_between,
                "now": now,
            }
        )

        return field_dict

    @classmethod
    def from_dict(cls: type[T], src_dict: Mapping[str, Any]) -> T:
        d = dict(src_dict)
        sku_id = d.pop("sku_id")

        title = d.pop("title")

        unit_price = d.pop("unit_price")

        currency = d.pop("currency")

        total = d.pop("total")

        free = d.pop("free")

        held = d.pop("held")

        sold = d.pop("sold")

        state = SkuState(d.pop("state"))

        def _parse_opens_at(data: object) -> datetime.datetime | None:
            if data is None:
                return data
            try:
                if not isinstance(data, str):
                    raise TypeError()
                opens_at_type_0 = datetime.datetime.fromisoformat(data)

                return opens_at_type_0
            except (TypeError, ValueError, AttributeError, KeyError):
                pass
            return cast(datetime.datetime | None, data)

        opens_at = _parse_opens_at(d.pop("opens_at"))

        def _parse_closes_at(data: object) -> datetime.datetime | None:
            if data is None:
                return data
            try:
                if not isinstance(data, str):
                    raise TypeError()
                closes_at_type_0 = datetime.datetime.fromisoformat(data)

                return closes_at_type_0
            except (TypeError, ValueError, AttributeError, KeyError):
                pass
            return cast(datetime.datetime | None, data)

        closes_at = _parse_closes_at(d.pop("closes_at"))

        def _parse_per_user_limit(data: object) -> int | None:
            if data is None:
                return data
            return cast(int | None, data)

        per_user_limit = _parse_per_user_limit(d.pop("per_user_limit"))

        waiting = d.pop("waiting")

        waitlist_max = d.pop("waitlist_max")

        waitlist_skips = d.pop("waitlist_skips")

        def _parse_waitlist_payment_ttl_ms(data: object) -> int | None:
            if data is None:
                return data
            return cast(int | None, data)

        waitlist_payment_ttl_ms = _parse_waitlist_payment_ttl_ms(d.pop("waitlist_payment_ttl_ms"))

        def _parse_assign_between(data: object) -> list[str] | None:
            if data is None:
                return data
            try:
                if not isinstance(data, list):
                    raise TypeError()
                assign_between_type_0 = cast(list[str], data)

                return assign_between_type_0
            except (TypeError, ValueError, AttributeError, KeyError):
                pass
            return cast(list[str] | None, data)

        assign_between = _parse_assign_between(d.pop("assign_between"))

        now = datetime.datetime.fromisoformat(d.pop("now"))

        sku = cls(
            sku_id=sku_id,
            title=title,
            unit_price=unit_price,
            currency=currency,
            total=total,
            free=free,
            held=held,
            sold=sold,
            state=state,
            opens_at=opens_at,
            closes_at=closes_at,
            per_user_limit=per_user_limit,
            waiting=waiting,
            waitlist_max=waitlist_max,
            waitlist_skips=waitlist_skips,
            waitlist_payment_ttl_ms=waitlist_payment_ttl_ms,
            assign_between=assign_between,
            now=now,
        )

        return sku
