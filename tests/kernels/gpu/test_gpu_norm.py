"""Layer norm in Triton's kernels, whose blocks have rows of hidden units in one place: on a GPU if
there is one, else in Triton's interpreter. The oracles are loops in plain torch: of
test_extensions.py, and step by step in torch's operations."""

import itertools
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn
from rnn import dispatch
from rnn.kernels import notices
from rnn.kernels.plan import Plan
from rnn.kernels.planner import NoPlan, make_plan
from rnn.normalized import layer_cell
from tests.cases import LAYER_NAMES
from tests.kernels.gpu.test_gpu import DEVICE, H200, HALF
from tests.rnn.test_extensions import DOUBLE, OPTIONS, by_hand, randomized

STEP_BY_STEP = Plan("cupy")
I, B, T = 5, 3, 3
ENDS = torch.tensor([3, 0, 2])


def plan_for(layer: Any, dtype: torch.dtype) -> Plan:
    """That of a GPU."""
    sizes = B, I, layer.hidden_size // layer.num_heads, 1
    return make_plan(layer_cell(layer), sizes, str(dtype).removeprefix("torch."), H200)


def pair(name: str, dtype: torch.dtype, H: int = 13, **options: Any) -> tuple[Any, Any]:
    """A layer in float64, step by step, and the same one in Triton, of the same weights."""
    make = getattr(rnn, name)
    options |= dict(layer_norm=True, device=DEVICE)
    ours = randomized(make(I, H, dtype=dtype, **options))
    exact = make(I, H, dtype=DOUBLE, plan=STEP_BY_STEP, **options)
    exact.load_state_dict(ours.state_dict())
    ours.plan = plan_for(ours, dtype)
    return exact, ours


def results(layer: Any, x: Any, **more: Any) -> list[Tensor]:
    """y, the last states and all gradients, in float64."""
    packed = isinstance(x, nn.utils.rnn.PackedSequence)
    weight = layer.weight_ih_l0
    leaf = (x.data if packed else x).to(weight).requires_grad_()
    given = x._replace(data=leaf) if packed else leaf
    y, last = layer(given, **more)
    ends = last if isinstance(last, tuple) else (last,)
    outputs = [y.data if packed else y, *ends]
    loss = sum((t.double().sin() * (k + 1)).sum() for k, t in enumerate(outputs))
    grads = torch.autograd.grad(loss, [leaf, *layer.parameters()])
    return [t.detach().double().cpu() for t in (*outputs, *grads)]


def check(exact: Any, ours: Any, x: Any, **more: Any) -> None:
    """The largest error, relative to the largest number of its tensor, by that of the loop in torch
    in the same dtype."""
    want = results(exact, x, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rnn.* runs step by step")
        found = results(ours, x, **more)
    plan = ours.plan
    ours.plan = STEP_BY_STEP
    theirs = results(ours, x, **more)
    ours.plan = plan
    worst, allowed = (
        max(float((t - right).abs().max() / right.abs().max()) for t, right in zip(each, want))
        for each in (found, theirs)
    )
    assert len(found) == len(want)
    assert worst <= 4 * allowed


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rnn.* runs step by step")
        yield


def some(chosen: list[tuple[Any, Any]], others: Iterable[tuple[Any, Any]]) -> list[Any]:
    """All pairs, of which those that are not chosen are slow."""
    more = [pair for pair in others if pair not in chosen]
    return [*chosen, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in more)]


@pytest.mark.parametrize(
    ("name", "bias"),
    some(
        [("RNN", True), ("LSTM", False), ("GRU", True)],
        itertools.product(LAYER_NAMES, (True, False)),
    ),
)
def test_by_hand(name: str, bias: bool) -> None:
    """Against the loop that knows none of our cells."""
    _, ours = pair(name, torch.float32, 21, bias=bias, bidirectional=True)
    S = ours.layer_cell().carried
    double = getattr(rnn, name)(I, 21, bias=bias, bidirectional=True, layer_norm=True, dtype=DOUBLE)
    double.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, dtype=DOUBLE)
    states = [torch.randn(2, B, 21, dtype=DOUBLE, requires_grad=True) for _ in range(S)]
    leaf = x.clone().requires_grad_()
    y, ends = by_hand(name, double, leaf, states, ENDS)
    want = [y, *ends, *_grads([y, *ends], [leaf, *states, *double.parameters()])]
    given = [s.detach().float().to(DEVICE).requires_grad_() for s in states]
    leaf = x.float().to(DEVICE).requires_grad_()
    y, last = ours(leaf, tuple(given) if S > 1 else given[0], lengths=ENDS)
    ends = [*last] if S > 1 else [last]
    found = [y, *ends, *_grads([y, *ends], [leaf, *given, *ours.parameters()])]
    for right, own in zip(want, found, strict=True):
        torch.testing.assert_close(own.double().cpu(), right, rtol=1e-4, atol=1e-4)


def _grads(outputs: Any, leaves: Any) -> Any:
    return torch.autograd.grad([t.sin().sum() for t in outputs], leaves)


@pytest.mark.parametrize(
    ("name", "form"),
    some(
        [("RNN", "padded"), ("LSTM", "resets"), ("GRU", "packed")],
        itertools.product(LAYER_NAMES, ("padded", "lengths", "resets", "packed")),
    ),
)
def test_float32(name: str, form: str) -> None:
    """Of two directions; units that are no power of two."""
    exact, ours = pair(name, torch.float32, bidirectional=True)
    x: Any = torch.randn(T, B, I, dtype=DOUBLE, device=DEVICE)
    more: dict[str, Any] = {}
    if form == "lengths":
        more = dict(lengths=ENDS)
        x[2:, 2] = torch.nan
    elif form == "resets":
        more = dict(lengths=ENDS, resets=(torch.rand(T, B) < 0.3).to(DEVICE))
    elif form == "packed":
        x = nn.utils.rnn.pack_padded_sequence(x, ENDS.clamp(min=1), enforce_sorted=False)
    check(exact, ours, x, **more)


def test_the_gradient_of_one_unit() -> None:
    """It comes to all units of the row, also where steps are left out that none comes to."""
    exact, ours = pair("LSTM", torch.float32)
    x = torch.randn(T, B, I, dtype=DOUBLE, device=DEVICE)
    resets = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 1]], device=DEVICE).bool()
    found = []
    for layer in (exact, ours):
        y, _ = layer(x.to(layer.weight_ih_l0), resets=resets)
        found.append(torch.autograd.grad(y[1:, :, 3].sum(), [*layer.parameters()]))
    for want, own in zip(*found, strict=True):
        torch.testing.assert_close(own.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"),
    some(
        [("RNN", torch.float16), ("LSTM", torch.bfloat16), ("GRU", torch.float16)],
        itertools.product(LAYER_NAMES, HALF),
    ),
)
def test_half(name: str, dtype: torch.dtype) -> None:
    """More sequences than a program has."""
    exact, ours = pair(name, dtype, batch_first=True)
    x = torch.randn(9, T, I, dtype=DOUBLE, device=DEVICE).to(dtype).double()
    check(exact, ours, x, lengths=ENDS.repeat(3))


def test_autocast() -> None:
    """All of it in autocast's dtype, as for other layers."""
    _, ours = pair("LSTM", torch.float32, num_layers=2)
    ours.plan = plan_for(ours, torch.bfloat16)
    half = rnn.LSTM(I, 13, 2, layer_norm=True, dtype=torch.bfloat16, device=DEVICE, plan=ours.plan)
    half.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, device=DEVICE)
    for given in (x, x.bfloat16()):
        with torch.autocast(DEVICE, torch.bfloat16):
            y, _ = ours(given)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, half(x.bfloat16())[0])
        grads = torch.autograd.grad(y.float().sin().sum(), [*ours.parameters()])
        assert {grad.dtype for grad in grads} == {torch.float32}


def test_with_all_others() -> None:
    """Each option, with the same masks."""
    _, ours = pair("GRU", torch.float32, 26, bidirectional=True, **OPTIONS["all"])
    x = torch.randn(T, B, I, device=DEVICE)
    found = []
    for plan in (ours.plan, STEP_BY_STEP):
        ours.plan = plan
        torch.manual_seed(3)
        found.append(results(ours, x, lengths=ENDS))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "H"), [("LSTM", 129), ("GRU", 200), ("RNN", 257)])
def test_rows_that_no_block_holds(name: str, H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step, which a warning and `explain` say."""
    layer = getattr(rnn, name)(I, H, layer_norm=True, dtype=torch.bfloat16)
    with pytest.raises(NoPlan, match=f"no kernel has the {H} hidden units"):
        plan_for(layer, torch.bfloat16)
    served = dispatch.Support("triton", torch.bfloat16, "")
    monkeypatch.setattr(dispatch, "served", lambda *_: served)
    monkeypatch.setattr(dispatch, "_plan", lambda cell, *_: plan_for(layer, torch.bfloat16))
    monkeypatch.setattr(notices, "_given", set())
    x = torch.randn(2, 3, I, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=f"no kernel has the {H} .*runs step by step"):
        layer(x)
    assert f"no kernel has the {H} hidden units" in rnn.explain(layer, x)


@pytest.mark.parametrize("scope", ["grid", "launch", "library"])
def test_plans_of_other_scopes(scope: str) -> None:
    """A program has some of the units alone: step by step."""
    layer = rnn.LSTM(I, 13, layer_norm=True, plan=Plan("triton", scope, 16, 16, 16, 1))
    words = rnn.explain(layer, torch.randn(2, 3, I))
    assert f"by the plan 'triton' of scope {scope!r}" in words
