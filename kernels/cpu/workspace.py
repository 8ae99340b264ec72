"""Scratch memory of the CPU's kernels, reused from call to call: the first touch of fresh memory
takes as long as the arithmetic of the step that writes it."""

import sys
import threading

import torch
from torch import Tensor

# References to memory that no call holds: the variable, and the argument of getrefcount.
FREE = 2


class _ThreadScratch(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}


thread_scratch = _ThreadScratch()


def scratch(like: Tensor, size: int) -> Tensor:
    """Uninitialized memory of that size or more, for as long as the result is held: this thread's
    next call gets the same. A call of a signal handler or a finalizer, in the middle of another
    one, gets memory of its own."""
    key = like.dtype, like.device
    memory = thread_scratch.memory.pop(key, None)
    if memory is None or memory.shape[0] < size or sys.getrefcount(memory) > FREE:
        memory = None  # freed before more is allocated
        # Tensors of inference mode could not be used outside of it.
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=like.dtype, device=like.device)
    thread_scratch.memory[key] = memory
    return memory


def release() -> None:
    """Free this thread's scratch memory that is not in use."""
    thread_scratch.memory.clear()
