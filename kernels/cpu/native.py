"""The recurrence in C++ for the CPU: recurrence.cpp and its headers, compiled for a cell, a dtype
and this machine, and kept on disk. Threads are those of torch, where the compiler has OpenMP."""

import ctypes
import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..cells import Cell
from ..codegen import statements
from ..forks import forked
from ..plan import Plan, window
from ..types import Gradients, Layout, OutputGrads, Outputs, States, Weights
from . import shipping
from .build import compiler as compiler
from .build import load_library
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
_FUNCTIONS = "needed", "forward", "backward", "step", "step_backward", "struct_size"
SOURCES = Path(__file__).parent
# The dtypes that are computed in, and the type of number in C++.
NUMBERS = {torch.float32: "float", torch.float64: "double"}

# The fields of the C++ structs: what Python gives, the C type, and the length of an array.
Required = Annotated[Tensor, "const NUMBER*", ""]
Input = Annotated[Tensor | None, "const NUMBER*", ""]
Output = Annotated[Tensor | None, "NUMBER*", ""]
Integers = Annotated[Tensor | None, "const int64_t*", ""]
Flags = Annotated[Tensor | None, "const bool*", ""]
InputStates = Annotated[Sequence[Tensor | None] | None, "const NUMBER*", "STATES"]
OutputStates = Annotated[Sequence[Tensor | None] | None, "NUMBER*", "STATES"]
Size = Annotated[int, "int64_t", ""]
Pair = Annotated[tuple[int, int], "int64_t", "2"]


class Sizes(NamedTuple):
    """Bit n of `reverses` is set if recurrence n goes backward. `window` is a pair, for a forward
    and a backward pass: windows of time have about as many rows as so many steps of B
    sequences."""

    steps: Size
    B: Size
    R: Size
    I: Size
    H: Size
    N: Size
    reverses: Size
    threads: Size
    window: Pair


class Arguments(NamedTuple):
    """The arguments of `forward` and `backward` in recurrence.cpp: tensors first, then S tensors
    each, then sizes, as `_call` packs them. s0 and dlast are zero where missing; `last` is written
    by forward, s0_grad by backward."""

    x: Required
    w_ih: Required
    w_hh: Required
    b_ih: Input = None
    b_hh: Input = None
    dy: Input = None
    dstates: Input = None
    y: Output = None
    states: Output = None
    saved: Output = None
    x_grad: Output = None
    w_ih_grad: Output = None
    w_hh_grad: Output = None
    b_ih_grad: Output = None
    b_hh_grad: Output = None
    offsets: Integers = None
    resets: Flags = None
    s0: InputStates = None
    dlast: InputStates = None
    last: OutputStates = None
    s0_grad: OutputStates = None
    sizes: Sizes = Sizes(0, 0, 0, 0, 0, 0, 0, 1, (1, 1))


class StepSizes(NamedTuple):
    """`memory` has `size` numbers; `parameters` is the number per layer."""

    memory: Output
    size: Size
    B: Size
    I: Size
    H: Size
    layers: Size
    parameters: Size
    threads: Size


class Step(NamedTuple):
    """The argument of `step` in single_step.cpp. After it come the pointers of the parameters."""

    x: Required
    s: InputStates
    y: Output
    n: OutputStates
    saved: Output
    sizes: StepSizes


class StepAdjoint(NamedTuple):
    """Likewise for `step_backward`."""

    x: Required
    s: InputStates
    saved: Input
    dy: Input
    dy_alike: Input
    dn: InputStates
    dx: Output
    ds: OutputStates
    sizes: StepSizes


STRUCTS = Arguments, Step, StepAdjoint


def _fields(struct_type: Any) -> Iterator[tuple[str, str, str]]:
    """The name, C type and array length of each field, also of a NamedTuple inside it."""
    for name, hint in get_type_hints(struct_type, include_extras=True).items():
        if hasattr(hint, "_fields"):
            yield from _fields(hint)
        else:
            yield name, *hint.__metadata__


def _declaration(struct_type: Any) -> str:
    """The struct in C++."""
    lines = [f"struct {struct_type.__name__} {{"]
    for name, kind, length in _fields(struct_type):
        lines.append(f"  {kind} {name}[{length}];" if length else f"  {kind} {name};")
    return "\n".join([*lines, "};\n"])


@cache
def words(struct_type: Any, states: int) -> int:
    """The struct's size in 8 bytes for a cell of so many states."""
    lengths = {"": 1, "2": 2, "STATES": states}
    return sum(lengths[length] for _, _, length in _fields(struct_type))


@cache
def _fingerprint() -> str:
    """Of all that a cell's library includes."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def definitions(cell: Cell, dtype: torch.dtype, fixed_order: bool = False) -> str:
    """What the C++ expects to be defined before it: the type of its numbers, the order of its sums,
    the cell, and the structs of its calls."""
    choices = dict(
        NUMBER=NUMBERS[dtype],
        FIXED_ORDER=int(fixed_order),
        GATES=cell.gates,
        STATES=cell.states,
        CARRIED=cell.carried,
        SAVED=cell.saved,
        SEPARATE_RECURRENT_GRAD=int(cell.split),
        FORWARD=statements(cell, False),
        BACKWARD=statements(cell, True),
    )
    defines = "".join(f"#define {name} {value}\n" for name, value in choices.items())
    return defines + "#include <cstdint>\n" + "".join(map(_declaration, STRUCTS))


def program(cell: Cell, dtype: torch.dtype, fixed_order: bool = False) -> str:
    """The text of a cell's library, which includes files of the folder SOURCES."""
    defined = definitions(cell, dtype, fixed_order)
    return f'// {_fingerprint()}\n{defined}#include "single_step.cpp"\n'


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
    library, refused = shipping.find(code, _FLAGS_OF_ANY_CPU, _FUNCTIONS)
    prebuilt = library is not None
    if library is None:
        try:
            library = load_library(code, _FLAGS, SOURCES, _FUNCTIONS)
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
    library.step.restype = ctypes.c_int64
    library.step_backward.restype = ctypes.c_int64
    library.forward.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.backward.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return library


def threads() -> int:
    return 1 if forked() else torch.get_num_threads()


# The fields of Arguments that are one tensor come first; those from here on, but for `sizes`, are S
# tensors each.
_FIRST_STATES_FIELD = Arguments._fields.index("s0")


def _call(name: str, cell: Cell, plan: Plan, arguments: Arguments) -> None:
    """Calls one of the library's functions, and gives it the memory that it needs."""
    w_hh = arguments.w_hh
    dtype = w_hh.dtype
    if dtype not in NUMBERS or not w_hh.is_cpu:
        got = f"{dtype} on {w_hh.device}"
        raise RuntimeError(f'The plan "native" is for float32 and float64 on the CPU, got {got}')
    fixed_order = plan.precision == "fixed"
    library = load_fixed_order(cell, dtype) if fixed_order else load(cell, dtype)
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
    packed = _pack(count)(*addresses, *sizes[:-1], *sizes.window)
    if arguments.offsets is None and not fixed_order:
        needed = _needed(cell, dtype, sizes)
    else:
        needed = library.needed(packed)
    memory = scratch(w_hh, needed)  # held while it is in use
    getattr(library, name)(packed, memory.data_ptr())


@lru_cache(4096)
def _needed(cell: Cell, dtype: torch.dtype, sizes: Sizes) -> int:
    """How many numbers of memory a call needs without offsets, where only its sizes matter."""
    pointers = words(Arguments, cell.states) - words(Sizes, cell.states)
    pack = _pack(words(Arguments, cell.states))
    needed: int = load(cell, dtype).needed(pack(*[0] * pointers, *sizes[:-1], *sizes.window))
    return needed


@cache
def _pack(count: int) -> Callable[..., bytes]:
    return struct.Struct(f"{count}q").pack


def _sizes(cell: Cell, layout: Layout, x: Tensor, w_hh: Tensor) -> Sizes:
    steps, reverse, sizes, _, offsets, _, B = layout
    rows, H = w_hh.shape
    shape = x.shape
    R = steps * B if offsets is None else shape[0]
    # Of numbers of 4 bytes.
    windows = _windows(sizes[0], rows * w_hh.itemsize // 4, cell.split)
    return Sizes(steps, B, R, shape[-1], H, len(reverse), layout.reverses, threads(), windows)


@lru_cache(4096)
def _windows(sequences: int, width: int, split: bool) -> tuple[int, int]:
    """Steps of a window in forward and in backward, for rows of `width` pre-activations.

    Each window reads W once more, and in backward its gradients too: windows have at least
    WINDOW_ROWS rows for that. Forward, which has no gradients, does with an eighth of these rows.
    In backward of a split cell a row is twice as wide, dx and dr: a quarter of the rows then saves
    more memory than it costs time."""
    layout = Layout(0, (), (sequences,))
    forward = window(layout, width, share=8)
    backward = window(layout, 2 * width, share=4) if split else window(layout, width)
    return forward, backward


def forward(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    x: Tensor,
    weights: Weights,
    s0: States,
    outputs: Outputs,
) -> None:
    """Writes `outputs`."""
    sizes = _sizes(cell, layout, x, weights.w_hh)
    # By position: with names this takes as long as asking each tensor for its address
    arguments = Arguments(
        x,
        weights.w_ih,
        weights.w_hh,
        weights.b_ih,
        weights.b_hh,
        None,  # dy
        None,  # dstates
        outputs.y,
        outputs.states,
        outputs.saved,
        None,  # x_grad
        None,  # w_ih_grad
        None,  # w_hh_grad
        None,  # b_ih_grad
        None,  # b_hh_grad
        layout.offsets,
        layout.resets,
        s0,
        None,  # dlast
        outputs.last,
        None,  # s0_grad
        sizes,
    )
    _call("forward", cell, plan, arguments)


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
    w_hh = weights.w_hh
    sizes = _sizes(cell, layout, x, w_hh)
    arguments = Arguments(
        x,
        weights.w_ih,
        w_hh,
        None,  # b_ih
        None,  # b_hh
        grads.y,
        grads.states,
        outputs.y,
        outputs.states,
        outputs.saved,
        gradients.x,
        gradients.w_ih,
        gradients.w_hh,
        gradients.b_ih,
        gradients.b_hh,
        layout.offsets,
        layout.resets,
        s0,
        grads.last,
        None,  # last
        gradients.s0,
        sizes,
    )
    _call("backward", cell, plan, arguments)
