"""The forward and the backward pass on a GPU, around the kernels in Triton or in CUDA C++.

Here are the tensors that the kernels write, and the large products before and after them. Each
language is a module with a function `launch` that runs its kernels."""

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from ..cells import Cell
from ..plan import Plan
from ..types import Gradients, Layout, OutputGrads, Outputs, Save, States, Weights
from . import products
from .products import differing
from .tensors import BackwardTensors, ForwardTensors


def _launcher(plan: Plan) -> Callable[..., None]:
    """The function that runs a plan's kernels through time."""
    # imported late: Triton may be missing, and takes a while
    module = ".triton_kernels.launch" if plan.backend == "triton" else ".cuda.launch"
    launch: Callable[..., None] = import_module(module, __package__).launch
    return launch


def _joined(
    states: Sequence[Tensor | None] | None,
    size: tuple[int, int, int, int],
    like: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """A new tensor [N*S, B, H] where `like` is, of S states [N, B, H]; 0 for None. In one launch,
    whatever their dtype."""
    N, S, B, H = size
    if states is None:
        return like.new_zeros((N * S, B, H), dtype=dtype)
    given = [(k, s) for k, s in enumerate(states) if s is not None]
    new = like.new_empty if len(given) == S else like.new_zeros
    joined = new((N * S, B, H), dtype=dtype)
    if given:
        to = [joined[n * S + k] for n in range(N) for k, _ in given]
        torch._foreach_copy_(to, [s[n] for n in range(N) for _, s in given])
    return joined


def _parted(joined: Tensor, S: int, dtype: torch.dtype) -> list[Tensor]:
    """The inverse: S states [N, B, H], each a tensor of its own, in this dtype."""
    if S == 1:
        return [joined.to(dtype)]
    N = len(joined) // S
    parts = [joined.new_empty((N, *joined.shape[1:]), dtype=dtype) for _ in range(S)]
    places = [(n, k) for n in range(N) for k in range(S)]
    torch._foreach_copy_([parts[k][n] for n, k in places], [joined[n * S + k] for n, k in places])
    return parts


def _initial(states: States, size: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """The initial states [N*S, B, H] in the dtype of `like`."""
    if states is not None and size[1] == 1:
        first: Tensor = states[0]
        return first
    return _joined(states, size, like, like.dtype)


def _set_to_zero(tensors: Sequence[Tensor | None]) -> None:
    torch._foreach_zero_([t for t in tensors if t is not None])


def _is_padded(layout: Layout) -> bool:
    """Whether there are rows past a sequence's end, which kernels do not write."""
    return layout.lengths is not None and layout.offsets is None


def forward(
    cell: Cell, plan: Plan, layout: Layout, x: Tensor, weights: Weights, s0: States, save: int
) -> Outputs:
    """x [R, I], S states [N, B, H], zeros if None."""
    w_ih, w_hh, b_ih, b_hh = weights
    N = len(layout.reverse)
    S = cell.states
    A = cell.saved
    R = len(x)
    H = w_hh.shape[1]
    B = layout.sequences if s0 is None else s0[0].shape[1]
    size = N, S, B, H
    state = _joined(s0, size, x, torch.float32)
    y = x.new_empty(R, N * H)
    states = x.new_empty(S - 1, R, N * H) if S > 1 and save else None
    saved = x.new_empty(A, R, N * H) if A and save == Save.ACTIVATIONS else None
    if _is_padded(layout):
        _set_to_zero((y, states, saved))
    tensors = ForwardTensors(
        x=x if plan.fused else products.linear(x, w_ih, b_ih, differing(x, plan.precision)),
        w_ih=w_ih if plan.fused else None,
        w_hh=w_hh,
        b_ih=b_ih if plan.fused else None,
        b_hh=b_hh,
        state=state,
        hidden=None,
        y=y,
        states=states,
        saved=saved,
        lengths=layout.lengths,
        offsets=layout.offsets,
        resets=layout.resets,
    )
    # some of Triton's scopes exchange the first h in its own dtype; else only its size counts
    if plan.backend == "triton" and plan.scope != "block":
        initial = _initial(s0, size, x)
    elif x.dtype == state.dtype:
        initial = state
    else:
        initial = x.new_empty(()).expand(state.shape)
    _launcher(plan)(cell, plan, layout, tensors, initial)
    return Outputs(y, states, _parted(state, S, x.dtype), saved)


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
    w_ih, w_hh, _, _ = weights
    y, states, _, saved = outputs
    dy, dstates, dlast = grads
    N = len(layout.reverse)
    B = layout.sequences if s0 is None else s0[0].shape[1]
    size = N, cell.states, B, w_hh.shape[1]
    padded = _is_padded(layout)
    dr = y.new_empty(len(y), len(w_hh))
    ds = _joined(dlast, size, y, torch.float32)
    initial = _initial(s0, size, y)
    dx = y.new_empty(dr.shape) if cell.split else None
    h_prev = None if layout.lengths is None and layout.resets is None else y.new_empty(y.shape)
    if padded:
        _set_to_zero((dr, dx, h_prev))
    tensors = BackwardTensors(
        w_hh=w_hh,
        state=initial,
        y=y,
        states=states,
        saved=saved,
        dy=torch.zeros_like(y) if dy is None else dy,
        dstates=dstates,
        ds=ds,
        dx=dx,
        dr=dr,
        h_prev=h_prev,
        lengths=layout.lengths,
        offsets=layout.offsets,
        resets=layout.resets,
    )
    _launcher(plan)(cell, plan, layout, tensors, initial)
    if padded and needs.w_ih:
        # 0 times a NaN in the padding is NaN
        ran = torch.arange(layout.steps, device=x.device)[:, None] < layout.lengths
        x = torch.where(ran.view(-1, 1), x, 0)
    first = _parted(ds, cell.states, y.dtype) if needs.s0 else None
    return _products(cell, plan, layout, x, w_ih, tensors, needs)._replace(s0=first)


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
        gradients[0] = products.mm(dx, w_ih, precision)
    if needs.w_ih:
        gradients[1] = products.mm(dx.T, x, precision)
    if needs.w_hh:
        firsts = tensors.state[:: cell.states]
        gradients[2] = _w_hh_gradient(layout, dr, tensors.y, firsts, tensors.h_prev, precision)
    if needs.b_ih:
        gradients[3] = dx.sum(0)
    if needs.b_hh:
        # a tensor of its own, also where both biases have the same gradient
        shared = None if cell.split else gradients[3]
        gradients[4] = dr.sum(0) if shared is None else shared.clone()
    return Gradients._make(gradients)


def _w_hh_gradient(
    layout: Layout,
    dr: Tensor,
    y: Tensor,
    firsts: Tensor,
    h_prev: Tensor | None,
    precision: str,
) -> Tensor:
    """[N*G*H, H], from the h that came into each step, which is that of y one step before where
    `h_prev` was not written."""
    N = len(layout.reverse)
    drs = dr.chunk(N, 1)
    if h_prev is not None:
        parts = [products.mm(d.T, h, precision) for d, h in zip(drs, h_prev.chunk(N, 1))]
    else:
        parts = [
            _shifted_product(d, h, first, bool(back), precision)
            for d, h, first, back in zip(drs, y.chunk(N, 1), firsts, layout.reverse)
        ]
    return parts[0] if N == 1 else torch.cat(parts)


def _shifted_product(d: Tensor, h: Tensor, first: Tensor, reverse: bool, precision: str) -> Tensor:
    """The sum over rows of d_t h_{t-1}^T: d [R, K], h [R, H], and the initial h `first` [B, H]."""
    B = len(first)
    if len(h) == B:
        return products.mm(d.T, first, precision)
    if reverse:
        inner = products.mm(d[:-B].T, h[B:], precision)
        return products.addmm(inner, d[-B:].T, first, precision)
    inner = products.mm(d[:B].T, first, precision)
    return products.addmm(inner, d[B:].T, h[:-B], precision)
