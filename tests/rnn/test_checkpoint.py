"""`checkpoint`: what it keeps, and that it changes no bit. The oracle of bits is the plain layer,
which other tests hold to torch.nn."""

from typing import Any

import pytest
import torch
from torch import Tensor

import rnn

# Lengths with more than one window in the C++, and few units so that they are quick.
T = 2600
LAYERS = {"RNN": rnn.RNN, "LSTM": rnn.LSTM, "GRU": rnn.GRU}


def layer(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    hidden = 130 if name == "RNN" else 19
    return LAYERS[name](3, hidden, **options)


def results(one: Any, x: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """y, the last states and all gradients, of x, of the states and of the parameters."""
    x = x.clone().requires_grad_()
    directions = 2 if one.bidirectional else 1
    shape = one.num_layers * directions, x.shape[0 if one.batch_first else 1], one.hidden_size
    generator = torch.Generator().manual_seed(1)

    def drawn(size: Any) -> Tensor:
        return torch.randn(size, generator=generator)

    states = [drawn(shape).requires_grad_() for _ in range(2 if one.mode == "LSTM" else 1)]
    y, last = one(x, tuple(states) if len(states) > 1 else states[0], lengths)
    outputs = [y, *([last] if torch.is_tensor(last) else last)]
    grads = torch.autograd.grad(
        outputs, [x, *states, *one.parameters()], [drawn(t.shape) for t in outputs]
    )
    return [*outputs, *grads]


def kept(one: Any, x: Tensor) -> int:
    """Bytes kept for backward, but for x and the parameters."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        one(x)
    given = {x.data_ptr(), *(p.data_ptr() for p in one.parameters())}
    return sum(size for place, size in sizes.items() if place not in given)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"batch_first": True}, {"bias": False}])
@pytest.mark.parametrize("name", LAYERS)
def test_bits(name: str, options: dict[str, Any]) -> None:
    x = torch.randn(1, T, 3) if options.get("batch_first") else torch.randn(T, 1, 3)
    plain = results(layer(name, **options), x)
    for every in (True, 1, T // 2):
        found = results(layer(name, checkpoint=every, **options), x)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_two_directions_and_lengths(name: str) -> None:
    """Gradients of x are sums of two recurrences, whose tiles differ: a rounding. So do those of W
    where threads share the sums."""
    x = torch.randn(T, 4, 3)
    lengths = torch.tensor([T, 0, T // 2, T - 1])
    plain = results(layer(name, bidirectional=True), x, lengths)
    found = results(layer(name, bidirectional=True, checkpoint=True), x, lengths)
    of_x = 3 if name == "LSTM" else 2
    for i, (a, b) in enumerate(zip(plain, found, strict=True)):
        if i == of_x or torch.get_num_threads() > 1:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_memory_kept(name: str) -> None:
    """At most a twentieth of the plain layer's."""
    x = torch.randn(16384, 1, 3)
    sizes = [kept(layer(name, checkpoint=every), x) for every in (False, True)]
    assert 20 * sizes[1] <= sizes[0]


def test_graph_of_gradients() -> None:
    """A gradient that is to be differentiated again is the composite's."""
    found = []
    for every in (False, 1):
        one = rnn.GRU(2, 19, checkpoint=every)
        torch.manual_seed(0)
        one.reset_parameters()
        x = torch.linspace(-1, 1, 2 * 12 * 512).view(12, 512, 2).requires_grad_()
        (grad,) = torch.autograd.grad(one(x)[0].sum(), x, create_graph=True)
        found.append(grad)
        assert grad.requires_grad
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (1.5, TypeError)])
def test_wrong_checkpoint(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="checkpoint"):
        rnn.LSTM(2, 3, checkpoint=wrong)
