"""`checkpoint`: what it keeps, and that it changes no bit. The oracle of bits is the plain layer,
which other tests hold to torch.nn."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn
from rnn.kernels.cpu import calls
from rnn.kernels.plan import Plan

# Lengths with more than one window in the C++, and few units so that they are quick.
T = 2600
LAYERS = {"RNN": rnn.RNN, "LSTM": rnn.LSTM, "GRU": rnn.GRU}


def layer(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    hidden = 130 if name == "RNN" else 19
    return LAYERS[name](3, hidden, **options)


def results(
    one: Any, x: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None
) -> list[Tensor]:
    """y, the last states and all gradients, of x, of the states and of the parameters."""
    x = x.clone().requires_grad_()
    directions = 2 if one.bidirectional else 1
    shape = one.num_layers * directions, x.shape[0 if one.batch_first else 1], one.hidden_size
    generator = torch.Generator().manual_seed(1)

    def drawn(size: Any) -> Tensor:
        return torch.randn(size, generator=generator).to(x.dtype)

    states = [drawn(shape).requires_grad_() for _ in range(2 if one.mode == "LSTM" else 1)]
    y, last = one(x, tuple(states) if len(states) > 1 else states[0], lengths, resets)
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


def same_bits(found: list[Tensor], plain: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_two_directions_lengths_and_resets(name: str, threads: int, set_threads: Any) -> None:
    """A reset at the border of windows, one within, and 4 rows of W beyond whole tiles."""
    set_threads(threads)
    x = torch.randn(T, 4, 3)
    lengths = torch.tensor([T, 0, T // 2, T - 1])
    resets = torch.rand(T, 4) < 0.01
    resets[:: T // 100] = True
    for masks in ((None, None), (lengths, None), (None, resets), (lengths, resets)):
        plain, found = (
            results(layer(name, bidirectional=True, checkpoint=every), x, *masks)
            for every in (False, True)
        )
        assert same_bits(found, plain)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_that_threads_divide(bidirectional: bool, set_threads: Any) -> None:
    """The windows of two groups of sequences stand at other steps: a rounding. Going backward a
    group begins after the first segments, with the given states."""
    set_threads(4 if bidirectional else 2)
    x = torch.randn(T, 16, 3)
    lengths = (T * torch.linspace(0, 1, 16) ** 2).long()
    plain, found = (
        results(layer("LSTM", checkpoint=every, bidirectional=bidirectional), x, lengths)
        for every in (False, True)
    )
    for a, b in zip(found, plain, strict=True):
        assert (a - b).abs().max() <= 4e-6 * b.abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_windows_of_few_rows(name: str, set_threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads and large batches make them: fewer rows than a tile has, and than a step of a
    group; an odd number of windows, in the middle of which both directions meet."""
    for steps in (1, 2, 3):
        monkeypatch.setattr(calls, "_windows", lambda *_, steps=steps: (4, steps))
        for threads, batch in [(2, 1), (3, 2), (4, 5), (6, 24)]:
            set_threads(threads)
            x = torch.randn(13, batch, 5)
            for bidirectional in (False, True):
                one = LAYERS[name](5, 40, bidirectional=bidirectional)
                plain = results(one, x)
                one.checkpoint = 1
                assert same_bits(results(one, x), plain)


@pytest.mark.parametrize("name", LAYERS)
def test_groups_that_begin_late(
    name: str, set_threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going backward, a group of short sequences begins after the first segments: with the states
    that were given."""
    monkeypatch.setattr(calls, "_windows", lambda *_: (9, 3))
    x = torch.randn(40, 5, 16)
    for lengths in ([40, 31, 20, 9, 2], [40, 38, 3, 2, 1], [40, 4, 3, 2, 0]):
        one = LAYERS[name](16, 8, bidirectional=True)
        set_threads(1)
        plain = results(one, x, torch.tensor(lengths))
        one.checkpoint = 1
        for threads in (4, 6):
            set_threads(threads)
            for a, b in zip(results(one, x, torch.tensor(lengths)), plain, strict=True):
                assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_heads_of_two_directions() -> None:
    """Gradients of x are sums over four recurrences in another order: a rounding."""
    x = torch.randn(T, 2, 3)
    options = dict(num_heads=2, bidirectional=True)

    def found(every: bool) -> list[Tensor]:
        torch.manual_seed(0)
        return results(rnn.GRU(3, 20, checkpoint=every, **options), x)

    plain, own = found(False), found(True)
    of_x = 2
    assert (own[of_x] - plain[of_x]).abs().max() <= 4e-7 * plain[of_x].abs().max()
    del own[of_x], plain[of_x]
    assert same_bits(own, plain)


OPTIONS: list[dict[str, Any]] = [
    dict(num_layers=2, dropout=0.3, bidirectional=True),
    dict(proj_size=7, bidirectional=True),
    dict(recurrent_dropout=0.2),
    dict(zoneout=0.1, learned_state=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any]) -> None:
    """The states of every step as well."""
    x = torch.randn(T, 2, 3)
    runs = []
    for every in (False, True):
        one = layer("LSTM", checkpoint=every, **options)
        torch.manual_seed(1)
        y, last, states = one(x, return_states=True)
        loss = y.sin().sum() + sum(s.cos().sum() for s in (*last, *states))
        grads = torch.autograd.grad(loss, [*one.parameters()])
        runs.append([y, *last, *states, *grads])
    assert same_bits(*runs)


def test_other_inputs() -> None:
    """A PackedSequence, one sequence without a batch, float64, a cell of our own."""
    x = torch.randn(T, 3, 3)
    packed = pack_padded_sequence(x, torch.tensor([T, 5, T // 3]), enforce_sorted=False)
    cases: list[tuple[Any, Any]] = [
        (packed, {}),
        (x[:, 0], {}),
        (x.double(), dict(dtype=torch.float64)),
    ]
    for given, options in cases:
        runs = []
        for every in (False, True):
            one = layer("GRU", bidirectional=True, checkpoint=every, **options)
            y, last = one(given)
            y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
            grads = torch.autograd.grad(y.sin().sum() + last.sum(), [*one.parameters()])
            runs.append([y, last, *grads])
        assert same_bits(*runs)
    own = [rnn.Recurrent(rnn.cells.cifg, 3, 19, checkpoint=every) for every in (False, True)]
    own[1].load_state_dict(own[0].state_dict())
    both = []
    for one in own:
        loss = one(x)[0].sin().sum()
        both.append([loss, *torch.autograd.grad(loss, [*one.parameters()])])
    assert same_bits(*both)


@pytest.mark.parametrize("name", LAYERS)
def test_reference_backend(name: str) -> None:
    """NumPy has segments of 7 steps: the same but for rounding, and less is kept."""
    x = torch.randn(50, 4, 3, dtype=torch.float64)
    options = dict(bidirectional=True, dtype=torch.float64, plan=Plan("numpy"))
    lengths = torch.tensor([50, 0, 20, 49])
    resets = torch.rand(50, 4) < 0.1
    for masks in ((None, None), (lengths, None), (None, resets), (lengths, resets)):
        plain, found = (
            results(layer(name, checkpoint=every, **options), x, *masks) for every in (False, True)
        )
        torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-11)
    sizes = [kept(layer(name, checkpoint=every, **options), x) for every in (False, True)]
    assert 2 * sizes[1] < sizes[0]


def test_nan_behind_a_reset() -> None:
    """What a reset cuts off, and the loss does not ask for, reaches no gradient."""
    x = torch.randn(T, 2, 3)
    x[:100] = float("nan")
    resets = torch.zeros(T, 2, dtype=torch.bool)
    resets[100] = True
    grads = []
    for every in (False, True):
        one = layer("LSTM", checkpoint=every)
        y, _ = one(x, resets=resets)
        grads.append([*torch.autograd.grad(y[100:].sum(), [*one.parameters()])])
    assert same_bits(*grads) and all(bool(t.isfinite().all()) for t in grads[0])


def test_small_sequences() -> None:
    """Fewer steps than a segment, one step, and no sequences."""
    one = rnn.LSTM(2, 3, bidirectional=True, checkpoint=True)
    for shape in ((5, 2, 2), (1, 2, 2), (5, 0, 2)):
        y, _ = one(torch.randn(shape))
        y.sum().backward()
        assert y.shape == (*shape[:2], 6)


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
