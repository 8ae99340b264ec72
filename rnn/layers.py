"""Drop-in layers: torch.nn's parameters, checks and semantics, with the recurrence of `ops`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .kernels import cells
from .kernels.cells import Cell
from .kernels.plan import Plan
from .ops import recurrence

_CELLS = {"RNN_TANH": cells.rnn_tanh, "RNN_RELU": cells.rnn_relu, "LSTM": cells.lstm, "GRU": cells.gru}


class _Stack(nn.RNNBase):
    """Layers and directions of one cell. (Not a subclass of nn.RNN: torch.compile refuses every instance of those.)"""

    def __init__(self, mode: str, *args: Any, plan: Plan | None = None, **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        self.plan = plan

    @property
    def _cell(self) -> Cell:
        return _CELLS[self.mode]

    @property
    def _flat_weights(self) -> list[Any]:
        """The weights as they are now: no buffer holds copies that could be out of date."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Does nothing: the weights are used where they are."""

    def _weights(self, layer: int) -> list[Tensor | None]:
        """w_ih, w_hh, b_ih, b_hh of a layer, those of all directions one below the other."""
        D = 1 + self.bidirectional
        directions = [[getattr(self, name) for name in names] for names in self._all_weights[layer * D : (layer + 1) * D]]
        weights = [torch.cat(parts) for parts in zip(*directions)] if self.bidirectional else directions[0]
        return weights if self.bias else [*weights, None, None]

    def forward(self, input: Any, hx: Any = None, *, lengths: Tensor | None = None, resets: Tensor | None = None) -> Any:
        """Run the layers over a batch of sequences.

        Args:
            input: [T, B, I] ([B, T, I] if batch_first), [T, I] for one sequence, or a PackedSequence.
            hx: the states before the first step, zeros if None: [L*D, B, H], or [L*D, H] for one sequence.
            lengths: integers [B] on any device, in any order, zeros allowed: the number of steps of each sequence. Its
                output is 0 past them and its last state that of its own last step.
            resets: bool [T, B] (as `input` if batch_first or unbatched): where a new episode begins, to which no state
                is carried over from the step before (nor, in reverse, from it to that step).

        Returns:
            The output [T, B, D*H] in the layout of `input`, and the last states in that of `hx`.

        Raises:
            ValueError, RuntimeError: what torch.nn refuses, as it does, before anything is computed.
        """
        batch_sizes = sorted_indices = unsorted_indices = None
        x, one, batch_dim = input, False, 0 if self.batch_first else 1
        if isinstance(input, PackedSequence):
            x, batch_sizes, sorted_indices, unsorted_indices = input
        else:
            if x.dim() not in (2, 3):
                raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {x.dim()}D tensor instead")
            one = x.dim() == 2
            if hx is not None and hx.dim() != x.dim():
                kind = "unbatched" if one else "batched"
                raise RuntimeError(f"For {kind} {x.dim()}-D input, hx should also be {x.dim()}-D but got {hx.dim()}-D tensor")
            if one:
                x, hx = x.unsqueeze(batch_dim), hx if hx is None else hx.unsqueeze(1)
                resets = resets if resets is None else resets.unsqueeze(batch_dim)
        if hx is None:
            L, B, H = self.get_expected_hidden_size(x, batch_sizes)
            hx = torch.zeros(L, B, H, dtype=x.dtype, device=x.device)
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(x, hx, batch_sizes)
        if self.batch_first and batch_sizes is None:
            x, resets = x.transpose(0, 1), resets if resets is None else resets.transpose(0, 1)
        if resets is not None and sorted_indices is not None:
            resets = resets.index_select(1, sorted_indices)

        D, last = 1 + self.bidirectional, []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            s0 = hx if self.num_layers == 1 else hx[layer * D : (layer + 1) * D]
            x, _, s_n = recurrence(self._cell, x, *self._weights(layer), s0, lengths, batch_sizes, resets,
                                   (False, True)[:D], plan=self.plan)
            last.append(s_n)
        h_n = self.permute_hidden(torch.cat(last) if len(last) > 1 else last[0], unsorted_indices)
        if batch_sizes is not None:
            return PackedSequence(x, batch_sizes, sorted_indices, unsorted_indices), h_n
        x = x.transpose(0, 1) if self.batch_first else x
        return (x.squeeze(batch_dim), h_n.squeeze(1)) if one else (x, h_n)


class RNN(_Stack):
    __doc__ = nn.RNN.__doc__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class RNNCell(nn.RNNCellBase):
    __doc__ = nn.RNNCell.__doc__
    nonlinearity: str
    ...
