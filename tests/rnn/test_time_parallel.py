"""Chunks of time side by side: the numbers of the sequential layer, or the sequential layer."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import rnn
from rnn.gate_products import with_products
from rnn.kernels import notices
from rnn.kernels.plan import Plan
from tests.cases import LAYER_NAMES

DOUBLE = torch.float64


def results(layer: Any, x: Tensor, hx: Any) -> list[Tensor]:
    """Values and all gradients, with the states of every step."""
    y, last, states = layer(x, hx, return_states=True)
    ends = [last] if isinstance(last, Tensor) else [*last]
    every = [states] if isinstance(states, Tensor) else [*states]
    first = [] if hx is None else [hx] if isinstance(hx, Tensor) else [*hx]
    loss = torch.stack([t.sin().sum() * (k + 1) for k, t in enumerate([y, *ends, *every])]).sum()
    grads = torch.autograd.grad(loss, [x, *first, *layer.parameters()])
    return [y, *ends, *every, *grads]


def compare(layer: Any, x: Tensor, hx: Any = None, limit: float = 1e-9) -> None:
    layer.time_parallel = False
    want = results(layer, x, hx)
    layer.time_parallel = rnn.TimeParallel(chunk=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = results(layer, x, hx)
    assert layer.last_time_parallel and all(r.converged for r in layer.last_time_parallel)
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", [*LAYER_NAMES, "cifg"])
def test_as_the_sequential_layer(name: str, bidirectional: bool) -> None:
    """T is no multiple of the chunk; two layers; given states."""
    options = dict(num_layers=2, bidirectional=bidirectional, dtype=DOUBLE, plan=Plan("numpy"))
    if name == "cifg":
        layer: Any = rnn.Recurrent(rnn.cells.cifg, 3, 6, **options)
    else:
        layer = getattr(rnn, name)(3, 6, batch_first=name == "GRU", **options)
    S = layer.layer_cell().states
    x = torch.randn((2, 71, 3) if name == "GRU" else (71, 2, 3), dtype=DOUBLE, requires_grad=True)
    shape = 2 * (1 + bidirectional), 2, 6
    hx = tuple(torch.randn(shape, dtype=DOUBLE, requires_grad=True) for _ in range(S))
    compare(layer, x, hx if S > 1 else hx[0])
    reports = layer.last_time_parallel
    assert len(reports) == 2 * (1 + bidirectional)
    assert all(r.passes > 1 and r.backward_passes > 1 for r in reports)


def test_with_options() -> None:
    """Heads, and a bias-free layer."""
    layer = rnn.LSTM(3, 6, bias=False, num_heads=2, dtype=DOUBLE, plan=Plan("numpy"))
    compare(layer, torch.randn(64, 2, 3, dtype=DOUBLE, requires_grad=True))


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_passes(name: str) -> None:
    """Few, with default initial values; and with what is exact after a pass, one."""
    layer = getattr(rnn, name)(8, 32, dtype=DOUBLE)
    layer.time_parallel = rnn.TimeParallel(64, tol=1e-10)
    x = torch.randn(1024, 1, 8, dtype=DOUBLE)
    with torch.no_grad():
        layer(x)
    assert layer.last_time_parallel[0].passes <= 3


def test_products_need_fewer_passes() -> None:
    """An LSTM that remembers: the correction by its forget gates settles what is far away."""
    torch.manual_seed(0)
    layer: Any = rnn.LSTM(4, 8, dtype=DOUBLE, plan=Plan("numpy"))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.1)
        layer.bias_ih_l0[8:16] = 6.0
    x = torch.randn(512, 1, 4, dtype=DOUBLE)
    layer.time_parallel = rnn.TimeParallel(16, max_passes=40, tol=1e-9)
    passes = []
    for plain in (False, True):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            if plain:
                patch.setattr(rnn.time_parallel, "with_products", lambda cell: (cell, []))
            layer(x)
        passes.append(layer.last_time_parallel[0].passes)
    assert passes[0] * 2 <= passes[1]


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_chaos_is_sequential(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not settle is what the sequential layer gives, said once."""
    monkeypatch.setattr(notices, "_given", set())
    torch.manual_seed(0)
    layer = getattr(rnn, name)(4, 32, plan=Plan("numpy"))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(30)
    x = torch.randn(130, 1, 4)
    want = layer(x)
    layer.time_parallel = rnn.TimeParallel(32, max_passes=2)
    with pytest.warns(UserWarning, match="one step after the other") as said:
        got = layer(x)
    assert [w.filename for w in said] == [__file__]
    assert torch.equal(got[0], want[0]) and not layer.last_time_parallel[0].converged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def test_nan_is_sequential() -> None:
    layer = rnn.GRU(4, 8, plan=Plan("numpy"))
    x = torch.randn(130, 1, 4)
    x[20:] = torch.nan
    want = layer(x)[0]
    layer.time_parallel = rnn.TimeParallel(32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = layer(x)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", ["lengths", "resets", "packed", "short"])
def test_what_is_not_cut(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequential layer, said once; of a short sequence there is nothing to be said."""
    monkeypatch.setattr(notices, "_given", set())
    layer = rnn.RNN(4, 8, plan=Plan("numpy"))
    x: Any = torch.randn(12 if form == "short" else 70, 2, 4)
    more: dict[str, Any] = {}
    if form == "lengths":
        more = dict(lengths=[70, 3])
    elif form == "resets":
        more = dict(resets=torch.rand(70, 2) < 0.1)
    elif form == "packed":
        x = torch.nn.utils.rnn.pack_sequence([torch.randn(70, 4), torch.randn(3, 4)])
    want = layer(x, **more)[0]
    layer.time_parallel = rnn.TimeParallel(16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = layer(x, **more)[0]
    assert [w.filename for w in said if "whole sequences" in str(w.message)] == (
        [] if form == "short" else [__file__]
    )
    data = [t.data if form == "packed" else t for t in (got, want)]
    assert torch.equal(*data) and not layer.last_time_parallel


def test_compiled() -> None:
    """One graph, of the sequential layer."""
    layer = rnn.GRU(4, 8, plan=Plan("numpy"), time_parallel=rnn.TimeParallel(16))
    x = torch.randn(64, 2, 4)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_no_sequences() -> None:
    layer = rnn.GRU(4, 6, bidirectional=True, time_parallel=rnn.TimeParallel(2))
    x = torch.zeros(9, 0, 4, requires_grad=True)
    y, last = layer(x)
    y.sum().backward()
    assert y.shape == (9, 0, 12) and last.shape == (2, 0, 6)


def test_never_by_itself() -> None:
    layer = rnn.RNN(4, 8)
    layer(torch.randn(200, 1, 4))
    assert not layer.time_parallel and not layer.last_time_parallel


def test_cells_with_products() -> None:
    cell, gated = with_products(rnn.kernels.cells.lstm)
    assert gated == [1] and (cell.gates, cell.states) == (4, 3)
    assert with_products(rnn.kernels.cells.rnn_tanh)[1] == []
    assert with_products(rnn.kernels.cells.gru)[1] == [0]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("yes", TypeError),
        (3, TypeError),
        (rnn.TimeParallel(0), ValueError),
        (rnn.TimeParallel(max_passes=0), ValueError),
        (rnn.TimeParallel(8.0), TypeError),  # type: ignore[arg-type]
        (rnn.TimeParallel(tol=2.0), ValueError),
        (rnn.TimeParallel(tol="0"), TypeError),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_mistakes(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="time_parallel"):
        rnn.LSTM(4, 6, time_parallel=value)
    layer = rnn.LSTM(4, 6)
    with pytest.raises(error, match="time_parallel"):
        layer.time_parallel = value


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_batched_gradients(name: str) -> None:
    """Many gradients at once are those one by one, and each can be differentiated again."""
    layer = getattr(rnn, name)(3, 4, bidirectional=True, dtype=DOUBLE, plan=Plan("numpy"))
    x = torch.randn(20, 2, 3, dtype=DOUBLE, requires_grad=True)
    inputs = [x, *layer.parameters()]
    layer.time_parallel = rnn.TimeParallel(chunk=5, max_passes=20)
    y, _ = layer(x)
    assert all(report.converged for report in layer.last_time_parallel)
    many = torch.randn(3, *y.shape, dtype=DOUBLE)
    found = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in many]
    want = [torch.stack(grads) for grads in zip(*each)]
    torch.testing.assert_close([*found], want, rtol=1e-8, atol=1e-8)

    def second() -> Any:
        y, last = layer(x)
        ends = [last] if isinstance(last, Tensor) else [*last]
        loss = y.sin().sum() + sum(end.cos().sum() for end in ends)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs)

    chunked = second()
    layer.time_parallel = False
    torch.testing.assert_close(chunked, second(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    layer = rnn.LSTM(3, 4, dtype=DOUBLE, plan=Plan("numpy"))
    x = torch.randn(20, 2, 3, dtype=DOUBLE)
    want = layer(x)[0]
    layer.time_parallel = rnn.TimeParallel(chunk=5)
    with mode():
        got = layer(x)[0]
    assert layer.last_time_parallel[0].converged and not got.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
