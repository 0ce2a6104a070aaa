from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from attrs import define as _attrs_define

from ..types import UNSET, Unset

if TYPE_CHECKING:
    from ..models.order_request_attributes_type_0 import OrderRequestAttributesType0


T = TypeVar("T", bound="OrderRequest")


@_attrs_define
class OrderRequest:
    """Unknown and duplicate members are refused. The whole body has at most 16 KiB.

    Attributes:
        user_id (int | str): 1 to 48 characters of visible ASCII; an integer means its decimal string.
        sku_id (int | str): 1 to 32 characters of visible ASCII; an integer means its decimal string.
        quantity (int | Unset):  Default: 1.
        adjustment (int | Unset): Minor units that the shop adds or takes off; unit_price × quantity + adjustment is
            never negative. Default: 0.
        attributes (None | OrderRequestAttributesType0 | Unset): The shop's own, stored as it came; at most 1,024 bytes.
        waitlist (bool | Unset): Join the waiting list if no units are free. It is part of what a key stands for, so
            joining after a `sold_out` takes a new key. Default: False.
    """

    user_id: int | str
    sku_id: int | str
    quantity: int | Unset = 1
    adjustment: int | Unset = 0
    attributes: None | OrderRequestAttributesType0 | Unset = UNSET
    waitlist: bool | Unset = False

    def to_dict(self) -> dict[str, Any]:
        from ..models.order_request_attributes_type_0 import OrderRequestAttributesType0  # noqa: PLC0415

        user_id: int | str
        user_id = self.user_id

        sku_id: int | str
        sku_id = self.sku_id

        quantity = self.quantity

        adjustment = self.adjustment

        attributes: dict[str, Any] | None | Unset
        if isinstance(self.attributes, Unset):
            attributes = UNSET
        elif isinstance(self.attributes, OrderRequestAttributesType0):
            attributes = self.attributes.to_dict()
        else:
            attributes = self.attributes

        waitlist = self.waitlist

        field_dict: dict[str, Any] = {}

        field_dict.update(
            {
                "user_id": user_id,
                "sku_id": sku_id,
            }
        )
        if quantity is not UNSET:
            field_dict["quantity"] = quantity
        if adjustment is not UNSET:
            field_dict["adjustment"] = adjustment
        if attributes is not UNSET:
            field_dict["attributes"] = attributes
        if waitlist is not UNSET:
            field_dict["waitlist"] = waitlist

        return field_dict

    @classmethod
    def from_dict(cls: type[T], src_dict: Mapping[str, Any]) -> T:
        from ..models.order_request_attributes_type_0 import OrderRequestAttributesType0  # noqa: PLC0415

        d = dict(src_dict)

        def _parse_user_id(data: object) -> int | str:
            return cast(int | str, data)

        user_id = _parse_user_id(d.pop("user_id"))

        def _parse_sku_id(data: object) -> int | str:
            return cast(int | str, data)

        sku_id = _parse_sku_id(d.pop("sku_id"))

        quantity = d.pop("quantity", UNSET)

        adjustment = d.pop("adjustment", UNSET)

        def _parse_attributes(data: object) -> None | OrderRequestAttributesType0 | Unset:
            if data is None:
                return data
            if isinstance(data, Unset):
                return data
            try:
                if not isinstance(data, dict):
                    raise TypeError()
                attributes_type_0 = OrderRequestAttributesType0.from_dict(data)

                return attributes_type_0
            except (TypeError, ValueError, AttributeError, KeyError):
                pass
            return cast(None | OrderRequestAttributesType0 | Unset, data)

        attributes = _parse_attributes(d.pop("attributes", UNSET))

        waitlist = d.pop("waitlist", UNSET)

        order_request = cls(
            user_id=user_id,
            sku_id=sku_id,
            quantity=quantity,
            adjustment=adjustment,
            attributes=attributes,
            waitlist=waitlist,
        )

        return order_request
