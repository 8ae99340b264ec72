"""How much of a loss's gradient reaches the hidden state after every step: the vanishing or
exploding gradient of a model, measured.

The recurrent layers of the model run once in differentiable torch operations, step by step, so that
autograd has every hidden state: a diagnostic, slow."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_layer
from .composite import composite, composite_layer
from .convert import replace
from .kernels.cells import Cell
from .layer_types import LayerInputs, LayerOutputs, Options
from .stack import Stack


@dataclass(frozen=True)
class GradientFlow:
    """What `gradient_flow` measured.

    loss: the value of the loss.
    norms: float64 [T] on the CPU for each recurrence of the model, in order of time: the 2-norm,
        over the whole batch, of the gradient of the loss with respect to the hidden state after
        step t, with proj_size the projected one. The keys are the module's name and the ending of
        its parameters' names: "encoder.l0", "encoder.l0_reverse", "encoder.l1". What is called
        several times has "encoder.l0 (call 2)" as well."""

    loss: float
    norms: dict[str, Tensor]

    def plot(self, axes: Any = None) -> Any:
        """Draw the norms over the steps, on a logarithmic scale, a line for each recurrence.

        `axes`: matplotlib's, in which to draw; those of a new figure if None. Returns the axes.
        Needs matplotlib."""
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.figure(layout="constrained").add_subplot()
        for name, norms in self.norms.items():
            axes.plot(range(len(norms)), norms.numpy(), label=name)
        axes.set_yscale("log")
        axes.set_xlabel("step t")
        axes.set_ylabel("norm of dL/dh_t")
        axes.legend()
        return axes


class _Sweep(NamedTuple):
    """The hidden states of one recurrence in order of time, [B, H] each, and its name."""

    name: str
    states: list[Tensor]


class _Recording:
    """A cell that leaves every h which it returns in `record`."""

    def __init__(self, cell: Cell, record: list[Tensor]) -> None:
        self.cell = cell
        self.record = record

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cell, name)

    def forward(self, x: Sequence[Any], r: Sequence[Any], s: Sequence[Any]) -> Any:
        (h, *others), saved = self.cell.forward(x, r, s)
        return (_recorded(h, self.record), *others), saved


def _recorded(h: Tensor, record: list[Tensor]) -> Tensor:
    # An alias, so that a state that is h once more does not count
    h = h.view_as(h) if h.requires_grad else h.detach().requires_grad_()
    record.append(h)
    return h


class _Operator:
    """In place of `functional.run_layer` in one call of a layer: the composite, which leaves the
    hidden states in `sweeps`."""

    def __init__(self, name: str, sweeps: list[_Sweep]) -> None:
        self.name = name
        self.sweeps = sweeps
        self.layer = 0

    def __call__(self, inputs: LayerInputs, options: Options) -> LayerOutputs:
        record: list[Tensor] = []
        check_layer(inputs, options.batch_first)
        recording: Any = _Recording(inputs.cell, record)
        found = composite_layer(inputs._replace(cell=recording), options)
        self.leave(record, inputs.reverse)
        return found

    def leave(self, record: list[Tensor], reverse: Sequence[int]) -> None:
        """The hidden states of one layer, which are done in the order of the recurrences."""
        steps = len(record) // len(reverse)
        for n, backwards in enumerate(reverse):
            swept = record[n * steps : (n + 1) * steps]
            name = self.name.format(f"l{self.layer}_reverse" if backwards else f"l{self.layer}")
            self.sweeps.append(_Sweep(name, swept[::-1] if backwards else swept))
        self.layer += 1


def _projected_layer(operator: Any, inputs: LayerInputs, options: Options) -> LayerOutputs:
    """In place of `projection.projected_layer`, for an LSTM whose h is a projection of o tanh(c).
    Here h is that of the recurrence, with zeros up to the width of c."""
    w_ih, w_hh, b_ih, b_hh, w_hr = inputs.weights
    cell = inputs.cell
    N = len(inputs.reverse)
    down = w_hr.chunk(N)
    P, H = down[0].shape
    record: list[Tensor] = []

    def wide(t: Tensor) -> Tensor:
        return F.pad(t, (0, H - P))

    def step(n: int, x: Tensor, r: Tensor, s: Any, biases: Sequence[Any]) -> Any:
        gates = [v if b is None else v + b for v, b in zip((x, r), biases)]
        (m, c), _ = cell.forward(*(v.chunk(cell.gates, -1) for v in gates), s)
        return wide(_recorded(m @ down[n].T, record)), c

    states = inputs.states
    if states is not None:
        states = [wide(states[0]), *states[1:]]
    wide_inputs = inputs._replace(weights=(w_ih, wide(w_hh), b_ih, b_hh), states=states)
    by_step = partial(composite, step=step)
    y, others, (h_n, *last) = composite_layer(wide_inputs, options, by_step)
    operator.leave(record, inputs.reverse)

    def narrow(t: Tensor) -> Tensor:
        own: Tensor = t.unflatten(-1, (-1, H))[..., :P].flatten(-2)
        return own

    return narrow(y), others, [narrow(h_n), *last]


class _Watch:
    """`Stack._run` of one layer of the model."""

    def __init__(self, layer: Stack, name: str, sweeps: list[_Sweep]) -> None:
        self.layer = layer
        self.name = f"{name}.{{}}" if name else "{}"
        self.sweeps = sweeps
        self.calls = 0

    def __call__(self, operator: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        name = self.name if self.calls == 1 else f"{self.name} (call {self.calls})"
        return type(self.layer)._run(self.layer, _Operator(name, self.sweeps), *args, **kwargs)


@contextmanager
def _assigned(module: nn.Module, **values: Any) -> Iterator[None]:
    """Methods and attributes of one module, for a while."""
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    vars(module).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(module)[name]
        vars(module).update(before)


def _watched(layers: dict[str, nn.RNNBase], sweeps: list[_Sweep]) -> ExitStack:
    """While this is open, those layers leave their hidden states in `sweeps`."""
    stack = ExitStack()
    for name, layer in layers.items():
        ours: Any = layer
        if not isinstance(layer, Stack):
            # torch.nn's: one of ours with the same parameters
            ours = replace(copy.copy(layer), verbose=False)
            stack.enter_context(_assigned(layer, forward=ours.forward))
        watch = _Watch(ours, name, sweeps)
        stack.enter_context(
            _assigned(ours, _run=watch, _single_step=lambda x, hx: None, time_parallel=False)
        )
        if ours.proj_size:
            stack.enter_context(_assigned(ours, _projected_layer=_projected_layer))
    return stack


def _unseen(layer: nn.RNNBase) -> str:
    """The option of a layer, if any, whose hidden states do not come from the operator's cell."""
    if not isinstance(layer, Stack):
        return ""
    if layer.proj_size and layer.extended:
        return "proj_size and options of the recurrence"
    if layer.layer_norm:
        return "layer_norm"
    if isinstance(layer.clip_recurrent_grad, (tuple, list)):
        return "clip_recurrent_grad by a norm"
    return "recurrent_dropout in training" if layer.training and layer.recurrent_dropout else ""


def _layers(model: Any) -> dict[str, nn.RNNBase]:
    """The recurrent layers of the model by name. Raises TypeError and ValueError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__name__}")
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and isinstance(
            replace(copy.copy(module), verbose=False), Stack
        ):
            found[name] = module
            option = _unseen(module)
            if option:
                raise ValueError(
                    f"Expected layers without {option}, got {name or 'the model'}: its hidden "
                    "state is not that of the recurrence"
                )
    if not found:
        raise ValueError("Expected a model with a layer of rnn or torch.nn, RNN, LSTM or GRU")
    return found


def _norm(grad: Tensor | None) -> Tensor:
    if grad is None:
        return torch.zeros((), dtype=torch.float64)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=dtype)
    return norm.cpu().double()


def gradient_flow(model: nn.Module, x: Any, loss_fn: Callable[[Any], Tensor]) -> GradientFlow:
    """The norm of dL/dh_t, the total derivative of a loss with respect to the hidden state after
    step t, through all later steps and layers, for each recurrent layer and direction of a model.

    Args:
        model: any module with layers of ours or of torch.nn (RNN, LSTM, GRU; own classes derived
            from ours, but not those derived from torch.nn's), whatever their options but
            layer_norm, clip_recurrent_grad by a norm, recurrent_dropout in training, and proj_size
            with options of the recurrence. It runs once, in the mode (train or eval) that it is in,
            without torch.compile. Its parameters and their gradients stay as they are.
        x: what the model is called with: a tensor or PackedSequence, or a tuple of arguments.
        loss_fn: from the model's output to the loss, a tensor of one number.

    For packed input and `lengths` T is the number of steps of the longest sequence, and a sequence
    counts for nothing past its end. Tensors are of any floating-point dtype.
    Returns a `GradientFlow`, whose `plot()` draws the norms.
    Source of the diagnostic: Pascanu, Mikolov and Bengio, On the difficulty of training recurrent
    neural networks, 2013, https://arxiv.org/abs/1211.5063.
    Raises TypeError for a model that is no module and a loss_fn that cannot be called, ValueError
    for a model without such layers, layers with those options, a call that reaches none of the
    layers, and a loss that is not one number or does not depend on them."""
    layers = _layers(model)
    if not callable(loss_fn):
        raise TypeError(f"Expected loss_fn to be callable, got {type(loss_fn).__name__}")
    sweeps: list[_Sweep] = []
    arguments = [*x] if type(x) is tuple else [x]
    eager = torch.compiler.set_stance("force_eager")
    with torch.inference_mode(False), torch.enable_grad(), eager, _watched(layers, sweeps):
        # What inference mode has made cannot enter a graph
        arguments = [
            t.clone() if isinstance(t, Tensor) and t.is_inference() else t for t in arguments
        ]
        loss = loss_fn(model(*arguments))
    if not sweeps:
        raise ValueError("Expected a model that calls its recurrent layers")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"Expected loss_fn to return a tensor of one number, got {got}")
    if not loss.requires_grad:
        raise ValueError("Expected a loss that depends on the recurrent layers of the model")
    states = [h for sweep in sweeps for h in sweep.states]
    grads = iter(torch.autograd.grad(loss, states, torch.ones_like(loss), allow_unused=True))
    norms: dict[str, Tensor] = {}
    for sweep in sweeps:
        found = torch.stack([_norm(next(grads)) for _ in sweep.states])
        # Of several heads together
        norms[sweep.name] = torch.hypot(norms.get(sweep.name, torch.zeros_like(found)), found)
    return GradientFlow(loss.item(), norms)
