from enum import StrEnum


class RefundReason(StrEnum):
    ALREADY_PAID = "already_paid"
    ALREADY_REFUNDED = "already_refunded"
    AMOUNT_MISMATCH = "amount_mismatch"
    CURRENCY_MISMATCH = "currency_mismatch"
    NOT_ASSIGNED = "not_assigned"
    ORDERED_AGAIN = "ordered_again"
    ORDER_CANCELLED = "order_cancelled"
    ORDER_EXPIRED = "order_expired"
    ORDER_FAILED = "order_failed"
    RECEIPT_INVALID = "receipt_invalid"
    RECEIPT_MISSING = "receipt_missing"
    SOLD_OUT = "sold_out"
    UNKNOWN_SKU = "unknown_sku"

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def _missing_(cls, value: object) -> "RefundReason | None":
        """A value that a newer server added: a member without a constant, so that it is an answer and no error."""
        if not isinstance(value, str):
            return None
        member = str.__new__(cls, value)
        member._name_ = member._value_ = value
        return member
