"""The recurrence in CUDA C++: forward.cu and backward.cu, compiled by NVRTC, launched by CuPy.

Compiled for a cell and a plan, without nvcc. Compiled kernels are kept on disk, beside CuPy's."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...build_cache import build_once
from ...cells import Cell
from ...codegen import statements
from ...plan import Plan, exchange_bytes, plan_text, shared_bytes, slices
from ...types import Layout
from ..faults import Refused, faults_of
from ..tensors import BackwardTensors, ForwardTensors, set_to_zero
from .compiler import nvrtc


class Masks(IntEnum):
    """What a kernel looks at beside its numbers. The fewer these are, the shorter its steps."""

    NONE = 0
    ENDS = 1  # lengths or offsets
    RESETS = 2  # too


_NAMES = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
# Blocks of a cluster that every GPU with clusters can run, and the attribute that allows more
# (CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED).
PORTABLE_CLUSTER = 8
NON_PORTABLE_CLUSTER_SIZE = 14
# After which blocks that wait for each other give up, three minutes: in units of 2^32 ns.
WAIT_LIMIT = 42


def program(
    helpers: str,
    cell: Cell,
    plan: Plan,
    dtype: torch.dtype,
    adjoint: bool,
    masks: Masks,
    even: bool,
    grad_of_y: bool = True,
) -> str:
    """The text of a kernel: its constants, `helpers` (the text of ptx.cuh), and the other files."""
    constants: dict[str, Any] = dict(
        FLOAT32=0,
        FLOAT16=1,
        BFLOAT16=2,
        TYPE=_NAMES[dtype],
        BLOCK=0,
        CLUSTER=1,
        GRID=2,
        SCOPE=plan.scope.upper(),
        GATES=cell.gates,
        STATES=cell.states,
        CARRIED=cell.carried,
        SAVED=cell.saved,
        SEPARATE_RECURRENT_GRAD=cell.split,
        CELL=statements(cell, adjoint),
        UNITS=plan.units,
        BLOCKS=plan.blocks,
        SEQUENCES=plan.sequences,
        SPLITS=plan.warps * 16 // plan.units,
        WEIGHT_REGISTERS=plan.weight_registers,
        ADJOINT=adjoint,
        MASKS=masks > Masks.NONE,
        RESETS=masks == Masks.RESETS,
        EVEN=even,
        GRAD_OF_Y=grad_of_y,
        PRECISE=dtype == torch.float32 and plan.precision == "tf32x3",
        PLAN=json.dumps(plan_text(plan)),
        WAIT_LIMIT=WAIT_LIMIT,
    )
    values = {k: v if isinstance(v, str) else int(v) for k, v in constants.items()}
    defines = "".join(f"#define {k} {v}\n" for k, v in values.items())
    # of S tensors: the parameters of a kernel, and an array of them
    parameters = ", ".join(f"type* name##{k}" for k in range(cell.states))
    names = ", ".join(f"name##{k}" for k in range(cell.states))
    defines += f"#define STATE_PARAMETERS(type, name) {parameters}\n"
    defines += f"#define STATE_POINTERS(name) {{{names}}}\n"
    body = text("backward.cu" if adjoint else "forward.cu")
    files = "sizes.cuh", "products.cuh", "packets.cuh", "padding.cuh", "worker.cuh"
    headers = "".join(map(text, files))
    return defines + helpers + headers + body


def text(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


def build(code: str, capability: int) -> tuple[bytes, str]:
    """A cubin, made without a GPU, and what the compiler says of it: registers and spills."""
    compiler = nvrtc()
    handle = compiler.createProgram(code, "recurrence.cu", [], [])
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17", "--ptxas-options=-v"]
    try:
        compiler.compileProgram(handle, options)
        return compiler.getCUBIN(handle) + b"\0", compiler.getProgramLog(handle)
    except compiler.NVRTCError as error:
        raise RuntimeError(compiler.getProgramLog(handle)) from error
    finally:
        compiler.destroyProgram(handle)


def cache_folder() -> Path | None:
    """Where compiled programs are kept: in a folder of its own, as other users may be allowed to
    write to CuPy's. None without a home."""
    base = os.path.expanduser(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache"))
    return None if base.startswith("~") else Path(base).absolute() / "fused_rnn"


def _cubin(code: str, capability: int) -> Path:
    """Where a compiled program lies on disk; compiled now if it does not yet."""
    key = hashlib.sha256(f"{nvrtc().getVersion()} {capability} {code}".encode()).hexdigest()

    def make() -> bytes:
        return build(code, capability)[0]

    return build_once(key[:32], ".cubin", cache_folder(), make, lambda path: path)


def on_stream(cuda: Any, device: torch.device) -> Any:
    """The context in which cupy.cuda works on torch's current stream."""
    stream = torch.cuda.current_stream(device)
    from_external = getattr(cuda.Stream, "from_external", None)
    # older CuPy
    if from_external is None:
        return cuda.ExternalStream(stream.cuda_stream)
    return from_external(stream)


@cache
def load(
    cell: Cell,
    plan: Plan,
    dtype: torch.dtype,
    adjoint: bool,
    masks: Masks,
    even: bool,
    grad_of_y: bool,
    device: torch.device,
) -> Callable[..., None]:
    """A compiled kernel as a function of its grid and arguments (addresses and integers).

    It runs on torch's current stream."""
    import cupy

    if device.type != "cuda":
        raise RuntimeError(f'The plan "cuda" is for tensors on a GPU, got {device}')
    properties = torch.cuda.get_device_properties(device)
    code = program(text("ptx.cuh"), cell, plan, dtype, adjoint, masks, even, grad_of_y)
    shared = shared_bytes(cell, plan, dtype.itemsize, adjoint)
    with cupy.cuda.Device(device.index), faults_of(plan, device):
        cubin = _cubin(code, 10 * properties.major + properties.minor)
        # a cooperative launch keeps the blocks of a grid resident together
        module = cupy.RawModule(path=str(cubin), enable_cooperative_groups=plan.scope == "grid")
        kernel = module.get_function("recurrence")
        kernel.max_dynamic_shared_size_bytes = shared
        if plan.scope == "cluster" and plan.blocks > PORTABLE_CLUSTER:
            cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, NON_PORTABLE_CLUSTER_SIZE, 1)

    def run(grid: tuple[int, int, int], arguments: Sequence[int]) -> None:
        # blocks of a grid wait for each other
        if plan.scope == "grid" and prod(grid) > properties.multi_processor_count:
            raise Refused(f"{plan} needs {grid} blocks at a time: more than {device} runs")
        with on_stream(cupy.cuda, device), faults_of(plan, device):
            kernel(grid, (32 * plan.warps,), arguments, shared_mem=shared)

    return run


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _numbers(tensors: ForwardTensors | BackwardTensors) -> tuple[Tensor | None, ...]:
    """The kernel's first parameters: the tensors of floating-point numbers."""
    if isinstance(tensors, ForwardTensors):
        return (
            tensors.x,
            tensors.w_hh,
            tensors.b_hh,
            tensors.y,
            tensors.states,
            tensors.saved,
            *tensors.first,
            *tensors.last,
        )
    return (
        tensors.w_hh,
        tensors.y,
        tensors.states,
        tensors.saved,
        tensors.dy,
        tensors.dstates,
        tensors.dx,
        tensors.dr,
        tensors.h_prev,
        *tensors.first,
        *tensors.dlast,
        *tensors.dfirst,
    )


def launch(
    cell: Cell,
    plan: Plan,
    layout: Layout,
    tensors: ForwardTensors | BackwardTensors,
    B: int,
) -> None:
    """Run the forward or the backward kernel over all steps of B sequences."""
    adjoint = isinstance(tensors, BackwardTensors)
    w_hh = tensors.w_hh
    H = w_hh.shape[1]
    N = len(layout.reverse)
    if not B or not H:
        return
    parts = slices(plan, B)
    packets = None
    slice_bytes = 0
    if plan.scope == "grid":
        tile_bytes = exchange_bytes(cell, plan, w_hh.element_size(), adjoint)
        slice_bytes = parts[0].tiles * N * tile_bytes
        # words, as the first phase of a buffer differs from 0
        packets = w_hh.new_empty(len(parts) * slice_bytes // 4, dtype=torch.int32)
    set_to_zero(tensors, packets)
    lengths = None if layout.lengths is None else layout.lengths.to(torch.int64)
    given = lengths, layout.offsets, layout.resets
    grad_of_y = True
    marks: tuple[Tensor | None, ...] = ()
    if isinstance(tensors, BackwardTensors):
        grad_of_y = tensors.dy is not None
        marks = (tensors.marks,)
    numbers_at = [_address(t) for t in _numbers(tensors)]
    pair_bytes = 2 * w_hh.element_size()
    even = H % 2 == 0 and all(address % pair_bytes == 0 for address in numbers_at)
    R = len(tensors.y)
    masks = Masks.NONE
    if layout.resets is not None:
        masks = Masks.RESETS
    elif lengths is not None or layout.offsets is not None:
        masks = Masks.ENDS
    # compiled once for any slices of the batch
    of_any = plan._replace(slice_tiles=0)
    kernel = load(cell, of_any, w_hh.dtype, adjoint, masks, even, grad_of_y, w_hh.device)
    addresses = *numbers_at, *map(_address, given), *map(_address, marks)
    sizes = layout.steps, B, R, H, layout.reverses
    for k, part in enumerate(parts):
        packets_at = _address(packets) + k * slice_bytes
        kernel((plan.blocks, part.tiles, N), (*addresses, packets_at, *sizes, part.first))
