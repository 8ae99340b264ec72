"""Drop-in layers: torch.nn's parameters, checks and semantics, with the recurrence of `ops`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .kernels import cells
from .kernels.plan import Plan
from .ops import recurrence

_CELLS = {"RNN_TANH": cells.rnn_tanh, "RNN_RELU": cells.rnn_relu, "LSTM": cells.lstm, "GRU": cells.gru}


class _Stack(nn.RNNBase):
    """Layers and directions of one cell. (Not a subclass of nn.RNN: torch.compile refuses every instance of those.)"""

    def __init__(self, mode: str, *args: Any, plan: Plan | None = None, **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        self.plan = plan

    def flatten_parameters(self) -> None:
        """Does nothing: the weights are used where they are."""

    def _layers(self) -> Any:
        """w_ih, w_hh, b_ih, b_hh of each layer as they are now, those of its directions one below the other."""
        weights = [[getattr(self, name) for name in names] for names in self._all_weights]
        if self.bidirectional:
            weights = [[torch.cat(pair) for pair in zip(*both)] for both in zip(weights[::2], weights[1::2])]
        return weights if self.bias else [[*pair, None, None] for pair in weights]

    def forward(self, input: Any, hx: Any = None, *, lengths: Tensor | None = None) -> Any:
        """Run the layers over a batch of sequences.

        Args:
            input: [T, B, I] ([B, T, I] if batch_first), [T, I] for one sequence, or a PackedSequence.
            hx: the states before the first step, zeros if None: [L*D, B, H], or [L*D, H] for one sequence.
            lengths: integers [B] on any device, in any order, zeros allowed: the number of steps of each sequence. Its
                output is 0 past them and its last state that of its own last step.

        Returns the output [T, B, D*H] in the layout of `input`, and the last states in that of `hx`.
        Raises ValueError and RuntimeError for what torch.nn refuses, as it does, before anything is computed."""
        batch_sizes = order = restore = None
        x, one, batch_dim = input, False, 0 if self.batch_first else 1
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, restore = input
        else:
            one = x.dim() == 2
            if x.dim() not in (2, 3):
                name = self.mode.partition("_")[0]
                raise ValueError(f"{name}: Expected input to be 2D or 3D, got {x.dim()}D tensor instead")
            if hx is not None and hx.dim() != x.dim():
                raise RuntimeError(f"For {'unbatched' if one else 'batched'} {x.dim()}-D input, hx should also be "
                                   f"{x.dim()}-D but got {hx.dim()}-D tensor")
            if one:
                x, hx = x.unsqueeze(batch_dim), hx if hx is None else hx.unsqueeze(1)
        layers = self._layers()
        if x.dtype != layers[0][0].dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(f"RNN input dtype ({x.dtype}) does not match weight dtype ({layers[0][0].dtype}). Convert "
                             f"input: input.to({layers[0][0].dtype}), or convert model: model.to({x.dtype})")
        if x.shape[-1] != self.input_size:
            sizes = f"{self.input_size}, got {x.shape[-1]}"
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {sizes}")
        expected = self.get_expected_hidden_size(x, batch_sizes)
        hx = x.new_zeros(expected) if hx is None else self.permute_hidden(hx, order)
        self.check_hidden_size(hx, expected)
        x = x.transpose(0, 1) if self.batch_first and batch_sizes is None else x
        D, last = 1 + self.bidirectional, []
        for i, (w_ih, w_hh, b_ih, b_hh) in enumerate(layers):
            if i and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            s0 = hx if len(layers) == 1 else hx[i * D : (i + 1) * D]
            x, _, s_n = recurrence(_CELLS[self.mode], x, w_ih, w_hh, b_ih, b_hh, s0, lengths, batch_sizes, None,
                                   (False, True)[:D], 0, self.plan)
            last.append(s_n)
        h_n = self.permute_hidden(last[0] if len(last) == 1 else torch.cat(last), restore)
        if batch_sizes is not None:
            return PackedSequence(x, batch_sizes, order, restore), h_n
        x = x.transpose(0, 1) if self.batch_first else x
        return (x.squeeze(batch_dim), h_n.squeeze(1)) if one else (x, h_n)


class RNN(_Stack):
    __doc__ = nn.RNN.__doc__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        self.nonlinearity = args[3] if len(args) > 3 else kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args[:3], *args[4:], **kwargs)


class RNNCell(nn.RNNCell):
    """torch.nn's own, under this name: in a single step there is no loop through time to be fused."""
