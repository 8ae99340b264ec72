"""The forward and the backward pass on a GPU, around the kernels in Triton or in CUDA C++.

Here are the tensors that the kernels write, and the large products before and after them. Each
language is a module with a function `launch` that runs its kernels."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from ..cells import Cell
from ..plan import STEP_SCOPES, Plan
from ..types import Gradients, Layout, OutputGrads, Outputs, Save, States, Weights
from . import products
from .fallback import with_fallback
from .products import differing
from .tensors import BackwardTensors, ForwardTensors

# by the bytes of a number
_INTEGERS = {2: torch.int16, 4: torch.int32}


def _launcher(plan: Plan) -> Callable[..., None]:
    """The function that runs a plan's kernels through time."""
    # imported late: Triton may be missing, and takes a while
    module = ".triton_kernels.launch" if plan.backend == "triton" else ".cuda.launch"
    launch: Callable[..., None] = import_module(module, __package__).launch
    return launch


def _is_padded(layout: Layout) -> bool:
    """Whether there are rows past a sequence's end."""
    return layout.lengths is not None and layout.offsets is None


def _new_marks(layout: Layout, y: Tensor, needs: Gradients[bool]) -> Tensor | None:
    """For which rows the products of weights' gradients read; None where that may be all."""
    R = len(y)
    integer = _INTEGERS[y.element_size()]
    if layout.resets is not None and (needs.w_ih or needs.w_hh):
        return y.new_empty(1 + len(layout.reverse), R, dtype=integer)
    if _is_padded(layout) and needs.w_ih:
        return y.new_empty(1, R, dtype=integer)
    return None


def forward(
    cell: Cell, plan: Plan, layout: Layout, x: Tensor, weights: Weights, s0: States, save: int
) -> Outputs:
    """x [R, I], or without w_ih pre-activations [R, N*G*H]; S states [N, B, H], zeros if None."""
    found: Outputs = with_fallback(_forward, cell, plan, layout, x, weights, s0, save)
    return found


def _forward(
    cell: Cell, plan: Plan, layout: Layout, x: Tensor, weights: Weights, s0: States, save: int
) -> Outputs:
    w_ih, w_hh, b_ih, b_hh = weights
    N = len(layout.reverse)
    S = cell.states
    A = cell.saved
    R = len(x)
    H = w_hh.shape[1]
    B = layout.sequences if s0 is None else s0[0].shape[1]
    last = tuple([x.new_empty(N, B, H) for _ in range(S)])
    y = x.new_empty(R, N * H)
    states = x.new_empty(S - 1, R, N * H) if S > 1 and save else None
    saved = x.new_empty(A, R, N * H) if A and save == Save.ACTIVATIONS else None
    precision = differing(x, plan.precision)
    # a product in another precision than torch's would need a copy of the bias for each row
    fused = plan.fused and w_ih is not None
    biased = fused or (plan.scope == "library" and precision != "")
    if not fused and w_ih is not None:
        x = products.linear(x, w_ih, None if biased else b_ih, precision)
    tensors = ForwardTensors(
        x=x,
        w_ih=w_ih if fused else None,
        w_hh=w_hh,
        b_ih=b_ih if biased else None,
        b_hh=b_hh,
        y=y,
        states=states,
        saved=saved,
        lengths=layout.lengths,
        offsets=layout.offsets,
        resets=layout.resets,
        first=(None,) * S if s0 is None else tuple(s0),
        last=last,
    )
    _launcher(plan)(cell, plan, layout, tensors, B)
    return Outputs(y, states, [*last], saved)


def backward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
    grads: OutputGrads,
    needs: Gradients[bool],
) -> Gradients[Tensor | None]:
    """The adjoint of `forward`."""
    found: Gradients[Tensor | None] = with_fallback(
        _backward, cell, plan, layout, x, weights, s0, outputs, grads, needs
    )
    return found


def _backward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
    grads: OutputGrads,
    needs: Gradients[bool],
) -> Gradients[Tensor | None]:
    w_ih, w_hh, _, _ = weights
    y, states, _, saved = outputs
    dy, dstates, dlast = grads
    N = len(layout.reverse)
    B = layout.sequences if s0 is None else s0[0].shape[1]
    S = cell.states
    H = w_hh.shape[1]
    dr = y.new_empty(len(y), len(w_hh))
    dx = y.new_empty(dr.shape) if cell.split else None
    h_prev = None if layout.lengths is None and layout.resets is None else y.new_empty(y.shape)
    marks = _new_marks(layout, y, needs)
    dfirst = [y.new_empty(N, B, H) if needs.s0 else None for _ in range(S)]
    tensors = BackwardTensors(
        w_hh=w_hh,
        y=y,
        states=states,
        saved=saved,
        dy=dy,
        dstates=dstates,
        dx=dx,
        dr=dr,
        h_prev=h_prev,
        marks=marks,
        lengths=layout.lengths,
        offsets=layout.offsets,
        resets=layout.resets,
        first=(None,) * S if s0 is None else tuple(s0),
        dlast=(None,) * S if dlast is None else tuple(dlast),
        dfirst=tuple(dfirst),
    )
    _launcher(plan)(cell, plan, layout, tensors, B)
    if marks is not None:
        # 0 times a NaN of a row without a mark is NaN: all bits there are set to 0, a launch each,
        # or by the kernel in the launch after, where there is one
        if needs.w_ih:
            x = torch.bitwise_and(x.view(marks.dtype), marks[0, :, None]).view(x.dtype)
        if needs.w_hh and layout.resets is not None and plan.scope not in STEP_SCOPES:
            assert h_prev is not None
            h_prev.view(marks.dtype).view(-1, N, H).bitwise_and_(marks[1:].T[..., None])
    found = _products(cell, plan, layout, x, w_ih, tensors, needs)
    return found._replace(s0=dfirst if needs.s0 else None)


def _products(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    w_ih: Tensor,
    tensors: BackwardTensors,
    needs: Gradients[bool],
) -> Gradients[Tensor | None]:
    """Of x and the weights, from those of the pre-activations, which the kernel wrote."""
    dr = tensors.dr
    dx = dr if tensors.dx is None else tensors.dx
    precision = differing(x, plan.precision)
    gradients: list[Tensor | None] = [None] * 6
    if needs.x:
        gradients[0] = dx if w_ih is None else products.mm(dx, w_ih, precision)
    if needs.w_ih:
        gradients[1] = products.mm(dx.T, x, precision)
    if needs.w_hh:
        gradients[2] = _w_hh_gradient(layout, tensors, precision)
    if needs.b_ih:
        gradients[3] = dx.sum(0)
    if needs.b_hh:
        # a tensor of its own, also where both biases have the same gradient
        shared = None if cell.split else gradients[3]
        gradients[4] = dr.sum(0) if shared is None else shared.clone()
    return Gradients._make(gradients)


def _w_hh_gradient(layout: Layout, tensors: BackwardTensors, precision: str) -> Tensor:
    """[N*G*H, H], from the h that came into each step, which is that of y one step before where
    `h_prev` was not written."""
    N = len(layout.reverse)
    y = tensors.y
    found = y.new_empty(tensors.w_hh.shape)
    drs = tensors.dr.chunk(N, 1)
    outs = found.chunk(N)
    if tensors.h_prev is not None:
        for d, h, out in zip(drs, tensors.h_prev.chunk(N, 1), outs):
            products.mm(d.T, h, precision, out)
        return found
    firsts = tensors.first[0]
    if firsts is None:
        # as in torch a NaN of dr in the first step, times 0, is NaN
        firsts = y.new_zeros(N, layout.sequences, found.shape[1])
    for d, h, first, back, out in zip(drs, y.chunk(N, 1), firsts, layout.reverse, outs):
        _shifted_product(d, h, first, bool(back), precision, out)
    return found


def _shifted_product(
    d: Tensor, h: Tensor, first: Tensor, reverse: bool, precision: str, out: Tensor
) -> None:
    """The sum over rows of d_t h_{t-1}^T, into `out`: d [R, K], h [R, H], and the initial h `first`
    [B, H]."""
    B = len(first)
    if len(h) == B:
        products.mm(d.T, first, precision, out)
    elif reverse:
        products.mm(d[:-B].T, h[B:], precision, out)
        products.add_mm(out, d[-B:].T, first, precision)
    else:
        products.mm(d[:B].T, first, precision, out)
        products.add_mm(out, d[B:].T, h[:-B], precision)
