"""The boundary between tensors and kernels that read them by address: what a tensor has to be
there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .transforms import unwrapped

# Tensors that are what they seem to be: no subclass, no wrapper of a transform.
PLAIN = (Tensor, torch.nn.Parameter)


def ready(tensors: Sequence[Any], like: Tensor | None = None) -> list[Any]:
    """Tensors that a kernel can read by address: contiguous, in memory that is there, with no bit
    that says that their numbers are yet to be negated, and of the dtype and on the device of
    `like`. None stays.

    Raises RuntimeError, as torch's operations do, where a storage was freed or is too small for a
    shape, and for another dtype or device."""
    found = [*tensors]
    dtype = None if like is None else like.dtype
    on_cpu = like is not None and like.is_cpu
    for k, t in enumerate(tensors):
        if t is None:
            continue
        if like is not None and (
            t.dtype is not dtype or (not t.is_cpu if on_cpu else t.device != like.device)
        ):
            raise RuntimeError(
                f"Expected a tensor of {dtype} on {like.device}, got {t.dtype} on {t.device}"
            )
        whole = t.is_contiguous()
        if not whole or t.storage_offset() or t.untyped_storage().nbytes() < t.nbytes:
            _check_memory(t)
        if t._is_zerotensor():
            found[k] = torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        elif t.is_neg():
            found[k] = t.resolve_neg().contiguous()
        elif not whole:
            found[k] = t.contiguous()
    return found


def alive(tensors: Sequence[Any]) -> None:
    """Raises RuntimeError where a storage was freed or is too small for its tensor: torch's
    operations that read several tensors do not all look."""
    if torch.compiler.is_compiling():
        return
    for t in tensors:
        if t is None or type(t) not in PLAIN:
            continue
        try:
            _check_memory(t)
        except NotImplementedError:
            # A transform's wrapper has no storage; asking every tensor first takes long
            inner = unwrapped(t)
            if inner is not t:
                alive((inner,))


def _check_memory(t: Tensor) -> None:
    if not t.numel():
        return
    if t.is_contiguous():
        last = t.numel() - 1
    else:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    storage = t.untyped_storage().nbytes()
    if storage < (t.storage_offset() + last + 1) * t.itemsize:
        raise RuntimeError(
            f"Expected a tensor whose data is allocated, got one of shape {list(t.shape)} in a "
            f"storage of {storage} bytes: it was freed or resized"
        )
