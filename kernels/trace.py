"""Records a cell's algebra once, as a straight line of array operations that write into buffers given to them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .cells import bind


class _Value:
    """A result in the recording; sums and products with the constant 0 fold away."""

    def __init__(self, lines: list[tuple[str, tuple[Any, ...], "_Value"]], name: str = "") -> None:
        self.lines, self.name = lines, name

    def record(self, operation: str, *arguments: Any) -> "_Value":
        result = _Value(self.lines)
        self.lines.append((operation, arguments, result))
        return result

    def __add__(self, other: Any) -> Any:
        return self if _is_zero(other) else self.record("add", self, other)

    def __sub__(self, other: Any) -> Any:
        return self if _is_zero(other) else self.record("subtract", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self.record("subtract", other, self)

    def __mul__(self, other: Any) -> Any:
        return other if _is_zero(other) else self.record("multiply", self, other)

    __radd__, __rmul__ = __add__, __mul__


def _is_zero(x: Any) -> bool:
    return not isinstance(x, _Value) and x == 0


class Program(NamedTuple):
    """`run(*inputs, *outputs, *temporaries)`; `skipped`: the output that may be skipped is 0, and has no buffer."""

    run: Callable[..., None]
    temporaries: int
    skipped: bool


def record(function: Callable[..., Any], inputs: Sequence[Sequence[str | None]], outputs: Sequence[Sequence[str]],
           operations: Mapping[str, Callable[..., Any]], skip: str = "") -> Program:
    """Record `function`, which takes and returns tuples, as a Program over distinct named buffers.

    An input named None is the constant 0; an empty group of outputs is left out, and so is the output `skip` if it is
    the constant 0. `operations` are add, subtract, multiply, copy, tanh, relu, positive and perhaps sigmoid, each with
    an `out` argument."""
    lines: list[tuple[str, tuple[Any, ...], _Value]] = []
    leaves = [tuple(_Value(lines, name) if name else 0 for name in group) for group in inputs]
    unary = {name: lambda v, name=name: v.record(name, v) for name in ("tanh", "relu", "positive", "sigmoid")}
    if "sigmoid" not in operations:
        unary["sigmoid"] = lambda v: unary["tanh"](v * 0.5) * 0.5 + 0.5
    results = bind(function, zeros_like=lambda v: 0, **unary)(*leaves)
    parameters, skipped = [name for group in inputs for name in group if name], False
    for name, value in (pair for group in zip(outputs, results) for pair in zip(*group)):
        if name == skip and _is_zero(value):
            skipped = True
            continue
        if not isinstance(value, _Value) or value.name:  # a constant, an input, or an output already
            value = _Value(lines).record("copy", value)
        value.name = name
        parameters.append(name)

    last_use = {id(a): i for i, (_, arguments, _) in enumerate(lines) for a in arguments}
    text, free, temporaries = [], list[str](), list[str]()
    for i, (operation, arguments, result) in enumerate(lines):
        words = [a.name if isinstance(a, _Value) else repr(a) for a in arguments]
        free += {w for w, a in zip(words, arguments) if w in temporaries and last_use[id(a)] == i}
        if not result.name:
            if not free:
                temporaries.append(f"t{len(temporaries)}_")
                free.append(temporaries[-1])
            result.name = free.pop()
        text.append(f"    {operation}({', '.join(words)}, out={result.name})")
    scope = dict(operations)
    # Straight-line Python, because a loop over the operations would cost as much as they do at small sizes.
    exec(f"def run({', '.join(parameters + temporaries)}):\n" + "\n".join(text), scope)  # noqa: S102
    return Program(scope["run"], len(temporaries), skipped)
