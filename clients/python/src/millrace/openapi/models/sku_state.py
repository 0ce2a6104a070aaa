from enum import StrEnum


class SkuState(StrEnum):
    CLOSED = "closed"
    DRAWN = "drawn"
    ENTRIES_FIXED = "entries_fixed"
    ENTRIES_OPEN = "entries_open"
    NOT_OPEN = "not_open"
    OPEN = "open"
    PAUSED = "paused"
    SOLD_OUT = "sold_out"

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def _missing_(cls, value: object) -> "SkuState | None":
        """A value that a newer server added: a member without a constant, so that it is an answer and no error."""
        if not isinstance(value, str):
            return None
        member = str.__new__(cls, value)
        member._name_ = member._value_ = value
        return member
