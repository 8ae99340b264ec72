"""Memory of the CPU's kernels that is kept from call to call: the first touch of fresh memory takes as long as the
arithmetic of the step that writes it, and malloc gives back what is large."""

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

LASTING = 2**20  # bytes from which malloc may not do well: what it keeps depends on what the process happens to free
# Bytes up to which FEW pieces of a size stay ours, for madvise would take up to a tenth of their call. (It takes less
# than the first touch of fresh memory.)
LARGE, FEW = 2**22, 4
HUGE_PAGE = 2**21
FREE = 2  # references to memory that no call holds: the one that asks, and the argument by which it does


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}


kept = _Kept()
spare: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # by size


def working(like: Tensor, size: int) -> Tensor:
    """Memory of that size or more, with whatever is in it, for as long as the result is held: this thread's next call
    gets the same. A call of a signal handler or a finalizer, in the middle of another one, gets memory of its own."""
    key = like.dtype, like.device
    memory = kept.memory.pop(key, None)
    if memory is None or memory.shape[0] < size or sys.getrefcount(memory) > FREE:
        memory = None  # before there is another
        with torch.inference_mode(False):  # or it would be of no use outside of it
            memory = torch.empty(size, dtype=like.dtype, device=like.device)
    kept.memory[key] = memory
    return memory


def _give_back(memory: mmap.mmap) -> None:
    with suppress(OSError):
        if len(memory) > LARGE or len(spare[len(memory)]) >= FEW:
            memory.madvise(mmap.MADV_FREE)  # until it is written to again, the system takes it if it needs some
        spare[len(memory)].append(memory)


def lasting(like: Tensor, *shape: int) -> Tensor:
    """As `like.new_empty(shape)`. If it is large, the memory is kept once the tensor is no more."""
    numbers = math.prod(shape)
    size = numbers * like.element_size()
    if size < LASTING or not like.is_cpu or not hasattr(mmap, "MADV_FREE"):
        return like.new_empty(shape)
    rounded = power_of_2(size, 1)  # what is never written to is not there
    try:
        memory = spare[rounded].pop()
    except IndexError:
        try:
            memory = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE)
        except OSError:  # there may not be as much as that
            return like.new_empty(shape)
        with suppress(OSError, AttributeError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, 0, size // HUGE_PAGE * HUGE_PAGE)
    view = memoryview(memory)
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=numbers).view(shape)


def release() -> None:
    """Give all of it back to the system that is not in use, but for what other threads work in."""
    kept.memory.clear()
    spare.clear()
