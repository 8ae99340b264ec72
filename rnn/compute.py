"""The operator's two halves on tensors: choose a plan, run its kernels, do the large matrix products around them. And
the formula, in differentiable torch operations: slow, and right wherever torch is.
Shapes are those of `ops.recurrence`; `given` is its x to s0, `masks` its lengths, batch_sizes and resets."""

import os
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

from .kernels import cells
from .kernels.cells import Cell
from .kernels.plan import Gpu, Plan, Rows, make_plan
from .kernels.states import join_states, part_states

_FOUND = {library: find_spec(library) is not None for library in ("triton", "cupy")}  # once: it searches the disk
_AROUND = {"triton": "device", "cuda": "device"}  # what is around a backend, if not host
_MODULES = {"host": "cpu", "device": "gpu", "native": "cpu.native"}
_SWITCH: Any = torch.backends.cudnn.rnn  # once: the way to it takes as long as an operation
_OPERATORS: dict[Cell, Any] = {cells.rnn_tanh: torch.rnn_tanh, cells.rnn_relu: torch.rnn_relu,
                               cells.lstm: torch.lstm, cells.gru: torch.gru}
_REPORTED: set[str] = set()  # compilers that fail
_HERE, _QUIET = nullcontext(), partial(np.errstate, all="ignore")  # a NaN goes its way quietly, as in torch


def _usable(library: str) -> bool:
    """Whether it can be imported. One that is there, and cannot, is reported once."""
    if _FOUND[library] and not torch.compiler.is_compiling():
        try:
            found = import_module(library)
            if library == "cupy":
                found.cuda.nvrtc.getVersion()  # its compiler is a library of its own
                found.cuda.runtime.getDeviceCount()  # raises where its CUDA does not fit the driver
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
    return import_module(f".kernels.{_MODULES[name]}", __package__)


@lru_cache
def compiles(cell: Cell) -> bool:
    """Whether the cell's C++ can be compiled. A compiler that fails, or that $CXX names and is not there, is reported
    once."""
    native = _module("native")
    command = native.compiler()
    named = os.environ.get("CXX")
    if command:
        try:
            return native.load(cell) is not None
        except RuntimeError as error:
            _report(command[0], f"rnn does without {command[0]}, which is installed and fails: {error}", UserWarning)
    elif named:
        _report(named, f"rnn does without a C++ compiler: $CXX is {named!r}, which is no program", RuntimeWarning)
    return False


def _report(compiler: str, text: str, kind: type[Warning]) -> None:
    if compiler not in _REPORTED:
        _REPORTED.add(compiler)
        warnings.warn(text, kind, stacklevel=3)


@lru_cache(4096)
def _plan(cell: Cell, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device,
          tf32: bool) -> Plan:
    gpu, serves = None, served(device, dtype)[0]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
        gpu = Gpu(10 * found.major + found.minor, found.multi_processor_count, shared, _usable("cupy"))
    native = device.type == "cpu" and dtype == torch.float32 and compiles(cell)
    plan = make_plan(cell, sizes, str(dtype).removeprefix("torch."), gpu, tf32, native)
    return Plan("cupy") if serves == "cupy" and (plan.backend != "cuda" or dtype == torch.float64) else plan


def choose(cell: Cell, x: Tensor, first: tuple[int, int], reverse: Sequence[int]) -> Plan:
    """The plan of a call, where it is served; `first` is (B, H). float32 follows torch's own switch, as it is now."""
    tf32 = x.is_cuda and x.dtype == torch.float32 and _SWITCH.fp32_precision == "tf32"
    (B, H), I = first, x.shape[-1]
    return _plan(cell, (B, I, H, len(reverse)), x.dtype, x.device, tf32)


def torch_operator(cell: Cell, x: Tensor, masks: Sequence[Any], reverse: Sequence[int], keep: int, plan: Plan | None,
                   recompute: bool) -> Any:
    """torch's own operator for a call on the CPU, where C++ cannot do it and that can: a layer of torch.nn's, on whole
    sequences, of whose states only the last are asked for; None elsewhere."""
    if not x.is_cpu or (x.dtype is torch.float32 and compiles(cell)) or cell not in _OPERATORS:
        return None
    if plan or keep or recompute or [*reverse] not in ([False], [False, True]):
        return None
    if x.dtype not in (torch.float32, torch.float64) or not masks[0] is masks[1] is masks[2] is None:
        return None
    return _OPERATORS[cell]


def by_torch(operator: Any, cell: Cell, x: Tensor, weights: Sequence[Any], states: Sequence[Tensor] | None, N: int,
             batch_first: bool) -> tuple[Tensor, None, list[Tensor]]:
    """As `ops.run_layer`, by torch's operator, which has gradients of its own."""
    if len(weights) < 4 * N:
        columns = [[None] * N if t is None else t.chunk(N) for t in weights]
        weights = [part for own in zip(*columns) for part in own]
    if not states:
        B = x.shape[0] if batch_first else x.shape[1]
        states = [x.new_zeros((N, B, weights[1].shape[1]))] * cell.states
    x, *given = ready((x, *states, *weights))
    first = given[: cell.states]
    parameters = [t for t in given[cell.states :] if t is not None]
    y, *last = operator(x, first if cell.states > 1 else first[0], parameters, len(parameters) == 4 * N, 1, 0.0,
                        torch.is_grad_enabled(), N > 1, batch_first)
    return y, None, last


def _place(backend: str, x: Tensor) -> AbstractContextManager[Any]:
    """What a kernel runs in: the device of its tensors, and for CuPy torch's current stream and torch's memory."""
    if not x.is_cuda:
        return _QUIET() if backend == "numpy" else _HERE
    index = x.get_device()
    if backend != "cupy":
        return _HERE if index == torch.cuda.current_device() else torch.cuda.device(index)
    place, cuda = ExitStack(), import_module("cupy.cuda")

    def memory(size: int) -> Any:
        block = torch.empty(size, dtype=torch.uint8, device=x.device)
        return cuda.MemoryPointer(cuda.UnownedMemory(block.data_ptr(), size, block, index), 0)

    place.enter_context(torch.cuda.device(index))
    place.enter_context(import_module(".kernels.gpu.cuda.launch", __package__).on_stream(cuda, x.device))
    place.enter_context(cuda.using_allocator(memory))
    return place


def first_states(x: Tensor, w_hh: Tensor, states: Sequence[Tensor] | None, batch_sizes: Tensor | None, N: int,
                 S: int) -> Tensor:
    """`states` joined, or zeros of x [T, B, I] or, with batch_sizes, [R, I]."""
    if states is not None:
        return join_states(states, N)
    B = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    return x.new_zeros((N * S, B, w_hh.shape[-1]))


def ready(tensors: Sequence[Any], like: Tensor | None = None) -> list[Any]:
    """Tensors that a kernel can read by address: contiguous, in memory that is there, with no bit that says that their
    numbers are yet to be negated, and of the dtype and on the device of `like`. None stays.

    Raises RuntimeError, as torch's operations do, where a storage was freed or is too small for a shape, and for
    another dtype or device."""
    found = [*tensors]
    dtype = None if like is None else like.dtype
    on_cpu = like is not None and like.is_cpu
    for k, t in enumerate(tensors):
        if t is None:
            continue
        whole = t.is_contiguous()
        if not whole or t.storage_offset() or t.untyped_storage().nbytes() < t.nbytes:
            _check_memory(t)
        if like is not None and (t.dtype is not dtype or (not t.is_cpu if on_cpu else t.device != like.device)):
            raise RuntimeError(f"Expected a tensor of {like.dtype} on {like.device}, got {t.dtype} on {t.device}")
        if t._is_zerotensor():
            found[k] = torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        elif t.is_neg():
            found[k] = t.resolve_neg().contiguous()
        elif not whole:
            found[k] = t.contiguous()
    return found


def alive(tensors: Sequence[Any]) -> None:
    """Raises RuntimeError where a storage was freed or is too small for its tensor: torch's operations that read
    several tensors do not all look."""
    for t in tensors:
        if t is not None and type(t) in (Tensor, torch.nn.Parameter):
            _check_memory(t)


def _check_memory(t: Tensor) -> None:
    if not t.numel():
        return
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    storage = t.untyped_storage().nbytes()
    if storage < (t.storage_offset() + last + 1) * t.itemsize:
        raise RuntimeError(f"Expected a tensor whose data is allocated, got one of shape {list(t.shape)} in a "
                           f"storage of {storage} bytes: it was freed or resized")


@lru_cache
def _interpreted() -> bool:
    """Whether Triton interprets its kernels, which then take tensors on the CPU."""
    return bool(import_module("triton").knobs.runtime.interpret)


class Run:
    """One call, there and back: its plan, and the rows that the kernels see. Array operations do not see those past an
    end. With `batch_first` the caller's x and y are [B, T, ...]."""

    def __init__(self, cell: Cell, plan: Plan | None, x: Tensor, w_hh: Tensor, masks: Sequence[Any],
                 reverse: Sequence[int], batch_first: bool = False) -> None:
        plain = masks[0] is masks[1] is masks[2] is None
        lengths, batch_sizes, resets = (None, None, None) if plain else ready(masks)
        self.cell, self.reverse, self.batch_first = cell, [*map(int, reverse)], batch_first
        shape = x.shape
        if batch_sizes is None:
            T, B = (shape[1], shape[0]) if batch_first else (shape[0], shape[1])
            self.total = T * B
        else:
            T, B = len(batch_sizes), int(batch_sizes[0])
            self.total = shape[0]
        self.leading = (T, B) if batch_sizes is None else (self.total,)
        first = B, w_hh.shape[1]
        self.plan: Plan = plan or choose(cell, x, first, reverse)
        if plan and plan.backend == "triton" and x.is_cpu and not _interpreted():
            raise RuntimeError(f'The plan "triton" is for tensors on a GPU, got {x.device}')
        self.on_host = self.plan.backend not in _AROUND
        self.index, self.order = None, None
        self.padded = lengths is not None and self.plan.scope != "host"
        if lengths is not None and not self.padded:
            ends, order = lengths.cpu().sort(descending=True, stable=True)
            steps = torch.arange(T, device="cpu")[:, None]  # whatever the default device is
            runs = steps < ends
            self.index, self.order = (steps * B + order)[runs].to(x.device), order.to(x.device)
            batch_sizes = runs.sum(1)[: max(1, int(runs.any(1).sum()))]
            resets = resets if resets is None else resets.index_select(1, self.order)
        if batch_sizes is None:
            ends = lengths if lengths is None else lengths.to(x.device, non_blocking=True)
            self.rows = Rows(T, self.reverse, [B] * T, ends, None, resets, B)
        else:
            T, starts, ends = len(batch_sizes), batch_sizes.cumsum(0) - batch_sizes, None
            if self.plan.scope != "host":
                ends = T - torch.searchsorted(batch_sizes.flip(0), torch.arange(B, device="cpu"), right=True)
                ends, starts = (t.to(x.device, non_blocking=True) for t in (ends, starts))
            self.rows = Rows(T, self.reverse, batch_sizes.tolist(), ends, starts, resets, B)

        self.as_it_is = self.plan.backend == "native" and self.index is None and not batch_first

    def kernel(self, name: str, *given: Any) -> Sequence[Any]:
        """The backend's `forward` or `backward`, whose tensors are `ready`."""
        backend = self.plan.backend
        with _place(backend, given[0]):
            return getattr(_module(_AROUND.get(backend, "host")), name)(self.cell, self.plan, self.rows, *given)

    def first(self, states: Sequence[Tensor] | None, like: Tensor) -> Any:
        """The states before the first step, which are `ready`, as the backend takes them."""
        states = None if not states else states if self.order is None else [self.sort(s) for s in states]
        if self.on_host:
            return states
        N = len(self.reverse)
        if states is None:
            return like.new_zeros((N * self.cell.states, self.rows.sequences, like.shape[1]))
        return join_states(states, N)

    def last_grads(self, grads: Sequence[Tensor | None]) -> Any:
        """The gradients of the last states, likewise; None if there are none."""
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None
        found = [None if grad is None else self.sort(grad) for grad in grads]
        if self.on_host:
            return found
        return join_states([torch.zeros_like(some) if grad is None else grad for grad in found], len(self.reverse))

    def last(self, states: Any) -> list[Tensor]:
        """The last states, or the gradients of the first ones, as the caller takes them."""
        parted = states if self.on_host else part_states(states, self.cell.states)
        return parted if self.order is None else [self.sort(s, back=True) for s in parted]

    def pick(self, t: Any) -> Any:
        """[..., total, K] to the rows that the kernels see."""
        return t if t is None or self.index is None else ready((t,))[0].index_select(-2, self.index)

    def flat(self, t: Tensor) -> Tensor:
        """Of the caller's layout to [R, K], the rows that the kernels see."""
        if self.as_it_is:
            return t
        if self.batch_first:
            t = t.transpose(0, 1)
        t = t.reshape(self.total, t.shape[-1])
        return t if self.index is None else ready((t,))[0].index_select(0, self.index)

    def unflat(self, t: Tensor) -> Tensor:
        """The inverse, in place, so that the result is no view; with 0 in the rows left out."""
        if self.as_it_is:
            return t
        if self.index is not None:
            t = self.spread(t)
        t.resize_(*self.leading, t.shape[-1])
        return t.transpose_(0, 1) if self.batch_first else t

    def spread(self, t: Any) -> Any:
        """The inverse of `pick`."""
        if t is None or self.index is None:
            return t
        return t.new_zeros(*t.shape[:-2], self.total, t.shape[-1]).index_copy_(-2, self.index, t)

    def sort(self, t: Tensor, back: bool = False) -> Tensor:
        """[K, B, H] in the kernels' order of sequences, or back from it."""
        if self.order is None:
            return t
        return t.index_select(1, self.order.argsort() if back else self.order)


def forward(run: Run, given: Sequence[Any], states: Sequence[Tensor] | None,
            keep: int) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    """y, the other states, with keep = 2 the activations that `backward` needs, and the last states, from `given`, x to
    b_hh, and the states before the first step, zeros if None."""
    x, w_ih, w_hh, b_ih, b_hh, *first = ready((run.flat(given[0]), *given[1:], *(states or ())))
    y, others, last, saved = run.kernel("forward", x, w_ih, w_hh, b_ih, b_hh, run.first(first, w_hh), keep)
    return run.unflat(y), run.spread(others), run.spread(saved), run.last(last)


def backward(run: Run, given: Sequence[Any], states: Sequence[Tensor] | None, kept: Sequence[Any],
             grads: Sequence[Tensor | None], last_grads: Sequence[Tensor | None],
             needs: Sequence[bool]) -> tuple[list[Tensor | None], list[Tensor] | None]:
    """The gradients of `given` and of `states`, those that are needed (six bools), from those of y and the other states
    (`grads`) and of the last states; `kept` is y, the other states and the activations."""
    y, others, saved = kept
    if run.cell.saved and saved is None:
        saved = forward(run, given, states, 2)[2]
    dy, dothers = grads
    if dy is not None:
        dy = run.flat(dy)
    saved = run.pick(saved)
    x, w_ih, w_hh, y, others, saved, dy, dothers, *ends = ready(
        (run.flat(given[0]), given[1], given[2], run.flat(y), run.pick(others), saved, dy, run.pick(dothers),
         *last_grads, *(states or ())), like=given[0])
    S = run.cell.states
    s0, dlast = run.first(ends[S:], w_hh), run.last_grads(ends[:S])
    if run.rows.resets is not None:
        x, s0, y, others, saved = asked_for(run, x, s0, y, others, saved, dy, dothers, dlast)
    found, first = run.kernel("backward", x, w_ih, w_hh, s0, y, others, saved, dy, dothers, dlast, needs)
    if found[0] is not None:
        found[0] = run.unflat(found[0])
    return found, None if first is None else run.last(first)


def asked_for(run: Run, x: Tensor, s0: Any, y: Tensor, others: Any, saved: Any, dy: Any, dothers: Any,
              dlast: Any) -> tuple[Tensor, Any, Tensor, Any, Any]:
    """x, s0, y, the other states and the activations with 0 in the steps that the loss does not ask for: those from
    which, up to the next reset, no gradient comes. Their own is 0; but 0 times the NaN that one of them may hold would
    be NaN."""
    before = [] if s0 is None else s0 if run.on_host else [s0]
    tensors = [t for t in (x, y, others, saved, *before) if t is not None]
    if not x.is_cuda and all(bool(t.sum().isfinite()) for t in tensors):  # a GPU would have to be waited for
        return x, s0, y, others, saved
    rows, N, device = run.rows, len(run.reverse), x.device
    T, B, R, H = rows.steps, rows.sequences, sum(rows.sizes), y.shape[-1] // N
    sizes = torch.tensor(rows.sizes, device=device)
    starts = sizes.cumsum(0) - sizes
    time, sequence = torch.arange(T, device=device)[:, None], torch.arange(B, device=device)
    row_time = torch.repeat_interleave(time[:, 0], sizes, output_size=R)
    row_sequence = torch.arange(R, device=device) - starts[row_time]
    runs = sequence < sizes[:, None]  # [T, B]
    if rows.lengths is not None:
        runs = runs & (time < rows.lengths)
    ends = runs.sum(0) - 1
    # Which steps a gradient comes into from outside, [T, B, N].
    given = torch.zeros(R, N, dtype=torch.bool, device=device)
    for grad in (dy, *(() if dothers is None else dothers)):
        if grad is not None:
            given |= (grad.view(R, N, H) != 0).any(-1)
    asks = given[((starts[:, None] + sequence) * runs).clamp(max=max(R - 1, 0))] & runs[..., None]
    for grad in () if dlast is None else dlast if run.on_host else dlast.view(N, -1, B, H).unbind(1):
        if grad is not None:
            last = (grad != 0).any(-1)  # [N, B]
            for n, back in enumerate(run.reverse):
                asks[..., n] |= (time == (0 if back else ends)) & last[n] & runs
    # A step is asked for if one that comes after it, in the order of the recurrence, and before a reset, is.
    asked = torch.empty_like(asks)
    for n, back in enumerate(run.reverse):
        if back:
            nearest = torch.where(asks[..., n], time, -1).cummax(0).values
            asked[..., n] = nearest >= torch.where(rows.resets, time, 0).cummax(0).values
        else:
            nearest = torch.where(asks[..., n], time, T).flip(0).cummin(0).values.flip(0)
            boundary = torch.where(rows.resets, time, T).flip(0).cummin(0).values.flip(0)
            asked[:-1, :, n] = nearest[:-1] < boundary[1:]
            asked[-1, :, n] = nearest[-1] < T
    of_row = asked[row_time, row_sequence]  # [R, N]
    first = torch.stack([asked[ends.clamp(min=0), sequence, n] if back else asked[0, :, n]
                         for n, back in enumerate(run.reverse)])  # [N, B]
    x = torch.where(of_row.any(1).view(*x.shape[:-1], 1), x, 0)
    y = torch.where(of_row[..., None], y.view(R, N, H), 0).view(y.shape)
    if run.on_host and s0 is not None:
        s0 = [torch.where(first[..., None], s, 0) for s in s0]
    elif s0 is not None:
        s0 = torch.where(first[:, None, :, None], s0.view(N, -1, B, H), 0).view(s0.shape)
    if others is not None:
        others = torch.where(of_row[..., None], others.view(-1, R, N, H), 0).view(others.shape)
    if saved is not None and run.plan.backend == "native":  # whose order that is
        saved = torch.where(of_row[..., None, None], saved.view(R, N, -1, H), 0).view(saved.shape)
    elif saved is not None:
        saved = torch.where(of_row[..., None], saved.view(-1, R, N, H), 0).view(saved.shape)
    return x, s0, y, others, saved


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
