"""Every public name says what it takes, what it raises and where its formula is from."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any, TypeGuard

import pytest

import rnn
from rnn import interop
from rnn.kernels.cells import Cell
from rnn.kernels.plan import Plan

LAYERS = [rnn.RNN, rnn.LSTM, rnn.GRU]
CELLS = [rnn.RNNCell, rnn.LSTMCell, rnn.GRUCell]
CLASSES: list[type] = [*LAYERS, *CELLS, Cell, Plan]
# Of no formula of their own
TOOLS: list[type] = [rnn.GradientFlow, rnn.Streaming]
FUNCTIONS: list[Any] = [
    getattr(rnn, name) for name in rnn.__all__ if inspect.isfunction(getattr(rnn, name))
]
FUNCTIONS += [getattr(rnn.functional, name) for name in rnn.functional.__all__]
FUNCTIONS += [getattr(rnn.init, name) for name in rnn.init.__all__]


def is_ours(value: Any) -> TypeGuard[FunctionType]:
    return isinstance(value, FunctionType) and value.__module__.split(".")[0] == "rnn"


def methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """Those that we define, by the class that has them."""
    for base in cls.__mro__:
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else value
            if is_ours(function):
                yield name, function


PUBLIC: dict[str, Any] = {
    f"{function.__module__}.{function.__qualname__}": function
    for function in [
        *FUNCTIONS,
        *(method for cls in [*CLASSES, *TOOLS] for name, method in methods(cls) if name[0] != "_"),
    ]
    # what a dataclass or a NamedTuple makes has no source
    if function.__code__.co_filename.endswith(".py")
}


def raises(function: Any, seen: set[Any] | None = None) -> bool:
    """Whether it, or a function of ours that it calls by name, has a `raise`."""
    seen = set() if seen is None else seen
    if function in seen:
        return False
    seen.add(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes = [*ast.walk(tree)]
    if any(isinstance(node, ast.Raise) for node in nodes):
        return True
    named = [function.__globals__.get(node.id) for node in nodes if isinstance(node, ast.Name)]
    return any(raises(value, seen) for value in named if is_ours(value))


def test_the_search() -> None:
    assert {*PUBLIC} >= {"rnn.functional.recurrence", "rnn.explain.explain", "rnn.convert.patch"}
    assert "rnn.stack.Stack.forward" in PUBLIC
    assert raises(rnn.replace) and raises(rnn.unpatch) and not raises(rnn.patch)


@pytest.mark.parametrize("name", PUBLIC)
def test_functions(name: str) -> None:
    doc = inspect.getdoc(PUBLIC[name])
    assert doc
    if raises(PUBLIC[name]):
        assert "Raises " in doc


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_classes(cls: type) -> None:
    """Plan has no formula, and is checked where it is used."""
    doc = " ".join((cls.__doc__ or "").split())
    words = ["raises TypeError"] if cls is Plan else ["Raises ", "Source", "dtype"]
    assert [word for word in words if word not in doc] == []


@pytest.mark.parametrize("cls", [*LAYERS, *CELLS], ids=lambda cls: cls.__name__)
def test_layers(cls: type) -> None:
    """torch.nn's text, with its shapes and formulas, and ours after it, all filled in."""
    theirs = interop.TORCH[cls.__name__].__doc__
    assert cls.__doc__
    assert cls.__doc__.startswith(theirs)
    ours = cls.__doc__.removeprefix(theirs)
    assert "https://" in ours
    assert not {*"{}"} & {*ours}
