"""Forward and backward of one layer call: its plan, the rows that the kernels see, and the context
that they run in."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .boundary import ready
from .device_copies import kept_on_device, on_device
from .dispatch import module
from .kernels.cells import Cell
from .kernels.plan import Plan
from .kernels.types import Gradients, Layout, OutputGrads, Outputs, Save, Weights
from .layer_types import Masks
from .resets import requested_steps

# The module of a backend's `forward` and `backward`: of those not here, "host".
_WRAPPERS = {"triton": "device", "cuda": "device"}
_HERE = nullcontext()
# NaNs propagate without warnings, as in torch.
_QUIET = partial(np.errstate, all="ignore")


def device_context(backend: str, x: Tensor) -> AbstractContextManager[Any]:
    """What a kernel runs in: the device of its tensors, and for CuPy torch's current stream and
    torch's memory."""
    if not x.is_cuda:
        return _QUIET() if backend == "numpy" else _HERE
    index = x.get_device()
    if backend != "cupy":
        return _HERE if index == torch.cuda.current_device() else torch.cuda.device(index)
    place = ExitStack()
    cuda = import_module("cupy.cuda")

    def memory(size: int) -> Any:
        block = torch.empty(size, dtype=torch.uint8, device=x.device)
        return cuda.MemoryPointer(cuda.UnownedMemory(block.data_ptr(), size, block, index), 0)

    place.enter_context(torch.cuda.device(index))
    place.enter_context(
        import_module(".kernels.gpu.cuda.launch", __package__).on_stream(cuda, x.device)
    )
    place.enter_context(cuda.using_allocator(memory))
    return place


@lru_cache
def _interpreted() -> bool:
    """Whether Triton interprets its kernels, which then take tensors on the CPU."""
    return bool(import_module("triton").knobs.runtime.interpret)


def batch_size(x: Tensor, batch_sizes: Tensor | None, batch_first: bool = False) -> int:
    """B, of x [T, B, I] or [B, T, I], or packed."""
    if batch_sizes is not None:
        return int(batch_sizes[0])
    return x.shape[0 if batch_first else 1]


def _starts(batch_sizes: Tensor) -> Tensor:
    """The first row of each step of packed sequences, [T]."""
    return batch_sizes.cumsum(0) - batch_sizes


def _ends(batch_sizes: Tensor) -> Tensor:
    """The length of each packed sequence, [B]."""
    sequences = torch.arange(int(batch_sizes[0]), device="cpu")
    return len(batch_sizes) - torch.searchsorted(batch_sizes.flip(0), sequences, right=True)


class LayerCall:
    """The plan of a call, and the rows that its kernels see: array operations do not see those past
    an end. With `batch_first` the caller's x and y are [B, T, ...]."""

    def __init__(
        self,
        cell: Cell,
        plan: Plan,
        x: Tensor,
        masks: Masks,
        reverse: Sequence[int],
        batch_first: bool = False,
    ) -> None:
        lengths, batch_sizes, resets = masks
        if not lengths is batch_sizes is resets is None:
            lengths, batch_sizes, resets = ready(masks)
        self.cell = cell
        self.reverse = [*map(int, reverse)]
        self.batch_first = batch_first
        shape = x.shape
        sizes: list[int] = []
        if batch_sizes is None:
            T, B = (shape[1], shape[0]) if batch_first else (shape[0], shape[1])
            self.total = T * B
        else:
            sizes = batch_sizes.tolist()
            B = sizes[0]
            T = len(sizes)
            self.total = shape[0]
        self.leading = (T, B) if batch_sizes is None else (self.total,)
        self.plan = plan
        if plan.backend == "triton" and x.is_cpu and not _interpreted():
            raise RuntimeError(f'The plan "triton" is for tensors on a GPU, got {x.device}')
        self.index: Tensor | None = None
        self.order: Tensor | None = None
        if lengths is not None and self.plan.scope == "host":
            batch_sizes, resets = self._leave_out_padding(lengths, resets, (T, B), x.device)
            sizes = batch_sizes.tolist()
        if batch_sizes is None:
            # int64, as CUDA C++ has them
            ends = lengths if lengths is None else lengths.to(torch.int64)
            if ends is not None:
                ends = on_device("lengths", ends, x.device)
            self.layout = Layout(T, self.reverse, [B] * T, ends, None, resets, B)
        else:
            self.layout = self._packed_rows(batch_sizes, sizes, resets, B, x.device)
        self.rows_are_given = (
            self.plan.backend == "native" and self.index is None and not batch_first
        )

    def _leave_out_padding(
        self, lengths: Tensor, resets: Tensor | None, size: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Sequences in the order of their lengths, and the rows of their steps: as if packed.
        Returns the sizes of the batch at each step, and the resets in that order."""
        T, B = size
        ends, order = lengths.cpu().sort(descending=True, stable=True)
        steps = torch.arange(T, device="cpu")[:, None]  # whatever the default device is
        runs = steps < ends
        self.index = on_device("lengths", (steps * B + order)[runs], device)
        self.order = on_device("lengths", order, device)
        batch_sizes = runs.sum(1)[: max(1, int(runs.any(1).sum()))]
        if resets is not None:
            resets = resets[: len(batch_sizes)].index_select(1, self.order)
        return batch_sizes, resets

    def _packed_rows(
        self,
        batch_sizes: Tensor,
        sizes: list[int],
        resets: Tensor | None,
        B: int,
        device: torch.device,
    ) -> Layout:
        """`sizes` are the numbers of `batch_sizes`."""
        T = len(sizes)
        if self.plan.scope == "host":
            return Layout(T, self.reverse, sizes, None, _starts(batch_sizes), resets, B)
        if device.type != "cuda":
            ends = _ends(batch_sizes)
            return Layout(T, self.reverse, sizes, ends, _starts(batch_sizes), resets, B)

        def together() -> list[Tensor]:
            """Both in one, each from an even place on, for one copy."""
            ends = _ends(batch_sizes)
            return [torch.cat((ends, ends.new_zeros(B % 2), _starts(batch_sizes)))]

        (both,) = kept_on_device("batch_sizes", batch_sizes, device, together)
        return Layout(T, self.reverse, sizes, both[:B], both[B + B % 2 :], resets, B)

    def backend(self) -> Any:
        """The module whose `forward` and `backward` take tensors that are `ready`."""
        return module(_WRAPPERS.get(self.plan.backend, "host"))

    def context(self, x: Tensor) -> AbstractContextManager[Any]:
        return device_context(self.plan.backend, x)

    def initial_states(self, states: Sequence[Tensor] | None) -> Any:
        """The states before the first step, which are `ready`, as the backend takes them; None for
        zeros."""
        return [self.reorder(s) for s in states] if states else None

    def last_grads(self, grads: Sequence[Tensor | None]) -> Any:
        """The gradients of the last states, likewise; None if there are none."""
        if all(grad is None for grad in grads):
            return None
        return [None if grad is None else self.reorder(grad) for grad in grads]

    def in_callers_order(self, states: Any) -> Any:
        """The last states, or the gradients of the first ones, as the caller takes them."""
        return states if self.order is None else [self.reorder(s, back=True) for s in states]

    def gather_rows(self, t: Any) -> Any:
        """[..., total, K] to the rows that the kernels see."""
        return t if t is None or self.index is None else ready((t,))[0].index_select(-2, self.index)

    def to_rows(self, t: Tensor) -> Tensor:
        """Of the caller's layout to [R, K], the rows that the kernels see."""
        if self.rows_are_given:
            return t
        if self.batch_first:
            t = t.transpose(0, 1)
        t = t.reshape(self.total, t.shape[-1])
        return t if self.index is None else ready((t,))[0].index_select(0, self.index)

    def from_rows(self, t: Tensor) -> Tensor:
        """The inverse, in place, so that the result is no view; with 0 in the rows left out."""
        if self.rows_are_given:
            return t
        if self.index is not None:
            t = self.scatter_rows(t)
        t.resize_(*self.leading, t.shape[-1])
        return t.transpose_(0, 1) if self.batch_first else t

    def scatter_rows(self, t: Any) -> Any:
        """The inverse of `gather_rows`."""
        if t is None or self.index is None:
            return t
        return t.new_zeros(*t.shape[:-2], self.total, t.shape[-1]).index_copy_(-2, self.index, t)

    def reorder(self, t: Tensor, back: bool = False) -> Tensor:
        """[K, B, H] in the kernels' order of sequences, or back from it."""
        if self.order is None:
            return t
        return t.index_select(1, self.order.argsort() if back else self.order)


def forward(
    call: LayerCall, x: Tensor, weights: Weights, states: Sequence[Tensor] | None, save: int
) -> Outputs:
    """What the call gives for x in the caller's layout, and S states [N, B, H] before the first
    step, zeros if None."""
    rows, w_ih, w_hh, b_ih, b_hh, *initial = ready((call.to_rows(x), *weights, *(states or ())))
    s0 = call.initial_states(initial)
    ready_weights = Weights(w_ih, w_hh, b_ih, b_hh)
    backend = call.backend()
    with call.context(x):
        outputs: Outputs = backend.forward(
            call.cell, call.plan, call.layout, rows, ready_weights, s0, save
        )
    if call.rows_are_given:
        return outputs
    y, others, last, saved = outputs
    return Outputs(
        call.from_rows(y),
        call.scatter_rows(others),
        call.in_callers_order(last),
        call.scatter_rows(saved),
    )


def backward(
    call: LayerCall,
    x: Tensor,
    weights: Weights,
    states: Sequence[Tensor] | None,
    outputs: Outputs,
    grads: OutputGrads,
    needs: Gradients[bool],
) -> Gradients[Tensor | None]:
    """The adjoint of `forward`. The last states are not looked at; where the activations are not
    there, they are computed once more."""
    saved = outputs.saved
    if call.cell.saved and saved is None:
        saved = forward(call, x, weights, states, Save.ACTIVATIONS).saved
    S = call.cell.states
    given_last = [None] * S if grads.last is None else grads.last
    of_steps = x, outputs.y, outputs.states, saved, grads.y, grads.states
    if not call.rows_are_given:
        of_steps = (
            call.to_rows(x),
            call.to_rows(outputs.y),
            call.gather_rows(outputs.states),
            call.gather_rows(saved),
            grads.y if grads.y is None else call.to_rows(grads.y),
            call.gather_rows(grads.states),
        )
    given = weights.w_ih, weights.w_hh, *of_steps, *given_last, *(states or ())
    w_ih, w_hh, rows, y, others, saved, dy, dothers, *ends = ready(given, like=x)
    s0 = call.initial_states(ends[S:])
    coming = OutputGrads(dy, dothers, call.last_grads(ends[:S]))
    kept = Outputs(y, others, None, saved)
    if call.layout.resets is not None and call.plan.scope == "host":
        rows, s0, kept = requested_steps(call.plan, call.layout, rows, s0, kept, coming)
    whole = Weights(w_ih, w_hh, None, None)
    with call.context(x):
        found: Gradients[Tensor | None] = call.backend().backward(
            call.cell, call.plan, call.layout, rows, whole, s0, kept, coming, needs
        )
    if found.x is not None:
        found = found._replace(x=call.from_rows(found.x))
    return found if found.s0 is None else found._replace(s0=call.in_callers_order(found.s0))
