"""A cell's functions as Python loops over array operations, in NumPy or CuPy, generated and compiled once."""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from itertools import chain
from typing import Any, NamedTuple

from ..cells import Cell
from ..codegen import Line, Value, trace

_ELEMENTWISE = ("add", "subtract", "multiply", "divide", "tanh")
# {0} and {1} are arguments, {2} is where the result goes.
_WORDS = dict(copy="{2}[...] = {0}", relu="maximum({0}, 0, out={2})",
              relu_grad="copyto({2}, 0), copyto({2}, {0}, where=~({1} <= 0))")


def _words(line: Line) -> str:
    name, given, result = line
    word = _WORDS.get(name, f"{name}({', '.join(map(str, given))}, {{2}})")
    return word.format(*given, *[0] * (2 - len(given)), result)


def _pooled(lines: Sequence[Line], letter: str) -> int:
    """Give temporaries, t0, t1..., that are not needed at the same time one name: T0, T1..., or that of an h whose turn
    is yet to come. The number of names."""
    free: list[str] = []
    count = 0
    for name, given, result in reversed(lines):
        # Operations on elements may write over what they read.
        values = (result, *given) if name in _ELEMENTWISE else (*given, result)
        for value in (v for v in values if isinstance(v, Value)):
            if value.name[0] == "t":
                if not free:
                    free.append(f"{letter}{count}")
                    count += 1
                value.name = free.pop()
            if value is result and value.name[0] in (letter, "h"):
                free.append(value.name)
    return count


class Program(NamedTuple):
    """`before` is done for all steps of a segment at once, `run` step after step; and the names of what they are given,
    `run` of the columns of steps, and of what is the same at all steps. NAME_ is a tensor that shares NAME's memory,
    for `product`, cpu's. Going forward x and r are pre-activations, n and s the states after and before, a the
    activations, b and w bias and W^T. In the adjoint w is W, d the gradient of n, p that of s, g what is given of d, x
    and r gradients, h what does not depend on d. `run` returns the last states or gradients."""

    before: Any
    whole: Sequence[str]
    run: Any
    columns: Sequence[str]
    others: Sequence[str]
    early: int  # how many h, E, which are temporaries of `before`, and T, those of `run`
    spare: int
    pool: int
    in_place: bool  # whether x is where n is, the only thing that is made of it


def library(backend: str) -> Any:
    return import_module("cupy" if backend == "cupy" else "numpy")


def _function(backend: str, heading: str, body: Sequence[str], last: str = "") -> Any:
    """Straight-line Python: a loop over operations would cost as much as they do at small sizes."""
    scope = dict(vars(library(backend)))
    exec("\n  ".join((heading, *body, "pass")) + last, scope)
    return scope["run"]


@lru_cache
def program(backend: str, cell: Cell, adjoint: bool, save: bool, bias: bool, given: tuple[bool, ...]) -> Program:
    """Of a cell's forward, whose activations are to `save` or not and whose r has a `bias` or not; or of its adjoint,
    with which gradients of the states are `given`."""
    twin, G, S, A = "_" if backend == "torch" else "", cell.gates, cell.states, cell.saved
    x, r, s, n, a, d, p = ([f"{c}{k}" for k in range(count)] for c, count in zip("xrsnadp", (G, G, S, S, A, S, S)))
    in_place = G == S == 1 and not cell.split and not A
    step, x, r = ("n0", n, ["dr"] if adjoint else r) if in_place else ("x", x, r)
    gates = x if twin and not cell.split else r  # torch adds W h to x where it is
    if adjoint:
        lines, results = trace(cell.backward, (a, s, n, d), _ELEMENTWISE)
        named = [*zip((*(x if cell.split else r), *r, *p), chain(*results))]
    else:
        lines, results = trace(cell.forward, (x if cell.split else [""] * G, gates, s), _ELEMENTWISE)
        named = [*zip((*n, *(a if save else ())), chain(*results))]
    late: set[int] = set()  # what has to wait for the step
    for _, arguments, result in lines:
        if not adjoint or any(isinstance(v, Value) and (v.name in d or id(v) in late) for v in arguments):
            late.add(id(result))
    adds = True  # W^T dr is added to p0, if there is one
    for name, value in named:
        if name == "p0" and not isinstance(value, Value):
            adds = False
        elif not isinstance(value, Value) or id(value) not in late or (value.name[0] != "t" and value.name != name):
            lines.append(("copy", (value,), Value(lines, name)))
            late.add(id(lines[-1][2]))
        else:
            value.name = name
    early, lines = ([line for line in lines if (id(line[2]) in late) == which] for which in (False, True))
    used = {id(v): v for _, arguments, _ in lines for v in arguments if isinstance(v, Value)}
    h = [result for _, _, result in early if id(result) in used]
    for k, value in enumerate(h):
        value.name = f"h{k}"
    read = sorted({v.name for v in used.values() if v.name[0] in "asn"} if adjoint else ())
    pools = _pooled(early, "E"), _pooled(lines, "T")
    body, temporaries = [*map(_words, lines)], [f"T{k}" for k in range(pools[1])]
    if adjoint:
        g = [f"g{k}" for k, there in enumerate(given) if there]
        columns = [*dict.fromkeys((*read, *(v.name for v in h), *g, *(x if cell.split else ()), *r, "dr" + twin))]
        others, names = ["w", *d, *p, *temporaries, *(("product", "d0_", "p0_") if twin else ())], d
        body = [f"add(d{v[1:]}, {v}, d{v[1:]})" for v in g] + body
        body += [f"d{k}, p{k} = p{k}, d{k}" for k in (*(("0", "0_") if twin and adds else ()), *range(1, S))]
        body += [f"product(dr_, w, d0_, add={adds})"] if twin else ["dr.dot(w, d0)"]
        body += ["add(d0, p0, d0)"] if adds and not twin else []
    else:
        columns = [*(x if cell.split or twin else [step]), *n, *(a if save else ()), *(("n0_",) if twin else ())]
        columns = [*dict.fromkeys(columns if cell.split or not twin else [*columns, step + "_"])]
        others, names = ["w", "b", "r", *r, *s, *temporaries, *(("product", "r_", "s0_") if twin else ())], s
        term = step if not cell.split else "b" if bias else ""
        sums = {step: f"product(s0_, w, {step}_, add=True)", "b": "product(s0_, w, r_, b)", "": "product(s0_, w, r_)"}
        product = [sums[term]] if twin else ["s0.dot(w, r)", *([f"add(r, {term}, r)"] if term else [])]
        body = [*product, *body, *(f"s{k} = n{k}" for k in range(S)), *(("s0_ = n0_",) if twin else ())]
    run = _function(backend, f"def run(steps, {', '.join(others)}):\n for {', '.join(columns)}, in steps:", body,
                    f"\n return {', '.join(names)},")
    whole = [*a, *s, *n, *(v.name for v in h), *(f"E{k}" for k in range(pools[0]))] if adjoint else []
    ahead = _function(backend, f"def run({', '.join(whole)}):", [*map(_words, early)])
    return Program(ahead, whole, run, columns, others, len(h), *pools, in_place)
