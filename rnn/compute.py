"""The operator's two halves on tensors: choose a plan, run its kernels, do the large matrix products around them. And
the formula, in differentiable torch operations: slow, and right wherever torch is.
Shapes are those of `ops.recurrence`; `given` is its x to s0, `masks` its lengths, batch_sizes and resets."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.cells import Cell, lstm
from .kernels.plan import Gpu, Plan, Rows, make_plan

_FOUND = {library: find_spec(library) is not None for library in ("triton", "cupy")}  # once: it searches the disk
_AROUND = {"triton": "device", "cuda": "device", "onednn": "onednn"}  # what is around a backend, if not host
_SWITCH: Any = torch.backends.cudnn.rnn  # once: the way to it takes as long as an operation
_HERE, _QUIET = nullcontext(), partial(np.errstate, all="ignore")  # a NaN goes its way quietly, as in torch


def _usable(library: str) -> bool:
    """Whether it can be imported. One that is there, and cannot, is reported once."""
    if _FOUND[library] and not torch.compiler.is_compiling():
        try:
            found = import_module(library)
            if library == "cupy":
                found.cuda.nvrtc.getVersion()  # its compiler is a library of its own
        except Exception as error:
            _FOUND[library] = False
            warnings.warn(f"rnn does without {library}, which is installed and fails: {error!r}", stacklevel=2)
    return _FOUND[library]


@lru_cache
def _served(device: torch.device, dtype: torch.dtype) -> tuple[str, torch.dtype, str]:
    serves, why, half = "host", "", dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "", dtype, "kernels need a GPU of compute capability 8.0, this one has {}.{}".format(*capability)
        serves = "triton" if _usable("triton") else "cupy" if _usable("cupy") else ""
        why = {"triton": "", "cupy": "Triton is missing", "": "neither Triton nor CuPy can be imported"}[serves]
    elif device.type != "cpu":
        serves, why = "", f"no kernel for {device.type}"
    if half and serves in ("host", "cupy"):
        return serves, torch.float32, why  # NumPy and CuPy have no bfloat16
    if serves and not (half or dtype == torch.float32 or (dtype == torch.float64 and serves != "triton")):
        serves, why = "", f"no kernel for {dtype} on {device.type}"
    return serves, dtype, why


def served(device: torch.device, dtype: torch.dtype) -> tuple[str, torch.dtype, str]:
    """By what layers are computed there, "host", "triton", "cupy", or "" where only the formula is right; the dtype it
    is done in; and a reason."""
    return (_served.__wrapped__ if torch.compiler.is_compiling() else _served)(device, dtype)


@lru_cache
def _module(name: str) -> Any:
    return import_module(f".kernels.{name}", __package__)


@lru_cache
def compiles(cell: Cell) -> bool:
    """Whether the cell's C++ can be compiled. A compiler that is there, and fails, is reported once."""
    native = _module("native")
    try:
        return bool(native.compiler()) and native.load(cell) is not None
    except (OSError, RuntimeError) as error:
        warnings.warn(f"rnn does without {native.compiler()[0]}, which is installed and fails: {error}", stacklevel=2)
    return False


@lru_cache(4096)
def _plan(cell: Cell, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, tf32: bool,
          onednn: bool) -> Plan:
    gpu, serves = None, served(device, dtype)[0]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
        gpu = Gpu(10 * found.major + found.minor, found.multi_processor_count, shared, _usable("cupy"))
    native = device.type == "cpu" and dtype == torch.float32 and compiles(cell)
    plan = make_plan(cell, sizes, str(dtype).removeprefix("torch."), gpu, tf32, native, onednn)
    return Plan("cupy") if serves == "cupy" and (plan.backend != "cuda" or dtype == torch.float64) else plan


def choose(cell: Cell, x: Tensor, s0: Tensor, reverse: Sequence[int], plain: bool = False) -> Plan:
    """The plan of a call, where it is served, if it is `plain` or not: of whole sequences, of whose states only the
    last are asked for. float32 follows torch's own switch, as it is now."""
    tf32 = x.is_cuda and x.dtype == torch.float32 and _SWITCH.fp32_precision == "tf32"
    return _plan(cell, (s0.shape[1], x.shape[-1], s0.shape[2], len(reverse)), x.dtype, x.device, tf32,
                 plain and torch._C._get_mkldnn_enabled() and x.numel() > 0)


def _place(backend: str, x: Tensor) -> AbstractContextManager[Any]:
    """What a kernel runs in: the device of its tensors, and for CuPy torch's current stream and torch's memory."""
    if not x.is_cuda:
        return _QUIET() if backend in ("numpy", "torch") else _HERE
    index = x.get_device()
    if backend != "cupy":
        return _HERE if index == torch.cuda.current_device() else torch.cuda.device(index)
    place, cuda = ExitStack(), import_module("cupy.cuda")

    def memory(size: int) -> Any:
        block = torch.empty(size, dtype=torch.uint8, device=x.device)
        return cuda.MemoryPointer(cuda.UnownedMemory(block.data_ptr(), size, block, index), 0)

    place.enter_context(torch.cuda.device(index))
    place.enter_context(import_module(".kernels.cuda", __package__).on_stream(cuda, x.device))
    place.enter_context(cuda.using_allocator(memory))
    return place


class Run:
    """One call, there and back: its plan, and the rows that the kernels see. Array operations do not see those past an
    end."""

    def __init__(self, cell: Cell, plan: Plan | None, given: Sequence[Any], masks: Sequence[Any],
                 reverse: Sequence[int], plain: bool = False) -> None:
        x, s0 = given[0], given[5]
        lengths, batch_sizes, resets = (t if t is None else t.contiguous() for t in masks)
        self.cell, self.reverse = cell, reverse
        plain = plain and lengths is batch_sizes is resets is None
        self.plan: Plan = plan or choose(cell, x, s0, reverse, plain)
        fits = plain and cell is lstm and x.dtype == torch.float32 and x.is_cpu
        if plan and plan.backend == "onednn" and not fits:
            raise RuntimeError('The plan "onednn" is for an LSTM of whole sequences in float32 on the CPU, of whose '
                               "states only the last are asked for")
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
            ends = lengths if lengths is None else lengths.to(x.device, non_blocking=True)
            self.rows = Rows(shape[0], reverse, [B] * shape[0], ends, None, resets)
        else:
            T, starts, ends = len(batch_sizes), batch_sizes.cumsum(0) - batch_sizes, None
            if self.plan.scope != "host":
                ends = T - torch.searchsorted(batch_sizes.flip(0), torch.arange(B, device="cpu"), right=True)
                ends, starts = (t.to(x.device, non_blocking=True) for t in (ends, starts))
            self.rows = Rows(T, reverse, batch_sizes.tolist(), ends, starts, resets)

    def kernel(self, name: str, *given: Any) -> Sequence[Any]:
        """The backend's `forward` or `backward`."""
        backend, rows = self.plan.backend, self.rows
        with _place(backend, given[0]):
            read = (t.resolve_neg() if isinstance(t, Tensor) else t for t in given)
            return getattr(_module(_AROUND.get(backend, "host")), name)(self.cell, self.plan, rows, *read)

    def pick(self, t: Any) -> Any:
        """[..., total, K] to the rows that the kernels see."""
        return t if t is None or self.index is None else t.index_select(-2, self.index)

    def flat(self, t: Tensor, width: int) -> Tensor:
        """[..., width] to [R, width], the rows that the kernels see."""
        return self.pick(t.reshape(self.total, width).contiguous())

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
    whole: Any = (t if t is None else t.contiguous() for t in given)
    x, w_ih, w_hh, b_ih, b_hh, s0 = whole
    *leading, width = x.shape
    y, states, last, saved = run.kernel("forward", run.flat(x, width), w_ih, w_hh, b_ih, b_hh, run.sort(s0), keep)
    if run.index is not None:
        y, states, last, saved = run.spread(y), run.spread(states), run.sort(last, back=True), run.spread(saved)
    return y.resize_(*leading, y.shape[-1]), states, last, saved  # in place, so that it is no view


def backward(run: Run, given: Sequence[Any], kept: Sequence[Any], d: Sequence[Tensor | None],
             needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of `given`, those that are needed, from those of y, states and last; `kept` is y, states, saved."""
    x, w_ih, w_hh, s0 = (given[k].contiguous() for k in (0, 1, 2, 5))
    y, states, saved = kept
    if run.cell.saved and saved is None:
        saved = forward(run, given, 2)[3]
    shape, width = x.shape, y.shape[-1]
    dy, dstates = None if d[0] is None else run.flat(d[0], width), None if d[1] is None else run.pick(d[1].contiguous())
    grads = [*run.kernel("backward", run.flat(x, shape[-1]), w_ih, w_hh, run.sort(s0), run.flat(y, width),
                         run.pick(states), run.pick(saved), dy, dstates, run.sort(d[2]), needs)]
    grads[0] = grads[0] if grads[0] is None else run.spread(grads[0]).view(shape)
    grads[5] = run.sort(grads[5], back=True)
    return grads


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
