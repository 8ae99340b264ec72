"""Initial values of layers: against their definitions, and by what a layer then does."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn
from rnn import cells
from rnn.gates import Memory, Side, memories
from tests.small import LAYERS

H = 6
# For arguments of wrong kinds
init: Any = rnn.init


def blocks(layer: Any, kind: str) -> list[Tensor]:
    """[gates, H, ...] of each parameter of that kind."""
    gates = {"RNN": 1, "LSTM": 4, "GRU": 3}[type(layer).__name__]
    named = [t for name, t in layer.named_parameters() if name.startswith(kind)]
    return [t.detach().unflatten(0, (gates, -1)) for t in named]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@LAYERS
def test_orthogonal(name: str, dtype: torch.dtype) -> None:
    layer = getattr(rnn, name)(3, H, num_layers=2, bidirectional=True, dtype=dtype)
    before = {n: t.clone() for n, t in layer.named_parameters()}
    assert rnn.init.orthogonal_(layer, gain=0.5) is layer
    atol = 1e-12 if dtype == torch.float64 else 0.02
    for w in blocks(layer, "weight_hh"):
        for block in w.double():
            torch.testing.assert_close(
                block @ block.T, torch.eye(H).double() / 4, rtol=0, atol=atol
            )
    for n, t in layer.named_parameters():
        assert t.dtype == dtype and t.requires_grad and t.grad_fn is None
        assert torch.equal(t, before[n]) == (not n.startswith("weight_hh"))


def test_orthogonal_projection() -> None:
    layer = rnn.init.orthogonal_(rnn.LSTM(3, H, proj_size=4))
    (w,) = blocks(layer, "weight_hh")
    for block in w:
        torch.testing.assert_close(block.T @ block, torch.eye(4))


def test_generator() -> None:
    """Bits that repeat, and none of the global generator's are used."""
    state = torch.random.get_rng_state()
    found = []
    for _ in range(2):
        layer: Any = rnn.LSTM(3, H, dtype=torch.float64)
        torch.random.set_rng_state(state)
        rnn.init.orthogonal_(layer, generator=torch.Generator().manual_seed(3))
        rnn.init.chrono_(layer, 50, generator=torch.Generator().manual_seed(3))
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append([layer.weight_hh_l0, layer.bias_ih_l0[:H]])
    assert all(map(torch.equal, *found))


@LAYERS
def test_identity(name: str) -> None:
    layer = rnn.init.identity_(getattr(rnn, name)(3, H, num_layers=2), scale=0.9)
    for w in blocks(layer, "weight_hh"):
        assert torch.equal(w, 0.9 * torch.eye(H).expand(w.shape))
    assert all(not b.any() for b in blocks(layer, "bias"))


def test_irnn_keeps_its_state() -> None:
    layer: Any = rnn.init.identity_(rnn.RNN(3, H, nonlinearity="relu"))
    h = torch.rand(1, 2, H)
    assert torch.equal(layer(torch.zeros(50, 2, 3), h)[1], h)
    bare: Any = rnn.init.identity_(rnn.RNN(3, H, nonlinearity="relu", bias=False))
    assert torch.equal(bare(torch.zeros(50, 2, 3), h)[1], h)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_forget_bias(name: str) -> None:
    """The gate of torch.nn's formula: with a large bias the state stays, with -50 it is gone."""
    layer = getattr(rnn, name)(3, H, num_layers=2, bidirectional=True)
    assert rnn.init.forget_bias_(layer, 1) is layer
    for b_ih, b_hh in zip(blocks(layer, "bias_ih"), blocks(layer, "bias_hh")):
        assert (b_ih[1] == 1).all() and not b_hh[1].any() and b_ih[0].any() and b_hh[0].any()
    one = getattr(nn, name)(3, H, dtype=torch.float64)
    ours = getattr(rnn, name)(3, H, dtype=torch.float64)
    x = torch.zeros(20, 2, 3, dtype=torch.float64)
    states = torch.rand(2, 1, 2, H, dtype=torch.float64)
    kept = {}
    for value in (50, -50):
        one.load_state_dict(rnn.init.forget_bias_(ours, value).state_dict())
        ends = [one(x, tuple(s) if name == "LSTM" else s[0])[1] for s in (states, states * 0)]
        with_state, without = (end[1] if name == "LSTM" else end for end in ends)
        kept[value] = (with_state - without).norm() / states[int(name == "LSTM")].norm()
    assert kept[50] > 0.5 and kept[-50] < 0.1


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_chrono(name: str) -> None:
    torch.manual_seed(0)
    units = 4000
    layer: Any = getattr(rnn, name)(1, units, num_layers=1)
    del layer._parameters["weight_hh_l0"]
    layer.register_parameter("weight_hh_l0", nn.Parameter(torch.empty(0)))
    others = [b[2:].clone() for b in blocks(layer, "bias")]
    assert rnn.init.chrono_(layer, 101) is layer
    b_ih, b_hh = (b for b in blocks(layer, "bias"))
    steps = b_ih[1].exp()
    assert steps.min() >= 1 and steps.max() <= 100.001
    # Of a uniform distribution of 4,000: three standard deviations
    assert abs(steps.mean() - 50.5) < 3 * 99 / math.sqrt(12 * units)
    assert not b_hh[1].any()
    if name == "LSTM":
        assert torch.equal(b_ih[0], -b_ih[1]) and not b_hh[0].any()
    assert all(map(torch.equal, (b[2:] for b in (b_ih, b_hh)), others))


def test_other_cells() -> None:
    """The gate is found in the algebra, with its sign: not by its name or place."""
    assert memories(cells.mgu) == [Memory(Side(0, -1), None)]
    assert memories(cells.cifg) == [Memory(Side(0, 1), None)]
    assert memories(cells.peephole_lstm) == [Memory(Side(1, 1), Side(0, -1))]
    assert memories(cells.indrnn) == []
    layer: Any = rnn.init.forget_bias_(rnn.Recurrent(cells.mgu, 3, H), 2.0)
    assert (layer.bias_ih_l0[:H] == -2).all() and not layer.bias_hh_l0[:H].any()


def test_heads() -> None:
    """The gates of each head by themselves."""
    layer: Any = rnn.init.chrono_(rnn.init.orthogonal_(rnn.LSTM(3, 2 * H, num_heads=2)), 20)
    for w, b in zip(layer.weight_hh_l0.detach().chunk(2), layer.bias_ih_l0.detach().chunk(2)):
        for block in w.chunk(4):
            torch.testing.assert_close(block @ block.T, torch.eye(H))
        i, f, _, _ = b.chunk(4)
        assert torch.equal(i, -f) and (f >= 0).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rnn.init.orthogonal_(nn.LSTM(3, 4)), TypeError, "layer of rnn"),
        (lambda: rnn.init.identity_(rnn.LSTMCell(3, 4)), TypeError, "layer of rnn"),
        (lambda: rnn.init.orthogonal_(rnn.RNN(3, 4), math.nan), ValueError, "gain"),
        (lambda: init.identity_(rnn.RNN(3, 4), "1"), TypeError, "scale"),
        (lambda: rnn.init.forget_bias_(rnn.RNN(3, 4)), ValueError, "rnn_tanh"),
        (lambda: rnn.init.forget_bias_(rnn.LSTM(3, 4), math.inf), ValueError, "value"),
        (lambda: rnn.init.forget_bias_(rnn.LSTM(3, 4, bias=False)), ValueError, "biases"),
        (lambda: rnn.init.chrono_(rnn.RNN(3, 4), 10), ValueError, "rnn_tanh"),
        (lambda: rnn.init.chrono_(rnn.GRU(3, 4), 1), ValueError, "max_steps"),
        (lambda: init.chrono_(rnn.GRU(3, 4), 10.0), TypeError, "max_steps"),
        (lambda: rnn.init.chrono_(rnn.GRU(3, 4, bias=False), 10), ValueError, "biases"),
    ],
)
def test_errors(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_parametrized() -> None:
    layer = nn.utils.parametrizations.weight_norm(rnn.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0"):
        rnn.init.orthogonal_(layer)
    rnn.init.forget_bias_(layer)
