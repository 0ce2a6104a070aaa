from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from attrs import define as _attrs_define

from ..models.sku_allocation import SkuAllocation
from ..models.sku_state import SkuState
from ..types import UNSET, Unset

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
        allocation (SkuAllocation | Unset): Only of a SKU that is drawn.
        draw_at (datetime.datetime | Unset): RFC 3339, UTC with milliseconds.
        draw_beacon (None | str | Unset): Only of a SKU that is drawn; null if the seed alone ranks.
        draw_commitment (str | Unset):
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
    allocation: SkuAllocation | Unset = UNSET
    draw_at: datetime.datetime | Unset = UNSET
    draw_beacon: None | str | Unset = UNSET
    draw_commitment: str | Unset = UNSET

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

        allocation: str | Unset = UNSET
        if not isinstance(self.allocation, Unset):
            allocation = self.allocation.value

        draw_at: str | Unset = UNSET
        if not isinstance(self.draw_at, Unset):
            draw_at = self.draw_at.isoformat()

        draw_beacon: None | str | Unset
        if isinstance(self.draw_beacon, Unset):
            draw_beacon = UNSET
        else:
            draw_beacon = self.draw_beacon

        draw_commitment = self.draw_commitment

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
        if allocation is not UNSET:
            field_dict["allocation"] = allocation
        if draw_at is not UNSET:
            field_dict["draw_at"] = draw_at
        if draw_beacon is not UNSET:
            field_dict["draw_beacon"] = draw_beacon
        if draw_commitment is not UNSET:
            field_dict["draw_commitment"] = draw_commitment

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

        _allocation = d.pop("allocation", UNSET)
        allocation: SkuAllocation | Unset
        if isinstance(_allocation, Unset):
            allocation = UNSET
        else:
            allocation = SkuAllocation(_allocation)

        _draw_at = d.pop("draw_at", UNSET)
        draw_at: datetime.datetime | Unset
        if isinstance(_draw_at, Unset):
            draw_at = UNSET
        else:
            draw_at = datetime.datetime.fromisoformat(_draw_at)

        def _parse_draw_beacon(data: object) -> None | str | Unset:
            if data is None:
                return data
            if isinstance(data, Unset):
                return data
            return cast(None | str | Unset, data)

        draw_beacon = _parse_draw_beacon(d.pop("draw_beacon", UNSET))

        draw_commitment = d.pop("draw_commitment", UNSET)

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
            allocation=allocation,
            draw_at=draw_at,
            draw_beacon=draw_beacon,
            draw_commitment=draw_commitment,
        )

        return sku
