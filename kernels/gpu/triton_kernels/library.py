"""Scope library: W_hh h of a step, and W_hh^T dr, by a product of torch's, which is a library's.

The kernel does the rest of the step. Operands lie [N, B, K], so that one call serves all N."""

from torch import Tensor

from ...cells import Cell
from ..products import bmm, differing
from ..tensors import BackwardTensors, ForwardTensors

# What a captured product reads and writes.
OPERANDS = ("w_hh", "hidden", "outgoing", "product")


def with_operands(
    cell: Cell, tensors: ForwardTensors | BackwardTensors, s0: Tensor
) -> ForwardTensors | BackwardTensors:
    """With those that are still missing, of which nothing is read before it is written."""
    B, H = s0.shape[1:]
    N = len(s0) // cell.states
    if isinstance(tensors, ForwardTensors):
        return tensors._replace(product=s0.new_empty(N, B, cell.gates * H))
    outgoing = s0.new_empty(N, B, cell.gates * H)
    return tensors._replace(outgoing=outgoing, product=s0.new_empty(N, B, H))


def multiply(tensors: ForwardTensors | BackwardTensors, u: int, precision: str) -> None:
    """The product of step u; in the adjoint, that of the step done before."""
    assert tensors.product is not None
    N, H = len(tensors.product), tensors.w_hh.shape[1]
    w = tensors.w_hh.view(N, -1, H)
    precision = differing(w, precision)
    if isinstance(tensors, ForwardTensors):
        assert tensors.hidden is not None
        bmm(tensors.hidden[u % 2], w.mT, tensors.product, precision)
    else:
        assert tensors.outgoing is not None
        bmm(tensors.outgoing, w, tensors.product, precision)
