"""One step without gradients, as in streaming: by itself, in C++ or by torch's own cells."""

from typing import Any

import pytest
import torch
from cases import close
from torch import Tensor, nn

import rnn
from rnn import compute, ops

KINDS = [("RNN", dict(nonlinearity="relu")), ("RNN", {}), ("LSTM", {}), ("GRU", {})]
OPTIONS = [{}, dict(bias=False), dict(num_layers=3), dict(batch_first=True), dict(num_layers=2, dropout=0.5)]


@pytest.fixture(params=["compiler", "no compiler"])
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `one_step` gives, call after call, with a compiler and without."""
    if request.param == "no compiler":
        monkeypatch.setattr(compute, "compiles", lambda cell: False)
    elif not compute.compiles(rnn.kernels.cells.gru):
        pytest.skip("there is no C++ compiler")
    found: list[Any] = []
    plain = ops.one_step

    def one_step(*given: Any) -> Any:
        found.append(plain(*given))
        return found[-1]

    monkeypatch.setattr(rnn.layers, "one_step", one_step)
    return found


def made(kind: tuple[str, dict[str, Any]], I: int, H: int, **options: Any) -> tuple[Any, Any, Any]:
    """Ours, torch.nn's, and torch.nn's in float64, with the same weights."""
    torch.manual_seed(0)
    name, chosen = kind
    layers = [getattr(library, name)(I, H, **chosen, **options).eval() for library in (rnn, nn, nn)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    return layers[0], layers[1], layers[2].double()


def flat(found: Any) -> dict[str, Tensor]:
    y, last = found
    return dict(y=y, **{f"last {k}": s for k, s in enumerate(last if isinstance(last, tuple) else [last])})


@pytest.mark.parametrize(("options", "sizes"), [
    *((options, (5, 17, 40)) for options in OPTIONS),
    *(({}, sizes) for sizes in ((1, 3, 5), (1, 64, 64), (3, 300, 100), (40, 7, 33), (0, 3, 4))),
], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps(kind: tuple[str, dict[str, Any]], options: dict[str, Any], sizes: tuple[int, int, int],
               taken: list[Any]) -> None:
    """Four steps, each with the state of the one before."""
    B, I, H = sizes
    layers, ends = made(kind, I, H, **options), [None] * 3
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, B, I).transpose(0, int(bool(options.get("batch_first"))))
            found: list[Any] = []
            for k, (layer, dtype) in enumerate(zip(layers, (torch.float32, torch.float32, torch.float64))):
                y, ends[k] = layer(x.to(dtype), ends[k])
                found.append(flat((y, ends[k])))
                assert y.is_contiguous()
            assert [(n, t.shape) for n, t in found[0].items()] == [(n, t.shape) for n, t in found[1].items()]
            if B:
                close(*found)
    assert len(taken) == 4 * options.get("num_layers", 1) and None not in taken


def test_memory_of_its_own(taken: list[Any]) -> None:
    """Nothing that is returned is in the place of another thing, or of what was given."""
    layer = rnn.LSTM(4, 4)
    x, h, c = (torch.randn(1, 2, 4) for _ in range(3))
    with torch.no_grad():
        y, (h_n, c_n) = layer(x, (h, c))
    assert taken and len({t.untyped_storage().data_ptr() for t in (x, h, c, y, h_n, c_n)}) == 6


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_float64(kind: tuple[str, dict[str, Any]], taken: list[Any]) -> None:
    ours, _, theirs = made(kind, 3, 5)
    with torch.inference_mode():
        x = torch.randn(1, 2, 3, dtype=torch.float64)
        torch.testing.assert_close(flat(ours.double()(x)), flat(theirs(x)), rtol=1e-13, atol=1e-13)
    assert None not in taken


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_not_plain(kind: tuple[str, dict[str, Any]], taken: list[Any]) -> None:
    """Left to the layer's other ways, which are right."""
    ours, _, theirs = made(kind, 3, 4)
    rows = torch.randn(6, 1, 2, 3)
    with torch.no_grad():
        want = theirs(rows[0].double())[0]
        strided = rows[0].mT.contiguous().mT
        layer = nn.utils.parametrizations.weight_norm(made(kind, 3, 4)[0], "weight_hh_l0")
        for got in (ours(strided)[0], ours(torch._neg_view(-rows[0]))[0], layer(rows[0])[0],
                    torch.vmap(lambda x: ours(x)[0])(rows)[0]):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        with pytest.raises((RuntimeError, ValueError)):
            ours(rows[0].double())
        with pytest.raises(RuntimeError):
            ours(torch.randn(1, 2, 5))
        with pytest.raises(RuntimeError):
            ours(rows[0], (torch.zeros(1, 3, 4),) * 2 if kind[0] == "LSTM" else torch.zeros(1, 3, 4))


def test_shapes_of_weights(taken: list[Any]) -> None:
    """Weights of another shape are refused, not read past their end."""
    layer: Any = rnn.RNN(3, 4)
    layer.weight_hh_l0.data = torch.randn(2, 2)
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight_hh"):
        layer(torch.randn(1, 2, 3))
    assert taken == [None]
