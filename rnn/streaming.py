"""A layer that is fed step by step, or in chunks, and keeps its state in between; and what it is
exported as, with the state as explicit input and output."""

from typing import Any

import torch
from torch import Tensor, nn

from .checks import as_tensor
from .single_step import order
from .stack import Stack


class _Functional(nn.Module):
    """A layer without a memory of its own: forward(x, *state) -> (y, *state)."""

    def __init__(self, layer: Any, one_step: bool) -> None:
        super().__init__()
        self.layer = layer
        self.one_step = one_step
        self.states = layer.layer_cell().carried

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """x: [B, I] for one step, [T, B, I] ([B, T, I] if the layer is batch_first) for a chunk;
        state: the layer's states, [L, B, H] each. Returns y like x, and the states after it.

        Raises TypeError for another number of states, and else what the layer raises."""
        if len(state) != self.states:
            raise TypeError(f"Expected x and {self.states} states, got {len(state)} states")
        time = 1 if self.layer.batch_first else 0
        rows = x.unsqueeze(time) if self.one_step else x
        y, last = self.layer(rows, state if self.states > 1 else state[0])
        return y.squeeze(time) if self.one_step else y, *_as_tuple(last)


def _as_tuple(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _usable(state: Any) -> Any:
    """States that inference mode has made, and that outside of it cannot enter a graph."""
    if torch.is_inference_mode_enabled():
        return state
    copies = tuple([s.clone() for s in _as_tuple(state)])
    return copies if isinstance(state, tuple) else copies[0]


class Streaming(nn.Module):
    """A layer of ours in one direction that keeps its state from call to call.

    layer: `rnn.RNN`, `rnn.LSTM`, `rnn.GRU` or another layer of ours, any options but bidirectional;
        it is `streaming.layer`, whose parameters are those of this module.
    detach: whether the state that is kept has no graph, so that gradients end at the calls. If not,
        they flow back through all calls since the last reset.
    same_bits: whether on the CPU a step has the bits that it has in a whole sequence of as many
        sequences, in whatever chunks (float32 and float64, compiled C++, the same number of
        threads). If not, a single step is faster by a tenth to two thirds, for weights that do not
        fit the caches more, and differs by rounding: docs/numerics.md.

    The state is in buffers: `.to` moves and casts them. They are of a stream and not of the model,
    so no `state_dict` has them, and one of a model that has seen nothing loads at any time; copies
    and pickles have them, without a graph. Outside of torch.no_grad the output has the graph of its
    own call.

    A call is a call of the layer: dtypes and errors are the layer's.

    Raises TypeError for what is none of our layers and an option that is no bool, ValueError for a
    bidirectional layer, whose other direction begins at the end."""

    def __init__(self, layer: Any, detach: bool = True, same_bits: bool = True) -> None:
        super().__init__()
        if not isinstance(layer, Stack):
            raise TypeError(
                f"Expected a layer of rnn, got {type(layer).__module__}.{type(layer).__qualname__}"
            )
        if layer.bidirectional:
            raise ValueError(
                "Expected a layer in one direction: the other one begins at the end of the sequence"
            )
        for name, value in (("detach", detach), ("same_bits", same_bits)):
            if not isinstance(value, bool):
                raise TypeError(f"Expected {name} to be a bool, got {type(value).__name__}")
        self.layer = layer
        self.detach = detach
        self.same_bits = same_bits
        self._names = [f"state_{k}" for k in range(layer.layer_cell().carried)]
        for name in self._names:
            self.register_buffer(name, None, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have no part in a graph."""
        buffers = {k: None if s is None else s.detach() for k, s in self._buffers.items()}
        return {**self.__dict__, "_buffers": buffers}

    @property
    def state(self) -> Any:
        """The states after the last call in the form of the layer's hx, or None before the first.
        To be assigned as well: what is kept elsewhere for the sequences of the next call; with
        `detach` without its graph. Raises TypeError and ValueError for another number of states or
        other shapes than [L, B, H]."""
        buffers = self._buffers
        states = tuple([buffers[name] for name in self._names])
        if states[0] is None:
            return None
        return states if len(states) > 1 else states[0]

    @state.setter
    def state(self, value: Any) -> None:
        if value is None:
            self.reset()
            return
        states = value if isinstance(value, (tuple, list)) else (value,)
        if len(states) != len(self._names) or not all(isinstance(s, Tensor) for s in states):
            raise TypeError(f"Expected state to be {len(self._names)} tensors, got {value!r:.80}")
        batch = states[0].shape[1] if states[0].dim() == 3 else 0
        expected = self._shapes(batch)
        got = [tuple(s.shape) for s in states]
        if got != expected:
            raise ValueError(f"Expected state of shapes {expected}, got {got}")
        self._keep(tuple(states))

    def _shapes(self, batch_size: int) -> list[tuple[int, ...]]:
        """Of the states; a projection makes only h narrower."""
        layer: Any = self.layer
        first = layer.proj_size or layer.hidden_size
        widths = [first, *[layer.hidden_size] * (len(self._names) - 1)]
        return [(layer.num_layers, batch_size, width) for width in widths]

    def _keep(self, states: tuple[Tensor, ...]) -> None:
        for name, s in zip(self._names, states):
            self._buffers[name] = s.detach() if self.detach and s.requires_grad else s

    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        """Each state [L, batch_size, H] before the first step, zeros or what is learned, with the
        layer's dtype and device: the first state for what `step_module` and `chunk_module`
        make."""
        layer: Any = self.layer
        if layer.learned_state:
            rows = [getattr(layer, f"initial_states_l{k}") for k in range(layer.num_layers)]
            learned = torch.stack(rows, 1)[:, :, None].expand(-1, -1, batch_size, -1)
            return tuple(state.contiguous() for state in learned.detach())
        like = next(layer.parameters())
        return tuple(like.new_zeros(shape) for shape in self._shapes(batch_size))

    def reset(self, mask: Any = None) -> None:
        """Begin anew: all sequences, of which there may then be another number, or those of `mask`,
        bool [B] or a list, whose state becomes what it was before the first call.

        Raises TypeError for a mask that is no tensor or list of bools, ValueError for one of
        another shape."""
        if mask is None:
            self._buffers.update(dict.fromkeys(self._names))
            return
        first = self._buffers[self._names[0]]
        cut = as_tensor("mask", mask, None if first is None else first.device)
        if cut is None or cut.dtype != torch.bool:
            raise TypeError(f"Expected mask to have bools, got {mask!r:.80}")
        if first is None:
            return
        if cut.shape != first.shape[1:2]:
            raise ValueError(f"Expected mask of shape [{first.shape[1]}], got {list(cut.shape)}")
        new = self.initial_state(first.shape[1])
        for name, initial in zip(self._names, new):
            s: Any = self._buffers[name]
            self._buffers[name] = torch.where(cut.to(s.device).unsqueeze(-1), initial, s)

    def forward(self, x: Tensor) -> Tensor:
        """Take in the next step or steps of every sequence.

        x: [B, I], one step; or a chunk [T, B, I] ([B, T, I] if the layer is batch_first). B is that
            of the call before, or any after a reset.
        Returns the output, like x but of the layer's width.
        Raises TypeError for what is no tensor, packed sequences among them, ValueError for another
        number of dimensions or sequences, and what the layer raises; the state then stays."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Expected x to be a Tensor, a step or a chunk of steps of all sequences, got "
                f"{type(x).__name__}"
            )
        # Attributes of a module take long
        layer: Any = self._modules["layer"]
        time = 1 if layer.batch_first else 0
        dimensions = x.dim()
        if dimensions not in (2, 3):
            raise ValueError(f"Expected x to be 2D (a step) or 3D (a chunk), got {dimensions}D")
        rows = x.unsqueeze(time) if dimensions == 2 else x
        state = self.state
        if state is not None:
            first = state[0] if type(state) is tuple else state
            if first.shape[1] != rows.shape[1 - time]:
                raise ValueError(
                    f"Expected x of {first.shape[1]} sequences, as in the call before, got "
                    f"{rows.shape[1 - time]}: reset() comes before another number of them"
                )
            if not torch.compiler.is_compiling() and first.is_inference():
                state = _usable(state)
        y: Tensor
        if not torch.compiler.is_compiling():
            before = order.of_sequences
            # This call may be in one of another Streaming, by a hook of its layer
            order.of_sequences = self.same_bits
            try:
                y, last = layer(rows, state)
            finally:
                order.of_sequences = before
        else:
            y, last = layer(rows, state)
        self._keep(_as_tuple(last))
        return y.squeeze(time) if dimensions == 2 else y

    def step_module(self) -> nn.Module:
        """The layer as a module for one step, forward(x [B, I], *state) -> (y, *state), to be
        exported by torch.export or torch.onnx.export; it has the layer itself."""
        return _Functional(self.layer, True)

    def chunk_module(self) -> nn.Module:
        """Likewise for chunks and whole sequences: x is [T, B, I] ([B, T, I] if the layer is
        batch_first)."""
        return _Functional(self.layer, False)
