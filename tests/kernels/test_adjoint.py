"""Derived forward and backward functions: against autograd, the written ones, and in every
backend."""

import copy
import ctypes
import inspect
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import rnn
from rnn.kernels import cells
from rnn.kernels.adjoint import elementwise_jacobian
from rnn.kernels.cells import Cell, clip_grad, exp, relu, sigmoid, tanh
from rnn.kernels.codegen import statements
from rnn.kernels.cpu import native
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.plan import Plan
from rnn.layer_types import Masks
from tests.cases import CELLS
from tests.kernels.gpu.emulator import COMPILER, loader

READY = [rnn.cells.peephole_lstm, rnn.cells.cifg, rnn.cells.mgu, rnn.cells.indrnn]
recurrence: Any = rnn.functional.recurrence


def randn(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(50, dtype=dtype, requires_grad=True) for _ in range(count))


def check_adjoint(cell: Cell, limit: float = 1e-10) -> None:
    """The derived functions against autograd over the step as it was given."""
    x = randn(cell.gates)
    r = randn(cell.gates)
    s = randn(cell.states)
    ds = randn(cell.states)
    carried = cell.carried
    want_next = (*cell.step(x, r, s[:carried], s[carried:]), *s[carried:])
    want_next = tuple(v if isinstance(v, Tensor) else torch.full_like(s[0], v) for v in want_next)
    pairs = [(v, d) for v, d in zip(want_next, ds) if v.requires_grad]
    inputs = (*x, *r, *s)
    found = torch.autograd.grad(
        [v for v, _ in pairs], inputs, [d for _, d in pairs], allow_unused=True
    )
    want = [torch.zeros_like(s[0]) if d is None else d for d in found]
    with torch.no_grad():
        s_next, saved = cell.forward(x, r, s)
        got = [d for group in cell.backward(saved, s, s_next, ds) for d in group]
    torch.testing.assert_close(s_next, want_next, rtol=1e-14, atol=1e-14)
    scale = max(1.0, *(float(d.abs().max()) for d in want))
    torch.testing.assert_close(got, want, rtol=limit, atol=limit * scale)


@pytest.mark.parametrize("cell", READY, ids=lambda cell: cell.name)
def test_ready_made(cell: Cell) -> None:
    check_adjoint(cell)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_as_the_written_ones(cell: Cell) -> None:
    """The built-in cells, derived from their step: the same functions, nothing more saved."""
    written = cell.forward
    derived = Cell(
        cell.name, lambda x, r, s: written(x, r, s)[0], gates=cell.gates, states=cell.states
    )
    assert (derived.saved, derived.split) == (cell.saved, cell.split)
    check_adjoint(derived, 1e-12)
    x, r, s, ds = (randn(n) for n in (cell.gates, cell.gates, cell.states, cell.states))
    results = []
    for one in (cell, derived):
        s_next, saved = one.forward(x, r, s)
        results.append([s_next, *one.backward(saved, s, s_next, ds)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


Expression = Callable[[Any, Any, Any], Any]


def expressions(gates: int, states: int) -> st.SearchStrategy[Expression]:
    """Of x, r and s, bounded wherever it would grow fast."""
    inputs = [
        *(lambda x, r, s, k=k: x[k] for k in range(gates)),
        *(lambda x, r, s, k=k: r[k] for k in range(gates)),
        *(lambda x, r, s, k=k: x[k] + r[k] for k in range(gates)),
        *(lambda x, r, s, k=k: s[k] for k in range(states)),
    ]
    leaves = st.sampled_from(inputs)

    def larger(parts: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        two = st.tuples(parts, parts)
        number = st.floats(-2, 2).map(lambda v: round(v, 3))
        return st.one_of(
            parts.map(lambda f: lambda x, r, s: tanh(f(x, r, s))),
            parts.map(lambda f: lambda x, r, s: sigmoid(f(x, r, s))),
            parts.map(lambda f: lambda x, r, s: relu(f(x, r, s))),
            parts.map(lambda f: lambda x, r, s: exp(tanh(f(x, r, s)))),
            two.map(lambda p: lambda x, r, s: p[0](x, r, s) + p[1](x, r, s)),
            two.map(lambda p: lambda x, r, s: p[0](x, r, s) - p[1](x, r, s)),
            two.map(lambda p: lambda x, r, s: p[0](x, r, s) * tanh(p[1](x, r, s))),
            two.map(lambda p: lambda x, r, s: p[0](x, r, s) / (2 + sigmoid(p[1](x, r, s)))),
            st.tuples(parts, number).map(lambda p: lambda x, r, s: p[1] - p[0](x, r, s)),
            st.tuples(parts, number).map(lambda p: lambda x, r, s: p[0](x, r, s) * p[1]),
        )

    return st.recursive(leaves, larger, max_leaves=8)


@st.composite
def random_cells(draw: Any) -> Cell:
    gates = draw(st.integers(1, 3))
    states = draw(st.integers(1, 3))
    new = [draw(expressions(gates, states)) for _ in range(states)]
    # A value that several states share
    shared = draw(expressions(gates, states))

    def step(x: Any, r: Any, s: Any) -> Any:
        common = sigmoid(shared(x, r, s))
        return tuple(common * value(x, r, s) + s[k] / 2 for k, value in enumerate(new))

    return Cell("random", step, gates=gates, states=states)


def drawn(count: int, start: int) -> list[Cell]:
    """So many random cells."""
    found: list[Cell] = []

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(random_cells())
    def draw(cell: Cell) -> None:
        found.append(cell)

    draw()
    assert len(found) >= count
    return found


@pytest.mark.parametrize("count", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_random_cells(count: int) -> None:
    torch.manual_seed(0)
    for cell in drawn(count, 1):
        check_adjoint(cell)


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_random_recurrences(count: int) -> None:
    """With lengths and resets: the reference in float64 against the composite, which takes the step
    alone."""
    for cell in drawn(count, 2):
        check_plans(cell, [Plan("numpy")])


def check_plans(cell: Cell, plans: list[Plan]) -> None:
    """A recurrence of both directions with lengths and resets, by each plan against the composite
    in float64, all values and gradients."""
    T, B, I, H, N = 5, 3, 4, 10, 2
    G = cell.gates
    S = cell.states
    generator = torch.Generator().manual_seed(3)
    shapes = (T, B, I), (N * G * H, I), (N * G * H, H), (N * G * H,), (N * G * H,), (N * S, B, H)
    given = [torch.randn(s, generator=generator, dtype=torch.float64) / 2 for s in shapes]
    lengths = torch.tensor([4, 0, 5])
    resets = torch.rand(T, B, generator=generator) < 0.3
    weights = [
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in ((T, B, N * H), (S - 1, T * B, N * H), (N * S, B, H))
    ]

    def run(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in given]
        outputs = [(t, w) for t, w in zip(function(leaves), weights) if t is not None]
        loss = sum((t.double() * w).sum() for t, w in outputs)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        zeros = [torch.zeros_like(t) if d is None else d for t, d in zip(leaves, grads)]
        return [*(t.detach() for t, _ in outputs), *zeros]

    masks = Masks(lengths, None, resets)
    reverse = (False, True)
    exact = run(
        lambda leaves: rnn.composite.composite(cell, leaves, masks, reverse, 1), torch.float64
    )
    for plan in plans:
        dtype = torch.float64 if plan.backend == "numpy" else torch.float32
        got = run(
            lambda leaves, plan=plan: recurrence(
                cell, *leaves, lengths, None, resets, reverse, 1, plan
            ),
            dtype,
        )
        limit = 1e-11 if dtype == torch.float64 else 2e-5
        for one, right in zip(got, exact, strict=True):
            scale = 1 + float(right.abs().max())
            assert float((one.double() - right).abs().max()) <= limit * scale, plan


def _everything(x: Any, r: Any, s: Any, k: Any) -> Any:
    """Each operation that there is, a state that is a constant's product, and two constants."""
    a = exp(x[0] - r[1]) / (1 + exp(x[0] - r[1]))
    b = clip_grad(relu(x[1] * r[0] + s[1] * k[0]), 0.05)
    return tanh(a * s[0] - b / (2 + s[1] * s[1])) + 0.1 * k[1], 0.5 * s[1] + sigmoid(a * b)


EVERYTHING = Cell("everything", _everything, gates=2, states=4, constants=2)


def test_everything() -> None:
    check_adjoint(EVERYTHING)
    check_plans(EVERYTHING, [Plan("numpy")])


@pytest.mark.parametrize(
    "cell",
    [EVERYTHING, *(pytest.param(cell, marks=pytest.mark.slow) for cell in READY)],
    ids=lambda cell: cell.name,
)
def test_native(cell: Cell) -> None:
    if not rnn.dispatch.native_available(cell, torch.float32):
        pytest.skip("there is no C++ compiler that works")
    check_plans(cell, [Plan("native")])


@pytest.mark.interpreted
@pytest.mark.parametrize("scope", ["block", "launch"])
def test_triton(scope: str) -> None:
    plan = Plan("triton", scope, 16, 8 if scope == "block" else 16, 16, 1, False, "tf32x3")
    check_plans(EVERYTHING, [plan])


@pytest.mark.skipif(COMPILER is None, reason="there is no g++, which runs CUDA C++ on the CPU")
@pytest.mark.parametrize(("scope", "blocks"), [("block", 1), ("cluster", 2), ("grid", 2)])
def test_cuda(scope: str, blocks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "load", loader(tmp_path))
    units = 16
    check_plans(EVERYTHING, [Plan("cuda", scope, units, 8, 0, 1, False, "tf32x3", blocks)])


def test_functions_in_c(tmp_path: Path) -> None:
    """Random cells' functions, on vectors of C++, all in one library."""
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler that works")
    found = [EVERYTHING, *READY, *drawn(20, 3)]
    text = f'{native.definitions(cells.rnn_tanh, torch.float64)}#include "simd.h"\n'
    for k, cell in enumerate(found):
        for adjoint in (False, True):
            groups = "asndxrp" if adjoint else "xrsna"
            inputs = ", ".join(f"Vector* {group}" for group in groups)
            name = f"{'backward' if adjoint else 'forward'}{k}"
            text += f'extern "C" void {name}({inputs}) {{ {statements(cell, adjoint)} }}\n'
    source = tmp_path / "cells.cpp"
    source.write_text(text)
    command = ["g++", "-O1", "-march=native", "-std=gnu++17", "-shared", "-fPIC", "-Wno-psabi"]
    command += [f"-I{native.SOURCES}", str(source), "-o", str(tmp_path / "cells.so")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    library = ctypes.CDLL(str(tmp_path / "cells.so"))
    LANES = 8
    for k, cell in enumerate(found):
        sizes = dict(x=cell.gates, r=cell.gates, a=cell.saved)

        def arrays(groups: str, sizes: Any = sizes, cell: Cell = cell) -> list[Any]:
            return [aligned(sizes.get(group, cell.states), LANES) for group in groups]

        x, r, s, n, a = arrays("xrsna")
        for values in (x, r, s):
            values[...] = np.random.default_rng(k).normal(size=values.shape)
        getattr(library, f"forward{k}")(
            *(v.ctypes.data_as(ctypes.c_void_p) for v in (x, r, s, n, a))
        )
        as_tensors = [[torch.from_numpy(row.copy()) for row in group] for group in (x, r, s)]
        s_next, saved = cell.forward(*as_tensors)
        compare(n, s_next)
        compare(a, saved)
        d, dx, dr, p = arrays("dxrp")
        d[...] = np.random.default_rng(99).normal(size=d.shape)
        run(library, f"backward{k}", (a, s, n, d, dx, dr, p))
        ds = [torch.from_numpy(row.copy()) for row in d]
        wanted = cell.backward(saved, as_tensors[2], s_next, ds)
        compare(p, wanted[2])
        compare(dr, wanted[1])
        compare(dx, wanted[0])


def run(library: Any, name: str, arrays: tuple[Any, ...]) -> None:
    getattr(library, name)(*(array.ctypes.data_as(ctypes.c_void_p) for array in arrays))


def aligned(rows: int, lanes: int) -> Any:
    """[rows, lanes] doubles at a multiple of 64 bytes, as vectors are."""
    memory = np.zeros(rows * lanes + 8)
    skip = -memory.ctypes.data % 64 // 8
    return memory[skip : skip + rows * lanes].reshape(rows, lanes)


def compare(found: Any, wanted: Any) -> None:
    if len(wanted):
        np.testing.assert_allclose(found, torch.stack([*wanted]).numpy(), rtol=1e-11, atol=1e-11)


def test_source_can_be_read() -> None:
    """The derived functions are there to be looked at."""
    assert inspect.getsource(rnn.cells.mgu.forward).startswith("def forward(x, r, s):")
    assert "return " in inspect.getsource(rnn.cells.mgu.backward)


def _step(x: Any, r: Any, s: Any) -> Any:
    return (tanh(x[0] + r[0]),)


def test_one_object() -> None:
    """Copies and pickles are the cell itself, by which compiled programs are found."""
    cell = Cell("mine", _step)
    assert copy.copy(cell) is cell and copy.deepcopy(cell) is cell
    assert pickle.loads(pickle.dumps(cell)) is cell
    assert pickle.loads(pickle.dumps(cells.lstm)) is cells.lstm


def test_register() -> None:
    cell = rnn.register(Cell("test_register", _step))
    assert rnn.register(Cell("test_register", lambda x, r, s: (tanh(x[0] + r[0]),))) is cell
    with pytest.raises(ValueError, match="another cell of the name 'test_register'"):
        rnn.register(Cell("test_register", lambda x, r, s: (sigmoid(x[0] + r[0]),)))
    with pytest.raises(ValueError, match="another cell of the name 'lstm'"):
        rnn.register(Cell("lstm", _step))
    with pytest.raises(TypeError, match="to be a Cell, got str"):
        rnn.register("lstm")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="register it first"):
        cells.registered("unknown")


def test_elementwise_jacobian() -> None:
    """Of an LSTM: f for c, and nothing of h."""
    step = rnn.cells.cifg.recorded()
    h, c = elementwise_jacobian(step)
    lines = {line.result: line.operation for line in step.tape.lines}
    assert h == 0 and lines[c] == "sigmoid"


def _by_hand(x: Any, r: Any, s: Any) -> Any:
    return (tanh(x[0] + r[0]),), ()


def _right(saved: Any, s: Any, s_next: Any, ds: Any) -> Any:
    d = (ds[0] * (1 - s_next[0] * s_next[0]),)
    return d, d, (0 * ds[0],)


def _wrong(saved: Any, s: Any, s_next: Any, ds: Any) -> Any:
    d = (ds[0] * (1 + s_next[0] * s_next[0]),)
    return d, d, (0 * ds[0],)


def test_check() -> None:
    Cell("right", _by_hand, _right, check=True)
    with pytest.raises(ValueError, match=r"backward of the cell 'wrong' is wrong: dx\[0\]"):
        Cell("wrong", _by_hand, _wrong, check=True)


def _power(x: Any, r: Any, s: Any) -> Any:
    y = x[0] ** 2
    return (y,)


def _log(x: Any, r: Any, s: Any) -> Any:
    return (x[0].log(),)


def _branch(x: Any, r: Any, s: Any) -> Any:
    y = x[0] if x[0] else r[0]
    return (y,)


def _two(x: Any, r: Any, s: Any) -> Any:
    return x[0], r[0]


def _no_tuple(x: Any, r: Any, s: Any) -> Any:
    return tanh(x[0] + r[0])


def _nested(x: Any, r: Any, s: Any) -> Any:
    return ((x[0],),)


def _tensor(x: Any, r: Any, s: Any) -> Any:
    return (x[0] * torch.ones(3),)


def _infinite(x: Any, r: Any, s: Any) -> Any:
    return (x[0] * float("inf"),)


@pytest.mark.parametrize(
    ("step", "words", "line"),
    [
        (_power, ("_power", "**"), "y = x[0] ** 2"),
        (_log, ("_log", "'log'"), "return (x[0].log(),)"),
        (_branch, ("_branch", "no branches"), "y = x[0] if x[0] else r[0]"),
        (_two, ("_two", "the new states, 1, got 2"), "return x[0], r[0]"),
        (_no_tuple, ("a tuple: for one state, (h,)",), "return tanh(x[0] + r[0])"),
        (_nested, ("state 0 is a tuple",), "return ((x[0],),)"),
        (_tensor, ("_tensor", "constants are Python's numbers"), "return (x[0] * torch.ones(3),)"),
        (_infinite, ("inf is no finite number",), 'return (x[0] * float("inf"),)'),
        (len, ("to be functions", "builtin"), ""),
    ],
)
def test_mistakes(step: Any, words: tuple[str, ...], line: str) -> None:
    with pytest.raises(TypeError) as caught:
        Cell("wrong", step)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(line), message


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        (dict(gates=0), ValueError),
        (dict(states=0), ValueError),
        (dict(constants=1), ValueError),
        (dict(gates=1.0), TypeError),
        (dict(gates=True), TypeError),
    ],
)
def test_sizes(sizes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="gates"):
        Cell("wrong", _step, **sizes)


def test_freedom_of_a_step() -> None:
    """Closures, default arguments, loops, and functions of its own: only what they do counts."""
    scale = 0.5

    def gate(v: Any) -> Any:
        return sigmoid(v)

    def step(x: Any, r: Any, s: Any, power: int = 3) -> Any:
        total = s[0]
        for k in range(power - 1):
            total = total * gate(x[k] + r[k])
        return (scale * total + tanh(x[0]),)

    cell = Cell("free", step, gates=2)
    check_adjoint(cell)
    check_plans(cell, [Plan("numpy")])
