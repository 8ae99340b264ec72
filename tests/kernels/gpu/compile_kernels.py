"""Compiles the Triton kernels of some layers for a GPU that need not be there, and reads what they
use.

Run as a script, apart from the tests: Triton's compiler and its interpreter cannot share a process.
Reads JSON lines [cell, dtype, B, I, H, N, capability, options] from standard input and writes a
JSON line for each kernel. The options:

"tf32"
"launch", "library"  the plan of that scope, whatever is faster
"graph"  what a CUDA graph launches
"kinds"  how many kernels Triton would make for several B and T
"norm"  the cell of a layer with layer_norm and biases
"lengths", "offsets", "resets", "states"  what else the kernels are given"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from rnn.kernels import cells
from rnn.kernels import gpu as device
from rnn.kernels.gpu.triton_kernels import launch as triton_launch
from rnn.kernels.plan import Gpu, Plan
from rnn.kernels.planner import make_plan, triton_plans
from rnn.kernels.types import Gradients, Layout, OutputGrads, Outputs, Save, Weights
from rnn.regularisers import extended_cell, norm_of

AMD = 942  # gfx942 in place of a compute capability
GPUS = {
    80: Gpu(80, 108, 166912),
    90: Gpu(90, 132, 232448),
    100: Gpu(100, 148, 232448),
    AMD: Gpu(90, 304, 65536),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches = list[tuple[Any, Any]]()

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.launches.append((arguments, options))


def source(kernel: Any, arguments: Any, options: Any, backend: Any) -> ASTSource:
    """What Triton would compile for this launch."""
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given, kinds, _ = bind(*arguments, **options)
    return ASTSource(kernel, *kernel._pack_args(backend, options, given, kinds, None)[1:])


def loop(sass: str) -> list[str]:
    """The instructions of the longest backward branch's body: the time loop."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    index = {address: i for i, (address, _) in enumerate(code)}
    bodies: list[list[str]] = [[]]
    for i, (address, text) in enumerate(code):
        branch = re.search(r"BRA.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address and int(branch[1], 16) in index:
            bodies.append([t for _, t in code[index[int(branch[1], 16)] : i + 1]])
    return max(bodies, key=len)


def shared_bytes(body: list[str]) -> dict[str, int]:
    """Read from shared memory by each thread in a pass through the body: by plain loads, as
    operands of products."""
    plain = [re.search(r"\bLDS(?:\.U)?(?:\.(\d+))?\b", text) for text in body]
    operand = [re.search(r"\bLDSM\.16\.MT?88(?:\.(\d))?", text) for text in body]
    return dict(
        LDS=sum(int(load[1] or 32) // 8 for load in plain if load),
        LDSM=sum(4 * int(load[1] or 1) for load in operand if load),
    )


def launches(
    cell: cells.Cell,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    plan: Any,
    options: list[str],
    T: int = 3,
) -> list[tuple[Any, Any, Any]]:
    """The kernels of a forward and backward pass, with their arguments and options."""
    (B, I, H, N) = sizes
    G = cell.gates
    S = cell.states
    A = cell.saved

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    lengths = torch.zeros(B, dtype=torch.int64) if {"lengths", "offsets"} & {*options} else None
    offsets = torch.zeros(T, dtype=torch.int64) if "offsets" in options else None
    resets = torch.zeros(T, B, dtype=torch.bool) if "resets" in options else None
    rows = Layout(T, [n % 2 == 1 for n in range(N)], (), lengths, offsets, resets)
    w = new(N * G * H, H)
    x = new(T * B, N * G * H if cell.whole_rows else I)
    w_ih: Any = None if cell.whole_rows else new(N * G * H, I)
    b = None if cell.whole_rows else new(N * G * H)
    s = [new(N, B, H) for _ in range(S)]
    y = new(T * B, N * H)
    real: Any = triton_launch.forward_kernel, triton_launch.backward_kernel
    vars(torch.cuda)["get_device_properties"] = lambda _: SimpleNamespace(
        multi_processor_count=10**6
    )
    recorders: Any = [Recorder(kernel) for kernel in real]
    triton_launch.forward_kernel, triton_launch.backward_kernel = recorders
    device.forward(cell, plan, rows, x, Weights(w_ih, w, b, b), s, Save.ACTIVATIONS)
    states = new(S - 1, T * B, N * H) if S > 1 else None
    saved = new(A, T * B, N * H) if A else None
    grads = OutputGrads(y, states if "states" in options else None, s)
    nothing: Gradients[bool] = Gradients._make([False] * 6)
    outputs = Outputs(y, states, None, saved)
    device.backward(cell, plan, rows, x, Weights(w_ih, w, None, None), s, outputs, grads, nothing)
    triton_launch.forward_kernel, triton_launch.backward_kernel = real
    return [(recorder.kernel, *recorder.launches[0]) for recorder in recorders]


def cell_of(name: str, options: list[str]) -> cells.Cell:
    cell: cells.Cell = getattr(cells, name)
    norm = norm_of(cell, True) if "norm" in options else None
    return extended_cell(cell, None, (), False, norm)


def read_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage, sass = (
            subprocess.run(
                [CUOBJDUMP, flag, f.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used
    body = loop(sass)
    return dict(
        registers=int(used[1]),
        stack=int(used[2]),
        loop=len(body),
        shared_bytes=shared_bytes(body),
        LDG=sum(bool(re.search(r"\bLDG\b", text)) for text in body),
        fused=sum(bool(re.search(r"\bFFMA2?\b", text)) for text in body),
        barriers=sum(bool(re.search(r"\bBAR\b", text)) for text in body),
        local=sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in body),
    )


def read_amdgcn(text: str) -> dict[str, Any]:
    used = dict(
        re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)
    )
    return dict(registers=int(used["vgpr_count"]), stack=int(used["private_segment_fixed_size"]))


def plan_for(
    cell: cells.Cell,
    sizes: tuple[int, int, int, int],
    dtype: str,
    gpu: Gpu,
    options: list[str],
) -> Plan:
    chosen = make_plan(cell, sizes, dtype, gpu, "tf32" in options)
    size = {"ieee": 2, "tf32": 4, "tf32x3": 8}[chosen.precision]
    plans = triton_plans(cell, sizes, size, chosen.precision, gpu)
    return next((plan for plan in plans if plan.scope in options), chosen)


def measure(
    name: str, dtype: str, B: int, I: int, H: int, N: int, capability: int, options: list[str]
) -> None:
    cell = cell_of(name, options)
    sizes = (B, I, H, N)
    gpu = GPUS[capability]
    plan = plan_for(cell, sizes, dtype, gpu, options)
    for kernel, arguments, launch in launches(cell, getattr(torch, dtype), sizes, plan, options):
        if "graph" in options:
            arguments = (torch.zeros(1, dtype=torch.int64), *arguments[1:])
        names = "num_warps", "num_stages", "launch_cooperative_grid", "enable_fp_fusion"
        chosen = {k: launch[k] for k in names if k in launch}
        target = (
            GPUTarget("hip", "gfx942", 64)
            if capability == AMD
            else GPUTarget("cuda", capability, 32)
        )
        built = triton.compile(
            source(kernel, arguments, launch, make_backend(target)), target=target, options=chosen
        )
        used = (
            read_amdgcn(built.asm["amdgcn"])
            if capability == AMD
            else read_cubin(built.asm["cubin"])
        )
        gives_up = "@too_long trap" in built.asm.get("ptx", "")
        used |= dict(plan=plan, shared=built.metadata.shared, gives_up=gives_up)
        print(json.dumps(dict(kernel=kernel.fn.__name__, **used)), flush=True)


def kinds(
    name: str, dtype: str, B: int, I: int, H: int, N: int, capability: int, options: list[str]
) -> None:
    """Of the plan for B: Triton's own keys of the kernels for other B and T."""
    cell = cell_of(name, options)
    backend = make_backend(GPUTarget("cuda", capability, 32))
    plan = plan_for(cell, (B, I, H, N), dtype, GPUS[capability], options)
    found: dict[str, set[str]] = {}
    for batch, T in itertools.product((1, 16, 33, 64), (1, 2, 16, 100)):
        for kernel, arguments, launch in launches(
            cell, getattr(torch, dtype), (batch, I, H, N), plan, options, T
        ):
            key = create_function_from_signature(kernel.signature, kernel.params, backend)(
                *arguments, **launch
            )
            found.setdefault(kernel.fn.__name__, set()).add(str(key[1:]))
    for kernel_name, keys in found.items():
        print(json.dumps(dict(kernel=kernel_name, plan=plan, kinds=len(keys))), flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        row = json.loads(line)
        (kinds if "kinds" in row[-1] else measure)(*row)
