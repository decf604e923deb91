"""JSON as RFC 8259 has it, from people who may send anything."""

from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")


class NotJson(ValueError):
    """The bytes are not JSON: not UTF-8, not well formed, or nested beyond reason."""


class WrongShape(ValueError):
    """The bytes are JSON, but not what was expected: `field` says where, if it has a name."""

    def __init__(self, message: str, field: str | None) -> None:
        super().__init__(message)
        self.field = field


@overload
def decode(body: bytes) -> Any: ...
@overload
def decode(body: bytes, shape: type[T]) -> T: ...
def decode(body: bytes, shape: Any = Any) -> Any:
    """The value of a JSON text, of the given shape. Raises NotJson or WrongShape.

    NaN, Infinity, trailing commas and unknown fields of a struct are refused.
    """
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at ")
        field = path.strip("`").removeprefix("$").removeprefix(".") or None
        quoted = problem.partition("field `")[2].partition("`")[0]
        raise WrongShape(problem, quoted or field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotJson("not JSON") from error
