"""Whether a cell's two functions keep to what every backend can compute, with errors that show the
line."""

import linecache
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any


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


def _error(function: FunctionType, line: int, problem: str) -> TypeError:
    """It names the function and shows the line, if its source can be found."""
    file = function.__code__.co_filename
    text = linecache.getline(file, line).strip()
    shown = f"\n    {text}" if text else ""
    return TypeError(f"{function.__qualname__} ({file}, line {line}) {problem}{shown}")


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
    code = function.__code__
    try:
        results = bound(*groups)
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code is code]
        problem = (
            "failed on stand-ins for arrays, which have + - * / and the functions of "
            f"rnn.kernels.cells: {error}"
        )
        raise _error(function, lines[-1] if lines else code.co_firstlineno, problem) from error
    # Nearly always that of the return statement
    line = max(number for _, _, number in code.co_lines() if number)
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
