"""The layers that are timed against each other, each made from a case with the weights of one and
the same oracle."""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from suites import Case
from torch import Tensor, nn

import rnn
from rnn.kernels.plan import Plan

Builder = Callable[[Case, nn.RNNBase], nn.Module]
UNROLLED = 128  # the longest loop that torch.compile gets: beyond, it takes many minutes


def construct(layer: Any, case: Case) -> nn.Module:
    """A layer with the constructor of torch.nn's."""
    nonlinearity = dict(nonlinearity=case.cell) if case.cell in ("tanh", "relu") else {}
    made: nn.Module = layer(
        case.inputs,
        case.H,
        num_layers=case.layers,
        batch_first=case.batch_first,
        dropout=case.dropout,
        bidirectional=case.bidirectional,
        **nonlinearity,
    )
    return made


def of_package(package: Any, case: Case) -> nn.Module:
    return construct(
        getattr(package, "RNN" if case.cell in ("tanh", "relu") else case.cell.upper()), case
    )


def _only_plain(case: Case, *cells: str) -> None:
    """Refuse what an adapter has no words for."""
    if case.cell not in cells or case.options:
        raise NotImplementedError(f"has no {case.cell} {case.options}".rstrip())


class Loop(nn.Module):
    """torch.nn's cell, step after step, for torch.compile."""

    def __init__(self, case: Case, oracle: nn.RNNBase) -> None:
        super().__init__()
        _only_plain(case, "tanh", "relu", "lstm", "gru")
        if case.T > UNROLLED:
            raise NotImplementedError(
                f"a loop of more than {UNROLLED} steps takes too long to compile"
            )
        nonlinearity = dict(nonlinearity=case.cell) if case.cell in ("tanh", "relu") else {}
        cell: Any = getattr(nn, "RNNCell" if nonlinearity else f"{case.cell.upper()}Cell")
        self.cell = cell(case.inputs, case.H, **nonlinearity)
        self.cell.load_state_dict(
            {k.removesuffix("_l0"): v for k, v in oracle.state_dict().items()}
        )
        self.compile()

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        out = []
        for step in x.unbind(0):
            state = self.cell(step, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out), state


class FlashRNN(nn.Module):
    """`flashrnn`, with one head and, as it has none, with the product of the input."""

    def __init__(self, case: Case, oracle: nn.RNNBase) -> None:
        super().__init__()
        _only_plain(case, "tanh", "lstm", "gru")
        self.run = importlib.import_module("flashrnn.flashrnn").flashrnn
        self.function = "elman" if case.cell == "tanh" else case.cell
        self.dtype = {"tf32": "float32", "default": "float32"}.get(case.dtype, case.dtype)
        w_ih, w_hh, b_ih, b_hh = (p.detach() for p in oracle.parameters())
        w_hh = w_hh.unflatten(0, (-1, 1, case.H))
        b = (b_ih + b_hh).unflatten(0, (-1, 1, case.H))
        if case.cell == "gru":  # its recurrent gates are n, r, z, and n has two biases
            w_hh = w_hh[[2, 0, 1]]
            b = torch.stack(
                [v.view(1, case.H) for v in (b_hh.chunk(3)[2], b[0], b[1], b_ih.chunk(3)[2])]
            )
        self.w_ih = nn.Parameter(w_ih)
        self.w_hh = nn.Parameter(w_hh.contiguous())
        self.b = nn.Parameter(b)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, Any]:
        gates = F.linear(x.transpose(0, 1), self.w_ih).unflatten(-1, (-1, 1, self.w_hh.shape[-1]))
        states, last = self.run(gates, self.w_hh, self.b, function=self.function, dtype=self.dtype)
        return states[0].squeeze(2).transpose(0, 1), last


def loaded(layer: nn.Module, oracle: nn.RNNBase) -> nn.Module:
    layer.load_state_dict(oracle.state_dict())
    return layer


def haste(case: Case, oracle: nn.RNNBase) -> nn.Module:
    _only_plain(case, "lstm", "gru")
    layer: Any = getattr(importlib.import_module("haste_pytorch"), case.cell.upper())(
        case.inputs, case.H
    )
    layer.from_native_weights(*oracle.parameters())
    return layer


NAMED: dict[str, Builder] = {
    "rnn": lambda case, oracle: loaded(of_package(rnn, case), oracle),
    "torch.nn": lambda case, oracle: loaded(of_package(nn, case), oracle),
    "compile": Loop,
    "flashrnn": FlashRNN,
    "haste": haste,
}


def planned(plan: Plan) -> Builder:
    """Ours, by this plan."""

    def build(case: Case, oracle: nn.RNNBase) -> nn.Module:
        layer: Any = NAMED["rnn"](case, oracle)
        layer.plan = plan
        return layer

    return build


def find(name: str) -> Builder:
    """One of NAMED, or a class MODULE:CLASS with the constructor and the state_dict of
    torch.nn's."""
    if name in NAMED:
        return NAMED[name]
    module, _, attribute = name.partition(":")
    layer = getattr(importlib.import_module(module), attribute)
    return lambda case, oracle: loaded(construct(layer, case), oracle)


def installed(device: str) -> list[str]:
    """The peers that need not be named."""
    others = {"flashrnn": "flashrnn", "haste_pytorch": "haste"} if device == "cuda" else {}
    return [name for module, name in others.items() if find_spec(module) is not None]
