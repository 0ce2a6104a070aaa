from enum import StrEnum


class SkuAllocation(StrEnum):
    DRAW = "draw"

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def _missing_(cls, value: object) -> "SkuAllocation | None":
        """A value that a newer server added: a member without a constant, so that it is an answer and no error."""
        if not isinstance(value, str):
            return None
        member = str.__new__(cls, value)
        member._name_ = member._value_ = value
        return member
