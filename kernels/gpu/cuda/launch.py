"""The recurrence in CUDA C++: forward.cu and backward.cu, compiled by NVRTC for a cell and a plan, launched by CuPy.
It needs no nvcc; compiled kernels are kept on disk, among CuPy's own."""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...build_cache import build_once
from ...cells import Cell
from ...codegen import statements
from ...plan import Plan, Rows, shared_bytes

_NAMES = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


def program(helpers: str, cell: Cell, plan: Plan, dtype: torch.dtype, adjoint: bool, masks: bool, even: bool) -> str:
    """The text of a kernel: the choices that the files leave open, `helpers`, that is ptx.cuh, and the other files."""
    constants: dict[str, Any] = dict(
        FLOAT32=0, FLOAT16=1, BFLOAT16=2, TYPE=_NAMES[dtype], BLOCK=0, CLUSTER=1, GRID=2, SCOPE=plan.scope.upper(),
        GATES=cell.gates, STATES=cell.states, SAVED=cell.saved, SPLIT=cell.split, CELL=statements(cell, adjoint),
        UNITS=plan.units, BLOCKS=plan.blocks, SEQUENCES=plan.sequences, SPLITS=plan.warps * 16 // plan.units,
        ADJOINT=adjoint, MASKS=masks, EVEN=even, PRECISE=dtype == torch.float32 and plan.precision == "tf32x3")
    choices = "".join(f"#define {k} {v if isinstance(v, str) else int(v)}\n" for k, v in constants.items())
    return choices + helpers + text("worker.cuh") + text("backward.cu" if adjoint else "forward.cu")


def text(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


def build(code: str, capability: int) -> tuple[bytes, str]:
    """A cubin, made without a GPU, and what the compiler says of it: registers and spills."""
    from cupy.cuda import nvrtc

    handle = nvrtc.createProgram(code, "recurrence.cu", [], [])
    try:
        nvrtc.compileProgram(handle, [f"--gpu-architecture=sm_{capability}", "--std=c++17", "--ptxas-options=-v"])
        return nvrtc.getCUBIN(handle) + b"\0", nvrtc.getProgramLog(handle)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(handle)) from error
    finally:
        nvrtc.destroyProgram(handle)


def _cubin(code: str, capability: int) -> Path:
    """Where a compiled program lies on disk; compiled now if it does not yet."""
    from cupy.cuda import nvrtc

    key = hashlib.sha256(f"{nvrtc.getVersion()} {capability} {code}".encode()).hexdigest()
    base = os.path.expanduser(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache"))
    # In a folder of our own, as others may be allowed to write to CuPy's. A user without a home has none.
    folder = None if base.startswith("~") else Path(base).absolute() / "fused_rnn"
    return build_once(key[:32], ".cubin", folder, lambda: build(code, capability)[0], lambda path: path)


def on_stream(cuda: Any, device: torch.device) -> Any:
    """The context in which cupy.cuda works on torch's current stream. (Older CuPy has another word for it.)"""
    stream, new = torch.cuda.current_stream(device), getattr(cuda.Stream, "from_external", None)
    return new(stream) if new else cuda.ExternalStream(stream.cuda_stream)


@cache
def load(cell: Cell, plan: Plan, dtype: torch.dtype, adjoint: bool, masks: bool, even: bool,
         device: torch.device) -> Callable[..., None]:
    """A kernel as `launch(grid, arguments)`: addresses and whole numbers, on torch's current stream."""
    import cupy

    if device.type != "cuda":
        raise RuntimeError(f'The plan "cuda" is for tensors on a GPU, got {device}')
    properties = torch.cuda.get_device_properties(device)
    made = program(text("ptx.cuh"), cell, plan, dtype, adjoint, masks, even)
    with cupy.cuda.Device(device.index):
        module = cupy.RawModule(path=str(_cubin(made, 10 * properties.major + properties.minor)),
                                enable_cooperative_groups=plan.scope == "grid")
        kernel, shared = module.get_function("recurrence"), shared_bytes(cell, plan, dtype.itemsize, adjoint)
        kernel.max_dynamic_shared_size_bytes = shared
        if plan.scope == "cluster" and plan.blocks > 8:
            cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, 14, 1)  # NON_PORTABLE_CLUSTER_SIZE_ALLOWED

    def launch(grid: tuple[int, int, int], arguments: Sequence[int]) -> None:
        if plan.scope == "grid" and prod(grid) > properties.multi_processor_count:  # they wait for each other
            raise RuntimeError(f"{plan} needs {grid} blocks at a time: more than {device} runs")
        with on_stream(cupy.cuda, device):
            kernel(grid, (32 * plan.warps,), arguments, shared_mem=shared)

    return launch


def sweep(cell: Cell, plan: Plan, rows: Rows, adjoint: bool, tensors: Sequence[Any], s0: Tensor) -> None:
    """Run the forward or the backward kernel on what `device` gives it."""
    _, B, H = s0.shape
    tensors = tensors if adjoint else (tensors[0], tensors[2], *tensors[4:])
    grid = plan.blocks, -(-B // plan.sequences), len(rows.reverse)
    words = prod(grid) * plan.units * plan.sequences * (cell.gates if adjoint else 1) * s0.element_size() // 4
    flags = s0.new_zeros(2 * words, dtype=torch.int64) if plan.scope == "grid" else None
    masks = None if rows.lengths is None else rows.lengths.to(torch.int64), rows.offsets, rows.resets
    addresses = [0 if t is None else t.data_ptr() for t in (*tensors, *masks, flags)]
    even = H % 2 == 0 and all(address % (2 * s0.element_size()) == 0 for address in addresses[: len(tensors)])
    R = len(tensors[2] if adjoint else tensors[0])
    if B and H:
        launch = load(cell, plan, s0.dtype, adjoint, any(t is not None for t in masks), even, s0.device)
        launch(grid, (*addresses, rows.steps, B, R, H, rows.reverses))
