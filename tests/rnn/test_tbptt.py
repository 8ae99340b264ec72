"""Truncated backpropagation through time, against a loop written by hand with torch.nn's layers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import rnn
from tests.cases import close
from tests.small import LAYERS, B, H, I, pair

T = 7


def detached(state: Any) -> Any:
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def by_hand(layer: Any, x: Tensor, window: int, state: Any) -> Iterator[tuple[Tensor, Any]]:
    """x: [T, B, I]."""
    for first in range(0, len(x), window):
        y, state = layer(x[first : first + window], state)
        state = detached(state)
        yield y, state


def flat(state: Any) -> list[Tensor]:
    return [*state] if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("window", [1, 3, 7, 100])
@LAYERS
def test_windows(name: str, window: int) -> None:
    """Outputs, states, and what a loss of each window leaves in .grad."""
    torch.manual_seed(0)
    theirs, ours = pair(name, I, H, num_layers=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    h0 = [torch.randn(2, B, H, dtype=torch.float64) for _ in range(1 + (name == "LSTM"))]
    given = {}
    for layer in (theirs, ours):
        leaves = [h.clone().requires_grad_() for h in h0]
        given[layer] = leaves, tuple(leaves) if len(leaves) > 1 else leaves[0]
    steps: list[int] = []
    windows = rnn.tbptt(ours, x, window, given[ours][1])
    for got, want in zip(windows, by_hand(theirs, x, window, given[theirs][1]), strict=True):
        y, state, part = got
        torch.testing.assert_close([y, *flat(state)], [want[0], *flat(want[1])])
        assert not any(s.requires_grad for s in flat(state))
        steps += range(T)[part]
        for output in (y, want[0]):
            output.sin().sum().backward()
    assert steps == [*range(T)]
    grads = [[t.grad for t in (*layer.parameters(), *given[layer][0])] for layer in (ours, theirs)]
    torch.testing.assert_close(*grads)


@LAYERS
def test_steps_in_between(name: str) -> None:
    """Each window sees the parameters as the one before left them."""
    theirs, ours = pair(name)
    x = torch.randn(T, B, I, dtype=torch.float64)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (ours, theirs)]
    windows = rnn.tbptt(ours, x, 2), by_hand(theirs, x, 2, None)
    for got, want in zip(*windows, strict=True):
        for output, optimizer in zip((got[0], want[0]), optimizers):
            optimizer.zero_grad()
            output.pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()])
    # The next batch of the same sequences
    state = got.state
    found = [w.output for w in rnn.tbptt(ours, x, 2, state)]
    torch.testing.assert_close(torch.cat(found), theirs(x, state)[0])


@LAYERS
def test_masks(name: str) -> None:
    """lengths and resets of the whole give what one call without windows gives."""
    torch.manual_seed(0)
    layer = getattr(rnn, name)(I, H, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, T, I, dtype=torch.float64)
    lengths = [T, 0, 3, 4]
    resets = torch.rand(B, T) < 0.3
    y, last = layer(x, lengths=lengths, resets=resets)
    windows = [*rnn.tbptt(layer, x, 3, lengths=lengths, resets=resets)]
    assert [w.output.shape[1] for w in windows] == [3, 3, 1]
    torch.testing.assert_close(torch.cat([w.output for w in windows], 1), y)
    torch.testing.assert_close(flat(windows[-1].state), flat(last))


def test_one_sequence() -> None:
    layer = rnn.GRU(I, H, batch_first=True)
    x = torch.randn(T, I)
    windows = [*rnn.tbptt(layer, x, 4, lengths=6, resets=[False] * 5 + [True, False])]
    y, last = layer(x, lengths=6, resets=[False] * 5 + [True, False])
    found = torch.cat([w.output for w in windows])
    close(
        {"y": found, "h": windows[-1].state},
        {"y": y, "h": last},
        {"y": y.double(), "h": last.double()},
    )


def test_torch_layer() -> None:
    theirs, _ = pair("LSTM")
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert torch.equal(torch.cat([w.output for w in rnn.tbptt(theirs, x, T)]), theirs(x)[0])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((2.0,), {}, TypeError, "window"),
        ((True,), {}, TypeError, "window"),
        ((0,), {}, ValueError, "window"),
        ((-3,), {}, ValueError, "window"),
        ((2,), dict(lengths=[T + 1, 1, 1, 1]), RuntimeError, "lengths"),
        ((2,), dict(lengths=[1, 1]), RuntimeError, "lengths"),
        ((2,), dict(lengths="1"), TypeError, "lengths"),
        ((2,), dict(resets=torch.zeros(B, T, dtype=torch.bool)), RuntimeError, "resets"),
    ],
)
def test_errors(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Raised by the call itself, not by the first window."""
    with pytest.raises(error, match=words):
        rnn.tbptt(rnn.GRU(I, H), torch.randn(T, B, I), *arguments, **options)


def test_what_it_does_not_take() -> None:
    call: Any = rnn.tbptt
    x = torch.randn(T, B, I)
    with pytest.raises(TypeError, match="layer of rnn"):
        call(rnn.GRUCell(I, H), x, 2)
    with pytest.raises(ValueError, match="direction"):
        call(rnn.GRU(I, H, bidirectional=True), x, 2)
    with pytest.raises(TypeError, match="PackedSequence"):
        call(rnn.GRU(I, H), pack_sequence([x[:, 0]]), 2)
    with pytest.raises(ValueError, match="4D"):
        call(rnn.GRU(I, H), x[None], 2)
    with pytest.raises(RuntimeError, match="larger than 0"):
        call(rnn.GRU(I, H), x[:0], 2)


@pytest.mark.parametrize("masks", [dict(lengths=[1] * B), dict(resets=torch.zeros(T, B).bool())])
def test_masks_of_a_torch_layer(masks: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="lengths and resets"):
        rnn.tbptt(torch.nn.GRU(I, H), torch.randn(T, B, I), 2, **masks)


def test_windows_longer_than_the_sequence_and_no_sequences() -> None:
    layer = rnn.LSTM(I, H)
    for shape in ((1, B, I), (T, 0, I), (T, I)):
        x = torch.randn(shape)
        (window,) = rnn.tbptt(layer, x, 100)
        y, last = layer(x)
        assert torch.equal(window.output, y) and torch.equal(window.state[1], last[1])
