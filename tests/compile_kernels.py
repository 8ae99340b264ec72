"""Compiles the Triton kernels of some layers for a GPU that need not be there, and reads what they use.

Run as a script, apart from the tests: Triton's compiler and its interpreter cannot share a process. Reads JSON lines
[cell, dtype, B, I, H, N, capability, options] from standard input and writes a JSON line for each kernel. The options:
"tf32", and what else the kernels are given, of "lengths", "offsets", "resets" and "states"."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnn.kernels import cells, gpu
from rnn.kernels.plan import Gpu, Rows, make_plan

GPUS = {80: Gpu(80, 108, 166912), 90: Gpu(90, 132, 232448), 100: Gpu(100, 148, 232448)}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
         torch.int32: "*i32", torch.bool: "*i1"}


class Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, list[tuple[Any, Any]]()

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.launches.append((arguments, options))


def source(kernel: Any, arguments: Any, options: Any) -> ASTSource:
    """The specialisation that Triton would compile for this launch."""
    given = dict(zip(kernel.arg_names, arguments)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


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
    """Read from shared memory by each thread in a pass through the body: by plain loads, as operands of products."""
    plain = [re.search(r"\bLDS(?:\.U)?(?:\.(\d+))?\b", text) for text in body]
    operand = [re.search(r"\bLDSM\.16\.MT?88(?:\.(\d))?", text) for text in body]
    return dict(LDS=sum(int(load[1] or 32) // 8 for load in plain if load),
                LDSM=sum(4 * int(load[1] or 1) for load in operand if load))


def launches(cell: cells.Cell, dtype: torch.dtype, sizes: tuple[int, int, int, int], plan: Any,
             options: list[str]) -> list[tuple[Any, Any, Any]]:
    """The kernels of a forward and backward pass, with their arguments and options."""
    (B, I, H, N), T, G, S, A = sizes, 3, cell.gates, cell.states, cell.saved

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    lengths = torch.zeros(B, dtype=torch.int64) if {"lengths", "offsets"} & {*options} else None
    offsets = torch.zeros(T, dtype=torch.int64) if "offsets" in options else None
    resets = torch.zeros(T, B, dtype=torch.bool) if "resets" in options else None
    rows = Rows(T, [n % 2 == 1 for n in range(N)], (), lengths, offsets, resets)
    w, b, s, y = new(N * G * H, H), new(N * G * H), new(N * S, B, H), new(T * B, N * H)
    x, fused = (new(T * B, I), dict(w_ih=new(N * G * H, I), b_ih=b)) if plan.fused else (new(T * B, N * G * H), {})
    kernels: Any = gpu.forward_kernel, gpu.backward_kernel
    recorders: Any = [Recorder(kernel) for kernel in kernels]
    gpu.forward_kernel, gpu.backward_kernel = recorders
    gpu.forward(cell, plan, rows, x, w, b, s, 2, **fused)
    states, saved = new(S - 1, T * B, N * H) if S > 1 else None, new(A, T * B, N * H) if A else None
    gpu.backward(cell, plan, rows, w, s, y, states, saved, y, states if "states" in options else None, s)
    gpu.forward_kernel, gpu.backward_kernel = kernels
    return [(recorder.kernel, *recorder.launches[0]) for recorder in recorders]


def measure(name: str, dtype: str, B: int, I: int, H: int, N: int, capability: int, options: list[str]) -> None:
    cell, sizes = getattr(cells, name), (B, I, H, N)
    plan = make_plan(cell, sizes, dtype, GPUS[capability], "tf32" in options)
    for kernel, arguments, launch in launches(cell, getattr(torch, dtype), sizes, plan, options):
        chosen = {k: launch[k] for k in ("num_warps", "num_stages", "launch_cooperative_grid") if k in launch}
        built = triton.compile(source(kernel, arguments, launch), target=GPUTarget("cuda", capability, 32),
                               options=chosen)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(built.asm["cubin"])
            f.flush()
            usage, sass = (subprocess.run([CUOBJDUMP, flag, f.name], capture_output=True, text=True, check=True).stdout
                           for flag in ("-res-usage", "-sass"))
        used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert used
        body = loop(sass)
        loads = sum(bool(re.search(r"\bLDG\b", text)) for text in body)
        print(json.dumps(dict(kernel=kernel.fn.__name__, plan=plan, registers=int(used[1]), stack=int(used[2]),
                              shared=built.metadata.shared, loop=len(body), shared_bytes=shared_bytes(body),
                              LDG=loads)), flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        measure(*json.loads(line))
