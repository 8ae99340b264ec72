"""One CUDA graph for all calls of a kind.

The graph launches a kernel for a fixed number of steps. Its launches read from a table in device
memory which step they do and where the tensors are: it serves any length and any tensors."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

# Enough to hide the host's cost of a replay, few enough to run past the end of a sequence.
STEPS_PER_GRAPH = 16
# A step number past any sequence's end.
PAST_ANY_END = 2**30


class StepGraph:
    """`launch(table, k)` launches step k of a block of STEPS_PER_GRAPH steps.

    The table is [4 + tensors], int64. Entries 0 and 1 are slots for the step's number: launch k
    reads it from slot k % 2 and writes the next one to the other slot. Entries 2 and 3 are two
    sizes. The rest are pointers, 0 for None. A step past the end must do nothing.
    A StepGraph belongs to one stream; the lock is for threads that share that stream."""

    def __init__(self, *_kind: Any) -> None:
        self.lock = Lock()
        self.table = torch.empty(0)
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self, launch: Callable[[Tensor, int], None]) -> torch.cuda.CUDAGraph:
        # Does nothing, but loads the kernel, which is not allowed during a capture.
        launch(self.table, 0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for k in range(STEPS_PER_GRAPH):
                    launch(self.table, k)
            finally:
                graph.capture_end()
        return graph

    def run(
        self,
        launch: Callable[[Tensor, int], None],
        steps: int,
        sizes: tuple[int, int],
        device: torch.device,
        tensors: Sequence[Tensor | None],
    ) -> None:
        entries = [*sizes, *(0 if t is None else t.data_ptr() for t in tensors)]
        stream = torch.cuda.current_stream()
        with self.lock:
            if self.graph is None:
                # In a thread of its own: the table must outlive inference mode and memory pools (as
                # torch.compile has them), which belong to the caller's thread.
                with ThreadPoolExecutor(
                    1, initializer=torch.cuda.set_stream, initargs=(stream,)
                ) as thread:
                    table = [PAST_ANY_END, PAST_ANY_END, *entries]
                    self.table = thread.submit(torch.tensor, table, device=device).result()
                self.graph = self.capture(launch)
            table_now = torch.tensor([0, 0, *entries], device="cpu")
            self.table.copy_(table_now, non_blocking=True)
            for _ in range(0, steps, STEPS_PER_GRAPH):
                self.graph.replay()


def can_replay(steps: int, tensors: Sequence[Tensor | None]) -> bool:
    """Not for a few steps, nor for unaligned tensors, nor while the caller captures a graph."""
    if steps < STEPS_PER_GRAPH:
        return False
    if not all(t is None or (t.is_cuda and t.data_ptr() % 16 == 0) for t in tensors):
        return False
    return not torch.cuda.is_current_stream_capturing()


# The graph of a kind: all that is not in the table, also device and stream.
step_graph = lru_cache(maxsize=64)(StepGraph)
