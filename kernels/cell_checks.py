"""Whether a cell's two functions keep to what every backend can compute, with errors that show the
line."""

import linecache
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch

from . import adjoint
from .tracing import Value


class StandIn:
    """Stands for any array: it has the arithmetic that all backends have, and nothing else."""

    def _result(self, _: Any = None) -> "StandIn":
        return self

    __add__ = __radd__ = _result
    __sub__ = __rsub__ = _result
    __mul__ = __rmul__ = _result
    __truediv__ = __rtruediv__ = _result
    __neg__ = _result

    def __bool__(self) -> bool:
        raise TypeError("an array has no truth value, so a cell has no branches")


class CellError(TypeError):
    """What is wrong with a cell's function: its text has the line."""


def _error(function: FunctionType, line: int, problem: str) -> TypeError:
    """It names the function and shows the line, if its source can be found."""
    file = function.__code__.co_filename
    text = linecache.getline(file, line).strip()
    shown = f"\n    {text}" if text else ""
    return CellError(f"{function.__qualname__} ({file}, line {line}) {problem}{shown}")


def _failure(function: FunctionType, error: Exception) -> TypeError:
    """Of a function that failed on stand-ins for arrays."""
    code = function.__code__
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code is code]
    problem = (
        "failed on stand-ins for arrays, which have + - * / and the functions of "
        f"rnn.kernels.cells: {error}"
    )
    return _error(function, lines[-1] if lines else code.co_firstlineno, problem)


def _last_line(function: FunctionType) -> int:
    """Nearly always that of the return statement."""
    return max(number for _, _, number in function.__code__.co_lines() if number)


def check_sizes(name: Any, gates: Any, states: Any, constants: Any) -> None:
    """Raises TypeError and ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"Expected a cell's name to be a string, got {type(name).__name__}")
    for what, value in (("gates", gates), ("states", states), ("constants", constants)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"Expected {what} to be an integer, got {type(value).__name__}")
    if gates < 1 or states < 1 or not 0 <= constants < states:
        raise ValueError(
            "Expected a cell to have at least one gate, and a state that is no constant, got "
            f"gates={gates}, states={states}, constants={constants}"
        )


def recorded_step(step: Any, gates: int, states: int, constants: int) -> adjoint.Step:
    """A step's operations. Raises TypeError, with the line, where it fails or returns anything but
    a tuple of the new states."""
    if not isinstance(step, FunctionType):
        kind = type(step).__name__
        raise TypeError(f"Expected a cell's forward and backward to be functions, got {kind}")
    carried = states - constants

    def checked(*groups: Any) -> Any:
        s_next = adjoint.recorded(step)(*groups)
        if not isinstance(s_next, tuple):
            raise _error(step, _last_line(step), "has to return a tuple: for one state, (h,)")
        if len(s_next) != carried:
            problem = f"has to return the new states, {carried}, got {len(s_next)}"
            raise _error(step, _last_line(step), problem)
        for k, value in enumerate(s_next):
            if not isinstance(value, (Value, int, float)):
                problem = f"has to return arrays: state {k} is a {type(value).__name__}"
                raise _error(step, _last_line(step), problem)
        return s_next

    try:
        return adjoint.record(checked, gates, states, constants)
    except CellError:
        raise
    except Exception as error:
        raise _failure(step, error) from error


def check_gradients(cell: Any, derived: adjoint.Functions) -> None:
    """Compares a cell's own adjoint with the one that was derived from its step, in float64 on
    random numbers. Raises ValueError where they differ."""
    numbers = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[torch.Tensor, ...]:
        every = torch.randn(count, 64, generator=numbers, dtype=torch.float64, device="cpu")
        return tuple(every.unbind())

    x = draw(cell.gates)
    r = draw(cell.gates)
    s = draw(cell.states)
    ds = draw(cell.states)
    s_next, saved = cell.forward(x, r, s)
    own = cell.backward(saved, s, s_next, ds)
    s_next, saved = derived.forward(x, r, s)
    right = derived.backward(saved, s, s_next, ds)
    for group, found, expected in zip(("dx", "dr", "ds_prev"), own, right):
        for k, (one, other) in enumerate(zip(found, expected)):
            error = float((one - other).abs().max())
            if not error <= 1e-10 * (1 + float(other.abs().max())):
                raise ValueError(
                    f"The backward of the cell {cell.name!r} is wrong: {group}[{k}] differs by "
                    f"{error:.3g} from the gradient of its forward"
                )


def check_function(function: Any) -> None:
    """Raises TypeError for what a backend could not run with names of its own."""
    if not isinstance(function, FunctionType):
        kind = type(function).__name__
        raise TypeError(f"Expected a cell's forward and backward to be functions, got {kind}")
    code = function.__code__
    line = code.co_firstlineno
    if function.__closure__:
        names = ", ".join(code.co_freevars)
        raise _error(function, line, f"is a closure over {names}: write constants into it")
    if function.__defaults__ or function.__kwdefaults__:
        raise _error(function, line, "has default arguments: write constants into it")


def results_of(
    function: Any,
    bound: Callable[..., Any],
    groups: Sequence[Any],
    sizes: Mapping[str, int | None],
) -> list[Any]:
    """What `bound`, a copy of `function`, returns for groups of stand-ins: tuples with the names
    and sizes of `sizes`, of any size if None. Raises TypeError if it fails or returns others."""
    try:
        results = bound(*groups)
    except Exception as error:
        raise _failure(function, error) from error
    line = _last_line(function)
    if not isinstance(results, tuple) or len(results) != len(sizes):
        count = len(results) if isinstance(results, tuple) else 1
        problem = f"has to return {len(sizes)} tuples, {', '.join(sizes)}, got {count}"
        raise _error(function, line, problem)
    for (name, size), result in zip(sizes.items(), results):
        if not isinstance(result, tuple):
            problem = f"has to return {name} as a tuple: for one value, (value,) with its comma"
            raise _error(function, line, problem)
        if size is not None and len(result) != size:
            problem = f"has to return {name} of length {size}, got {len(result)}"
            raise _error(function, line, problem)
    return [*results]
