"""What all layers have in common: torch.nn's parameters, checks and semantics, with the recurrence
of `functional`."""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function_variadic

from . import interop
from .autograd import own_gradient
from .batch import batch_of
from .boundary import alive
from .checks import check_checkpoint, check_plan
from .extensions import (
    OPTIONS,
    check_option,
    described,
    extended_layer,
    make_parameters,
    prepare,
    reset_parameters,
)
from .functional import run_layer
from .kernels import cells
from .kernels.cells import Cell
from .kernels.plan import Plan
from .layer_types import LayerInputs, Operator, Options
from .projection import check_projected, projected_layer
from .single_step import single_step
from .time_options import check_time_parallel
from .time_parallel import parallel_layer
from .transforms import tracing_state

# By the modes of nn.RNNBase
CELLS = {
    "RNN_TANH": cells.rnn_tanh,
    "RNN_RELU": cells.rnn_relu,
    "LSTM": cells.lstm,
    "GRU": cells.gru,
}


class Stack(nn.RNNBase):
    """Layers and directions of one cell. (Not a subclass of nn.RNN: torch.compile refuses every
    instance of those.)"""

    # Of the class, so that torch.nn's modules have them when they become ours.
    recompute = False
    # Of how many steps the states are kept for backward, if not of all
    checkpoint: bool | int = False
    # How to compute the layer, if not as `rnn.kernels.planner.make_plan` would
    plan: Plan | None = None
    # Independent parts of the hidden state, each with a recurrence of its own
    num_heads = 1
    # The options of extensions.py, each off
    recurrent_dropout = 0.0
    zoneout: Any = 0.0
    weight_drop = 0.0
    layer_norm = False
    learned_state = False
    clip_recurrent_grad: Any = None
    # Chunks of time side by side, a `TimeParallel`, and what the last call reported
    time_parallel: Any = False
    last_time_parallel: Sequence[Any] = ()
    # Whether any of them is on, or the cell has constants
    extended = False
    # What was assigned to _flat_weights, which is a property: Dynamo of torch 2.10 cannot read
    # that.
    _given_weights: Any = None

    def __init__(
        self,
        mode: str,
        *args: Any,
        plan: Plan | None = None,
        recompute: bool = False,
        checkpoint: bool | int = False,
        time_parallel: Any = False,
        cell: Cell | None = None,
        **kwargs: Any,
    ) -> None:
        if mode != "LSTM" and "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        check_plan(plan)
        if not isinstance(recompute, int):
            raise TypeError(f"Expected recompute to be a bool, got {type(recompute).__name__}")
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        super().__init__(mode if cell is None else "RNN_TANH", *args, **kwargs)
        if cell is not None:
            self.mode = mode
            self.cell = cell
        if options or cell is not None:
            self.__dict__["under_construction"] = True
            for name, value in options.items():
                setattr(self, name, value)
            self.__dict__["extended"] = prepare(self)
            self._make_parameters()
            del self.__dict__["under_construction"]
        self.plan = plan
        self.recompute = recompute
        self.checkpoint = checkpoint
        if time_parallel:
            self.time_parallel = time_parallel

    def _make_parameters(self) -> None:
        """In place of those of nn.RNNBase, which knows neither other cells nor extensions."""
        make_parameters(self)
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn's, uniform within 1 / sqrt(H), where H is that of one head."""
        if self.extended:
            reset_parameters(self)
        else:
            super().reset_parameters()

    def extra_repr(self) -> str:
        return super().extra_repr() + described(self)

    def has_no_twin(self) -> bool:
        """Whether torch.nn has no layer that computes the same."""
        return self.extended or self.mode not in CELLS

    def layer_cell(self) -> Cell:
        """The algebra of a step."""
        return CELLS[self.mode]

    qconfig = interop.qconfig

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "plan":
            check_plan(value)
        elif name == "checkpoint":
            check_checkpoint(value)
        elif name == "time_parallel":
            check_time_parallel(value)
        elif name in OPTIONS:
            # A list could be changed without a check
            value = tuple(value) if isinstance(value, list) else value
            check_option(self, name, value)
        super().__setattr__(name, value)
        if name in OPTIONS and "under_construction" not in self.__dict__:
            self.__dict__["extended"] = prepare(self)

    @property
    def _flat_weights(self) -> Any:
        """As in torch.nn: what is assigned here is used, until one of the parameters becomes
        another tensor."""
        return self.__dict__["_flat_weights"]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        self.__dict__["_flat_weights"] = weights
        self.__dict__["_given_weights"] = weights

    def _init_flat_weights(self) -> None:
        super()._init_flat_weights()
        self.__dict__.pop("_given_weights", None)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.extended:
            prepare(self)

    def flatten_parameters(self) -> None:
        """Does nothing, and raises nothing: the weights are used where they are."""

    __prepare_scriptable__ = interop.prepare_scriptable

    _projected_layer = staticmethod(projected_layer)

    def _layers(self) -> list[list[Any]]:
        """w_ih, w_hh, b_ih, b_hh of each layer as they are now, of one direction after the other;
        with projections of both together, and w_hr too."""
        if self._given_weights is not None:
            self._update_flat_weights()
        if self._given_weights is not None:
            given = iter(self._given_weights)
            weights: list[list[Any]] = [[*islice(given, len(names))] for names in self._all_weights]
        else:
            # Asked directly: attributes take long. What is parametrized is not in it
            own = self._parameters
            weights = [
                [own[name] if name in own else getattr(self, name) for name in names]
                for names in self._all_weights
            ]
        if not self.bias:
            weights = [[*some[:2], None, None, *some[2:]] for some in weights]
        if self.proj_size:
            check_projected(self, weights)
        if not self.bidirectional:
            return weights
        pairs = zip(weights[::2], weights[1::2])
        if not self.proj_size:
            return [[*one, *other] for one, other in pairs]
        alive([t for some in weights for t in some])
        return [
            [
                None if one is None else torch.cat((own_gradient(one), own_gradient(other)))
                for one, other in zip(*both)
            ]
            for both in pairs
        ]

    # No keyword-only arguments, and no default but None: the ONNX exporter that traces gives all by
    # their positions.
    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        resets: Any = None,
        return_states: bool | None = None,
    ) -> Any:
        """Run the layers over a batch of sequences.

        Args:
            input: [T, B, I] ([B, T, I] if batch_first), [T, I] for one sequence, or a
                PackedSequence; of the parameters' dtype and device (under autocast of any
                floating-point dtype).
            hx: the states before the first step, zeros if None: [L*D, B, H], or [L*D, H] for one
                sequence; of an LSTM two, h_0 and c_0.
            lengths: int64 or int32 [B] on any device, in any order, zeros allowed: the steps of
                each sequence. Its output is 0 past them and its last state that of its own last
                step. A list, or for one sequence a number, will do.
            resets: bool [T, B] ([B, T] if batch_first, [T] for one sequence). resets[t] is a
                boundary between the steps t - 1 and t: the state that would cross it, in either
                direction, is 0. resets[0] drops hx going forward. A list of lists will do.
            return_states: whether to return the states of every step as well.

        Returns the output [T, B, D*H] in the layout of `input`, and the last states in that of
        `hx`; with `return_states` also the states of all layers after every step, stacked: [L, T,
        B, D*H] in the layout of `input`, of an LSTM two, h and c.
        Raises ValueError and RuntimeError for what torch.nn refuses, as it does, and TypeError for
        an argument of the wrong kind, before anything is computed."""
        if lengths is None and resets is None and not return_states:
            found = self._single_step(input, hx)
            if found is not None:
                return found
        states = hx if type(hx) is tuple else (hx,)
        if (
            has_torch_function_variadic(input, *states, lengths, resets, *self._parameters.values())
            or tracing_state() is not None
        ):
            extra = {"lengths": lengths, "resets": resets, "return_states": return_states or None}
            found = interop.other_forward(
                self, input, hx, {k: v for k, v in extra.items() if v is not None}
            )
            if found is not None:
                return found
        return self._run(run_layer, input, hx, lengths, resets, return_states)

    def _single_step(self, x: Any, hx: Any) -> Any:
        """One step, where all that `_run` does would take longer than the step; None where `_run`
        has to look at it."""
        if not isinstance(x, Tensor) or x.is_nested:
            return None
        size = x.shape
        if len(size) != 3 or size[1 if self.batch_first else 0] != 1:
            return None
        dropout = self.dropout and self.training and self.num_layers > 1
        if (
            self.bidirectional
            or self.proj_size
            or self.plan is not None
            or self.recompute
            or dropout
        ):
            return None
        if self._given_weights is not None or self.extended:
            return None
        own = self._parameters  # what is parametrized is not in it
        weights = [*map(own.get, self._flat_weights_names)]
        return single_step(
            self.layer_cell(), x, hx, weights, self.num_layers, self.hidden_size, self.batch_first
        )

    def _run(
        self,
        operator: Operator,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        resets: Any = None,
        return_states: bool | None = None,
    ) -> Any:
        """`forward` by another operator than `run_layer`."""
        layers = self._layers()
        if self.time_parallel:
            self.last_time_parallel = []
        cell = self.layer_cell()
        batch = batch_of(self, cell.carried, input, hx, lengths, resets, layers[0][0])
        # Under one name: torch.jit.trace looks for a tensor among the local variables
        input = batch.x
        reverse = (False, True) if self.bidirectional else (False,)
        D = len(reverse)
        batch_sizes = batch.masks.batch_sizes
        packed = batch_sizes is not None
        # A projection adds rows of the first step to x, and has x in order of time.
        turned = self.batch_first and not packed and bool(self.proj_size)
        x = own_gradient(input).transpose(0, 1) if turned else input
        del input
        batch_first = self.batch_first and not packed and not turned
        keep = int(bool(return_states))
        options = Options(keep, self.plan, self.recompute, batch_first, self.checkpoint)
        last = []
        every = []
        alone = len(layers) == 1
        for i, weights in enumerate(layers):
            if i and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            first = batch.states
            if first is not None and not alone:
                first = [s[i * D : (i + 1) * D] for s in first]
            run = operator
            if self.time_parallel:
                run = partial(parallel_layer, self, run)
            if self.extended:
                run = partial(extended_layer, self, i, run)
            if self.proj_size:
                run = partial(self._projected_layer, run)
            inputs = LayerInputs(cell, x, weights, first, batch.masks, reverse)
            x, others, ends = run(inputs, options)
            if keep:
                every.append(_all_states(x, others, batch_first))
            last.append(ends)

        def layout(t: Tensor) -> Tensor:
            """[..., T, B, K], or if `batch_first` [..., B, T, K], as the input was."""
            t = t.transpose(-3, -2) if turned else t
            return t.squeeze(-3 if self.batch_first else -2) if batch.unbatched else t

        h_n = last[0] if alone else [torch.cat(ends) for ends in zip(*last)]
        if batch.restore is not None:
            h_n = [h.index_select(1, batch.restore) for h in h_n]
        if batch.unbatched:
            h_n = [h.squeeze(1) for h in h_n]
        output: Any = layout(x)
        if batch_sizes is not None:
            output = PackedSequence(x, batch_sizes, batch.order, batch.restore)
        result = output, tuple(h_n) if len(h_n) > 1 else h_n[0]
        if not keep:
            return result
        columns = [torch.stack([layout(t) for t in column]) for column in zip(*every)]
        return *result, tuple(columns) if len(columns) > 1 else columns[0]


def _all_states(y: Tensor, others: Tensor | None, batch_first: bool) -> list[Tensor]:
    """The states after every step in the layout of y, which is the first of them."""
    if others is None:
        return [y]
    if not batch_first:
        return [y, *others.unflatten(1, y.shape[:-1])]
    B, T, _ = y.shape
    return [y, *others.unflatten(1, (T, B)).transpose(1, 2)]
