"""A cell's functions as statements in C."""

from typing import Any

from .cells import Cell
from .tracing import INFIX, Value, trace


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
    lines, values = trace(function, cell.inputs(groups))
    text = []

    def word(value: Any) -> str:
        return str(value) if isinstance(value, Value) else f"number({float(value)!r})"

    for name, arguments, result in lines:
        between = INFIX.get(name, ",")
        words = [*map(word, arguments)]
        text.append(
            f"const auto {result} = {'' if name in INFIX else name}({between.join(words)});"
        )
    for group, column in zip(results, values):
        text += [f"{group}[{k}] = {word(value)};" for k, value in enumerate(column)]
    return " ".join(text)
