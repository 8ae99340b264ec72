"""A cell's functions as a list of operations, from which a backend makes its own program."""

from collections.abc import Callable, Sequence
from typing import Any

from .cells import Cell, bind

_INFIX = dict(add="+", subtract="-", multiply="*", divide="/")
Line = tuple[str, tuple[Any, ...], "Value"]  # operation, arguments (values or numbers), result


def _method(operation: str, swap: bool = False) -> Callable[..., Any]:
    return lambda self, other: self.do(operation, *((other, self) if swap else (self, other)))


class Value:
    """A value while it is recorded. The constant 0 adds nothing."""

    def __init__(self, lines: list[Line], name: str) -> None:
        self.lines = lines
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def do(self, operation: str, *arguments: Any) -> Any:
        if operation == "add" and 0 in arguments:
            return self
        self.lines.append((operation, arguments, Value(self.lines, f"t{len(self.lines)}")))
        return self.lines[-1][2]

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


def trace(function: Callable[..., Any], inputs: Sequence[Sequence[str]]) -> tuple[list[Line], Any]:
    """The operations of `function` on inputs of these names, in groups, and its results: values or
    numbers, in groups. Results are named t0, t1..."""
    lines: list[Line] = []
    calls: Any = {
        name: lambda v, *rest, name=name: v.do(name, v, *rest)
        for name in ("tanh", "sigmoid", "relu", "relu_grad")
    }
    results = bind(function, zeros_like=lambda v: 0, **calls)(
        *(tuple(Value(lines, name) for name in group) for group in inputs)
    )
    return lines, results


def statements(cell: Cell, adjoint: bool) -> str:
    """The cell's forward or backward as statements in C, on numbers or on vectors, which `number`
    makes of one."""
    function = cell.forward
    groups = "xrs"
    results = "na"
    if adjoint:
        function = cell.backward
        groups = "asnd"
        results = "xrp"
    sizes = dict(
        x=cell.gates,
        r=cell.gates,
        s=cell.states,
        n=cell.states,
        a=cell.saved,
        d=cell.states,
        p=cell.states,
    )
    inputs = [[f"{group}[{k}]" for k in range(sizes[group])] for group in groups]
    lines, values = trace(function, inputs)
    text = []

    def word(value: Any) -> str:
        return str(value) if isinstance(value, Value) else f"number({float(value)!r})"

    for name, arguments, result in lines:
        between = _INFIX.get(name, ",")
        words = [*map(word, arguments)]
        text.append(
            f"const auto {result} = {'' if name in _INFIX else name}({between.join(words)});"
        )
    for group, column in zip(results, values):
        text += [f"{group}[{k}] = {word(value)};" for k, value in enumerate(column)]
    return " ".join(text)
