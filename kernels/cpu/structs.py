"""The structs of the calls into C++, in Python: from these definitions comes their text in C."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

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
    """Bit n of `reverses` is set if recurrence n goes backward. `window` is a pair, for a
    forward and a backward pass: windows of time have about as many rows as so many steps of B
    sequences. A call is divided among `threads`. Of W's rows so many `parts` are summed up by
    themselves where the sums are over all groups: the order of a sum depends on their number.
    Of a backward pass in several calls, `continues` says that one came before, to whose
    gradients of W this one adds, and `continued` that another follows. `segments` is how many
    states are kept."""

    steps: Size
    B: Size
    R: Size
    I: Size
    H: Size
    N: Size
    reverses: Size
    threads: Size
    parts: Size
    continues: Size
    continued: Size
    segments: Size
    window: Pair


class Arguments(NamedTuple):
    """The arguments of `forward` and `backward` in recurrence.cpp: tensors first, then S
    tensors each, then sizes, as `_call` packs them. s0 and dlast are zero where missing; `last`
    is written by forward, s0_grad by backward. `group_grads` keeps the gradients of W of all
    groups but the first between the calls of a backward pass in several. Forward writes to
    `kept` [segments, S, N, B, H] the states that enter the steps `kept_steps` [2, segments]: in
    ascending order those of recurrences that go forward, then of those that go backward. A
    segment's number is its place in the order in which the adjoint comes to them."""

    x: Required
    w_ih: Input
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
    group_grads: Output = None
    kept: Output = None
    offsets: Integers = None
    kept_steps: Integers = None
    resets: Flags = None
    s0: InputStates = None
    dlast: InputStates = None
    last: OutputStates = None
    s0_grad: OutputStates = None
    sizes: Sizes = Sizes(0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, (1, 1))


class StepSizes(NamedTuple):
    """`memory` has `size` numbers; `parameters` is the number per layer. Sums have the order of a
    sequence of several steps that has `order` threads, or where that is 0 the fastest."""

    memory: Output
    size: Size
    B: Size
    I: Size
    H: Size
    layers: Size
    parameters: Size
    threads: Size
    order: Size


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


def declaration(struct_type: Any) -> str:
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
