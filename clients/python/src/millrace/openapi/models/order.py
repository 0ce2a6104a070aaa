from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from attrs import define as _attrs_define

from ..models.order_status import OrderStatus
from ..models.refund_reason import RefundReason
from ..types import UNSET, Unset

if TYPE_CHECKING:
    from ..models.order_attributes import OrderAttributes


T = TypeVar("T", bound="Order")


@_attrs_define
class Order:
    """
    Attributes:
        order_id (str): A 64-bit, time-ordered integer as a string.
        user_id (str):
        sku_id (str):
        quantity (int):
        adjustment (int):
        amount (int): Minor units: unit_price × quantity + adjustment.
        currency (str): ISO 4217.
        status (OrderStatus):
        created_at (datetime.datetime): RFC 3339, UTC with milliseconds.
        expires_at (datetime.datetime | None): The end of the time to pay; null while the order waits for units, and if
            it never had any.
        position (int | Unset): With `waitlisted`: the number of orders that wait ahead of it, plus one. It only falls.
            An entry of a draw has one once the draw is made.
        entry_token (str | Unset): With an entry of a draw; it finds the entry in the published draw.
        refund_reason (RefundReason | Unset): Why money must go back.
        receipt (None | str | Unset): With every order that there is, or will be; null while it waits for units, and if
            it never had any.
        estimated_wait_ms (int | Unset): With an order that was accepted just now: how long it will take to become a
            row, by the rate of late.
        attributes (OrderAttributes | Unset):
    """

    order_id: str
    user_id: str
    sku_id: str
    quantity: int
    adjustment: int
    amount: int
    currency: str
    status: OrderStatus
    created_at: datetime.datetime
    expires_at: datetime.datetime | None
    position: int | Unset = UNSET
    entry_token: str | Unset = UNSET
    refund_reason: RefundReason | Unset = UNSET
    receipt: None | str | Unset = UNSET
    estimated_wait_ms: int | Unset = UNSET
    attributes: OrderAttributes | Unset = UNSET

    def to_dict(self) -> dict[str, Any]:
        order_id = self.order_id

        user_id = self.user_id

        sku_id = self.sku_id

        quantity = self.quantity

        adjustment = self.adjustment

        amount = self.amount

        currency = self.currency

        status = self.status.value

        created_at = self.created_at.isoformat()

        expires_at: None | str
        if isinstance(self.expires_at, datetime.datetime):
            expires_at = self.expires_at.isoformat()
        else:
            expires_at = self.expires_at

        position = self.position

        entry_token = self.entry_token

        refund_reason: str | Unset = UNSET
        if not isinstance(self.refund_reason, Unset):
            refund_reason = self.refund_reason.value

        receipt: None | str | Unset
        if isinstance(self.receipt, Unset):
            receipt = UNSET
        else:
            receipt = self.receipt

        estimated_wait_ms = self.estimated_wait_ms

        attributes: dict[str, Any] | Unset = UNSET
        if not isinstance(self.attributes, Unset):
            attributes = self.attributes.to_dict()

        field_dict: dict[str, Any] = {}

        field_dict.update(
            {
                "order_id": order_id,
                "user_id": user_id,
                "sku_id": sku_id,
                "quantity": quantity,
                "adjustment": adjustment,
                "amount": amount,
                "currency": currency,
                "status": status,
                "created_at": created_at,
                "expires_at": expires_at,
            }
        )
        if position is not UNSET:
            field_dict["position"] = position
        if entry_token is not UNSET:
            field_dict["entry_token"] = entry_token
        if refund_reason is not UNSET:
            field_dict["refund_reason"] = refund_reason
        if receipt is not UNSET:
            field_dict["receipt"] = receipt
        if estimated_wait_ms is not UNSET:
            field_dict["estimated_wait_ms"] = estimated_wait_ms
        if attributes is not UNSET:
            field_dict["attributes"] = attributes

        return field_dict

    @classmethod
    def from_dict(cls: type[T], src_dict: Mapping[str, Any]) -> T:
        from ..models.order_attributes import OrderAttributes  # noqa: PLC0415

        d = dict(src_dict)
        order_id = d.pop("order_id")

        user_id = d.pop("user_id")

        sku_id = d.pop("sku_id")

        quantity = d.pop("quantity")

        adjustment = d.pop("adjustment")

        amount = d.pop("amount")

        currency = d.pop("currency")

        status = OrderStatus(d.pop("status"))

        created_at = datetime.datetime.fromisoformat(d.pop("created_at"))

        def _parse_expires_at(data: object) -> datetime.datetime | None:
            if data is None:
                return data
            try:
                if not isinstance(data, str):
                    raise TypeError()
                expires_at_type_0 = datetime.datetime.fromisoformat(data)

                return expires_at_type_0
            except (TypeError, ValueError, AttributeError, KeyError):
                pass
            return cast(datetime.datetime | None, data)

        expires_at = _parse_expires_at(d.pop("expires_at"))

        position = d.pop("position", UNSET)

        entry_token = d.pop("entry_token", UNSET)

        _refund_reason = d.pop("refund_reason", UNSET)
        refund_reason: RefundReason | Unset
        if isinstance(_refund_reason, Unset):
            refund_reason = UNSET
        else:
            refund_reason = RefundReason(_refund_reason)

        def _parse_receipt(data: object) -> None | str | Unset:
            if data is None:
                return data
            if isinstance(data, Unset):
                return data
            return cast(None | str | Unset, data)

        receipt = _parse_receipt(d.pop("receipt", UNSET))

        estimated_wait_ms = d.pop("estimated_wait_ms", UNSET)

        _attributes = d.pop("attributes", UNSET)
        attributes: OrderAttributes | Unset
        if isinstance(_attributes, Unset):
            attributes = UNSET
        else:
            attributes = OrderAttributes.from_dict(_attributes)

        order = cls(
            order_id=order_id,
            user_id=user_id,
            sku_id=sku_id,
            quantity=quantity,
            adjustment=adjustment,
            amount=amount,
            currency=currency,
            status=status,
            created_at=created_at,
            expires_at=expires_at,
            position=position,
            entry_token=entry_token,
            refund_reason=refund_reason,
            receipt=receipt,
            estimated_wait_ms=estimated_wait_ms,
            attributes=attributes,
        )

        return order
