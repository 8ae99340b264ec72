"""Copies on a GPU of the integers and masks that callers have on the CPU, kept by content.

A call whose lengths were seen before copies nothing. While a CUDA graph is captured nothing may be
copied from the CPU: each replay would read that memory again, which is freed by then. What a call
before the capture left here serves, and stays for as long as the process; what is not here is
refused."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .transforms import active_transform

# Of all copies that no graph uses, on all devices together.
KEPT_BYTES = 2**26


class _Copy(NamedTuple):
    """Tensors, the stream that filled them, and the event after which others may read them."""

    tensors: tuple[Tensor, ...]
    stream: int
    filled: Any
    bytes: int


_lock = Lock()
# In the order of their last use; and those that a graph reads.
_kept: OrderedDict[Hashable, _Copy] = OrderedDict()
_captured: dict[Hashable, _Copy] = {}


def kept_on_device(
    name: str, source: Tensor, device: torch.device, make: Callable[[], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """On `device`, a GPU, what `make` makes of `source`, both on the CPU. `name` says what that is.

    Raises RuntimeError while a CUDA graph is captured, if no call before made it."""
    content = source.contiguous().numpy()
    key = name, device, source.dtype, source.shape, content.tobytes()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        if torch.cuda.is_current_stream_capturing():
            return _for_a_graph(name, key)
        with _lock:
            found = _captured.get(key) or _kept.get(key)
            if key in _kept:
                _kept.move_to_end(key)
        if found is None:
            found = _copied(make(), device, stream)
            # not those of a mode under which tensors hold nothing
            if all(type(t) is Tensor for t in found.tensors):
                _keep(key, found)
        elif found.stream != stream.cuda_stream:
            stream.wait_event(found.filled)
            for t in found.tensors:
                t.record_stream(stream)
    return found.tensors


def _for_a_graph(name: str, key: Hashable) -> tuple[Tensor, ...]:
    with _lock:
        found = _captured.get(key) or _kept.pop(key, None)
        if found is not None:
            _captured[key] = found
            return found.tensors
    raise RuntimeError(
        f"A CUDA graph is being captured, and the {name} of this call are on the CPU: make the "
        "same call once before the capture, with the same numbers, which copies them to the GPU; "
        "or give `lengths` as a tensor on the GPU, which may change between replays"
    )


def _copied(sources: Sequence[Tensor], device: torch.device, stream: Any) -> _Copy:
    # An ordinary tensor, whatever the mode of this call is.
    with torch.inference_mode(False):
        tensors = tuple(t.to(device, non_blocking=True) for t in sources)
    filled = torch.cuda.Event()
    filled.record(stream)
    return _Copy(tensors, stream.cuda_stream, filled, sum(t.nbytes for t in tensors))


def _keep(key: Hashable, copy: _Copy) -> None:
    with _lock:
        _kept[key] = copy
        total = sum(kept.bytes for kept in _kept.values())
        while total > KEPT_BYTES:
            total -= _kept.popitem(last=False)[1].bytes


def on_device(name: str, t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`; from the CPU to a GPU by `kept_on_device`."""
    if t.device == device:
        return t
    if (
        device.type != "cuda"
        or not t.is_cpu
        or type(t) is not Tensor
        or torch.compiler.is_compiling()
        or active_transform()
    ):
        return t.to(device, non_blocking=True)
    return kept_on_device(name, t, device, lambda: (t,))[0]
