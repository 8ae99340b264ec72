"""Steps that the loss does not ask for, on the other side of a reset: what they hold, NaN even,
reaches no gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn
from rnn.kernels.plan import Plan
from tests.cases import LAYER_NAMES

T = 7
B = 3
I = 4
H = 6
NAN = float("nan")
# Form, plan and what the steps hold that nobody asks for.
CASES = [
    *((form, None, NAN) for form in ("padded", "batch_first", "lengths", "packed", "recompute")),
    ("lengths", Plan("numpy"), NAN),
    ("shorter", None, NAN),
    ("padded", Plan("numpy"), NAN),
    ("packed", Plan("numpy"), float("inf")),
    ("padded", None, float("inf")),
    ("lengths", None, 1e38),
]


def pair(name: str, bidirectional: bool, **options: Any) -> tuple[Any, Any]:
    ours = getattr(rnn, name)(I, H, bidirectional=bidirectional, **options)
    exact = getattr(nn, name)(I, H, bidirectional=bidirectional).double()
    exact.load_state_dict(ours.state_dict())
    return ours, exact


def loss(y: Tensor, weights: Tensor) -> Tensor:
    return (y * weights.to(y.dtype)).sum()


@pytest.mark.parametrize(("form", "plan", "bad"), CASES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("name", LAYER_NAMES)
@pytest.mark.parametrize("asked", ["after", "before"])
def test_what_is_not_asked_for(
    name: str, form: str, bidirectional: bool, asked: str, plan: Plan | None, bad: float
) -> None:
    """Sequence b is cut before its step 2 + b. The gradients are those of torch.nn for the asked
    part alone."""
    options: dict[str, Any] = dict(
        batch_first=form == "batch_first", recompute=form == "recompute", plan=plan
    )
    ours, exact = pair(name, bidirectional, **options)
    x = torch.randn(T, B, I)
    cuts = [2, 3, 4]
    ends = {"lengths": [7, 5, 6], "packed": [7, 5, 6], "shorter": [6, 5, 6]}
    lengths = torch.tensor(ends.get(form, [T] * B))
    resets = torch.zeros(T, B, dtype=torch.bool)
    wants = torch.randn(T, B, H * (1 + bidirectional))
    total = torch.zeros((), dtype=torch.float64)
    right: list[Tensor] = []
    for b, cut in enumerate(cuts):
        resets[cut, b] = True
        end = int(lengths[b])
        part = slice(cut, end) if asked == "after" else slice(0, cut)
        alone = x[part, b : b + 1].double().requires_grad_()
        right.append(alone)
        total = total + loss(exact(alone)[0][:, 0], wants[part, b])
        rest = torch.ones(T, dtype=torch.bool)
        rest[part] = False
        wants[rest, b] = 0
        x[rest, b] = bad
    want = torch.autograd.grad(total, [*right, *exact.parameters()])
    x = x.requires_grad_()
    if form == "packed":
        given: Any = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y = nn.utils.rnn.pad_packed_sequence(ours(given, resets=resets)[0], total_length=T)[0]
    elif form == "batch_first":
        y = ours(x.transpose(0, 1), resets=resets.T)[0].transpose(0, 1)
    else:
        y = ours(x, lengths=lengths if form in ends else None, resets=resets)[0]
    picked = torch.where(wants != 0, y, 0)
    dx, *got = torch.autograd.grad(loss(picked, wants), [x, *ours.parameters()])
    for b, cut in enumerate(cuts):
        part = slice(cut, int(lengths[b])) if asked == "after" else slice(0, cut)
        torch.testing.assert_close(dx[part, b].double(), want[b][:, 0], rtol=1e-4, atol=1e-5)
        rest = torch.ones(T, dtype=torch.bool)
        rest[part] = False
        assert (dx[rest, b] == 0).all()
    for ours_grad, exact_grad in zip(got, want[B:]):
        torch.testing.assert_close(ours_grad.double(), exact_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_first_and_last_states(name: str) -> None:
    """A first state that is dropped, and a last state that is asked for, in place of steps."""
    ours, exact = pair(name, False)
    x = torch.randn(T, B, I)
    pairs = name == "LSTM"
    x[:3] = NAN
    first = torch.full((1, B, H), NAN)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    x.requires_grad_()
    last = ours(x, (first, first) if pairs else first, resets=resets)[1]
    alone = x.detach()[3:].double().requires_grad_()
    want = exact(alone)[1]
    seeds = torch.randn(1, B, H)
    ends = [(last, want)] if not pairs else [*zip(last, want)]
    for found, right in ends:
        got = torch.autograd.grad(loss(found, seeds), [x, *ours.parameters()], retain_graph=True)
        expected = torch.autograd.grad(
            loss(right, seeds), [alone, *exact.parameters()], retain_graph=True
        )
        torch.testing.assert_close(got[0][3:].double(), expected[0], rtol=1e-4, atol=1e-5)
        assert (got[0][:3] == 0).all()
        for a, b in zip(got[1:], expected[1:]):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_what_is_asked_for_stays_nan(name: str) -> None:
    """As in torch.nn: a NaN that the loss asks for is not hidden."""
    ours, _ = pair(name, False)
    x = torch.randn(T, B, I)
    x[1, 0] = NAN
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    y = ours(x, resets=resets)[0]
    assert y[1:3, 0].isnan().all() and not y[3:].isnan().any() and not y[:, 1:].isnan().any()
    grads = torch.autograd.grad(y.sum(), [*ours.parameters()])
    assert all(grad.isnan().any() for grad in grads)


def test_no_copy_where_all_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair("GRU", True)
    resets = torch.rand(T, B) < 0.3
    where = torch.where
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(1)
        return where(*given)

    y = ours(torch.randn(T, B, I), resets=resets)[0]
    monkeypatch.setattr(torch, "where", counted)
    y.sum().backward()
    assert not calls
