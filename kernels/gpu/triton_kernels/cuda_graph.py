"""One CUDA graph for all calls of a kind: it launches a kernel for so many steps, and reads from a table in the
device's memory which step that is and where the tensors are."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

STEPS = 16  # of a graph: enough to hide what a replay costs the host, few enough to run past the end


class Replay:
    """`launch(table, k)` launches step k of a block of STEPS. The table [4 + tensors], int64: two slots, the step comes
    in slot k % 2 and goes on in the other; two sizes; pointers, 0 for None. A step past the end has to do nothing.
    A replay belongs to one stream; the lock is for threads that share that."""

    def __init__(self, *_kind: Any) -> None:
        self.lock, self.table = Lock(), torch.empty(0)
        self.graph: Any = None

    def capture(self, launch: Callable[[Tensor, int], None]) -> Any:
        launch(self.table, 0)  # does nothing, but loads the kernel, which a capture may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for k in range(STEPS):
                    launch(self.table, k)
            finally:
                graph.capture_end()
        return graph

    def run(self, launch: Callable[[Tensor, int], None], steps: int, sizes: tuple[int, int], device: torch.device,
            tensors: Sequence[Tensor | None]) -> None:
        entries, stream = [*sizes, *(0 if t is None else t.data_ptr() for t in tensors)], torch.cuda.current_stream()
        with self.lock:
            if self.graph is None:
                # Inference mode and memory pools (torch.compile has some) are of a thread: this has to outlive them.
                with ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(stream,)) as thread:
                    past_any_end = [2**30, 2**30, *entries]
                    self.table = thread.submit(torch.tensor, past_any_end, device=device).result()
                self.graph = self.capture(launch)
            self.table.copy_(torch.tensor([0, 0, *entries], device="cpu"), non_blocking=True)
            for _ in range(0, steps, STEPS):
                self.graph.replay()


def can_replay(steps: int, tensors: Sequence[Tensor | None]) -> bool:
    """Not while somebody else captures, for a few steps, or where tensors begin anywhere."""
    return (steps >= STEPS and all(t is None or (t.is_cuda and t.data_ptr() % 16 == 0) for t in tensors)
            and not torch.cuda.is_current_stream_capturing())


replay = lru_cache(maxsize=64)(Replay)  # the one of a kind: of all that is not in the table, device and stream as well
