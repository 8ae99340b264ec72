"""A cell's functions as a list of operations: what they do to values that only have names."""

import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple, cast

# Functions of one value that a step may use, beside + - * /, and those of layer norm
FUNCTIONS = ("tanh", "sigmoid", "relu", "exp", "row_mean", "rsqrt")
INFIX = dict(add="+", subtract="-", multiply="*", divide="/")


def bind(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of `function` whose free names resolve to `names`."""
    plain = cast(FunctionType, function)
    bound = FunctionType(
        plain.__code__,
        {**plain.__globals__, **names},
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    bound.__kwdefaults__ = plain.__kwdefaults__
    return bound


class Line(NamedTuple):
    """An operation on values or numbers, and its result."""

    operation: str
    arguments: tuple[Any, ...]
    result: "Value"


class Tape:
    """Records operations. With `shared`, an operation on the same arguments is recorded once."""

    def __init__(self, shared: bool = False) -> None:
        self.lines: list[Line] = []
        self.shared = shared
        self._found: dict[tuple[Any, ...], Value] = {}

    def inputs(self, group: str, count: int) -> tuple["Value", ...]:
        return tuple(Value(self, f"{group}[{k}]") for k in range(count))

    def do(self, operation: str, *arguments: Any) -> "Value":
        key = (operation, *arguments)
        if self.shared and key in self._found:
            return self._found[key]
        result = Value(self, f"t{len(self.lines)}")
        self.lines.append(Line(operation, arguments, result))
        self._found[key] = result
        return result


def _method(operation: str, swap: bool = False) -> Callable[..., Any]:
    return lambda self, other: self.do(operation, *((other, self) if swap else (self, other)))


class Value:
    """A value while it is recorded. The constant 0 adds nothing."""

    def __init__(self, tape: Tape, name: str) -> None:
        self.tape = tape
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def do(self, operation: str, *arguments: Any) -> Any:
        for argument in arguments:
            if not isinstance(argument, (Value, int, float)):
                kind = type(argument).__name__
                raise TypeError(f"an array and a {kind}: constants are Python's numbers")
            if not isinstance(argument, Value) and not math.isfinite(argument):
                raise TypeError(f"{argument} is no finite number")
        if operation == "add" and 0 in arguments:
            return self
        return self.tape.do(operation, *arguments)

    __add__ = _method("add")
    __radd__ = _method("add")
    __mul__ = _method("multiply")
    __rmul__ = _method("multiply")
    __sub__ = _method("subtract")
    __rsub__ = _method("subtract", swap=True)
    __truediv__ = _method("divide")
    __rtruediv__ = _method("divide", swap=True)

    def __neg__(self) -> Any:
        return self * -1

    def __bool__(self) -> bool:
        raise TypeError("an array has no truth value, so a cell has no branches")

    def tanh(self) -> Any:
        return self.do("tanh", self)

    def sigmoid(self) -> Any:
        return self.do("sigmoid", self)

    def relu(self) -> Any:
        return self.do("relu", self)

    def exp(self) -> Any:
        return self.do("exp", self)


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on values: the functions of a cell are recorded as operations."""
    calls: Any = {
        name: lambda v, *rest, name=name: v.do(name, v, *rest)
        for name in (*FUNCTIONS, "relu_grad", "clip_grad", "clamp")
    }
    return bind(function, zeros_like=lambda v: 0, **calls)


def trace(function: Callable[..., Any], inputs: Sequence[Sequence[str]]) -> tuple[list[Line], Any]:
    """The operations of `function` on inputs of these names, in groups, and its results: values or
    numbers, in groups. Results are named t0, t1..."""
    tape = Tape()
    results = recorded(function)(*(tuple(Value(tape, name) for name in group) for group in inputs))
    return tape.lines, results
