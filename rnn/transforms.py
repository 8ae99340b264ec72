"""All that rnn uses of PyTorch's private interfaces (torch._C, functorch, dispatch modes, Dynamo's
configuration): what is at work around a call.

Read in torch 2.10 to 2.15. A name that a later version lacks raises at import, here and nowhere
else; where it is read only when it is needed, the function says so."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import unwrap_batched
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils import _python_dispatch

# What torch.nn's cells call.
torch_cells: Any = torch._VF
is_batched = functorch.is_legacy_batchedtensor
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
mkldnn_enabled: Callable[[], bool] = torch._C._get_mkldnn_enabled
tracing_state: Callable[[], Any] = torch._C._get_tracing_state


def traced(*tensors: Tensor) -> bool:
    for t in tensors:
        if type(t) is not Tensor and type(t) is not Parameter:
            return True
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or tracing_state() is not None
    )


def _depth() -> int:
    """How many transforms of functions are at work, one in another."""
    return functorch.get_dynamic_layer_stack_depth()


# As torch.compiler.assume_constant_result does, which imports all of Dynamo. torch 2.10 and 2.11
# have no other way to compile this. Their guards see to it that the depth is the one that was
# compiled for.
vars(_depth)["_dynamo_marked_constant"] = True


def under_dispatch_mode() -> bool:
    """Whether a dispatch mode sees what is computed now."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def dispatch_modes() -> list[Any]:
    """The dispatch modes that see what is computed now, the outermost first."""
    return _python_dispatch._get_current_dispatch_mode_stack()


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """No dispatch mode sees what is computed in it."""
    return _python_dispatch._disable_current_modes()


def count_flops(mode: Any, operator: Any, arguments: Sequence[Any]) -> None:
    """Have a torch.utils.flop_counter.FlopCounterMode count a call of `operator` that it did not
    see. Raises AttributeError where the mode has no `_count_flops` any more."""
    mode._count_flops(operator, None, tuple(arguments), {})


def assert_async(condition: Tensor, message: str) -> None:
    """Raises RuntimeError if the condition is false; on a GPU, which the host does not wait for,
    the device stops instead."""
    torch._assert_async(condition, message)


def dynamo_config() -> Any:
    """The settings of torch.compile. Imported when asked for, as all of Dynamo comes with them."""
    return import_module("torch._dynamo.config")


def active_transform() -> Any:
    """The innermost transform of functions that is at work, if any."""
    if forward_ad._current_level >= 0:
        return TransformType.Jvp
    depth = _depth()
    return depth and (
        depth if torch.compiler.is_compiling() else functorch.peek_interpreter_stack().key()
    )


def only_autograd() -> bool:
    """Whether nothing but autograd sees or changes what is computed now: no compiler, transform,
    dispatch mode, tracer or autocast. All questions in one, for what takes as long as they do."""
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and not functorch.get_dynamic_layer_stack_depth()
        and not torch._C._len_torch_dispatch_stack()
        and tracing_state() is None
        and not any_autocast()
    )


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """What ran in one precision stays in it going backward."""
    return torch.autocast(device.type, enabled=False) if any_autocast() else nullcontext()


def needs_composite(grads: Sequence[Any]) -> bool:
    """Whether a backward pass has to be differentiable itself, or runs under a transform."""
    for t in grads:
        if t is not None and is_batched(t):
            return True
    return torch.is_grad_enabled() or bool(active_transform())


def autocast_dtype(device: str) -> torch.dtype | None:
    """In which dtype autocast has layers computed on this device, if it does."""
    if any_autocast() and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def is_vmap(transform: Any) -> bool:
    """Whether the innermost transform is vmap, and kernels can be run for each of its examples."""
    return bool(transform == TransformType.Vmap and not torch.compiler.is_compiling())


def unwrapped(t: Tensor) -> Tensor:
    """The numbers of a tensor that a transform has wrapped."""
    while not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t


def vmap_rule(
    tensors: tuple[Any, ...],
    shared: int,
    composite: Callable[[Sequence[Any]], Sequence[Any]],
    one: Callable[[Sequence[Any]], Sequence[Any]],
) -> tuple[Any, ...]:
    """Under vmap: all examples in one `composite` on the CPU, or each through its kernels by `one`
    on a GPU. The tensor number `shared` is the same for all of them."""
    interpreter: Any = retrieve_current_functorch_interpreter()
    V = interpreter.batch_size()
    level = interpreter.level()
    plain, dims = unwrap_batched(tensors, level)
    with interpreter.lower():
        batched: Any = [
            t if t is None or d is not None else t.expand(V, *t.shape) for t, d in zip(plain, dims)
        ]
        batched = [t if d is None else t.movedim(d, 0) for t, d in zip(batched, dims)]
        batched[shared] = plain[shared]
        if plain[0].is_cuda:
            examples = zip(*([t] * V if t is None or t is plain[shared] else t for t in batched))
            each = zip(*(one(example) for example in examples))
            results: Any = [None if column[0] is None else torch.stack(column) for column in each]
        else:
            results = composite(batched)
    return tuple(t if t is None else functorch._add_batch_dim(t, 0, level) for t in results)
