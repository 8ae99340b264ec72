"""The recurrence as ONNX's own RNN, LSTM and GRU nodes, while torch.onnx exports a model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layer_types import Masks

# Of each cell: the operator, ONNX's order of torch's gates, the attributes for one direction.
_NODES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "rnn_tanh": ("RNN", [0], {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", [0], {"activations": ["Relu"]}),
    "lstm": ("LSTM", [0, 3, 1, 2], {}),
    "gru": ("GRU", [1, 0, 2], {"linear_before_reset": 1}),
}
_DIRECTIONS = {(0,): "forward", (1,): "reverse", (0, 1): "bidirectional"}


def has_node(cell: str, masks: Masks, reverse: Sequence[int], keep: int) -> bool:
    """ONNX knows no packed rows, no resets, of an LSTM no c of every step, and no cells of one's
    own."""
    plain = masks.batch_sizes is masks.resets is None and not (keep and cell == "lstm")
    return plain and cell in _NODES and tuple(reverse) in _DIRECTIONS


def recurrence(
    cell: str, given: Sequence[Any], lengths: Tensor | None, reverse: Sequence[int]
) -> tuple[Tensor, None, Tensor]:
    """As `functional.recurrence`. (https://onnx.ai/onnx/operators/onnx__LSTM.html)"""
    (x, w_ih, w_hh, b_ih, b_hh, s0) = given
    (operator, order, attributes) = _NODES[cell]
    N = len(reverse)
    (T, B, _) = x.shape
    H = s0.shape[-1]

    def gates(w: Tensor) -> Tensor:
        """[N*G*H, ...] to [N, G*H, ...] in ONNX's order."""
        return torch.cat([w.unflatten(0, (N, len(order), H))[:, g] for g in order], 1)

    bias = None if b_ih is None else torch.cat((gates(b_ih), gates(b_hh)), 1)
    states = 2 if operator == "LSTM" else 1
    attributes = {
        name: value * N if isinstance(value, list) else value for name, value in attributes.items()
    }
    y, *last = torch.onnx.ops.symbolic_multi_out(
        operator,
        (
            x,
            gates(w_ih),
            gates(w_hh),
            bias,
            None if lengths is None else lengths.int(),
            *(s0[k::states] for k in range(states)),
        ),
        {"hidden_size": H, "direction": _DIRECTIONS[tuple(reverse)], **attributes},
        dtypes=[x.dtype] * (1 + states),
        shapes=[(T, N, B, H), *[(N, B, H)] * states],
    )
    ends = last[0] if states == 1 else torch.stack(last, 1).flatten(0, 1)
    if lengths is not None:  # ONNX has 0 for a sequence of no steps
        ends = torch.where((lengths == 0)[:, None], s0, ends)
    return y.transpose(1, 2).flatten(2), None, ends
