"""rnn.replace and rnn.restore."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import rnn


class Own(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(input * 2, hx)


class Model(nn.Module):
    cells: Any

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4))
        self.first = nn.RNN(4, 5, nonlinearity="relu", bidirectional=True)
        self.second = nn.LSTM(10, 6, 2, proj_size=3, batch_first=True)
        self.shared = self.third = nn.GRU(3, 4)
        self.own = Own(4, 4)
        self.cells = nn.ModuleList([nn.RNNCell(4, 4), nn.LSTMCell(4, 4), nn.GRUCell(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(self.encoder(x))[0].transpose(0, 1))[0].transpose(0, 1)
        y = self.own(self.shared(y)[0])[0][-1]
        return self.cells[2](self.cells[1](self.cells[0](y))[0])


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def test_replace_and_restore(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    x = torch.randn(5, 2, 3)
    before = kinds(model)
    parameters = list(model.parameters())
    calls = []
    model.third.register_forward_hook(lambda *_: calls.append(1))
    want = model(x)
    want_grads = torch.autograd.grad(want.sum(), parameters)
    assert rnn.replace(model) is model
    after = kinds(model)
    assert {name for name in after if after[name].__module__.startswith("rnn.")} == {
        "first",
        "second",
        "shared",
        "third",
        "cells.0",
        "cells.1",
        "cells.2",
    }
    assert after["own"] is Own
    said = capsys.readouterr().out
    assert "second, torch.nn.modules.rnn.LSTM, is now rnn.modules.LSTM" in said
    assert "own" in said and "left alone" in said
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(
        torch.autograd.grad(model(x).sum(), parameters), want_grads, rtol=1e-4, atol=1e-6
    )
    assert len(calls) == 3
    model.first.plan = rnn.kernels.plan.Plan("numpy")
    torch.testing.assert_close(copy.deepcopy(model)(x), want)
    rnn.restore(model, verbose=False)
    assert kinds(model) == before
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    assert not capsys.readouterr().out


def test_a_model_that_is_one_layer_in_training() -> None:
    layer = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    replaced: Any = rnn.replace(layer, verbose=False)
    assert isinstance(replaced, rnn.LSTM)
    y, _ = replaced(x, lengths=torch.tensor([5, 2]))
    y.sum().backward()
    before = layer.get_parameter("weight_hh_l0").detach().clone()
    optimizer.step()
    assert not torch.equal(layer.get_parameter("weight_hh_l0"), before)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTMCell"])
def test_parametrized(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """torch.nn.utils.parametrize gives such a module a class of its own."""
    model: Any = nn.Sequential(getattr(nn, name)(3, 4))
    layer = model[0]
    weight = "weight_hh" if name == "LSTMCell" else "weight_hh_l0"
    parametrizations.weight_norm(layer, weight)
    parametrizations.orthogonal(layer, weight.replace("hh", "ih"))
    x = torch.randn(5, 3)
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    with torch.no_grad():
        want = model(x)
    rnn.replace(model)
    assert f"rnn.modules.{name} with parametrizations" in capsys.readouterr().out
    assert isinstance(layer, getattr(rnn, name)) and isinstance(
        copy.deepcopy(model)[0], getattr(rnn, name)
    )
    assert parametrize.is_parametrized(layer, weight)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(copy.deepcopy(model)(x), want)
    torch.testing.assert_close(model(x), want)
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(model)
    with torch.no_grad():
        setattr(layer, weight, getattr(layer, weight) * 2)
    changed = model(x)
    rnn.restore(model, verbose=False)
    assert not isinstance(layer, getattr(rnn, name))
    torch.testing.assert_close(model(x), changed)
    rnn.replace(model, verbose=False)
    parametrize.remove_parametrizations(layer, weight)
    parametrize.remove_parametrizations(layer, weight.replace("hh", "ih"))
    assert type(layer) is getattr(rnn, name)
    torch.testing.assert_close(model(x), changed)


def test_a_layer_that_is_parametrized_later() -> None:
    model: Any = rnn.replace(nn.Sequential(nn.GRU(3, 4)), verbose=False)
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    rnn.restore(model, verbose=False)
    assert isinstance(model[0], nn.GRU)
    assert parametrize.is_parametrized(model[0])


def test_scripted_models_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.layer = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.first(x))[0]

    for model in (torch.jit.script(Text()), torch.jit.trace(Text(), torch.randn(5, 2, 3))):
        rnn.replace(model)
        said = capsys.readouterr().out
        assert said.startswith("layer") and "left alone" in said and "TorchScript" in said
        assert said.count("\n") == 1
