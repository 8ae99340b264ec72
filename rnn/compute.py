"""The operator's two halves on tensors: choose a plan, run its kernels, do the large matrix products around them. And
the formula, in differentiable torch operations: slow, and right wherever torch is.
Shapes are those of `ops.recurrence`; `given` is its x to s0, `masks` its lengths, batch_sizes and resets."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.cells import Cell
from .kernels.plan import Gpu, Plan, Rows, make_plan

# Of a plan's backend: the module with its `forward` and `backward`, imported late: Triton takes a while.
_MODULES = {"numpy": "cpu", "torch": "cpu", "cupy": "cpu", "triton": "gpu"}
_FOUND = {library: find_spec(library) is not None for library in ("triton", "cupy")}  # once: it searches the disk
_ARRAYS: dict[str, Any] = {"numpy": torch.from_numpy, "cupy": torch.from_dlpack}  # the way back from their arrays
_SWITCH = torch.backends.cudnn.rnn  # once: the way to it takes as long as an operation
_HERE = nullcontext()


def _usable(library: str) -> bool:
    """Whether it can be imported. One that is there, and cannot, is reported once."""
    if _FOUND[library] and not torch.compiler.is_compiling():
        try:
            import_module(library)
        except Exception as error:
            _FOUND[library] = False
            warnings.warn(f"rnn does without {library}, which is installed and fails: {error!r}", stacklevel=2)
    return _FOUND[library]


def _served(device: torch.device, dtype: torch.dtype) -> tuple[str, torch.dtype, str]:
    serves, missing = "host", ""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "", dtype, "kernels need a GPU of compute capability 8.0, this one has {}.{}".format(*capability)
        serves, missing = "triton", ""
        if not _usable("triton"):
            serves, missing = "cupy", "Triton is missing"
            if not _usable("cupy"):
                return "", dtype, "neither Triton nor CuPy can be imported"
    elif device.type != "cpu":
        return "", dtype, f"there is no kernel for {device.type} devices"
    half = dtype in (torch.float16, torch.bfloat16)
    if serves != "triton" and half:
        return serves, torch.float32, missing  # NumPy and CuPy have no bfloat16
    if dtype == torch.float32 or half or (serves != "triton" and dtype == torch.float64):
        return serves, dtype, missing
    return "", dtype, f"there is no kernel for {dtype} on {device.type}"


_served_once = lru_cache(_served)


def served(device: torch.device, dtype: torch.dtype) -> tuple[str, torch.dtype, str]:
    """By what layers are computed there, "host", "triton", "cupy", or "" where only the formula is right; the dtype it
    is done in; and a reason."""
    return (_served if torch.compiler.is_compiling() else _served_once)(device, dtype)


@lru_cache(4096)
def _plan(cell: Cell, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, tf32: bool) -> Plan:
    gpu = None
    if served(device, dtype)[0] == "cupy":
        return Plan("cupy")
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
        gpu = Gpu(10 * found.major + found.minor, found.multi_processor_count, shared)
    return make_plan(cell, sizes, str(dtype).removeprefix("torch."), gpu, tf32)


def choose(cell: Cell, x: Tensor, s0: Tensor, reverse: Sequence[int]) -> Plan:
    """The plan of a call, where it is served. float32 follows torch's own switch, as it is now."""
    tf32 = x.is_cuda and x.dtype == torch.float32 and _SWITCH.fp32_precision == "tf32"
    return _plan(cell, (s0.shape[1], x.shape[-1], s0.shape[2], len(reverse)), x.dtype, x.device, tf32)


class _Borrowed:
    """A tensor for an array library. (`Tensor.numpy` would forbid its storage to be resized, as FSDP has to.)"""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.resolve_neg() if tensor.is_neg() else tensor

    def __dlpack__(self, **_: Any) -> Any:
        return torch._C._to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.tensor.get_device()) if self.tensor.is_cuda else (1, 0)


def _place(backend: str, x: Tensor) -> AbstractContextManager[Any]:
    """What a kernel runs in: the device of its tensors, and for CuPy torch's current stream and torch's memory."""
    if backend == "numpy":
        return np.errstate(all="ignore")  # a NaN goes its way quietly, as in torch
    if not x.is_cuda or (backend != "cupy" and x.get_device() == torch.cuda.current_device()):
        return _HERE
    place, index = ExitStack(), x.get_device()
    place.enter_context(torch.cuda.device(index))
    if backend == "cupy":
        cuda: Any = import_module("cupy.cuda")

        def memory(size: int) -> Any:
            block = torch.empty(size, dtype=torch.uint8, device=x.device)
            return cuda.MemoryPointer(cuda.UnownedMemory(block.data_ptr(), size, block, index), 0)

        stream = torch.cuda.current_stream()
        new = hasattr(cuda.Stream, "from_external")
        place.enter_context(cuda.Stream.from_external(stream) if new else cuda.ExternalStream(stream.cuda_stream))
        place.enter_context(cuda.using_allocator(memory))
    return place


@lru_cache
def _module(backend: str) -> Any:
    return import_module(f".kernels.{_MODULES[backend]}", __package__)


class Run:
    """One call, there and back: its plan, and the rows that the kernels see. Array operations do not see those past an
    end."""

    def __init__(self, cell: Cell, plan: Plan | None, given: Sequence[Any], masks: Sequence[Any],
                 reverse: Sequence[int]) -> None:
        x, s0, (lengths, batch_sizes, resets) = given[0], given[5], masks
        self.cell, self.plan, self.reverse = cell, plan or choose(cell, x, s0, reverse), reverse
        shape, B, self.index, self.order = x.shape, s0.shape[1], None, None
        self.padded = lengths is not None and self.plan.scope != "host"
        self.total = shape[0] * B if batch_sizes is None else shape[0]
        if lengths is not None and not self.padded:
            ends, order = lengths.cpu().sort(descending=True, stable=True)
            steps = torch.arange(shape[0], device="cpu")[:, None]  # whatever the default device is
            runs = steps < ends
            self.index, self.order = (steps * B + order)[runs].to(x.device), order.to(x.device)
            batch_sizes = runs.sum(1)[: max(1, int(runs.any(1).sum()))]
            resets = resets if resets is None else resets[:, self.order]
        if batch_sizes is None:
            ends = lengths if lengths is None else lengths.to(x.device)
            self.rows = Rows(shape[0], reverse, [B] * shape[0], ends, None, resets)
        else:
            starts = batch_sizes.cumsum(0) - batch_sizes
            ends = (batch_sizes > torch.arange(B, device="cpu")[:, None]).sum(1)
            self.rows = Rows(len(batch_sizes), reverse, batch_sizes.tolist(), ends.to(x.device), starts.to(x.device),
                             resets)

    def kernel(self, name: str, *given: Any, **fused: Any) -> Sequence[Any]:
        """The backend's `forward` or `backward`, of and to tensors."""
        backend, rows = self.plan.backend, self.rows
        function = getattr(_module(backend), name)
        with _place(backend, given[0]):
            if backend not in _ARRAYS:
                return function(self.cell, self.plan, rows, *given, **fused)
            take, back = import_module(backend).from_dlpack, _ARRAYS[backend]
            resets, *arrays = (take(_Borrowed(t)) if isinstance(t, Tensor) else t for t in (rows.resets, *given))
            found = function(self.cell, self.plan, rows._replace(resets=resets), *arrays)
            return [t if t is None else back(t) for t in found]

    def pick(self, t: Any) -> Any:
        """[..., total, K] to the rows that the kernels see."""
        return t if t is None or self.index is None else t.index_select(-2, self.index)

    def rows_of(self, t: Tensor, width: int) -> Tensor:
        """[T, B, width] or [R, width] to the rows that the kernels see, [R, width]."""
        t = t.reshape(self.total, width).contiguous()
        return t if self.index is None else t.index_select(0, self.index)

    def spread(self, t: Any) -> Any:
        """The inverse, with 0 in the rows left out."""
        if t is None or self.index is None:
            return t
        return t.new_zeros(*t.shape[:-2], self.total, t.shape[-1]).index_copy_(-2, self.index, t)

    def sort(self, t: Any, back: bool = False) -> Any:
        """[K, B, H] in the kernels' order of sequences, or back from it."""
        if t is None or self.order is None:
            return t if t is None else t.contiguous()
        return t[:, self.order.argsort() if back else self.order]


def forward(run: Run, given: Sequence[Any], keep: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """y, states, last, and with keep = 2 the activations [A, R, N*H] that `backward` needs."""
    x, w_ih, w_hh, b_ih, b_hh, s0 = given
    (*leading, width), fused = x.shape, {}
    x = run.rows_of(x, width)
    if b_hh is not None and not run.cell.split:
        b_ih, b_hh = b_ih + b_hh, None
    if run.plan.fused:
        fused = dict(w_ih=w_ih.contiguous(), b_ih=b_ih)
    else:
        x = F.linear(x, w_ih, b_ih)
    x = x.numpy() if run.plan.backend == "numpy" else x  # our own by now, to be overwritten
    y, states, last, saved = run.kernel("forward", x, w_hh.contiguous(), b_hh, run.sort(s0), keep, **fused)
    if run.index is not None:
        y, states, last, saved = run.spread(y), run.spread(states), run.sort(last, back=True), run.spread(saved)
    return y.resize_(*leading, y.shape[-1]), states, last, saved  # in place, so that it is no view


def backward(run: Run, given: Sequence[Any], kept: Sequence[Any], d: Sequence[Tensor | None],
             needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of `given`, those that are needed, from those of y, states and last; `kept` is y, states, saved."""
    (x, w_ih, w_hh, _, _, s0), (y, states, saved), cell, N = given, kept, run.cell, len(run.reverse)
    if cell.saved and saved is None:
        saved = forward(run, given, 2)[3]
    shape, (NGH, H) = x.shape, w_hh.shape
    x, y, s0, GH = run.rows_of(x, shape[-1]), run.rows_of(y, N * H), run.sort(s0), NGH // N
    dy = torch.zeros_like(y) if d[0] is None else run.rows_of(d[0], N * H)
    dstates = None if d[1] is None else run.pick(d[1].contiguous())
    dx, dr, ds, came = run.kernel("backward", w_hh.contiguous(), s0, y, run.pick(states), run.pick(saved), dy, dstates,
                                  run.sort(d[2]))
    if run.padded:  # 0 times a NaN in the padding is NaN
        x = torch.where((torch.arange(shape[0], device=x.device)[:, None] < run.rows.lengths).view(-1, 1), x, 0)
    grads: list[Any] = [None] * 6
    if needs[0]:
        grads[0] = run.spread(dx.mm(w_ih)).view(shape)
    if needs[1]:
        grads[1] = dx.t().mm(x)
    if needs[2]:
        h, parts = y if came is None else came, [(dr, y if came is None else came)]
        parts = parts if N == 1 else zip(dr.split(GH, 1), h.split(H, 1))
        products = [_product(*part, s0.select(0, n * cell.states) if came is None else None, run.reverse[n])
                    for n, part in enumerate(parts)]
        grads[2] = products[0] if N == 1 else torch.cat(products)
    if needs[3] or needs[4]:
        grads[3] = dx.sum(0)
        grads[4] = dr.sum(0) if cell.split else grads[3].clone()
    grads[5] = run.sort(ds, back=True) if needs[5] else None
    return grads


def _product(d: Tensor, h: Tensor, first: Tensor | None, reverse: int) -> Tensor:
    """The sum over rows of d_t h_{t-1}^T, d [R, K]. h [R, H] is h_{t-1}, or, given `first` [B, H], h_t."""
    edge = 0 if first is None else first.shape[0]
    if first is None or h.shape[0] == edge:
        return d.t().mm(h if first is None else first)
    if reverse:
        return torch.addmm(d[-edge:].t().mm(first), d[:-edge].t(), h[edge:])
    return torch.addmm(d[:edge].t().mm(first), d[edge:].t(), h[:-edge])


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
