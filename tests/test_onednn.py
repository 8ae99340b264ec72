"""torch's own LSTM as a plan: where there is no compiler."""

from typing import Any

import pytest
import torch
from cases import Case, check

import rnn
from rnn.kernels.plan import Plan

ONEDNN = Plan("onednn")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


@pytest.mark.parametrize("case", [
    Case(1, 1, 1, 1, mode="LSTM"), Case(5, 3, 4, 7, mode="LSTM"), Case(4, 33, 5, 100, mode="LSTM", hx=False),
    Case(6, 4, 3, 8, mode="LSTM", bias=False, bidirectional=True), Case(6, 4, 3, 8, mode="LSTM", proj=3),
    Case(6, 4, 3, 8, mode="LSTM", layers=2, bidirectional=True, batch_first=True),
    Case(6, 1, 3, 8, mode="LSTM", form="unbatched"),
], ids=str)
def test_layers(case: Case) -> None:
    check(case, ONEDNN)


def test_second_derivatives() -> None:
    """Which torch.nn has not there."""
    found = []
    for plan in (ONEDNN, Plan("numpy")):
        torch.manual_seed(0)
        layer, x = rnn.LSTM(3, 4, plan=plan), torch.randn(5, 2, 3, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_chosen(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For plain sequences alone, and only without a compiler."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    layer, x = rnn.LSTM(3, 4), torch.randn(5, 2, 3)
    assert "torch's own LSTM" in rnn.explain(layer, x)
    for options in (dict(lengths=torch.tensor([5, 2])), dict(return_states=True)):
        assert "NumPy" in rnn.explain(layer, x, **options)
        layer(x, **options)[0].sum().backward()
    assert "NumPy" in rnn.explain(rnn.LSTM(3, 4, recompute=True), x)
    assert "NumPy" in rnn.explain(rnn.GRU(3, 4), x)


@pytest.mark.parametrize("options", [dict(lengths=torch.tensor([5, 2])), dict(return_states=True),
                                     dict(resets=torch.zeros(5, 2, dtype=torch.bool))], ids=lambda o: next(iter(o)))
def test_what_it_cannot(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="whole sequences"):
        rnn.LSTM(3, 4, plan=ONEDNN)(torch.randn(5, 2, 3), **options)
    with pytest.raises(RuntimeError, match="LSTM"):
        rnn.GRU(3, 4, plan=ONEDNN)(torch.randn(5, 2, 3))
