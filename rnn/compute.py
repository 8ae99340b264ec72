"""Runs the operator's two halves on tensors: chooses a plan, calls its kernels, and adds the large matrix products.

Shapes are those of `ops.recurrence`, whose arguments these are. Nothing here is differentiable."""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .formula import formula, formula_vjp
from .kernels.cells import Cell
from .kernels.plan import NUMPY_PRODUCT, Gpu, Plan, Rows, make_plan

_HALF = (torch.float16, torch.bfloat16)


@lru_cache
def _plan(cell: Cell, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, tf32: bool) -> Plan:
    gpu = None
    if device.type == "cuda" and find_spec("triton"):
        found = torch.cuda.get_device_properties(device)
        gpu = Gpu(10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin)
    if gpu is None and device.type != "cpu" or dtype not in (torch.float64, torch.float32, *_HALF):
        return Plan("formula")
    return make_plan(cell, sizes, str(dtype).removeprefix("torch."), gpu, tf32)


def choose(cell: Cell, plan: Plan | None, x: Tensor, s0: Tensor, N: int) -> Plan:
    """The given plan, or the one for these sizes on this device."""
    tf32 = x.is_cuda and torch.backends.cudnn.rnn.fp32_precision == "tf32"
    return plan or _plan(cell, (s0.shape[1], x.shape[-1], s0.shape[2], N), x.dtype, x.device, tf32)


@lru_cache
def _backend(name: str) -> Any:  # imported late: Triton may be missing, and takes a while
    return import_module(".kernels.gpu" if name == "triton" else ".kernels.cpu", __package__)


def _arrays(numpy: bool, *tensors: Any) -> list[Any]:
    return [t.detach().numpy() if isinstance(t, Tensor) else t for t in tensors] if numpy else list(tensors)


def _tensors(*arrays: Any) -> list[Any]:
    return [t if t is None or isinstance(t, Tensor) else torch.from_numpy(t) for t in arrays]


def _rows(x: Tensor, B: int, lengths: Tensor | None, batch_sizes: Tensor | None) -> Rows:
    if batch_sizes is None:
        return Rows(x.shape[0], [B] * x.shape[0], lengths)
    offsets, lengths = batch_sizes.cumsum(0) - batch_sizes, (batch_sizes > torch.arange(B)[:, None]).sum(1)
    return Rows(len(batch_sizes), batch_sizes.tolist(), lengths.to(x.device), offsets.to(x.device))


def _pack(lengths: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of the sequences, the rows of [T, B] and the batch_sizes of the packed form."""
    ends, order = lengths.sort(descending=True, stable=True)
    runs = torch.arange(T)[:, None] < ends
    sizes = runs.sum(1)
    return order, (torch.arange(T)[:, None] * len(lengths) + order)[runs], sizes[sizes > 0]


def _unpack(rows: Tensor, index: Tensor, total: int) -> Tensor:
    """[..., R, K] to [..., total, K], with 0 in the rows that are not in `index`."""
    return rows.new_zeros(*rows.shape[:-2], total, rows.shape[-1]).index_copy_(-2, index, rows)


def forward(cell: Cell, plan: Plan | None, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
            b_hh: Tensor | None, s0: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, resets: Tensor | None,
            reverse: Sequence[bool], keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, states and last of `ops.recurrence`, and the activations [A, R, N*H] that `backward` needs (with keep = 2)."""
    N, S, A, (_, B, H) = len(reverse), cell.states, cell.saved, s0.shape
    plan, shape, total = choose(cell, plan, x, s0, N), x.shape[:-1], x.shape[:-1].numel()
    kept = total if keep else 0, total if keep > 1 else 0
    if plan.backend == "formula":
        return *formula(cell, x, w_ih, w_hh, b_ih, b_hh, s0, lengths, batch_sizes, resets, reverse, keep), x.new_empty(A, kept[1], N * H)
    if not total:
        return x.new_empty(*shape, N * H), x.new_empty(S - 1, 0, N * H), s0.clone(), x.new_empty(A, 0, N * H)
    if plan.backend != "triton" and x.dtype in _HALF:  # NumPy has no bfloat16 and a slow float16
        wide = [t if t is None else t.float() for t in (x, w_ih, w_hh, b_ih, b_hh, s0)]
        out = forward(cell, plan, *wide, lengths, batch_sizes, resets, reverse, keep)
        return tuple(t.to(x.dtype) for t in out)
    if plan.backend != "triton" and lengths is not None:  # rows past an end are left out
        order, index, batch_sizes = _pack(lengths.cpu(), shape[0])
        y, states, last, saved = forward(cell, plan, x.flatten(0, 1)[index], w_ih, w_hh, b_ih, b_hh, s0[:, order], None,
                                         batch_sizes, None if resets is None else resets[:, order], reverse, keep)
        y, states, saved = (_unpack(t, index, size) if size else t for t, size in zip((y, states, saved), (total, *kept)))
        return y.resize_(*shape, N * H), states, last[:, order.argsort()], saved

    numpy, rows = plan.backend == "numpy", _rows(x, B, lengths, batch_sizes)
    x, w_ih, b_ih, b_hh = _arrays(numpy and total * w_ih.numel() <= NUMPY_PRODUCT, x.reshape(total, -1), w_ih, b_ih, b_hh)
    fused: dict[str, Any] = {}
    if b_hh is not None and not cell.split:
        b_ih, b_hh = b_ih + b_hh, None
    if plan.fused:
        x, fused = x.contiguous(), dict(w_ih=w_ih.contiguous(), b_ih=b_ih)
    elif isinstance(x, Tensor):
        x = F.linear(x, w_ih, b_ih)
    else:
        x = x @ w_ih.T if b_ih is None else x @ w_ih.T + b_ih
    arrays = _arrays(numpy, x, w_hh.contiguous(), b_hh, s0.contiguous(), rows, resets)
    y, states, last, saved = _tensors(*_backend(plan.backend).forward(cell, plan, *arrays, reverse, keep, **fused))
    return y.resize_(*shape, N * H), states, last, saved  # in place, so that y is no view


def backward(cell: Cell, plan: Plan | None, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
             b_hh: Tensor | None, s0: Tensor, y: Tensor, states: Tensor, saved: Tensor, dy: Tensor | None,
             dstates: Tensor | None, dlast: Tensor | None, lengths: Tensor | None, batch_sizes: Tensor | None,
             resets: Tensor | None, reverse: Sequence[bool], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of x, w_ih, w_hh, b_ih, b_hh and s0, those that are needed."""
    N, (_, B, H) = len(reverse), s0.shape
    plan, shape, total = choose(cell, plan, x, s0, N), x.shape[:-1], x.shape[:-1].numel()
    dstates = None if dstates is None or not dstates.numel() else dstates
    dy, dlast = torch.zeros_like(y) if dy is None else dy, torch.zeros_like(s0) if dlast is None else dlast
    given = x, w_ih, w_hh, b_ih, b_hh, s0
    if plan.backend == "formula":
        out = formula_vjp(cell, given, (lengths, batch_sizes, resets, reverse), (dy, dstates, dlast), needs)
        return [None if g is None else g.detach() for g in out]
    if not total:
        zeros = [torch.zeros_like(t) for t in (x, w_ih, w_hh, w_ih[:, 0], w_ih[:, 0])]
        return [g if need else None for g, need in zip((*zeros, dlast.clone()), needs)]
    if plan.backend != "triton" and x.dtype in _HALF:
        wide = [t if t is None else t.float() for t in (*given, y, states, saved, dy, dstates, dlast)]
        grads = backward(cell, plan, *wide, lengths, batch_sizes, resets, reverse, needs)
        return [g if g is None else g.to(x.dtype) for g in grads]
    if plan.backend != "triton" and lengths is not None:
        order, index, batch_sizes = _pack(lengths.cpu(), shape[0])
        kept = [t if t is None else t.index_select(-2, index) for t in (y.flatten(0, 1), states, saved, dy.flatten(0, 1), dstates)]
        dx, *dw, ds = backward(cell, plan, x.flatten(0, 1)[index], *given[1:5], s0[:, order], *kept, dlast[:, order], None,
                               batch_sizes, None if resets is None else resets[:, order], reverse, needs)
        return [dx if dx is None else _unpack(dx, index, total).view_as(x), *dw, ds if ds is None else ds[:, order.argsort()]]

    numpy, rows = plan.backend == "numpy", _rows(x, B, lengths, batch_sizes)
    small = numpy and total * max(w_ih.numel(), w_hh.numel()) <= NUMPY_PRODUCT
    s0, y = s0.contiguous(), y.view(total, -1)
    arrays = _arrays(numpy, w_hh.contiguous(), s0, y, states, saved, dy.reshape(total, -1).contiguous(), dstates, dlast.contiguous(), rows, resets)
    dx, dr, ds, came = _backend(plan.backend).backward(cell, plan, *arrays, reverse)
    # From here on either NumPy's or torch's: the same words mean the same.
    dx, dr, came = (dx, dr, came) if small else _tensors(dx, dr, came)
    x, w_ih, y, s0 = _arrays(small, x.reshape(total, -1), w_ih, y, s0)
    grads = [None] * 5 + [ds if needs[5] else None]
    if needs[0]:
        grads[0] = (dx @ w_ih).reshape((*shape, -1))
    if needs[1]:
        if lengths is not None:  # 0 times a NaN in the padding is NaN
            x = torch.where((torch.arange(shape[0], device=x.device)[:, None] < lengths).view(-1, 1), x, 0)
        grads[1] = dx.T @ x
    if needs[2]:
        h, width = y if came is None else came, cell.gates * H
        parts = [_product(dr[:, n * width : (n + 1) * width].T, h[:, n * H : (n + 1) * H],
                          s0[n * cell.states] if came is None else None, reverse[n]) for n in range(N)]
        grads[2] = parts[0] if N == 1 else torch.cat(_tensors(*parts))
    if needs[3]:
        grads[3] = dx.sum(0)
    if needs[4]:
        grads[4] = dr.sum(0)
    return _tensors(*grads)


def _product(d: Any, h: Any, first: Any, reverse: bool) -> Any:
    """The sum over rows of d_t h_{t-1}^T. h [R, H] is h_{t-1}; or, with `first`, h_t in steps of B = len(first) rows."""
    if first is None:
        return d @ h
    B = len(first)
    if len(h) == B:
        return d @ first
    late, early, edge = (slice(-B), slice(B, None), slice(-B, None)) if reverse else (slice(B, None), slice(-B), slice(B))
    return d[:, late] @ h[early] + d[:, edge] @ first
