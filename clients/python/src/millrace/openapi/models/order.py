from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

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
        expires_at (datetime.datetime): RFC 3339, UTC with milliseconds.
        refund_reason (RefundReason | Unset): Why money must go back.
        receipt (str | Unset): The order in a signed, compact form, for the pass-back field of the payment platform. It
            carries everything but `attributes`, and recovers an order only of the `sku_id` and the database that it was
            made for.
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
    expires_at: datetime.datetime
    refund_reason: RefundReason | Unset = UNSET
    receipt: str | Unset = UNSET
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

        expires_at = self.expires_at.isoformat()

        refund_reason: str | Unset = UNSET
        if not isinstance(self.refund_reason, Unset):
            refund_reason = self.refund_reason.value

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

        expires_at = datetime.datetime.fromisoformat(d.pop("expires_at"))

        _refund_reason = d.pop("refund_reason", UNSET)
        refund_reason: RefundReason | Unset
        if isinstance(_refund_reason, Unset):
            refund_reason = UNSET
        else:
            refund_reason = RefundReason(_refund_reason)

        receipt = d.pop("receipt", UNSET)

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
            refund_reason=refund_reason,
            receipt=receipt,
            estimated_wait_ms=estimated_wait_ms,
            attributes=attributes,
        )

        return order
