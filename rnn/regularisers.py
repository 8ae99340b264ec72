"""Regularisers of the recurrence as changes of a cell's step, so that every backend has them.

Zoneout takes its masks as further gates, whose part of W_ih is the identity. Recurrent dropout
takes its mask as a constant of the cell, and its state 0 is the h that W_hh multiplies, after the
mask: h itself is state 1. Layer norm takes its gains as constants."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import own_gradient
from .kernels import cells
from .kernels.cells import Cell
from .layer_types import LayerInputs

# x, r, s and constants to the new states
StepFunction = Callable[[Any, Any, Any, Any], Any]
EPSILON = 1e-5  # torch.nn.functional.layer_norm's


def zoneout_rates(layer: Any) -> tuple[float, ...]:
    """Of each state."""
    rates = layer.zoneout
    if isinstance(rates, (tuple, list)):
        return tuple(map(float, rates))
    states: int = layer.layer_cell().carried
    return (float(rates),) * states


def zoned_states(layer: Any) -> tuple[int, ...]:
    return tuple(k for k, rate in enumerate(zoneout_rates(layer)) if rate)


def clip_limit(layer: Any) -> float | None:
    """To which numbers of h's gradient are cut; None where they are not, or by a norm."""
    clip = layer.clip_recurrent_grad
    return float(clip) if isinstance(clip, (int, float)) else None


def clip_norm(layer: Any) -> float | None:
    """To which norm h's gradient is cut; None where it is not."""
    clip = layer.clip_recurrent_grad
    return float(clip[1]) if isinstance(clip, (tuple, list)) else None


def given_states(inputs: LayerInputs) -> Sequence[Tensor]:
    """The states and constants, which layers with options always give."""
    assert inputs.states is not None
    return inputs.states


def zoneout_masks(inputs: LayerInputs, rates: Sequence[float], training: bool) -> Tensor:
    """Like x, of width N * K * H: 1 where one of K states stays what it was; in evaluation, how
    often it does."""
    x = inputs.x
    N, _, H = given_states(inputs)[0].shape
    row = torch.tensor(rates, dtype=x.dtype, device=x.device)
    row = row[None, :, None].expand(N, -1, H).reshape(-1)
    every = row.expand(*x.shape[:-1], -1)
    return torch.bernoulli(every) if training else every


def with_step_masks(inputs: LayerInputs, masks: Tensor, K: int) -> LayerInputs:
    """With K more gates, whose pre-activations are the masks."""
    x = inputs.x
    N, _, H = given_states(inputs)[0].shape
    G = inputs.cell.gates

    def taller(w: Tensor | None) -> Tensor | None:
        """[N*G*H, ...] to [N*(G+K)*H, ...], with 0 for the further gates."""
        if w is None:
            return None
        parts = own_gradient(w).reshape(N, G * H, *w.shape[1:])
        zeros = w.new_zeros(N, K * H, *w.shape[1:])
        return torch.cat((parts, zeros), 1).flatten(0, 1)

    w_ih, *others = map(taller, inputs.weights)
    if w_ih is None:
        parts = (x.unflatten(-1, (N, G * H)), masks.unflatten(-1, (N, K * H)))
        x = torch.cat(parts, -1).flatten(-2)
    else:
        identity = torch.cat((x.new_zeros(G * H, K * H), torch.eye(K * H).to(x)))
        w_ih = torch.cat((w_ih, torch.block_diag(*[identity] * N)), 1)
        x = torch.cat((own_gradient(x), masks), -1)
    return inputs._replace(x=x, weights=(w_ih, *others))


def with_sequence_mask(inputs: LayerInputs, rate: float) -> LayerInputs:
    """With the h that is multiplied as the first state, and its mask as the last constant."""
    states = given_states(inputs)
    h = states[0]
    mask = torch.bernoulli(torch.full_like(h, 1 - rate)) / (1 - rate)
    return inputs._replace(states=[mask * h, *states, mask])


def normalized_output(x: Any, r: Any, c: Any, norm: Callable[[Any], Any]) -> Any:
    """The h of an LSTM whose c is normalised before its output."""
    return cells.sigmoid(x[3] + r[3]) * cells.tanh(norm(c))


def _row_norm(values: Sequence[Any], gains: Sequence[Any]) -> list[Any]:
    """Layer norm over all units of these values together."""
    share = 1 / len(values)
    mean = cells.row_mean(sum(values[1:], values[0]) * share)
    centred = [v - mean for v in values]
    squares = [v * v for v in centred]
    variance = cells.row_mean(sum(squares[1:], squares[0]) * share)
    scale = cells.rsqrt(variance + EPSILON)
    return [v * scale * gain for v, gain in zip(centred, gains)]


class Norm(NamedTuple):
    """The constants of layer norm: a gain of each gate of W_hh h; b_hh of each gate, if the cell
    does not add it to x; and the gain of an LSTM's c."""

    gains: int
    biases: int
    states: int


def norm_of(cell: Cell, biased: bool) -> Norm:
    return Norm(cell.gates, cell.gates * (biased and cell.split), int(cell is cells.lstm))


def _normalized(cell: Cell, norm: Norm) -> StepFunction:
    """Layer norm (Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450) of W_hh h and of
    an LSTM's c, whose constants come after those of the cell. x is normalised already."""
    G = cell.gates
    own = cell.constants

    def normal(x: Any, r: Any, s: Any, k: Any) -> Any:
        gains = k[own : own + norm.gains]
        biases = k[own + norm.gains :][: norm.biases]
        r = _row_norm(r[:G], gains)
        r = [v + bias for v, bias in zip(r, biases)] if biases else r
        new = cell.step(x, r, s, k[:own])
        if not norm.states:
            return new
        return normalized_output(x, r, new[1], lambda c: _row_norm([c], k[-1:])[0]), new[1]

    return normal


def _clipped(step: StepFunction, limit: float) -> StepFunction:
    """The gradient of h is cut to [-limit, limit]."""

    def clipped(x: Any, r: Any, s: Any, k: Any) -> Any:
        h, *others = step(x, r, s, k)
        return (cells.clip_grad(h, limit), *others)

    return clipped


def _zoned(step: StepFunction, gates: int, zoned: Sequence[int]) -> StepFunction:
    """Zoneout (Krueger et al., 2016, https://arxiv.org/abs/1606.01305): where the mask, a further
    gate, is 1, a state stays what it was."""

    def stays(x: Any, r: Any, s: Any, k: Any) -> Any:
        new = [*step(x[:gates], r[:gates], s, k)]
        for place, mask in zip(zoned, x[gates:]):
            new[place] = new[place] + mask * (s[place] - new[place])
        return tuple(new)

    return stays


def _dropped(step: StepFunction) -> StepFunction:
    """Recurrent dropout (Gal and Ghahramani, 2016, https://arxiv.org/abs/1512.05287): W_hh
    multiplies h after a mask, the last constant, which is the same at all steps."""

    def masked(x: Any, r: Any, s: Any, k: Any) -> Any:
        new = step(x, r, s[1:], k[:-1])
        return (k[-1] * new[0], *new)

    return masked


def extended_step(
    step: StepFunction, cell: Cell, limit: float | None, zoned: Sequence[int], dropped: bool
) -> StepFunction:
    """The options of a cell, from the innermost to the outermost."""
    if zoned:
        step = _zoned(step, cell.gates, zoned)
    if limit is not None:
        step = _clipped(step, limit)
    return _dropped(step) if dropped else step


def extended_cell(
    cell: Cell,
    limit: float | None,
    zoned: tuple[int, ...],
    dropped: bool,
    norm: Norm | None = None,
) -> Cell:
    """The cell with these options; registered if it is."""
    if limit is None and not zoned and not dropped and norm is None:
        return cell
    # torch.compile finds it there, and never has to make it.
    found = cell.variants.get((limit, zoned, dropped, norm))
    if found is None:
        found = _make_cell(cell, limit, zoned, dropped, norm)
        cell.variants[limit, zoned, dropped, norm] = found
    return found


def _make_cell(
    cell: Cell, limit: float | None, zoned: tuple[int, ...], dropped: bool, norm: Norm | None
) -> Cell:
    base = cell.step if norm is None else _normalized(cell, norm)
    step = extended_step(base, cell, limit, zoned, dropped)
    constants = sum(norm or ()) + dropped
    words = [cell.name]
    words += [] if limit is None else [f"clip{limit!r}"]
    words += [f"zoneout{''.join(map(str, zoned))}"] if zoned else []
    words += ["dropout"] if dropped else []
    words += [] if norm is None else ["norm-bias" if norm.biases else "norm"]

    def with_constants(x: Any, r: Any, s: Any, k: Any = ()) -> Any:
        return step(x, r, s, k)

    found = Cell(
        "-".join(words),
        with_constants,
        gates=cell.gates + len(zoned),
        states=cell.states + constants + dropped,
        constants=cell.constants + constants,
    )
    return cells.register(found) if cells.is_registered(cell) else found
