"""The operator's two halves on tensors: choose a plan, run its kernels, do the large matrix products around them. And
the formula, in differentiable torch operations: slow, and right wherever torch is.
Shapes are those of `ops.recurrence`; `given` is its x to s0, `masks` its lengths, batch_sizes and resets."""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import cpu
from .kernels.cells import Cell
from .kernels.plan import NUMPY_PRODUCT, Gpu, Plan, Rows, make_plan

TRITON = find_spec("triton") is not None  # asked once: it searches the disk


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether some plan runs here; the formula does everywhere."""
    if device.type == "cpu":
        return dtype in (torch.float64, torch.float32)
    return (device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
            and dtype in (torch.float32, torch.float16, torch.bfloat16) and TRITON)


@lru_cache
def _plan(cell: Cell, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, tf32: bool) -> Plan:
    gpu = None
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
        gpu = Gpu(10 * found.major + found.minor, found.multi_processor_count, shared)
    return make_plan(cell, sizes, str(dtype).removeprefix("torch."), gpu, tf32)


class _Borrowed:
    """A tensor for NumPy to read. (`Tensor.numpy` would forbid its storage to be resized, as FSDP has to.)"""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.resolve_neg()

    def __dlpack__(self, **_: Any) -> Any:
        return torch._C._to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def _arrays(numpy: bool, *tensors: Any) -> Sequence[Any]:
    return [np.from_dlpack(_Borrowed(t)) if isinstance(t, Tensor) else t for t in tensors] if numpy else tensors


def _tensors(*arrays: Any) -> list[Any]:
    return [t if t is None or isinstance(t, Tensor) else torch.from_numpy(t) for t in arrays]


class _Run:
    """One call: plan, backend, and the rows that the kernels see. On the host, those past an end are left out."""

    def __init__(self, cell: Cell, plan: Plan | None, given: Sequence[Any], masks: Sequence[Any],
                 reverse: Sequence[int]) -> None:
        (x, *_, s0), B = given, given[5].shape[1]
        lengths, batch_sizes, resets = (t if t is None else t.contiguous() for t in masks)
        tf32 = x.is_cuda and getattr(torch.backends.cudnn.rnn, "fp32_precision", "") == "tf32"
        self.plan = plan or _plan(cell, (B, x.shape[-1], s0.shape[2], len(reverse)), x.dtype, x.device, tf32)
        # Imported late: Triton may be missing, and takes a while.
        module = dict(triton="gpu", cuda="cuda").get(self.plan.backend, "cpu")
        self.backend = import_module(f".kernels.{module}", __package__)
        self.numpy, T = self.plan.backend == "numpy", x.shape[0]
        self.total, self.index, self.order = x.shape[:-1].numel(), None, None
        if lengths is not None and self.backend is cpu:
            ends, self.order = lengths.cpu().sort(descending=True, stable=True)
            steps = torch.arange(T, device="cpu")[:, None]  # whatever the default device is
            runs = steps < ends
            self.index = (steps * B + self.order)[runs]
            batch_sizes = runs.sum(1)[: max(1, int(runs.any(1).sum()))]
            resets = resets if resets is None else resets[:, self.order]
        (resets,) = _arrays(self.numpy, resets)
        if batch_sizes is None:
            self.rows = Rows(T, reverse, [B] * T, lengths if lengths is None else lengths.to(x.device), None, resets)
        else:
            starts = batch_sizes.cumsum(0) - batch_sizes
            ends = (batch_sizes > torch.arange(B, device="cpu")[:, None]).sum(1)
            self.rows = Rows(len(batch_sizes), reverse, batch_sizes.tolist(), ends.to(x.device), starts.to(x.device),
                             resets)

    def pick(self, t: Any) -> Any:
        """[..., total, K] to the rows that the kernels see."""
        return t if t is None or self.index is None else t.index_select(-2, self.index)

    def spread(self, t: Any) -> Any:
        """The inverse, with 0 in the rows left out."""
        out = None if t is None or self.index is None else t.new_zeros(*t.shape[:-2], self.total, t.shape[-1])
        return t if out is None else out.index_copy_(-2, self.index, t)

    def sort(self, t: Any, back: bool = False) -> Any:
        """[K, B, H] in the kernels' order of sequences, or back from it."""
        order = self.order.argsort() if back and self.order is not None else self.order
        return t if t is None else t.contiguous() if order is None else t[:, order]


@np.errstate(all="ignore")  # a NaN goes its way quietly, as in torch
def forward(cell: Cell, plan: Plan | None, given: Sequence[Any], masks: Sequence[Tensor | None],
            reverse: Sequence[int], keep: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """y, states, last, and with keep = 2 the activations [A, R, N*H] that `backward` needs."""
    (x, w_ih, w_hh, b_ih, b_hh, s0), run = given, _Run(cell, plan, given, masks, reverse)
    small, shape = run.numpy and run.total * w_ih.numel() <= NUMPY_PRODUCT, x.shape[:-1]
    b_ih, b_hh = (b if b is None else b.contiguous() for b in (b_ih, b_hh))
    x, w_ih, b_ih, b_hh = _arrays(small, run.pick(x.reshape(run.total, x.shape[-1])), w_ih, b_ih, b_hh)
    if b_hh is not None and not cell.split:
        b_ih, b_hh = b_ih + b_hh, None
    fused: dict[str, Any] = {}
    if run.plan.fused:
        x, fused = x.contiguous(), dict(w_ih=w_ih.contiguous(), b_ih=b_ih)
    elif small:
        x = x @ w_ih.T if b_ih is None else x @ w_ih.T + b_ih
    else:
        x = F.linear(x, w_ih, b_ih)
    x = x.numpy() if run.numpy and not small else x  # our own by now, to be overwritten
    arrays = _arrays(run.numpy, w_hh.contiguous(), b_hh, run.sort(s0))
    y, states, last, saved = _tensors(*run.backend.forward(cell, run.plan, run.rows, x, *arrays, keep, **fused))
    y = run.spread(y).resize_(*shape, y.shape[-1])  # in place, so that it is no view
    return y, run.spread(states), run.sort(last, back=True), run.spread(saved)


@np.errstate(all="ignore")  # a NaN goes its way quietly, as in torch
def backward(cell: Cell, plan: Plan | None, given: Sequence[Any], masks: Sequence[Tensor | None],
             reverse: Sequence[int], kept: Sequence[Any], d: Sequence[Tensor | None],
             needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of `given`, those that are needed, from those of y, states and last; `kept` is y, states, saved."""
    if cell.saved and kept[2] is None:
        kept = *kept[:2], forward(cell, plan, given, masks, reverse, 2)[3]
    (x, w_ih, w_hh, _, _, s0), run = given, _Run(cell, plan, given, masks, reverse)
    small, shape = run.numpy and run.total * max(w_ih.numel(), w_hh.numel()) <= NUMPY_PRODUCT, x.shape
    x, y, dy = (run.pick(t.reshape(run.total, t.shape[-1]).contiguous())
                for t in (x, kept[0], torch.zeros_like(kept[0]) if d[0] is None else d[0]))
    s0, dlast, dstates = run.sort(s0), run.sort(d[2]), None if d[1] is None else run.pick(d[1].contiguous())
    arrays = _arrays(run.numpy, w_hh.contiguous(), s0, y, run.pick(kept[1]), run.pick(kept[2]), dy, dstates, dlast)
    dx, dr, ds, came = run.backend.backward(cell, run.plan, run.rows, *arrays)
    # From here on either NumPy's arrays or torch's tensors: the same words serve.
    x, w_ih = _arrays(small, x, w_ih)
    dx, dr, came, s0, y = (dx, dr, came, *arrays[1:3]) if small else _tensors(dx, dr, came, s0, y)
    if masks[0] is not None and run.index is None:  # 0 times a NaN in the padding is NaN
        x = torch.where((torch.arange(shape[0], device=x.device)[:, None] < run.rows.lengths).view(-1, 1), x, 0)
    (GH, H), N, h = (len(w_hh) // len(reverse), w_hh.shape[1]), len(reverse), y if came is None else came

    def recurrent(n: int) -> Any:
        first = s0[n * cell.states] if came is None else None
        return _product(dr[:, n * GH : (n + 1) * GH].T, h[:, n * H : (n + 1) * H], first, reverse[n])

    db: Any = dx.sum(0) if needs[3] or needs[4] else None
    grads = (lambda: run.spread(_tensors(dx @ w_ih)[0]).view(shape), lambda: dx.T @ x,
             lambda: recurrent(0) if N == 1 else torch.cat(_tensors(*map(recurrent, range(N)))), lambda: db,
             lambda: dr.sum(0) if cell.split else db + 0, lambda: run.sort(_tensors(ds)[0], back=True))
    return _tensors(*(grad() if need else None for grad, need in zip(grads, needs)))


def _product(d: Any, h: Any, first: Any, reverse: int) -> Any:
    """The sum over rows of d_t h_{t-1}^T, d [K, R]. h [R, H] is h_{t-1}, or, given `first` [B, H], h_t."""
    if first is None or len(h) == len(first):
        return d @ (h if first is None else first)
    early, late = slice(-len(first)), slice(len(first), None)
    if reverse:
        return d[:, early] @ h[late] + d[:, -len(first) :] @ first
    return d[:, late] @ h[early] + d[:, : len(first)] @ first


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x w^T + b, where all three may have the same leading dimension."""
    if w.dim() == 2:
        return F.linear(x, w, b)
    return x @ w.mT if b is None else torch.baddbmm(b.unsqueeze(-2), x, w.mT)


def formula(cell: Cell, given: Sequence[Any], masks: Sequence[Any], reverse: Sequence[int],
            keep: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `ops.recurrence`, with `given` x to s0 and `masks` lengths, batch_sizes and resets. But for batch_sizes all
    may have a leading dimension: so many recurrences side by side, each with weights of its own."""
    (x, w_ih, w_hh, b_ih, b_hh, s0), (lengths, batch_sizes, resets) = given, masks
    N, S, B, packed = len(reverse), cell.states, s0.shape[-2], slice(None)
    if batch_sizes is not None:
        b = torch.arange(B, device="cpu")
        runs, rows = batch_sizes[:, None] > b, (batch_sizes.cumsum(0) - batch_sizes)[:, None] + b
        x = x.index_select(-2, (rows * runs).flatten().to(x.device)).unflatten(-2, rows.shape)
        lengths, packed = runs.sum(0), runs.flatten().nonzero().squeeze(1).to(x.device)
    T = x.shape[-3]
    ends = torch.full((B, 1), T, device=x.device) if lengths is None else lengths.to(x.device).unsqueeze(-1)
    if lengths is not None:  # a NaN in the padding would come back in the gradients of the choices below
        x = torch.where(torch.arange(T, device=x.device)[:, None, None] < ends.unsqueeze(-3), x, 0)
    gates = _linear(x.flatten(-3, -2), w_ih, b_ih).unflatten(-2, (T, B)).chunk(N, -1)
    weights, biases = w_hh.chunk(N, -2), [None] * N if b_hh is None else b_hh.chunk(N, -1)
    sweeps = []
    for n, backwards in enumerate(reverse):
        s: Sequence[Any] = s0.narrow(-3, n * S, S).unbind(-3)
        out: list[Any] = [None] * T
        steps = gates[n].unbind(-3)
        for t in reversed(range(T)) if backwards else range(T):
            if resets is not None and t + backwards < T:
                cut = resets.select(-2, t + backwards).unsqueeze(-1) & (t + backwards < ends)
                s = [torch.where(cut, 0, v) for v in s]
            r = _linear(s[0], weights[n], biases[n])
            out[t] = cell.forward(steps[t].chunk(cell.gates, -1), r.chunk(cell.gates, -1), s)[0]
            if lengths is None:
                s = out[t]
            else:
                s = [torch.where(t < ends, new, old) for new, old in zip(out[t], s)]
                out[t] = [torch.where(t < ends, new, 0) for new in out[t]]
        sweeps.append(([torch.stack(column, -3) for column in zip(*out)], s))
    columns = [torch.cat(parts, -1) for parts in zip(*(out for out, _ in sweeps))]  # S of [T, B, N*H]
    y, rest = columns[0], [column.flatten(-3, -2)[..., packed, :] for column in columns[1 : S if keep else 1]]
    y = y if batch_sizes is None else y.flatten(-3, -2)[..., packed, :]
    return y, torch.stack(rest, -3) if rest else None, torch.stack([v for _, s in sweeps for v in s], -3)
