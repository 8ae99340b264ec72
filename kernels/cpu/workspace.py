"""Memory of the CPU's kernels that is reused from call to call: the first touch of fresh memory
takes as long as the arithmetic of the step that writes it, and malloc returns large pieces to the
system."""

import math
import mmap
import sys
import threading
import weakref
from collections import defaultdict
from contextlib import suppress

import torch
from torch import Tensor

from ..plan import power_of_2

# Bytes from which memory is pooled. What malloc keeps depends on what the process happens to free.
POOLED = 2**20
# Bytes up to which FEW pieces of a size stay with the process: for them madvise would take up to a
# tenth of the call. It takes less than the first touch of fresh memory.
LARGE = 2**22
FEW = 4
HUGE_PAGE = 2**21
# References to memory that no call holds: the variable, and the argument of getrefcount.
FREE = 2


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}


kept = _Kept()
spare: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # by size


def scratch(like: Tensor, size: int) -> Tensor:
    """Uninitialized memory of that size or more, for as long as the result is held: this thread's
    next call gets the same. A call of a signal handler or a finalizer, in the middle of another
    one, gets memory of its own."""
    key = like.dtype, like.device
    memory = kept.memory.pop(key, None)
    if memory is None or memory.shape[0] < size or sys.getrefcount(memory) > FREE:
        memory = None  # freed before more is allocated
        # Tensors of inference mode could not be used outside of it.
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=like.dtype, device=like.device)
    kept.memory[key] = memory
    return memory


def _give_back(memory: mmap.mmap) -> None:
    with suppress(OSError):
        if len(memory) > LARGE or len(spare[len(memory)]) >= FEW:
            # Until it is written to again, the system may take the pages.
            memory.madvise(mmap.MADV_FREE)
        spare[len(memory)].append(memory)


def pooled_empty(like: Tensor, *shape: int) -> Tensor:
    """As `like.new_empty(shape)`, but large memory goes to a pool when the tensor is freed."""
    numbers = math.prod(shape)
    size = numbers * like.element_size()
    if size < POOLED or not like.is_cpu or not hasattr(mmap, "MADV_FREE"):
        return like.new_empty(*shape)
    # Pages that are never written to take no memory.
    rounded = power_of_2(size, 1)
    try:
        memory = spare[rounded].pop()
    except IndexError:
        try:
            memory = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE)
        except OSError:  # out of memory, or of what may be mapped
            return like.new_empty(shape)
        with suppress(OSError, AttributeError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, 0, size // HUGE_PAGE * HUGE_PAGE)
    view = memoryview(memory)
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=numbers).view(shape)


def release() -> None:
    """Return all memory to the system that is not in use, but for other threads' scratch memory."""
    kept.memory.clear()
    spare.clear()
