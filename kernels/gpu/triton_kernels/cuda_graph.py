"""One CUDA graph for all calls of a kind.

The graph launches a kernel for a fixed number of steps. Its launches read from a table in device
memory which step they do and where the tensors are: it serves any length and any tensors.

The capture goes through the CUDA driver, not through `torch.cuda.CUDAGraph`: that registers the
process' default generator with the graph, and until its end every other thread that draws random
numbers on the GPU fails. Nothing that is captured here draws, or allocates a tensor."""

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensors import each_of

# Enough to hide the host's cost of a replay, few enough to run past the end of a sequence.
STEPS_PER_GRAPH = 16
# A step number past any sequence's end.
PAST_ANY_END = 2**30
# CU_STREAM_NON_BLOCKING: the legacy default stream of another library does not wait for it.
NON_BLOCKING = 1
# CU_STREAM_CAPTURE_MODE_RELAXED: neither what other threads do, nor what the garbage collector
# frees in this one, ends the capture.
RELAXED = 2


@cache
def _library() -> Any:
    """The CUDA driver, which is loaded where there is a GPU."""
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    """A function of the driver. Raises RuntimeError, as the driver names the fault."""
    library = _library()
    status = getattr(library, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {status}"
        raise RuntimeError(f"{name} failed: {reason}")


# Of a stream that several graphs are captured on, one after another.
_capturing = Lock()


def _new_stream() -> ctypes.c_void_p:
    # not one of torch's pool, which may be another thread's too
    stream = ctypes.c_void_p()
    _call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
    return stream


class CaptureStream(NamedTuple):
    """A stream, and the memory that a library works in where it is captured on it."""

    stream: ctypes.c_void_p
    memory: Any


@cache
def _capture_stream(_device: int, _stream: int) -> CaptureStream:
    """That of all graphs with a library's products that are replayed on a stream: these never run
    at the same time, and so share the memory.

    torch keeps a workspace of cuBLAS for each handle and stream, whose address is captured, but it
    drops all of them when torch.compile makes graphs of its own (_cuda_clearCublasWorkspaces), and
    would give that memory to others, which a replay would overwrite. A pool that is never let go
    gives it to none but this stream."""
    return CaptureStream(_new_stream(), torch.cuda.MemPool())


class Graph:
    """What `launch` launches on torch's current stream, to be launched again and again; with a
    library's products, `products`, on the current stream alone. (These in a thread without a memory
    pool, whose pool would be the workspace's.)"""

    def __init__(self, launch: Callable[[], None], products: bool = False) -> None:
        self._executable = ctypes.c_void_p()
        if products:
            current = torch.cuda.current_stream().cuda_stream
            with _capturing:
                # two threads at once would have two of them, one of which is let go
                place = _capture_stream(torch.cuda.current_device(), current)
                with torch.cuda.use_mem_pool(place.memory):
                    self._capture(launch, place.stream)
        else:
            stream = _new_stream()
            try:
                self._capture(launch, stream)
            finally:
                _call("cuStreamDestroy_v2", stream)
        # One that still runs is freed when it has ended.
        weakref.finalize(self, _call, "cuGraphExecDestroy", self._executable).atexit = False

    def _capture(self, launch: Callable[[], None], stream: ctypes.c_void_p) -> None:
        graph = ctypes.c_void_p()
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream.value)):
                _call("cuStreamBeginCapture_v2", stream, RELAXED)
                try:
                    launch()
                finally:
                    _call("cuStreamEndCapture", stream, ctypes.byref(graph))
            executable = ctypes.byref(self._executable)
            _call("cuGraphInstantiateWithFlags", executable, graph, ctypes.c_ulonglong(0))
        finally:
            if graph:
                _call("cuGraphDestroy", graph)

    def replay(self, stream: int) -> None:
        _call("cuGraphLaunch", self._executable, ctypes.c_void_p(stream))


class StepGraph:
    """`launch(table, k, tensors)` launches step k of a block of STEPS_PER_GRAPH steps.

    The table is [4 + tensors], int64. Entries 0 and 1 are slots for the step's number: launch k
    reads it from slot k % 2 and writes the next one to the other slot. Entries 2 and 3 are two
    sizes. The rest are pointers, 0 for None. A step past the end must do nothing.
    A captured call of a library reads and writes `fixed` tensors, of addresses that stay.
    A StepGraph belongs to one stream; the lock is for threads that share that stream."""

    def __init__(self, *_kind: Any) -> None:
        self.lock = Lock()
        self.table = torch.empty(0)
        self.fixed: dict[str, Tensor] = {}
        self.graph: Graph | None = None

    def capture(self, launch: Callable[[Tensor, int], None]) -> Graph:
        # Does nothing, but loads the kernel, which is not allowed during a capture.
        launch(self.table, 0)

        def launch_all() -> None:
            for k in range(STEPS_PER_GRAPH):
                launch(self.table, k)

        return Graph(launch_all, bool(self.fixed))

    def lasting(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, made in a thread of its own: it must outlive inference mode and
        memory pools (as torch.compile has them), which belong to the caller's thread."""
        stream = torch.cuda.current_stream()
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(stream,)) as thread:
            return thread.submit(make).result()

    def run(
        self,
        launch: Callable[[Tensor, int, Any], None],
        steps: int,
        sizes: tuple[int, int],
        device: torch.device,
        tensors: Any,
        fixed: Sequence[str],
        fill: Callable[[Any, Any], None],
    ) -> None:
        """`tensors` is a NamedTuple. In place of those named in `fixed` there are some at addresses
        that stay, which `fill(tensors, the same with these)` fills."""
        stream = torch.cuda.current_stream()
        with self.lock:
            given = {name: getattr(tensors, name) for name in fixed}
            if self.graph is None and given:
                self.fixed = self.lasting(
                    lambda: {name: torch.zeros_like(t) for name, t in given.items()}
                )
            if given:
                with_fixed = tensors._replace(**self.fixed)
                fill(tensors, with_fixed)
                tensors = with_fixed
            entries = [*sizes, *(0 if t is None else t.data_ptr() for t in each_of(tensors))]
            if self.graph is None:
                table = [PAST_ANY_END, PAST_ANY_END, *entries]
                self.table = self.lasting(lambda: torch.tensor(table, device=device))
                # a step as it is in another thread, where gradients are not off
                step = torch.no_grad()(lambda table, k: launch(table, k, tensors))
                self.graph = self.lasting(lambda: self.capture(step))
            table_now = torch.tensor([0, 0, *entries], device="cpu")
            self.table.copy_(table_now, non_blocking=True)
            for _ in range(0, steps, STEPS_PER_GRAPH):
                self.graph.replay(stream.cuda_stream)


def can_replay(steps: int, tensors: Iterable[Tensor | None], products: bool = False) -> bool:
    """Not for a few steps, nor for unaligned tensors, nor while the caller captures a graph; nor,
    with a library's `products`, where torch's allocator is one that has no memory pools."""
    if steps < STEPS_PER_GRAPH:
        return False
    if not all(t is None or (t.is_cuda and t.data_ptr() % 16 == 0) for t in tensors):
        return False
    if products and torch.cuda.get_allocator_backend() != "native":
        return False
    return not torch.cuda.is_current_stream_capturing()


# The graph of a kind: all that is not in the table, also device and stream.
step_graph = lru_cache(maxsize=64)(StepGraph)
