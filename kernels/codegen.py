"""A cell's functions as statements in C."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .cells import Cell
from .tracing import INFIX, Line, Value, trace


class Staged(NamedTuple):
    """A cell's function whose means over all hidden units divide it into stages: a row goes through
    each before the next one. `kept` values of each unit go from one stage to a later one, and there
    are so many `means`."""

    text: str
    stages: int
    kept: int
    means: int


def _word(value: Any) -> str:
    return str(value) if isinstance(value, Value) else f"number({float(value)!r})"


def _statement(line: Line) -> str:
    name, arguments, result = line
    between = INFIX.get(name, ",")
    words = between.join(map(_word, arguments))
    return f"const auto {result} = {'' if name in INFIX else name}({words});"


def _traced(cell: Cell, adjoint: bool) -> tuple[list[Line], list[Value], list[str]]:
    """The operations of the cell's forward or backward, its results, and the statements that give
    them."""
    function = cell.forward
    groups = "xrs"
    results = "na"
    if adjoint:
        function = cell.backward
        groups = "asnd"
        results = "xrp"
    lines, values = trace(function, cell.inputs(groups))
    given = [
        f"{group}[{k}] = {_word(value)};"
        for group, column in zip(results, values)
        for k, value in enumerate(column)
    ]
    return lines, [v for column in values for v in _values(column)], given


def statements(cell: Cell, adjoint: bool) -> str:
    """The cell's forward or backward as statements in C, on numbers or on vectors, which `number`
    makes of one."""
    lines, _, given = _traced(cell, adjoint)
    return " ".join([*map(_statement, lines), *given])


class _Stages(NamedTuple):
    """In which stage each line runs, and from which stage on there is each value; and the last."""

    runs_in: list[int]
    stage_of: dict[Value, int]
    last: int


def _stages(lines: Sequence[Line], results: Iterable[Value]) -> _Stages:
    """A mean as early as may be, any other value as late: what it takes may be at hand in every
    stage."""
    stage_of: dict[Value, int] = {}
    runs_in = []
    for line in lines:
        stage = max((stage_of.get(a, 0) for a in _values(line.arguments)), default=0)
        runs_in.append(stage)
        stage_of[line.result] = stage + (line.operation == "row_mean")
    last = max(stage_of.values(), default=0)
    first_use = dict.fromkeys(results, last)
    for k in reversed(range(len(lines))):
        line = lines[k]
        if line.operation != "row_mean":
            runs_in[k] = stage_of[line.result] = first_use[line.result]
        for a in _values(line.arguments):
            first_use[a] = min(first_use.get(a, last), runs_in[k])
    return _Stages(runs_in, stage_of, last)


def staged_statements(cell: Cell, adjoint: bool) -> Staged:
    """Likewise of a cell that takes means over rows, for C++: `STAGE` says which part runs, and
    `row` is a Row of kernels/cpu/cell.h."""
    lines, results, given = _traced(cell, adjoint)
    means = [line.result for line in lines if line.operation == "row_mean"]
    runs_in, stage_of, last = _stages(lines, results)
    taken: list[set[Value]] = [set() for _ in range(last + 1)]
    for line, stage in zip(lines, runs_in):
        taken[stage].update(a for a in _values(line.arguments) if a in stage_of)
    taken[last].update(value for value in results if value in stage_of)
    kept = [
        value
        for value in stage_of
        if value not in means and any(value in some for some in taken[stage_of[value] + 1 :])
    ]
    parts = []
    for stage in range(last + 1):
        body = []
        for value in stage_of:
            if value in taken[stage] and value in means:
                body.append(f"const auto {value} = row->mean({means.index(value)});")
            elif value in taken[stage] and stage_of[value] < stage:
                body.append(f"const auto {value} = row->kept({kept.index(value)});")
        for line, runs in zip(lines, runs_in):
            if runs == stage:
                body.append(_in_stage(line, means, kept))
        body += given if stage == last else []
        parts.append(f"if constexpr (STAGE == {stage}) {{ {' '.join(body)} }}")
    return Staged(" ".join(parts), last + 1, len(kept), len(means))


def _in_stage(line: Line, means: Sequence[Value], kept: Sequence[Value]) -> str:
    if line.operation == "row_mean":
        return f"row->add({means.index(line.result)}, {_word(line.arguments[0])});"
    text = _statement(line)
    if line.result in kept:
        text += f" row->keep({kept.index(line.result)}, {line.result});"
    return text


def _values(arguments: Iterable[Any]) -> list[Value]:
    return [a for a in arguments if isinstance(a, Value)]
