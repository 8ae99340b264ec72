"""Scope library: W_hh h of a step, and W_hh^T dr, by torch's own product, which is a library's.

The kernel does the rest of the step. Operands lie [N, B, K], so that one call serves all N."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...cells import Cell
from ...plan import Plan
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


def multiply(tensors: ForwardTensors | BackwardTensors, u: int) -> None:
    """The product of step u; in the adjoint, that of the step done before."""
    assert tensors.product is not None
    N, H = len(tensors.product), tensors.w_hh.shape[1]
    w = tensors.w_hh.view(N, -1, H)
    if isinstance(tensors, ForwardTensors):
        assert tensors.hidden is not None
        torch.bmm(tensors.hidden[u % 2], w.mT, out=tensors.product)
    else:
        assert tensors.outgoing is not None
        torch.bmm(tensors.outgoing, w, out=tensors.product)


@contextmanager
def precision_of_products(plan: Plan) -> Iterator[None]:
    """torch's switch for products of float32, set as the plan says."""
    if plan.scope != "library" or plan.precision == "ieee":
        yield
        return
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if plan.precision == "tf32" else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
