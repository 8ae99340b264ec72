"""From torch.nn's recurrent modules to ours and back: in a model that is there, or in torch.nn
itself."""

import threading
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import modules
from .interop import TORCH
from .stack import Stack
from .transforms import dynamo_config

Model = TypeVar("Model", bound=nn.Module)
_OURS: dict[type, type] = {theirs: getattr(modules, name) for name, theirs in TORCH.items()}
_THEIRS: dict[type, type] = {ours: theirs for theirs, ours in _OURS.items()}


def _is_parametrized(cls: type) -> bool:
    """Whether it is what torch.nn.utils.parametrize makes out of a module's class, for that module
    alone."""
    return cls.__module__ == parametrize.__name__ and len(cls.__bases__) == 1


def _name(cls: type) -> str:
    if _is_parametrized(cls):
        return f"{_name(cls.__bases__[0])} with parametrizations"
    return f"{cls.__module__}.{cls.__qualname__}"


def _converted(cls: type, classes: dict[type, type]) -> type | None:
    """What becomes of a module's class, if anything."""
    if not _is_parametrized(cls):
        return classes.get(cls)
    base = classes.get(cls.__bases__[0])
    if base is None:
        return None
    own = {
        name: value
        for name, value in vars(cls).items()
        if name not in ("__dict__", "__weakref__", "__doc__")
    }
    return type(f"Parametrized{base.__name__}", (base,), own)


def _has_no_twin(module: nn.Module, classes: dict[type, type]) -> bool:
    return classes is _THEIRS and isinstance(module, Stack) and module.has_no_twin()


def _left_alone(module: nn.Module, classes: dict[type, type]) -> str:
    """Why a module stays what it is, if that has to be said."""
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", "")
        compiled = f"TorchScript has compiled this {name}: that has to come afterwards"
        return compiled if name in TORCH else ""
    if _has_no_twin(module, classes):
        return "torch.nn has no layer like it"
    if isinstance(module, tuple(classes)) and not isinstance(module, tuple(classes.values())):
        return "a subclass may do something of its own"
    return ""


def _keep_given_weights(module: Any) -> None:
    """What was assigned to `_flat_weights` stays what the layer computes with."""
    flat = module.__dict__.get("_flat_weights", [])
    if isinstance(module, Stack):
        own = module._parameters
        if any(
            own.get(name) is not weight for name, weight in zip(module._flat_weights_names, flat)
        ):
            module._flat_weights = flat
    else:
        module.__dict__.pop("_given_weights", None)


def _swap(model: Model, classes: dict[type, type], verbose: bool) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        old = type(module)
        new = None if _has_no_twin(module, classes) else _converted(old, classes)
        if new is not None:
            module.__class__ = new
            _keep_given_weights(module)
            message = f"is now {_name(new)}"
        else:
            why = _left_alone(module, classes)
            message = f"is left alone: {why}" if why else ""
        if verbose and message:
            print(f"{name or 'the model'}, {_name(old)}, {message}")
    return model


def replace(model: Model, verbose: bool = True) -> Model:
    """Make every RNN, LSTM, GRU and cell of torch.nn in the model one of ours, in place.

    The modules stay the objects that they are, with their parameters, hooks and state: optimizers
    and references go on working; shapes and dtypes stay. Subclasses are left alone, and what
    TorchScript has compiled. Says so in a line for each, unless not `verbose`. Returns the model.
    Raises TypeError for what is no torch.nn.Module, before anything is changed."""
    return _swap(model, _OURS, verbose)


def restore(model: Model, verbose: bool = True) -> Model:
    """The inverse of `replace`, also for layers that were ours from the start: these compute
    without their plan. Returns the model. Raises TypeError for what is no torch.nn.Module."""
    return _swap(model, _THEIRS, verbose)


_NAMESPACES: tuple[Any, ...] = (nn, nn.modules, nn.modules.rnn)
_lock = threading.Lock()
_depth = 0  # of patch() without its unpatch()
_before: dict[str, Any] = {}  # what was there


class _Patch:
    """Undone at the end of a `with` block."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        unpatch()


def patch() -> _Patch:
    """Make torch.nn's RNN, LSTM, GRU and cells ours, for the whole process: `torch.nn.LSTM` is
    `rnn.LSTM` from now on.

    Call it before the libraries are imported that are to build, subclass and ask for these classes;
    `unpatch` ends it, and so does a `with` block. It may be nested: each call needs its own
    `unpatch`. Modules that were made before stay what they are (see `replace`). What is pickled
    meanwhile can be loaded without it, and the other way round. torch.compile, which refuses
    torch.nn's RNN, LSTM and GRU by name, does not while this lasts."""
    global _depth
    dynamo = dynamo_config()
    with _lock:
        _depth += 1
        if _depth == 1:
            _before["allow_rnn"] = dynamo.allow_rnn
            dynamo.allow_rnn = True
            for theirs, ours in _OURS.items():
                theirs.__reduce_ex__ = _reduce  # type: ignore[assignment,method-assign]
                _assign(theirs, ours)
    return _Patch()


def unpatch() -> None:
    """Undo one `patch`. Raises RuntimeError where there is none."""
    global _depth
    dynamo = dynamo_config()
    with _lock:
        if _depth == 0:
            raise RuntimeError("There is no rnn.patch() to be undone")
        _depth -= 1
        if _depth == 0:
            dynamo.allow_rnn = _before.pop("allow_rnn")
            for theirs, ours in _OURS.items():
                delattr(theirs, "__reduce_ex__")
                _assign(ours, theirs)


def _assign(old: type, new: type) -> None:
    """In torch.nn. A class that somebody else has put there stays."""
    for namespace in _NAMESPACES:
        if getattr(namespace, new.__name__) is old:
            setattr(namespace, new.__name__, new)


def _reduce(module: Any, protocol: Any) -> Any:
    """How torch.nn's own modules are pickled while pickle does not find their class under its
    name."""
    reduced: Any = object.__reduce_ex__(module, protocol)
    if type(module) not in _OURS:
        return reduced
    _, _, *state = reduced
    return (_new, (type(module).__name__,), *state)


def _new(name: str) -> Any:
    cls = TORCH[name]
    return cls.__new__(cls)
