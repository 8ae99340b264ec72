"""Whole models, from torch.nn's recurrent modules to ours and back."""

from typing import TypeVar

from torch import nn

from . import layers

Model = TypeVar("Model", bound=nn.Module)
_OURS: dict[type, type] = {getattr(nn, name): getattr(layers, name)
                           for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")}


def _swap(model: Model, classes: dict[type, type], verbose: bool) -> Model:
    for name, module in model.named_modules():
        old, new = type(module), classes.get(type(module))
        if new is not None:
            module.__class__ = new
            said = f"is now {new.__module__}.{new.__qualname__}"
        elif issubclass(old, tuple(classes)) and old not in classes.values():
            said = "is left alone: a subclass may do something of its own"
        else:
            continue
        if verbose:
            print(f"{name or 'the model'}, {old.__module__}.{old.__qualname__}, {said}")
    return model


def replace(model: Model, verbose: bool = True) -> Model:
    """Make every RNN, LSTM, GRU and cell of torch.nn in the model one of ours, in place.

    The modules stay the objects that they are, with their parameters, hooks and state: optimizers and references go on
    working. Subclasses are left alone. Says so in a line for each, unless not `verbose`. Returns the model."""
    return _swap(model, _OURS, verbose)


def restore(model: Model, verbose: bool = True) -> Model:
    """The inverse of `replace`, also for layers that were ours from the start (they lose their plan)."""
    return _swap(model, {ours: theirs for theirs, ours in _OURS.items()}, verbose)
