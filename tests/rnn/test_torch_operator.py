"""torch's own operators, in float32 and float64, where there is no compiler for C++."""

from typing import Any

import pytest
import torch

import rnn
from rnn import dispatch, functional
from rnn.kernels.plan import Plan
from tests.cases import CASES, LAYER_NAMES, Case, check

PLAIN = [
    case
    for case in CASES
    if case.form in ("padded", "unbatched") and case.dtype == torch.float32 and case.T > 1
]


@pytest.fixture
def used(fresh: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No compiler; the names of the operators that run."""
    names: list[str] = []
    by_torch = functional.by_torch

    def noted(operator: Any, *rest: Any) -> Any:
        names.append(operator.__name__)
        return by_torch(operator, *rest)

    monkeypatch.setattr(dispatch, "native_available", lambda cell, dtype: False)
    monkeypatch.setattr(functional, "by_torch", noted)
    return names


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_layers(case: Case, used: list[str]) -> None:
    check(case)
    assert len(used) == case.layers
    check(case._replace(dtype=torch.float64))
    assert len(used) == 2 * case.layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYER_NAMES)
def test_second_derivatives(name: str, dtype: torch.dtype, used: list[str]) -> None:
    """Which torch.nn's LSTM does not have in oneDNN."""
    found = []
    for plan in (None, Plan("numpy")):
        torch.manual_seed(0)
        layer = getattr(rnn, name)(3, 4, bidirectional=True, plan=plan, dtype=dtype)
        x = torch.randn(5, 2, 3, dtype=dtype, requires_grad=True)
        y, _ = layer(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, *layer.parameters()]))
    assert used
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_backward_twice(name: str, used: list[str]) -> None:
    """With `retain_graph`, and with gradients of several losses at once."""
    layer = getattr(rnn, name)(3, 4)
    y, _ = layer(torch.randn(5, 2, 3))
    weights = [*layer.parameters()]
    grads = torch.randn(2, *y.shape)
    alone = [torch.autograd.grad(y, weights, grad, retain_graph=True) for grad in grads]
    together = torch.autograd.grad(y, weights, grads, is_grads_batched=True)
    for k, pair in enumerate(zip(*alone)):
        torch.testing.assert_close(torch.stack(pair), together[k], rtol=1e-4, atol=1e-5)
    assert used


def test_what_is_edited(used: list[str]) -> None:
    """An output that the backward pass reads: torch's own error."""
    y, _ = rnn.LSTM(3, 4)(torch.randn(5, 2, 3))
    assert not y._is_view()
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert used


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_memory_that_is_gone(name: str, used: list[str]) -> None:
    layer = getattr(rnn, name)(3, 4)
    for t in (x := torch.randn(5, 2, 3), *layer.parameters()):
        held = t.detach().clone()
        t.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            layer(x)
        t.untyped_storage().resize_(held.nbytes)
        t.data.copy_(held)
    layer(x)


def test_chosen(used: list[str]) -> None:
    """For whole sequences alone, of whose states only the last are asked for."""
    layer = rnn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    assert "torch's own operator, lstm (there is no C++ compiler)" in rnn.explain(layer, x)
    some: list[dict[str, Any]] = [
        dict(lengths=torch.tensor([5, 2])),
        dict(return_states=True),
        dict(resets=torch.zeros(5, 2, dtype=torch.bool)),
    ]
    for options in some:
        assert "NumPy" in rnn.explain(layer, x, **options)
        layer(x, **options)[0].sum().backward()
    assert "NumPy" in rnn.explain(rnn.LSTM(3, 4, recompute=True), x)
    assert "NumPy" in rnn.explain(rnn.LSTM(3, 4, plan=Plan("numpy")), x)
    assert not used


def test_one_backwards(used: list[str]) -> None:
    """torch's operators cannot: the reference does."""
    x = torch.randn(5, 2, 3)
    w = torch.randn(4, 3)
    b = torch.randn(4)
    given = x, w, torch.randn(4, 4), b, b, torch.zeros(1, 2, 4)
    rnn.functional.recurrence(rnn.kernels.cells.rnn_tanh, *given, reverse=(True,))
    assert not used
    rnn.functional.recurrence(rnn.kernels.cells.rnn_tanh, *given)
    assert used == ["rnn_tanh"]
