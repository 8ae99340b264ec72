"""What other tools of PyTorch need to see of our layers: torch.fx, TorchScript, the ONNX exporter
that traces, expanded weights and quantization. What they can only do with a layer of torch.nn is
done by torch.nn's own code, with the parameters of ours."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn

from .boundary import PLAIN, alive
from .kernels.notices import warn

# torch.jit.script reads the source of a cell's forward with the names of this file: _VF.
from .transforms import torch_cells as _VF  # noqa: F401
from .transforms import tracing_state

# Taken now: `convert.patch` puts ours in torch.nn under these names.
TORCH: dict[str, Any] = {
    "RNN": nn.RNN,
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNNCell": nn.RNNCell,
    "LSTMCell": nn.LSTMCell,
    "GRUCell": nn.GRUCell,
}


def torch_class(layer: Any) -> Any:
    """The class of torch.nn that has the layer's parameters and does the same. Raises
    NotImplementedError where there is none."""
    if isinstance(layer, nn.RNNBase) and layer.has_no_twin():  # type: ignore[operator]
        raise NotImplementedError(
            f"torch.nn has no layer like rnn.{layer}: torch.jit.script, torch.onnx.export with "
            "dynamo=False and expanded weights know torch.nn's alone"
        )
    package = __name__.partition(".")[0]
    return next(
        TORCH[cls.__name__]
        for cls in type(layer).__mro__
        if cls.__module__.partition(".")[0] == package
    )


def leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of one of torch.nn's cells, of which torch.fx makes one node under our name as
    well."""

    @wraps(forward)
    def call(self: Any, input: Any, hx: Any = None) -> Any:
        proxy = None if type(input) is Tensor else _proxy(input, hx)
        if proxy is None:
            _check_cell(self, input, hx)
        node = None if proxy is None else _fx_node(self, proxy.tracer, input, hx, {})
        try:
            return forward(self, input, hx) if node is None else node
        except (AttributeError, IndexError) as error:  # torch.nn's own, of a wrong hx
            raise TypeError(
                f"Expected input and hx of a shape that {type(self).__name__} takes: {error}"
            ) from error

    call.__doc__ = """One step.

        Args:
            input: [B, I], or [I] for one sequence, of the parameters' dtype and device.
            hx: the states before it, zeros if None: [B, H], or [H] for one sequence; of an LSTM
                two, h and c.

        Returns the states after it, like `hx`.
        Raises TypeError for what is no tensor, and ValueError and RuntimeError for a shape, dtype
        or device that torch.nn's cell refuses."""
    return call


def _check_cell(cell: nn.Module, input: Any, hx: Any) -> None:
    """Raises TypeError for what is no tensor, and RuntimeError for one whose memory was freed:
    torch's operations read that all the same."""
    states = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
    for value in (input, *states):
        if not isinstance(value, Tensor):
            name = "input" if value is input else "hx"
            raise TypeError(f"Expected {name} to be a Tensor, got {type(value).__name__}")
    if not torch.compiler.is_compiling():
        for t in (input, *states, *cell._parameters.values()):
            if type(t) in PLAIN and t.layout is torch.strided and not t.data_ptr():
                alive((t,))


def other_forward(layer: Any, input: Any, hx: Any, extra: dict[str, Any]) -> Any:
    """What a call comes to where one of those tools is at work, or None where none is. `extra` has
    the arguments that torch.nn's layers lack, where they are given."""
    proxy = _proxy(input, hx, *extra.values())
    if proxy is not None:
        return _fx_node(layer, proxy.tracer, input, hx, extra)
    if tracing_state() is not None and torch.onnx.is_in_onnx_export():
        if extra:
            raise NotImplementedError(
                f"torch.onnx.export(dynamo=False) knows no {' and no '.join(extra)}: "
                "export with dynamo=True"
            )
        return torch_class(layer).forward(layer, input, hx)
    if _has_expanded_weights(layer):
        if extra:
            raise NotImplementedError(
                f"Expanded weights (call_for_per_sample_grads) know no {' and no '.join(extra)}: "
                "use torch.func.vmap with torch.func.grad"
            )
        return torch_class(layer).forward(layer, input, hx)
    return None


def _proxy(*arguments: Any) -> fx.Proxy | None:
    for argument in arguments:
        for part in argument if isinstance(argument, (tuple, list)) else (argument,):
            if isinstance(part, fx.Proxy):
                return part
    return None


def _fx_node(layer: nn.Module, tracer: Any, input: Any, hx: Any, extra: dict[str, Any]) -> Any:
    """One node for the layer, as torch.fx makes for every module of torch.nn. (It asks for the
    module's name.)"""
    path = tracer.path_of_module(layer)
    if not path:
        return None  # the layer is what is traced: then its own code is asked for
    # Those of torch.nn.utils (weight_norm, pruning) only make the weights anew.
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    if any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):
        raise NotImplementedError(
            f"torch.fx would run the hooks of {path!r} twice, now and in the traced model: let "
            "is_leaf_module of your Tracer return True for it"
        )
    arguments = (input,) if hx is None else (input, hx)
    return tracer.create_proxy("call_module", path, arguments, extra)


def _has_expanded_weights(layer: nn.Module) -> bool:
    class_names = {type(weight).__name__ for weight in layer._parameters.values()}
    return "ExpandedWeight" in class_names


def scriptable(layer: nn.Module) -> nn.Module:
    """What torch.jit.script compiles in place of a layer: torch.nn's, with the same parameters. (It
    leaves that in the model which it was given, whose layer becomes ours again once it is called
    from Python.)"""
    copied = copy.copy(layer)
    copied.__class__ = torch_class(layer)
    copied._compiled_call_impl = _Eager(copied, type(layer))
    return copied


def prepare_scriptable(layer: Any) -> Any:
    """For torch.jit.script. A subclass may do something of its own."""
    own = type(layer).__module__ == f"{__package__}.modules"
    return scriptable(layer) if own else layer


class _Eager:
    """In place of `Module.__call__` of such a layer."""

    def __init__(self, layer: nn.Module, ours: type) -> None:
        self.layer = layer
        self.ours = ours

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.layer._compiled_call_impl = None
        self.layer.__class__ = self.ours
        return self.layer(*args, **kwargs)


def _get_qconfig(module: nn.Module) -> Any:
    """What quantization has set. Raises AttributeError where it has not."""
    try:
        return module.__dict__["qconfig"]
    except KeyError:
        raise AttributeError("qconfig") from None


def _set_qconfig(module: nn.Module, value: Any) -> None:
    module.__dict__["qconfig"] = value
    warn(
        f"torch.ao.quantization does not know rnn.{type(module).__name__} and leaves it as it is, "
        "in floating point. "
        "Make it torch.nn's by rnn.restore(model) (and rnn.unpatch()) before it is quantized"
    )


def _delete_qconfig(module: nn.Module) -> None:
    module.__dict__.pop("qconfig", None)


# Quantization gives each module of a model this attribute, first of all.
qconfig = property(_get_qconfig, _set_qconfig, _delete_qconfig)
