"""Scope library: W_hh h of a step, and W_hh^T dr, by a product of torch's, which is a library's.

The kernel does the rest of the step. Operands lie [N, B, K], so that one call serves all N."""

import torch

from ...cells import Cell
from ..products import bmm, differing
from ..tensors import BackwardTensors, ForwardTensors

# What a captured product reads and writes.
OPERANDS = ("w_hh", "hidden", "outgoing", "product")


def with_operands(
    cell: Cell, tensors: ForwardTensors | BackwardTensors, size: tuple[int, int, int]
) -> ForwardTensors | BackwardTensors:
    """With those that are still missing, for N, B, H, not yet written."""
    N, B, H = size
    new = tensors.w_hh.new_empty
    if isinstance(tensors, ForwardTensors):
        return tensors._replace(product=new(N, B, cell.gates * H))
    return tensors._replace(outgoing=new(N, B, cell.gates * H), product=new(size))


def clear_operand(tensors: ForwardTensors | BackwardTensors) -> None:
    """Zeros where products read rows that no step has written, of sequences that begin later. No
    result of theirs is used, but memory that nobody wrote is not to be read at all."""
    operand = tensors.hidden if isinstance(tensors, ForwardTensors) else tensors.outgoing
    assert operand is not None
    operand.zero_()


def fill_operands(
    given: ForwardTensors | BackwardTensors, tensors: ForwardTensors | BackwardTensors
) -> None:
    """In one launch, what products read that no step has written: of `given`, where `tensors` has
    others in its place, W_hh, and the initial h, where there is one."""
    to = []
    source = []
    if tensors.w_hh is not given.w_hh:
        to.append(tensors.w_hh)
        source.append(given.w_hh)
    if isinstance(tensors, ForwardTensors) and tensors.first[0] is not None:
        assert tensors.hidden is not None
        to.append(tensors.hidden[0])
        source.append(tensors.first[0])
    if to:
        torch._foreach_copy_(to, source)


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
