"""Drop-in layers: torch.nn's parameters, checks and semantics, with the recurrence of `ops`."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function_variadic

from . import interop
from .kernels import cells
from .kernels.plan import Plan
from .ops import one_step, recurrence

_CELLS = {"RNN_TANH": cells.rnn_tanh, "RNN_RELU": cells.rnn_relu, "LSTM": cells.lstm, "GRU": cells.gru}
_REVERSE = (0,), (0, 1)


def _prepare_scriptable(self: Any) -> Any:
    """For torch.jit.script. A subclass may do something of its own."""
    return interop.scriptable(self) if type(self).__module__ == __name__ else self


class _Stack(nn.RNNBase):
    """Layers and directions of one cell. (Not a subclass of nn.RNN: torch.compile refuses every instance of those.)"""

    # Of the class, so that torch.nn's modules have them when they become ours.
    plan: Plan | None = None
    recompute = False
    _given_weights = False  # whether _flat_weights was assigned

    def __init__(self, mode: str, *args: Any, plan: Plan | None = None, recompute: bool = False, **kwargs: Any) -> None:
        if mode != "LSTM" and "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(mode, *args, **kwargs)
        self.plan, self.recompute = plan, recompute

    qconfig = interop.qconfig

    @property
    def _flat_weights(self) -> Any:
        """As in torch.nn: what is assigned here is used, until one of the parameters becomes another tensor."""
        return self.__dict__["_flat_weights"]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        self.__dict__["_flat_weights"] = weights
        self.__dict__["_given_weights"] = True

    def _init_flat_weights(self) -> None:
        super()._init_flat_weights()
        self.__dict__.pop("_given_weights")

    def flatten_parameters(self) -> None:
        """Does nothing: the weights are used where they are."""

    __prepare_scriptable__ = _prepare_scriptable

    def _layers(self) -> list[list[Any]]:
        """w_ih, w_hh, b_ih, b_hh of each layer as they are now, those of its directions one below the other; with
        projections w_hr too."""
        if self._given_weights:
            self._update_flat_weights()
        if self._given_weights:
            given = iter(self._flat_weights)
            weights: Any = [[*islice(given, len(names))] for names in self._all_weights]
        else:
            own = self._parameters  # asked directly: attributes take long. What is parametrized is not in it
            weights = [[own[name] if name in own else getattr(self, name) for name in names]
                       for names in self._all_weights]
        if self.bidirectional:
            weights = [[torch.cat(pair) for pair in zip(*both)] for both in zip(weights[::2], weights[1::2])]
        return weights if self.bias else [[*some[:2], None, None, *some[2:]] for some in weights]

    def _initial(self, x: Tensor, hx: Any, batch_sizes: Tensor | None, order: Tensor | None) -> list[Tensor]:
        """The states before the first step, [L*D, B, H] each, checked and in the order of the batch."""
        expected = [self.get_expected_hidden_size(x, batch_sizes)]
        names = ["hidden"]
        if self.mode == "LSTM":
            expected.append((*expected[0][:2], self.hidden_size))
            names = ["hidden[0]", "hidden[1]"]
        if len(hx) != len(expected):
            raise RuntimeError("lstm expects two hidden states")
        hx = [state if order is None else state.index_select(1, order) for state in hx]
        for name, state, shape in zip(names, hx, expected):
            self.check_hidden_size(state, shape, f"Expected {name} size {{}}, got {{}}")
        return hx

    def forward(self, input: Any, hx: Any = None, lengths: Tensor | None = None, resets: Tensor | None = None,
                return_states: bool | None = None) -> Any:
        """Run the layers over a batch of sequences.

        Args:
            input: [T, B, I] ([B, T, I] if batch_first), [T, I] for one sequence, or a PackedSequence.
            hx: the states before the first step, zeros if None: [L*D, B, H], or [L*D, H] for one sequence; of an LSTM
                two, h_0 and c_0.
            lengths: int64 or int32 [B] on any device, in any order, zeros allowed: the steps of each sequence. Its
                output is 0 past them and its last state that of its own last step.
            resets: bool [T, B] ([B, T] if batch_first, [T] for one sequence). resets[t] is a boundary between the steps
                t - 1 and t: the state that would cross it, in either direction, is 0. resets[0] drops hx going forward.
            return_states: whether to return the states of every step as well.

        Returns the output [T, B, D*H] in the layout of `input`, and the last states in that of `hx`; with
        `return_states` also the states of all layers after every step, stacked: [L, T, B, D*H] in the layout of
        `input`, of an LSTM two, h and c.
        Raises ValueError and RuntimeError for what torch.nn refuses, as it does, before anything is computed."""
        states = hx if type(hx) is tuple else (hx,)
        if (has_torch_function_variadic(input, *states, lengths, resets, *self._parameters.values())
                or torch._C._get_tracing_state() is not None):
            extra = {"lengths": lengths, "resets": resets, "return_states": return_states or None}
            found = interop.other_forward(self, input, hx, {k: v for k, v in extra.items() if v is not None})
            if found is not None:
                return found
        if not torch.is_grad_enabled() and lengths is None and resets is None and not return_states:
            found = self._step(input, hx)
            if found is not None:
                return found
        return self._run(recurrence, input, hx, lengths, resets, return_states)

    def _step(self, x: Any, hx: Any) -> Any:
        """One step without gradients, as in streaming, where all that `_run` does would take longer than the step; or
        None, where `_run` has to look at it."""
        cell, states = _CELLS[self.mode], hx if self.mode == "LSTM" else (hx,)
        if not isinstance(x, Tensor) or x.dim() != 3 or self.bidirectional or self.proj_size or self.plan:
            return None
        if self._given_weights:
            return None
        expected = self.num_layers, x.shape[1 - self.batch_first], self.hidden_size
        if hx is None:
            states = [x.new_zeros(expected) for _ in range(cell.states)]
        if (x.shape[self.batch_first] != 1 or x.shape[2] != self.input_size or (self.dropout and self.training)
                or len(states) != cell.states or any(s.shape != expected for s in states)):
            return None
        y, ends = x.transpose(0, 1) if self.batch_first else x, []
        for i, names in enumerate(self._all_weights):
            now = states if self.num_layers == 1 else [s[i : i + 1] for s in states]
            found = one_step(cell, y, [self._parameters.get(name) for name in names], now)
            if found is None:
                return None
            y, after = found
            ends.append(after)
        last = ends[0] if len(ends) == 1 else [torch.cat(column) for column in zip(*ends)]
        return y.transpose(0, 1) if self.batch_first else y, tuple(last) if self.mode == "LSTM" else last[0]

    def _run(self, operator: Any, input: Any, hx: Any = None, lengths: Tensor | None = None,
             resets: Tensor | None = None, return_states: bool | None = None) -> Any:
        """`forward` by an operator like `recurrence`."""
        batch_sizes = order = restore = None
        pair, batch_dim = self.mode == "LSTM", 0 if self.batch_first else 1
        x, one, states = input, False, hx if hx is None or pair else (hx,)
        del input  # torch.jit.trace compares graphs by the names of tensors: each has one
        if isinstance(x, PackedSequence):
            x, batch_sizes, order, restore = x
        else:
            one = x.dim() == 2
            if x.dim() not in (2, 3):
                name = self.mode.partition("_")[0]
                tensor = "D tensor" if name == "RNN" else "D"
                raise ValueError(f"{name}: Expected input to be 2D or 3D, got {x.dim()}{tensor} instead")
            if states is not None and any(s.dim() != x.dim() for s in states):
                got = f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors" if pair else f"{hx.dim()}-D tensor"
                raise RuntimeError(f"For {'unbatched' if one else 'batched'} {x.dim()}-D input, "
                                   f"{'hx and cx' if pair else 'hx'} should also be {x.dim()}-D but got {got}")
            if one:
                x, states = x.unsqueeze(batch_dim), states if states is None else [s.unsqueeze(1) for s in states]
                resets = resets if resets is None else resets.unsqueeze(batch_dim)
        layers = self._layers()
        if x.dtype != layers[0][0].dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(f"RNN input dtype ({x.dtype}) does not match weight dtype ({layers[0][0].dtype}). Convert "
                             f"input: input.to({layers[0][0].dtype}), or convert model: model.to({x.dtype})")
        if x.shape[-1] != self.input_size:
            sizes = f"{self.input_size}, got {x.shape[-1]}"
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {sizes}")
        given = None if states is None else self._initial(x, states, batch_sizes, order)
        if self.batch_first:
            x, resets = x if batch_sizes is not None else x.transpose(0, 1), resets if resets is None else resets.T
        if resets is not None and order is not None and batch_sizes is not None:
            if resets.shape != (batch_sizes.shape[0], order.shape[0]):
                raise RuntimeError(f"Expected resets of shape {[batch_sizes.shape[0], order.shape[0]]}, got "
                                   f"{list(resets.shape)}")
            resets = resets.index_select(1, order)
        D, last, every, alone = 1 + self.bidirectional, [], [], len(layers) == 1
        masks = lengths, batch_sizes, resets
        for i, weights in enumerate(layers):
            if i and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            first = given if given is None or alone else [s[i * D : (i + 1) * D] for s in given]
            steps, ends = self._layer(operator, x, weights, first, masks, int(bool(return_states)), restore)
            x = steps[0]
            every.append(steps)
            last.append(ends)

        def layout(t: Tensor) -> Tensor:
            """[..., T, B, K] as the input is."""
            t = t.transpose(-3, -2) if self.batch_first and batch_sizes is None else t
            return t.squeeze(batch_dim - 3) if one else t

        h_n = last[0] if alone else [torch.cat(ends) for ends in zip(*last)]
        h_n = [h.squeeze(1) for h in h_n] if one else h_n
        output: Any = layout(x) if batch_sizes is None else PackedSequence(x, batch_sizes, order, restore)
        result = output, tuple(h_n) if pair else h_n[0]
        if not return_states:
            return result
        columns = [layout(torch.stack(column)) for column in zip(*every)]
        return *result, tuple(columns) if pair else columns[0]

    def _layer(self, operator: Any, x: Tensor, weights: Sequence[Any], first: Sequence[Tensor] | None,
               masks: Sequence[Any], keep: int, restore: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The states after every step, like x but for their width, h first and with `keep` the others; and the last
        states [D, B, H], in the order of `restore` if there is one. `first` is like these, zeros if None.

        A projection is W_hh h = (W_hh W_hr) m of a layer whose state is m = o tanh(c), h = W_hr m. Only the first h is
        of no m: it comes in as further input of the first step."""
        cell, reverse, (lengths, batch_sizes, resets) = _CELLS[self.mode], _REVERSE[self.bidirectional], masks
        (w_ih, w_hh, b_ih, b_hh, *projection), S, N = weights, cell.states, len(reverse)
        if projection:
            down, inner = projection[0].chunk(N), w_hh.chunk(N)
            w_hh = torch.cat([w @ w_hr for w, w_hr in zip(inner, down)])
            if first is not None:
                x = torch.cat((x, _first_steps(x, first[0], masks, reverse)), -1)
                w_ih = torch.cat((w_ih, torch.block_diag(*inner)), 1)
        if first is None:
            s0 = x.new_zeros((N * S, x.shape[1] if batch_sizes is None else int(batch_sizes[0]), self.hidden_size))
        else:
            h0 = torch.zeros_like(first[1]) if projection else first[0]
            s0 = h0 if S == 1 else torch.stack((h0, *first[1:]), 1).flatten(0, 1)
        y, others, last = operator(cell, x, w_ih, w_hh, b_ih, b_hh, s0, lengths, batch_sizes, resets, reverse, keep,
                                   self.plan, self.recompute)
        steps = [y] if others is None else [y, *others.view(S - 1, *y.shape)]
        last = last if restore is None else last.index_select(1, restore)
        ends = [last] if S == 1 else [last[k::S] for k in range(S)]
        if projection:
            steps[0] = torch.cat([m @ w_hr.T for m, w_hr in zip(y.chunk(N, -1), down)], -1)
            ends[0] = torch.stack([m @ w_hr.T for m, w_hr in zip(ends[0], down)])
            if lengths is not None:
                none = (lengths == 0).to(x.device)[:, None]
                ends[0] = torch.where(none, 0 if first is None else first[0], ends[0])
        return steps, ends


def _first_steps(x: Tensor, h0: Tensor, masks: Sequence[Any], reverse: Sequence[int]) -> Tensor:
    """Like x but of width N*P: h0 [N, B, P] in the rows of the step that each sweep begins with, and else 0."""
    (lengths, batch_sizes, resets), (N, B, P) = masks, h0.shape
    T, b = x.shape[0] if batch_sizes is None else batch_sizes.shape[0], torch.arange(B, device=x.device)
    t, starts = b * 0 + T - 1, torch.arange(T, device=x.device) * B
    if lengths is not None:
        t = (lengths.to(x.device) - 1).clamp(min=0)
    if batch_sizes is not None:
        sizes = batch_sizes.to(x.device)
        t, starts = (sizes[:, None] > b).sum(0) - 1, sizes.cumsum(0) - sizes
    columns = []
    for h, backwards in zip(h0, reverse):
        if resets is not None and not backwards:
            h = torch.where(resets[0, :, None], 0, h)
        columns.append(h.new_zeros(math.prod(x.shape[:-1]), P).index_add(0, starts[t] + b if backwards else b, h))
    return torch.cat(columns, -1).view(*x.shape[:-1], N * P)


class RNN(_Stack):
    __doc__ = nn.RNN.__doc__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.nonlinearity = args[3] if len(args) > 3 else kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args[:3], *args[4:], **kwargs)


class LSTM(_Stack):
    __doc__ = nn.LSTM.__doc__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    # Of two states: torch.nn's.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden


class GRU(_Stack):
    __doc__ = nn.GRU.__doc__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)


# In a single step there is no loop through time to be fused: torch.nn's own, under our names.
class RNNCell(nn.RNNCell):
    __doc__ = nn.RNNCell.__doc__
    qconfig = interop.qconfig
    forward = interop.leaf(nn.RNNCell.forward)
    __prepare_scriptable__ = _prepare_scriptable


class LSTMCell(nn.LSTMCell):
    __doc__ = nn.LSTMCell.__doc__
    qconfig = interop.qconfig
    forward = interop.leaf(nn.LSTMCell.forward)
    __prepare_scriptable__ = _prepare_scriptable


class GRUCell(nn.GRUCell):
    __doc__ = nn.GRUCell.__doc__
    qconfig = interop.qconfig
    forward = interop.leaf(nn.GRUCell.forward)
    __prepare_scriptable__ = _prepare_scriptable
