"""The recurrence on the CPU: every cell, in NumPy and in C++."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rnn
from rnn import dispatch
from rnn.kernels import cells
from rnn.kernels.plan import Plan
from tests.cases import (
    NAMES,
    OF_EACH_SIZE,
    Case,
    cell_of,
    check,
    check_recurrence,
    close,
    evaluate,
    operands,
    right,
    thrice,
)
from tests.small import pair

PLANS = [Plan("numpy"), Plan("native")]
KINDS = [("RNN", "tanh"), ("RNN", "relu"), ("LSTM", ""), ("GRU", "")]
# Whole tiles and part of one, several tiles of rows, and of sequences as many as threads or fewer,
# so that these share the units.
SIZES = [(7, 13, 3, 40), (3, 1, 5, 33), (4, 70, 17, 65), (2, 3, 40, 300)]
# Gradients of W too large for each group of sequences to have its own.
SHARED = (3, 50, 3, 200)


def available(name: str, plan: Plan) -> None:
    if plan.backend == "native" and not dispatch.native_available(
        getattr(cells, name), torch.float32
    ):
        pytest.skip("there is no C++ compiler that works")


def suited(plan: Plan, dtype: torch.dtype) -> Plan | None:
    """The plan, or the layer's own choice where that is not for the dtype or the machine."""
    works = plan.backend != "native" or dispatch.native_available(cells.rnn_tanh, torch.float32)
    return plan if dtype in (torch.float32, torch.float64) and works else None


every_plan = pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.backend)
every_cell = pytest.mark.parametrize("cell", NAMES)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


@every_plan
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
@pytest.mark.parametrize(
    "reverse", [(False,), (True,), (False, True), (True, False, False)], ids=str
)
@every_cell
def test_cells(cell: str, plan: Plan, reverse: tuple[bool, ...], form: str, resets: bool) -> None:
    available(cell, plan)
    check_recurrence(cell, plan, (5, 6, 3, 9), reverse, form, resets)


@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_cell
def test_no_bias(cell: str, plan: Plan, dtype: torch.dtype) -> None:
    available(cell, plan)
    check_recurrence(cell, plan, (6, 4, 5, 20), bias=False, dtype=dtype)


@every_plan
@every_cell
def test_long(cell: str, plan: Plan) -> None:
    available(cell, plan)
    check_recurrence(cell, plan, (100, 2, 3, 30))


@every_plan
@pytest.mark.parametrize(
    ("reverse", "form"),
    [((True,), "padded"), ((False, True), "lengths"), ((False,), "packed")],
    ids=str,
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@every_cell
def test_sizes(
    cell: str, plan: Plan, sizes: tuple[int, int, int, int], reverse: tuple[bool, ...], form: str
) -> None:
    available(cell, plan)
    check_recurrence(cell, plan, sizes, reverse, form, form != "padded")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of few rows."""
    monkeypatch.setattr("rnn.kernels.plan.WINDOW", 0)
    monkeypatch.setattr("rnn.kernels.plan.WINDOW_ROWS", 24)


@pytest.mark.parametrize("plan", [Plan("native")], ids=lambda plan: plan.backend)
@pytest.mark.parametrize(
    ("reverse", "form"),
    [((True,), "padded"), ((False, True, True), "padded"), ((False,), "packed")],
    ids=str,
)
@pytest.mark.parametrize(
    "sizes", [SIZES[0], pytest.param(SIZES[2], marks=pytest.mark.slow), SIZES[3], SHARED], ids=str
)
@pytest.mark.parametrize("cell", OF_EACH_SIZE)
def test_threads(
    cell: str,
    plan: Plan,
    sizes: tuple[int, int, int, int],
    reverse: tuple[bool, ...],
    form: str,
    threads: Callable[[int], None],
    few: None,
) -> None:
    """More than there are processors, recurrences or sequences, and fewer."""
    available(cell, plan)
    for count in (1, 2, 3, 5):
        threads(count)
        check_recurrence(cell, plan, sizes, reverse, form)


class TestWindows:
    @every_plan
    @pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
    @pytest.mark.parametrize("reverse", [(False,), (True,), (True, False)], ids=str)
    @every_cell
    def test_few_steps(
        self, cell: str, plan: Plan, reverse: tuple[bool, ...], form: str, few: None
    ) -> None:
        available(cell, plan)
        check_recurrence(cell, plan, (20, 4, 3, 9), reverse, form, True)

    @every_plan
    @every_cell
    def test_nothing_is_asked_of_a_window(self, cell: str, plan: Plan, few: None) -> None:
        """Neither resets, nor biases, nor lengths."""
        available(cell, plan)
        check_recurrence(cell, plan, (19, 3, 5, 20), (False, True), bias=False)

    @every_plan
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_many_rows(self, kind: tuple[str, str], plan: Plan) -> None:
        """As many as windows are for."""
        mode, nonlinearity = kind
        available(cell_of(mode).name, plan)
        case = Case(
            6, 400, 2, 170, bidirectional=True, mode=mode, nonlinearity=nonlinearity or "tanh"
        )
        thrice(lambda seed: check(case, plan, seed=seed))


def placed(where: str) -> Callable[[Any], Any]:
    """The same values elsewhere in memory."""

    def place(t: Tensor) -> Tensor:
        if where == "apart":
            return t.repeat_interleave(2, -1)[..., ::2]
        if where == "across":
            return t.mT.contiguous().mT if t.dim() > 1 else t
        return torch._neg_view(-t) if t.is_floating_point() else t

    return place


@every_plan
@pytest.mark.parametrize("where", ["apart", "across", "negated"])
@every_cell
def test_memory_of_any_layout(cell: str, plan: Plan, where: str) -> None:
    """Of everything that is given, and of the gradients."""
    available(cell, plan)
    given = cell, (5, 6, 3, 9), (False, True), "lengths", True
    close(evaluate(operands(*given), plan, place=placed(where)), *right(*given))


@every_plan
@pytest.mark.parametrize(("form", "sizes"), [("padded", SIZES[0]), ("packed", SIZES[2])], ids=str)
@every_cell
def test_same_bits_twice(
    cell: str, plan: Plan, form: str, sizes: tuple[int, int, int, int]
) -> None:
    available(cell, plan)
    o = operands(cell, sizes, (False, True), form, True)
    first = evaluate(o, plan)
    second = evaluate(o, plan)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_plan
@every_cell
def test_nothing_runs(cell: str, plan: Plan) -> None:
    """Every sequence has ended before its first step: the states go through, and so do their
    gradients."""
    available(cell, plan)
    o = operands(cell, (5, 6, 3, 9), (False, True), "lengths")._replace(
        lengths=torch.zeros(6, dtype=torch.int64)
    )
    found = evaluate(o, plan)
    assert torch.equal(found["last"], o.given[5]) and torch.equal(found["d_s0"], o.d[-1])
    assert not any(found[name].any() for name in found.keys() - {"last", "d_s0"})


@every_plan
@pytest.mark.parametrize("form", ["padded", "lengths"])
@every_cell
def test_no_sequences(cell: str, plan: Plan, form: str) -> None:
    available(cell, plan)
    found = evaluate(operands(cell, (5, 0, 3, 9), (False, True), form, True), plan)
    assert found["y"].shape == (5, 0, 18)
    assert not any(found[name].any() for name in found), "sums over nothing"


def layers(kind: tuple[str, str], plan: Plan, **options: Any) -> tuple[Any, Any]:
    """Torch's layer in float64 and ours in float32, with the same parameters."""
    mode, nonlinearity = kind
    available(cell_of(mode, nonlinearity).name, plan)
    options |= dict(nonlinearity=nonlinearity) if nonlinearity else {}
    theirs, ours = pair(mode, 3, 21, dtype=torch.float32, bidirectional=True, **options)
    ours.plan = plan
    return theirs.double(), ours


@every_plan
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_not_finite(kind: tuple[str, str], value: float, plan: Plan) -> None:
    """In one step of one sequence: forward and backward carry it where torch's do, nowhere else."""
    theirs, ours = layers(kind, plan)
    x = torch.randn(7, 5, 3)
    x[3, 2, 1] = value
    found = []
    for layer in (theirs, ours):
        leaf = x.to(layer.weight_hh_l0.dtype).requires_grad_()
        y, last = layer(leaf)
        ends = last if isinstance(last, tuple) else (last,)
        found.append([y, *ends, *torch.autograd.grad(y.sum(), [leaf, *layer.parameters()])])
    for want, got in zip(*found):
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


@every_plan
@every_cell
def test_large_arguments(cell: str, plan: Plan) -> None:
    """Of tanh and sigmoid, up to 1e4: no NaN, and errors that are those of rounding the
    arguments."""
    available(cell, plan)

    def compare(seed: int) -> None:
        o = operands(cell, (5, 6, 3, 21), (False, True), seed=seed)
        o = o._replace(given=[1e4 * t if k == 0 else t for k, t in enumerate(o.given)])
        got = evaluate(o, plan)
        assert all(t.isfinite().all() for t in got.values())
        close(got, evaluate(o, oracle=True), evaluate(o, dtype=torch.float64, oracle=True))

    thrice(compare)


def test_quiet() -> None:
    """NaN and infinities propagate without warnings, as in torch."""
    layer = rnn.RNN(3, 4, plan=Plan("numpy"))
    x = torch.full((3, 2, 3), torch.inf, requires_grad=True)
    for p in layer.parameters():
        torch.nn.init.constant_(p, 0.5)  # so that infinity meets 0 in the adjoint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)[0]
        y.backward(torch.full_like(y, torch.inf))
    want = torch.nn.RNN(3, 4)
    want.load_state_dict(layer.state_dict())
    other = x.detach().clone().requires_grad_()
    want(other)[0].backward(torch.full_like(y, torch.inf))
    assert x.grad is not None and other.grad is not None
    assert x.grad.isnan().any() and torch.equal(x.grad.isnan(), other.grad.isnan())
