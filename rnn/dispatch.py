"""The one place that decides how a call is computed: by which backend, in which dtype, and why."""

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import transforms
from .kernels import cells
from .kernels.cells import Cell
from .kernels.notices import warn
from .kernels.plan import Gpu, Plan
from .kernels.planner import NoPlan, make_plan

# Once: it searches the disk
_FOUND = {library: find_spec(library) is not None for library in ("triton", "cupy")}
_MODULES = {
    "host": "cpu",
    "device": "gpu",
    "native": "cpu.native",
    "properties": "gpu.device",
    "compiler": "gpu.cuda.compiler",
}
_SWITCH: Any = torch.backends.cudnn.rnn  # once: the way to it takes as long as an operation
OPERATORS: dict[Cell, Any] = {
    cells.rnn_tanh: torch.rnn_tanh,
    cells.rnn_relu: torch.rnn_relu,
    cells.lstm: torch.lstm,
    cells.gru: torch.gru,
}
_REPORTED: set[str] = set()  # compilers that fail


class Support(NamedTuple):
    """What computes tensors of some dtype on some device: "host", "triton", "cupy", or "" where
    only the composite is right, or autocast is to cast first; the dtype that it computes in; and
    why."""

    kernels: str
    dtype: torch.dtype
    reason: str


class Decision(NamedTuple):
    """How a call is computed: by torch's own operator, if there is one, or by a plan, or else by
    the composite; in a dtype; and why."""

    plan: Plan | None
    operator: Any
    dtype: torch.dtype
    reason: str


def use_library(library: str) -> None:
    """Raises whatever is wrong with Triton or CuPy, as it is installed on this machine."""
    found = import_module(library)
    if library == "cupy":
        module("compiler").nvrtc()  # a library of its own
        found.cuda.runtime.getDeviceCount()  # raises where its CUDA does not fit the driver


def _available(library: str) -> bool:
    """Whether it can be imported. One that is there, and cannot, is reported once."""
    if _FOUND[library] and not torch.compiler.is_compiling():
        try:
            use_library(library)
        except Exception as error:
            _FOUND[library] = False
            warn(f"rnn does without {library}, which is installed and fails: {error!r}")
    return _FOUND[library]


@lru_cache
def _served(device: torch.device, dtype: torch.dtype) -> Support:
    serves = "host"
    why = ""
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            major, minor = capability
            why = f"kernels need a GPU of compute capability 8.0, this one has {major}.{minor}"
            return Support("", dtype, why)
        serves = "triton" if _available("triton") else "cupy" if _available("cupy") else ""
        why = {
            "triton": "",
            "cupy": "Triton is missing",
            "": "neither Triton nor CuPy can be imported",
        }[serves]
    elif device.type != "cpu":
        serves = ""
        why = f"no kernel for {device.type}"
    if half and serves in ("host", "cupy"):
        return Support(serves, torch.float32, why)  # NumPy and CuPy have no bfloat16
    if serves and not (
        half or dtype == torch.float32 or (dtype == torch.float64 and serves != "triton")
    ):
        serves = ""
        why = f"no kernel for {dtype} on {device.type}"
    return Support(serves, dtype, why)


def served(device: torch.device, dtype: torch.dtype) -> Support:
    return (_served.__wrapped__ if torch.compiler.is_compiling() else _served)(device, dtype)


@lru_cache
def module(name: str) -> Any:
    return import_module(f".kernels.{_MODULES[name]}", __package__)


@lru_cache
def native_available(cell: Cell, dtype: torch.dtype) -> bool:
    """Whether there is C++ for the dtype, and the cell's is prebuilt or can be compiled. A compiler
    that fails, or that $CXX names and is not there, is reported once."""
    native = module("native")
    if dtype not in native.NUMBERS:
        return False
    try:
        return native.load(cell, dtype) is not None
    except RuntimeError as error:
        command = native.compiler()
        named = os.environ.get("CXX")
        if command:
            _report(
                command[0],
                f"rnn does without {command[0]}, which is installed and fails: {error}",
                UserWarning,
            )
        elif named:
            _report(
                named,
                f"rnn does without a C++ compiler: $CXX is {named!r}, which is no program",
                RuntimeWarning,
            )
    return False


def _report(compiler: str, text: str, kind: type[Warning]) -> None:
    if compiler not in _REPORTED:
        _REPORTED.add(compiler)
        warn(text, kind)


def gpu(device: torch.device) -> Gpu:
    """A GPU as plans see it."""
    found: Gpu = module("properties").describe(device, _available("cupy"))
    return found


@lru_cache(4096)
def _plan(
    cell: Cell,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    tf32: bool,
) -> Plan:
    serves = served(device, dtype).kernels
    described = gpu(device) if device.type == "cuda" else None
    native = device.type == "cpu" and native_available(cell, dtype)
    plan = make_plan(cell, sizes, str(dtype).removeprefix("torch."), described, tf32, native)
    return (
        Plan("cupy")
        if serves == "cupy" and (plan.backend != "cuda" or dtype == torch.float64)
        else plan
    )


def support(x: Tensor, plan: Plan | None) -> Support:
    """Of a call for x, as things are around it; a plan that is given is followed."""
    if transforms.any_autocast():
        dtype = transforms.autocast_dtype(x.device.type)
        if dtype is not None:
            return Support("", dtype, "autocast")
    return Support("", x.dtype, "") if plan else served(x.device, x.dtype)


def choose_plan(cell: Cell, x: Tensor, batch: int, hidden: int, reverse: Sequence[int]) -> Plan:
    """For x [..., I] on a device and of a dtype that is served, of `batch` sequences, `hidden`
    units and a recurrence for each of `reverse`. float32 follows torch's own switch of TF32, as it
    is now. Raises NoPlan as `make_plan` does."""
    tf32 = x.is_cuda and x.dtype == torch.float32 and _SWITCH.fp32_precision == "tf32"
    sizes = batch, x.shape[-1], hidden, len(reverse)
    return _plan(cell, sizes, x.dtype, x.device, tf32)


def torch_operator(
    cell: Cell, x: Tensor, reverse: Sequence[int], plan: Plan | None, whole_sequences: bool
) -> Any:
    """torch's own operator for a call on the CPU, where there is no compiler and that can do it: a
    layer of torch.nn's, in float32 or float64. None elsewhere.

    `whole_sequences`: none is padded, packed or reset, of the states only the last are asked for,
    and nothing is to be computed once more in backward."""
    if plan or not whole_sequences or not x.is_cpu:
        return None
    if native_available(cell, x.dtype):
        return None
    if [*reverse] not in ([False], [False, True]):
        return None
    return OPERATORS.get(cell) if x.dtype in (torch.float32, torch.float64) else None


def decide(
    cell: Cell,
    x: Tensor,
    batch: int,
    hidden: int,
    reverse: Sequence[int],
    plan: Plan | None,
    whole_sequences: bool,
) -> Decision:
    """The decision for a call of the arguments of `choose_plan` and `torch_operator`; a plan that
    is given is followed."""
    serves, dtype, reason = support(x, plan)
    autocast = reason == "autocast"
    if dtype != x.dtype or autocast:
        cast = f"{x.dtype} is cast: {'autocast' if autocast else 'no kernel for it'}"
        reason = cast if dtype != x.dtype else ""
        if not plan:
            serves, dtype, more = served(x.device, dtype)
            reason = "; ".join(filter(None, [reason, more]))
        x = x.new_empty((), dtype=dtype).expand(x.shape)
    operator = torch_operator(cell, x, reverse, plan, whole_sequences)
    if plan is None and serves:
        try:
            plan = choose_plan(cell, x, batch, hidden, reverse)
        except NoPlan as error:
            reason = "; ".join(filter(None, [reason, str(error)]))
    return Decision(plan, operator, dtype, reason)
