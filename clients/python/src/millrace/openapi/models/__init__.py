"""Contains all the data models used in inputs/outputs"""

from .cancel_order_only import CancelOrderOnly
from .order import Order
from .order_attributes import OrderAttributes
from .order_list import OrderList
from .order_request import OrderRequest
from .order_request_attributes_type_0 import OrderRequestAttributesType0
from .order_status import OrderStatus
from .problem import Problem
from .refund_reason import RefundReason
from .sku import Sku
from .sku_allocation import SkuAllocation
from .sku_state import SkuState

__all__ = (
    "CancelOrderOnly",
    "Order",
    "OrderAttributes",
    "OrderList",
    "OrderRequest",
    "OrderRequestAttributesType0",
    "OrderStatus",
    "Problem",
    "RefundReason",
    "Sku",
    "SkuAllocation",
    "SkuState",
)
