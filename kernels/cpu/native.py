"""The recurrence in C++ for the CPU: recurrence.cpp and its headers, compiled for a cell, a dtype
and this machine, and kept on disk. Threads are those of torch, where the compiler has OpenMP."""

import ctypes
import hashlib
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import Cell
from ..codegen import Staged, staged_statements, statements
from ..plan import Plan
from ..types import Gradients, Layout, OutputGrads, Outputs, States, Weights
from . import shipping
from .build import compiler as compiler
from .build import load_library
from .calls import backward_call, forward_call, sizes_of
from .calls import threads as threads
from .structs import NUMBERS as NUMBERS
from .structs import STRUCTS, Arguments, Sizes, declaration
from .structs import Step as Step
from .structs import StepAdjoint as StepAdjoint
from .structs import StepSizes as StepSizes
from .structs import words as words
from .workspace import scratch

_FLAGS_OF_ANY_CPU = [
    "-O3",
    "-std=gnu++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
]
_FLAGS = [*_FLAGS_OF_ANY_CPU, "-march=native"]
_FUNCTIONS = ("needed", "adjoint_windows", "forward", "backward", "together", "struct_size")
_OF_ONE_STEP = ("step", "step_backward")
SOURCES = Path(__file__).parent


@cache
def _fingerprint() -> str:
    """Of all that a cell's library includes."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def definitions(cell: Cell, dtype: torch.dtype, fixed_order: bool = False) -> str:
    """What the C++ expects to be defined before it: the type of its numbers, the order of its sums,
    the cell, and the structs of its calls."""
    forward, backward = (_statements(cell, adjoint) for adjoint in (False, True))
    choices = dict(
        NUMBER=NUMBERS[dtype],
        FIXED_ORDER=int(fixed_order),
        GATES=cell.gates,
        STATES=cell.states,
        CARRIED=cell.carried,
        SAVED=cell.saved,
        SEPARATE_RECURRENT_GRAD=int(cell.split),
        WHOLE_ROWS=int(cell.whole_rows),
        FORWARD_STAGES=forward.stages,
        BACKWARD_STAGES=backward.stages,
        KEPT=max(forward.kept, backward.kept),
        MEANS=max(forward.means, backward.means),
        FORWARD=forward.text,
        BACKWARD=backward.text,
    )
    defines = "".join(f"#define {name} {value}\n" for name, value in choices.items())
    return defines + "#include <cstdint>\n" + "".join(map(declaration, STRUCTS))


def _statements(cell: Cell, adjoint: bool) -> Staged:
    if cell.whole_rows:
        return staged_statements(cell, adjoint)
    return Staged(statements(cell, adjoint), 1, 0, 0)


def program(cell: Cell, dtype: torch.dtype, fixed_order: bool = False) -> str:
    """The text of a cell's library, which includes files of the folder SOURCES."""
    defined = definitions(cell, dtype, fixed_order)
    file = "recurrence.cpp" if cell.whole_rows else "single_step.cpp"
    return f'// {_fingerprint()}\n{defined}#include "{file}"\n'


def _functions(cell: Cell) -> tuple[str, ...]:
    """Of a cell's library: tiles of a single step do not have a row in one place."""
    return _FUNCTIONS if cell.whole_rows else _FUNCTIONS + _OF_ONE_STEP


@cache
def load(cell: Cell, dtype: torch.dtype) -> Any:
    """A cell's library for float32 or float64: one that was compiled ahead, or compiled here if it
    is not on disk. `library.prebuilt` says which. Raises RuntimeError if that cannot be."""
    return _load(program(cell, dtype), cell)


@cache
def load_fixed_order(cell: Cell, dtype: torch.dtype) -> Any:
    """Likewise, one that sums up every product in the same order."""
    return _load(program(cell, dtype, fixed_order=True), cell)


def _load(code: str, cell: Cell) -> Any:
    library, refused = shipping.find(code, _FLAGS_OF_ANY_CPU, _functions(cell))
    prebuilt = library is not None
    if library is None:
        try:
            library = load_library(code, _FLAGS, SOURCES, _functions(cell))
        except RuntimeError as error:
            reasons = refused or shipping.missed()
            raise RuntimeError("; ".join([str(error), *reasons])) from error
    return _typed(library, cell, prebuilt)


def prebuilt_files(cell: Cell, dtype: torch.dtype) -> list[Path]:
    """The libraries of a cell that were compiled ahead, for whatever CPU."""
    return shipping.files(program(cell, dtype), _FLAGS_OF_ANY_CPU)


def prebuild(cell: Cell, dtype: torch.dtype, march: str, folder: Path) -> Path:
    """Compile a cell's library for CPUs of `-march=`, for machines without a compiler: its file in
    `folder`. Raises RuntimeError if it cannot be compiled, OSError if not written."""
    return shipping.write(program(cell, dtype), _FLAGS_OF_ANY_CPU, march, SOURCES, folder)


def _typed(library: Any, cell: Cell, prebuilt: bool) -> Any:
    """The library, with the types of its functions. Raises RuntimeError if its structs are not
    ours."""
    library.prebuilt = prebuilt
    library.struct_size.restype = ctypes.c_int64
    compiled = [library.struct_size(i) for i in range(len(STRUCTS))]
    expected = [8 * words(struct_type, cell.states) for struct_type in STRUCTS]
    if compiled != expected:
        raise RuntimeError(f"The C++ compiler's structs have {compiled} bytes, expected {expected}")
    library.needed.restype = ctypes.c_int64
    library.needed.argtypes = [ctypes.c_char_p]
    library.adjoint_windows.restype = ctypes.c_int64
    library.adjoint_windows.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    if not cell.whole_rows:
        library.step.restype = ctypes.c_int64
        library.step_backward.restype = ctypes.c_int64
    library.forward.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.backward.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.together.argtypes = [
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int64,
    ]
    return library


# Numbers between the memory of two calls
_APART = 1024
# The fields of Arguments that are one tensor come first; those from here on, but for `sizes`, are S
# tensors each.
_FIRST_STATES_FIELD = Arguments._fields.index("s0")


def _packed(cell: Cell, arguments: Arguments) -> bytes:
    """The struct, as the library reads it."""
    tensors: list[Any] = [*arguments[:_FIRST_STATES_FIELD]]
    for states in arguments[_FIRST_STATES_FIELD:-1]:
        tensors += states or [None] * cell.states
    addresses = []
    for t in tensors:
        if t is None:
            addresses.append(0)
            continue
        address = t.data_ptr()
        if not address and t.numel():
            shape = list(t.shape)
            raise RuntimeError(
                f"Expected a tensor whose data is allocated, got one of shape {shape}"
            )
        addresses.append(address)
    sizes = arguments.sizes
    # All numbers of 8 bytes. Sizes ends with `window`, a pair.
    count = len(addresses) + len(sizes) - 1 + 2
    return _pack(count)(*addresses, *sizes[:-1], *sizes.window)


def _library(cell: Cell, plan: Plan, w_hh: Tensor) -> Any:
    dtype = w_hh.dtype
    if dtype not in NUMBERS or not w_hh.is_cpu:
        got = f"{dtype} on {w_hh.device}"
        raise RuntimeError(f'The plan "native" is for float32 and float64 on the CPU, got {got}')
    return load_fixed_order(cell, dtype) if plan.precision == "fixed" else load(cell, dtype)


def _call(name: str, cell: Cell, plan: Plan, arguments: Arguments) -> None:
    """Calls one of the library's functions, and gives it the memory that it needs."""
    w_hh = arguments.w_hh
    library = _library(cell, plan, w_hh)
    packed = _packed(cell, arguments)
    memory = scratch(w_hh, _needed(library, cell, plan, arguments, packed))  # held while in use
    getattr(library, name)(packed, memory.data_ptr())


def together(adjoint: bool, cell: Cell, plan: Plan, calls: Sequence[Arguments]) -> None:
    """What `forward_call` or `backward_call` gave, at the same time where there are threads."""
    if len(calls) == 1:
        _call("backward" if adjoint else "forward", cell, plan, calls[0])
        return
    w_hh = calls[0].w_hh
    library = _library(cell, plan, w_hh)
    packed = [_packed(cell, call) for call in calls]
    starts = [0]
    for call, one in zip(calls, packed):
        # A multiple of a cache line, and away from the next
        needed = -(-_needed(library, cell, plan, call, one) // 16) * 16
        starts.append(starts[-1] + needed + _APART)
    memory = scratch(w_hh, starts[-1])  # held while it is in use
    count = len(calls)
    places = [memory.data_ptr() + w_hh.itemsize * start for start in starts[:-1]]
    library.together(
        count,
        min(count, threads()),
        (ctypes.c_char_p * count)(*packed),
        (ctypes.c_void_p * count)(*places),
        adjoint,
    )


def _needed(library: Any, cell: Cell, plan: Plan, arguments: Arguments, packed: bytes) -> int:
    """How many numbers of memory a call needs."""
    if arguments.offsets is None and plan.precision != "fixed":
        return _needed_by_sizes(cell, arguments.w_hh.dtype, arguments.sizes)
    needed: int = library.needed(packed)
    return needed


@lru_cache(4096)
def _needed_by_sizes(cell: Cell, dtype: torch.dtype, sizes: Sizes) -> int:
    """Likewise without offsets, where only the sizes matter."""
    pointers = words(Arguments, cell.states) - words(Sizes, cell.states)
    pack = _pack(words(Arguments, cell.states))
    needed: int = load(cell, dtype).needed(pack(*[0] * pointers, *sizes[:-1], *sizes.window))
    return needed


@cache
def _pack(count: int) -> Callable[..., bytes]:
    return struct.Struct(f"{count}q").pack


class Kept(NamedTuple):
    """Where forward writes the states that enter some steps: `kept` and `kept_steps` of
    Arguments."""

    states: Tensor
    steps: Tensor


def forward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
    kept: Kept | None = None,
) -> None:
    """Writes `outputs` and `kept`."""
    call = forward_call(cell, layout, x, weights, s0, outputs)
    if kept is not None:
        sizes = call.sizes._replace(segments=len(kept.states))
        call = call._replace(kept=kept.states, kept_steps=kept.steps, sizes=sizes)
    _call("forward", cell, plan, call)


def adjoint_windows(cell: Cell, layout: Layout, x: Tensor, w_hh: Tensor) -> list[int]:
    """The steps between which the windows of a backward pass stand, from 0 to all; of packed
    sequences, those of the first group."""
    sizes = sizes_of(cell, layout, x, w_hh)
    arguments = Arguments(x, w_hh, w_hh, offsets=layout.offsets, sizes=sizes)
    library = load(cell, w_hh.dtype)
    packed = _packed(cell, arguments)
    begins = (ctypes.c_int64 * layout.steps)()
    count = library.adjoint_windows(packed, begins)
    return [*begins[:count], layout.steps]


def backward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
    grads: OutputGrads,
    gradients: Gradients[Tensor | None],
) -> None:
    """Writes those of `gradients` that are not None; with more than one recurrence it adds to that
    of x."""
    call = backward_call(cell, layout, x, weights, s0, outputs, grads, gradients)
    _call("backward", cell, plan, call)
