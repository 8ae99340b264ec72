"""Initial values by which gradients survive many steps: of W_hh, and of the biases of the gates
that keep a state.

Each function changes a layer in place, all its layers and directions, without gradients, and
returns it. Parameters keep their dtype and device; random numbers are torch's, or those of
`generator`."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .gates import Memory, memories
from .stack import Stack

__all__ = ["chrono_", "forget_bias_", "identity_", "orthogonal_"]

Layer = TypeVar("Layer", bound=nn.Module)


def _blocks(layer: Any, kind: str) -> list[tuple[Tensor, ...]]:
    """The blocks of each gate, of all heads of all parameters of that kind. Raises TypeError for
    what is none of our layers, ValueError where it has no parameters of the kind to be set."""
    if not isinstance(layer, Stack):
        raise TypeError(
            f"Expected a layer of rnn, got {type(layer).__module__}.{type(layer).__qualname__}"
        )
    names = [name for names in layer._all_weights for name in names if name.startswith(kind)]
    if not names:
        raise ValueError(f"Expected a layer that has biases, got {layer}")
    computed = [name for name in names if name not in layer._parameters]
    if computed:
        raise ValueError(
            f"Expected {computed[0]} to be a parameter: it is computed, by a parametrization or "
            "pruning, which has to come after the initial values"
        )
    gates = layer.layer_cell().gates
    heads = [
        head for name in names for head in getattr(layer, name).detach().chunk(layer.num_heads)
    ]
    return [head.chunk(gates) for head in heads]


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected {name} to be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"Expected {name} to be finite, got {value}")


def _memories(layer: Any) -> list[Memory]:
    """Raises ValueError for a layer of a cell that has no gate to keep a state."""
    cell = layer.layer_cell()
    found = memories(cell)
    if not found:
        raise ValueError(
            f"Expected a layer whose cell has a gate that keeps its state, got {cell.name}"
        )
    return found


def orthogonal_(layer: Layer, gain: float = 1.0, generator: torch.Generator | None = None) -> Layer:
    """Make W_hh of every gate a random orthogonal matrix times `gain`: [H, H], or [H, P] with
    orthonormal columns for a projection.

    W_ih and the biases stay. Source: Saxe, McClelland and Ganguli, Exact solutions to the nonlinear
    dynamics of learning in deep linear neural networks, 2013, https://arxiv.org/abs/1312.6120; for
    each gate by itself, Henaff, Szlam and LeCun, 2016, https://arxiv.org/abs/1602.06662.
    Returns the layer. Raises TypeError for what is none of our layers and a gain that is no number,
    ValueError for a gain that is not finite and a W_hh that is computed by a parametrization."""
    _check_number("gain", gain)
    for blocks in _blocks(layer, "weight_hh"):
        for block in blocks:
            # There is no QR decomposition in half precision
            dtype = torch.promote_types(block.dtype, torch.float32)
            drawn = torch.empty_like(block, dtype=dtype)
            block.copy_(nn.init.orthogonal_(drawn, gain, generator))
    return layer


def identity_(layer: Layer, scale: float = 1.0) -> Layer:
    """Make W_hh of every gate the identity times `scale`, and all biases 0: with
    `nonlinearity="relu"` an IRNN, which keeps its state until the input changes it.

    W_ih stays: the source draws it from a normal distribution of standard deviation 0.001. Source:
    Le, Jaitly and Hinton, A Simple Way to Initialize Recurrent Networks of Rectified Linear Units,
    2015, https://arxiv.org/abs/1504.00941.
    Returns the layer. Raises TypeError for what is none of our layers and a scale that is no
    number, ValueError for a scale that is not finite and parameters that are computed by a
    parametrization."""
    _check_number("scale", scale)
    weights = _blocks(layer, "weight_hh")
    biases = _blocks(layer, "bias") if getattr(layer, "bias", False) else []
    for blocks in weights:
        for block in blocks:
            block.zero_().fill_diagonal_(scale)
    for blocks in biases:
        for block in blocks:
            block.zero_()
    return layer


def forget_bias_(layer: Layer, value: float = 1.0) -> Layer:
    """Set the bias of the gate that keeps the state, of an LSTM the forget gate's, of a GRU the
    update gate's: b_ih + b_hh = `value`, all of it in b_ih. With a value above 0 a new layer
    remembers.

    In a cell where the gate keeps its state at negative pre-activations it is -`value`. Source:
    Jozefowicz, Zaremba and Sutskever, An Empirical Exploration of Recurrent Network Architectures,
    2015, https://proceedings.mlr.press/v37/jozefowicz15.html, with a value of 1.
    Returns the layer. Raises TypeError for what is none of our layers and a value that is no
    number, ValueError for a value that is not finite, a layer without biases or with parametrized
    ones, and a cell that has no such gate, as that of an RNN."""
    _check_number("value", value)
    inputs = _blocks(layer, "bias_ih")
    recurrent = _blocks(layer, "bias_hh")
    found = _memories(layer)
    for b_ih, b_hh in zip(inputs, recurrent):
        for memory in found:
            gate, sign = memory.keeps
            b_ih[gate].fill_(sign * value)
            b_hh[gate].zero_()
    return layer


def chrono_(layer: Layer, max_steps: int, generator: torch.Generator | None = None) -> Layer:
    """Draw the biases of the gates for dependencies of up to `max_steps` steps: of an LSTM's forget
    gate log(u), and of its input gate -log(u), with u uniform between 1 and max_steps - 1 for each
    unit; of a GRU's update gate, which keeps the state where it is 1, log(u).

    b_ih + b_hh has these values, all of them in b_ih; the other biases stay. A unit then forgets
    after about u steps. Source: Tallec and Ollivier, Can recurrent neural networks warp time?,
    2018, https://arxiv.org/abs/1804.11188.
    Returns the layer. Raises TypeError for what is none of our layers and max_steps that is no
    integer, ValueError for max_steps below 2, a layer without biases or with parametrized ones, and
    a cell that has no gate that keeps its state, as that of an RNN."""
    if isinstance(max_steps, bool) or not isinstance(max_steps, int):
        raise TypeError(f"Expected max_steps to be an integer, got {type(max_steps).__name__}")
    if max_steps < 2:
        raise ValueError(f"Expected max_steps to be 2 or more, got {max_steps}")
    inputs = _blocks(layer, "bias_ih")
    recurrent = _blocks(layer, "bias_hh")
    found = _memories(layer)
    for b_ih, b_hh in zip(inputs, recurrent):
        for keeps, closed in found:
            dtype = torch.promote_types(b_ih[keeps.gate].dtype, torch.float32)
            u = torch.empty_like(b_ih[keeps.gate], dtype=dtype)
            bias = u.uniform_(1, max_steps - 1, generator=generator).log()
            for gate, sign in filter(None, (keeps, closed)):
                b_ih[gate].copy_(sign * bias)
                b_hh[gate].zero_()
    return layer
