"""Layer norm in the kernels of the CPU, C++ and the reference, against the loop in plain torch of
test_extensions.py: values and all gradients."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rnn
from rnn.kernels.plan import Plan
from tests.rnn.test_checkpoint import T as LONG
from tests.rnn.test_checkpoint import kept, same_bits
from tests.rnn.test_checkpoint import results as checkpointed
from tests.rnn.test_extensions import DOUBLE, NAMES, OPTIONS, compare, make, randomized

REFERENCE = Plan("numpy")


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """Nothing here runs step by step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rnn.* runs step by step")
        yield


def normalized(name: str, *args: Any, **options: Any) -> Any:
    return randomized(make(name, *args, layer_norm=True, **options))


def compare_all(name: str, plan: Plan | None) -> None:
    layer = normalized(name, 4, 6, 2, bidirectional=True, plan=plan)
    compare(name, layer)
    compare(name, layer, hx=False, lengths=torch.tensor([5, 0, 3]))
    # Units that are more than some vectors, and no multiple of one
    compare(name, normalized(name, 4, 37, bias=False, plan=plan))


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    compare_all(name, REFERENCE)


@pytest.mark.parametrize(
    "name",
    ["LSTM", "GRU", *(pytest.param(name, marks=pytest.mark.slow) for name in ("RNN", "Recurrent"))],
)
def test_native(name: str) -> None:
    compare_all(name, None)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *((name, REFERENCE) for name in NAMES),
        pytest.param("LSTM", None, marks=pytest.mark.slow),
        pytest.param("GRU", None, marks=pytest.mark.slow),
        pytest.param("Recurrent", None, marks=pytest.mark.slow),
    ],
)
def test_with_all_others(name: str, plan: Plan | None) -> None:
    layer = normalized(name, 4, 6, 2, bidirectional=True, plan=plan, **OPTIONS["all"])
    compare(name, layer)
    compare(name, layer, lengths=torch.tensor([5, 0, 3]))
    layer.eval()
    compare(name, layer, hx=False)


def test_a_cell_with_constants() -> None:
    """The peephole LSTM: as step by step, which a plan for a GPU's kernels has."""
    layer = randomized(
        rnn.Recurrent(rnn.cells.peephole_lstm, 4, 6, layer_norm=True, dtype=DOUBLE, plan=REFERENCE)
    )
    same_as_step_by_step(layer)


def test_a_cell_without_a_product() -> None:
    """IndRNN does not use W_hh h: step by step."""
    layer = rnn.Recurrent(rnn.cells.indrnn, 4, 6, layer_norm=True, plan=REFERENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "does not use W_hh h" in rnn.explain(layer, torch.randn(5, 3, 4))


def same_as_step_by_step(layer: Any, **more: Any) -> None:
    x = torch.randn(7, 5, 4, dtype=DOUBLE)
    found = []
    for plan in (layer.plan, Plan("cupy")):
        layer.plan = plan
        leaf = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "rnn.* runs step by step")
            y, last, states = layer(leaf, return_states=True, **more)
        ends = last if isinstance(last, tuple) else (last,)
        every = states if isinstance(states, tuple) else (states,)
        loss = sum(t.sin().sum() for t in (y, *ends, *every))
        grads = torch.autograd.grad(loss, [leaf, *layer.parameters()])
        found.append([y, *ends, *every, *grads])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("plan", [REFERENCE, None], ids=["reference", "native"])
def test_resets(plan: Plan | None, batch_first: bool) -> None:
    layer = normalized("LSTM", 4, 6, 2, bidirectional=True, batch_first=batch_first, plan=plan)
    same_as_step_by_step(layer, resets=torch.rand(7, 5) < 0.3)
    lengths = [5, 3, 0, 2, 4, 5, 1] if batch_first else [7, 3, 0, 2, 4]
    same_as_step_by_step(layer, lengths=torch.tensor(lengths))


def test_packed() -> None:
    """As with lengths."""
    layer = normalized("GRU", 4, 6, bidirectional=True)
    x = torch.randn(5, 3, 4, dtype=DOUBLE, requires_grad=True)
    lengths = [5, 2, 4]
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    found = []
    for given, more in ((packed, {}), (x, dict(lengths=lengths))):
        y, h = layer(given, **more)
        y = y if more else nn.utils.rnn.pad_packed_sequence(y)[0]
        grads = torch.autograd.grad((y.sin().sum() + h.sum()), [x, *layer.parameters()])
        found.append([y, h, *grads])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_padding_reaches_nothing() -> None:
    layer = normalized("LSTM", 4, 6, bidirectional=True)
    x = torch.randn(5, 3, 4, dtype=DOUBLE)
    x[3:, 1] = torch.nan
    x.requires_grad_()
    y, _ = layer(x, lengths=[5, 3, 0])
    assert y.isfinite().all()
    grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


def test_second_derivatives() -> None:
    """By the composite, with the same cell."""
    layer = normalized("LSTM", 3, 4)
    x = torch.randn(3, 2, 3, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


def test_recompute_and_without_gradients() -> None:
    layer = normalized("LSTM", 4, 6)
    x = torch.randn(5, 3, 4, dtype=DOUBLE)
    found = []
    for recompute in (False, True):
        layer.recompute = recompute
        y, _ = layer(x)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [*layer.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(layer(x)[0], found[0][0])


@pytest.mark.parametrize("threads", [1, 2])
def test_float32(threads: int) -> None:
    """Errors of float32, by those of the loop in torch; more sequences than a group has."""
    torch.manual_seed(0)
    exact = normalized("LSTM", 9, 50)
    single = make("LSTM", 9, 50, layer_norm=True, dtype=torch.float32)
    single.load_state_dict(exact.state_dict())
    x = torch.randn(20, 13, 9, dtype=DOUBLE)

    def results(layer: Any, x: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "rnn.* runs step by step")
            y, _ = layer(leaf)
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])]

    want = results(exact, x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = results(single, x.float())
    finally:
        torch.set_num_threads(before)
    single.plan = Plan("cupy")  # step by step
    theirs = results(single, x.float())
    for right, ours, other in zip(want, found, theirs):
        scale = float(right.abs().max())
        error, allowed = (float((t.double() - right).abs().max()) for t in (ours, other))
        assert error <= 4 * allowed + 1e-6 * scale


def test_explained() -> None:
    layer = rnn.LSTM(4, 6, 2, layer_norm=True, plan=REFERENCE)
    lines = rnn.explain(layer, torch.randn(5, 3, 4)).splitlines()
    assert len(lines) == 2 and all("NumPy, with layer_norm" in line for line in lines)


def of_checkpoint(name: str, every: Any, **options: Any) -> Any:
    """Few units, so that many steps are quick."""
    torch.manual_seed(0)
    return make(name, 3, 130 if name == "RNN" else 19, layer_norm=True, checkpoint=every, **options)


@pytest.mark.parametrize(
    "name", ["LSTM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("RNN", "GRU"))]
)
def test_checkpoint(name: str) -> None:
    """The same bits, and of what was kept a part: the rest is computed once more."""
    x = torch.randn(LONG, 1, 3, dtype=DOUBLE)
    plain = checkpointed(of_checkpoint(name, False), x)
    for every in (True, 1, LONG // 2):
        assert same_bits(checkpointed(of_checkpoint(name, every), x), plain)
    every, few = (kept(of_checkpoint(name, some), x) for some in (False, True))
    assert few < every / 4


def test_checkpoint_with_lengths_and_resets() -> None:
    x = torch.randn(LONG, 4, 3, dtype=DOUBLE)
    lengths = torch.tensor([LONG, 0, LONG // 2, LONG - 1])
    resets = torch.rand(LONG, 4) < 0.01
    # at the borders of windows too
    resets[:: LONG // 100] = True
    for masks in ((lengths, None), (None, resets), (lengths, resets)):
        plain, found = (
            checkpointed(of_checkpoint("LSTM", every), x, *masks) for every in (False, True)
        )
        assert same_bits(found, plain)


@pytest.mark.parametrize("plan", [REFERENCE, None], ids=["reference", "native"])
def test_checkpoint_of_two_directions(plan: Plan | None) -> None:
    """Each by itself: sums over other windows."""
    T = 60 if plan else LONG
    options = dict(bidirectional=True, num_layers=2, plan=plan, batch_first=True)
    x = torch.randn(2, T, 3, dtype=DOUBLE)
    resets = torch.rand(2, T) < 0.1
    plain, found = (
        checkpointed(of_checkpoint("GRU", every, **options), x, torch.tensor([T, T - 7]), resets)
        for every in (False, True)
    )
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)


def test_second_derivatives_with_checkpoint() -> None:
    layer = normalized("LSTM", 2, 3, checkpoint=2, plan=REFERENCE)
    x = torch.randn(3, 1, 2, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


def test_compiled() -> None:
    """An operator in the graph, as of other layers; in float64, whose sums a compiler orders."""
    layer = normalized("GRU", 4, 6, batch_first=True, recurrent_dropout=0.3).eval()
    x = torch.randn(3, 5, 4, dtype=DOUBLE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for more in ({}, dict(lengths=torch.tensor([5, 0, 3]))):
        found = []
        for run in (compiled, layer):
            leaf = x.clone().requires_grad_()
            y, h = run(leaf, **more)
            loss = y.sin().sum() + h.cos().sum()
            grads = torch.autograd.grad(loss, [leaf, *layer.parameters()])
            found.append([y, h, *grads])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    program = torch.export.export(layer, (x,))
    assert str(program.graph).count("fused_rnn.forward") == 1
    assert torch.equal(program.module()(x)[0], layer(x)[0])


def test_flops() -> None:
    """Of the products with x and with h."""
    layer = normalized("GRU", 4, 6)
    with FlopCounterMode(display=False) as counter:
        y, _ = layer(torch.randn(5, 3, 4, dtype=DOUBLE))
    rows, gates = 5 * 3, 3 * 6
    assert counter.get_total_flops() == 2 * rows * gates * (4 + 6)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # of W_ih and of W_hh, and back through W_hh: gains are among the states that need gradients
    assert counter.get_total_flops() == 2 * gates * rows * (4 + 6 + 6)
