from enum import StrEnum


class OrderStatus(StrEnum):
    ACCEPTED = "accepted"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"
    PAID = "paid"
    PENDING_PAYMENT = "pending_payment"
    REFUNDED = "refunded"
    REFUND_DUE = "refund_due"
    UNDECIDED = "undecided"
    WAITLISTED = "waitlisted"

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def _missing_(cls, value: object) -> "OrderStatus | None":
        """A value that a newer server added: a member without a constant, so that it is an answer and no error."""
        if not isinstance(value, str):
            return None
        member = str.__new__(cls, value)
        member._name_ = member._value_ = value
        return member
