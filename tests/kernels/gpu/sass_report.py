"""What the time loop of a CUDA C++ kernel costs, read from its cubin: no GPU is needed.

NVRTC compiles the kernels that a plan chooses, nvdisasm prints them with their encodings, in which
ptxas says how many cycles each instruction keeps its warp and which loads it waits for. A step is
the costliest path through the loop of the products: each branch once, loops that wait once, and
without the clock, which they look at once in 4096 polls."""

import argparse
import functools
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from rnn.kernels import cells
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.plan import Gpu, Plan
from rnn.kernels.planner import cuda_plans

GPUS = {80: Gpu(80, 108, 166912), 90: Gpu(90, 132, 232448), 100: Gpu(100, 148, 232448)}
# Cycles until the result of an instruction of variable latency is there: rough, of an H100.
LATENCY = dict(LDG=300, LD=300, LDS=30, LDSM=33, MUFU=24, SHFL=25, SYNCS=20, BAR=20, S2R=20)
MODES = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
}


class Instruction(NamedTuple):
    """`write` and `read` are the barriers (0 to 5, or 7 for none) that it sets when its result is
    there and when its operands were read; `waits` is the mask of those it waits for."""

    name: str
    text: str
    stall: int
    write: int
    read: int
    waits: int


class Block(NamedTuple):
    """Instructions without a branch, and the blocks that may follow."""

    instructions: list[Instruction]
    successors: list[int]


class Report(NamedTuple):
    """Of a kernel: registers; bytes of spills; instructions, stall cycles and estimated cycles of a
    step; the last two from the end of the wait for other blocks; the most loads in flight while W
    is loaded; cycles from a load in the time loop to what waits for it, at least; how often FCHK
    stands in the kernel, and CCTL.IVALL in the time loop."""

    registers: int
    spills: int
    instructions: int
    stall: int
    cycles: int
    stall_after_wait: int
    cycles_after_wait: int
    mma: int
    loads_of_w: int
    load_distance: int
    fchk: int
    ivall: int


def disassembler() -> str | None:
    """The path of nvdisasm: Triton brings one."""
    try:
        import triton
    except ImportError:
        return shutil.which("nvdisasm")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return str(bundled) if bundled.exists() else shutil.which("nvdisasm")


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler() or "nvdisasm", "-c", "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instruction(text: str, encoding: int) -> Instruction:
    control = encoding >> 41
    words = text.split()
    name = words[1] if words[0].startswith("@") else words[0]
    return Instruction(
        name, text, control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    )


def blocks(sass: str) -> list[Block]:
    """The flow of control. Calls, and what runs only where a warp is divided, are left out."""
    code: list[list[Instruction]] = [[]]
    label_at: dict[str, int] = {}
    pending = ""
    for line in sass.splitlines():
        label = re.match(r"(\.L_x_\d+|recurrence):", line)
        start = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        encoding = re.search(r"/\* 0x([0-9a-f]{16}) \*/", line)
        if label:
            if code[-1]:
                code.append([])
            label_at[label[1]] = len(code) - 1
        elif start:
            pending = start[1]
        elif encoding and pending:
            code[-1].append(instruction(pending, int(encoding[1], 16)))
            name = code[-1][-1].name
            if re.match(r"BRA\b|EXIT|RET", name) and "BRA.DIV" not in name:
                code.append([])
            pending = ""
    if not code[-1]:
        code.pop()
    following = [_successors(block, i, label_at) for i, block in enumerate(code)]
    return [
        Block(block, [j for j in after if j < len(code)]) for block, after in zip(code, following)
    ]


def _successors(block: list[Instruction], index: int, label_at: dict[str, int]) -> list[int]:
    last = block[-1]
    ends = re.match(r"BRA\b|EXIT|RET", last.name) and "BRA.DIV" not in last.name
    if not ends:
        return [index + 1]
    words = last.text.split()
    always = not words[0].startswith("@") and not re.match(r"BRA(\.\S+)? !?U?P\d", last.text)
    target = re.search(r"\(?(\.L_x_\d+)", last.text)
    following = [] if always else [index + 1]
    return following + ([label_at[target[1]]] if target and last.name.startswith("BRA") else [])


def natural_loops(graph: list[Block]) -> dict[int, set[int]]:
    """Bodies of loops by the block that they begin with."""
    predecessors: list[list[int]] = [[] for _ in graph]
    for i, block in enumerate(graph):
        for following in block.successors:
            predecessors[following].append(i)
    found: dict[int, set[int]] = {}
    for header, latch in _back_edges(graph, predecessors):
        body = {header, latch}
        stack = [latch]
        while stack:
            last = stack.pop()
            new = set() if last == header else {*predecessors[last]} - body
            body |= new
            stack += new
        found.setdefault(header, set()).update(body)
    return found


def _back_edges(graph: list[Block], predecessors: list[list[int]]) -> list[tuple[int, int]]:
    """(header, latch) where the header dominates the latch; dominators as bit masks."""
    everything = (1 << len(graph)) - 1
    dominators = [1] + [everything] * (len(graph) - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(graph)):
            common = everything
            for j in predecessors[i]:
                common &= dominators[j]
            changed |= dominators[i] != (common | 1 << i)
            dominators[i] = common | 1 << i
    reached = [i == 0 or bool(predecessors[i]) for i in range(len(graph))]
    return [
        (j, i)
        for i, block in enumerate(graph)
        for j in block.successors
        if reached[i] and dominators[i] >> j & 1
    ]


def costliest_path(
    graph: list[Block], loops: dict[int, set[int]], first: int, body: set[int], sends: int = 1
) -> list[Instruction]:
    """From block `first` through `body`, by stall cycles, each block once. A loop inside that sends
    has `sends` turns, others one."""

    def turns(i: int) -> int:
        inner = [b for b in loops.values() if i in b and b < body]
        sending = any(
            x.name.startswith("STAS") for b in inner for k in b for x in graph[k].instructions
        )
        return sends if sending else 1

    cost = {i: sum(x.stall for x in graph[i].instructions) * turns(i) for i in body}
    best: dict[int, tuple[int, list[int]]] = {}
    active: list[int] = []

    def visit(i: int) -> None:
        active.append(i)
        ways = []
        for j in graph[i].successors:
            # an edge back to the beginning of a loop is left out
            if j not in body or j in active or i in loops.get(j, ()):
                continue
            if j not in best:
                visit(j)
            ways.append(best[j])
        longest = max(ways, key=lambda way: way[0], default=(0, []))
        best[i] = (cost[i] + longest[0], [i, *longest[1]])
        active.pop()

    visit(first)
    return [x for i in best[first][1] for x in graph[i].instructions * turns(i)]


class Timeline(NamedTuple):
    """When each instruction of a path begins; from each load to what waits for it; the most loads
    in flight."""

    begins: list[int]
    distances: list[int]
    in_flight: int


def timeline(path: Iterable[Instruction]) -> Timeline:
    """A warp alone, in order: it waits for its stalls and for barriers."""
    now = 0
    begins = []
    distances = []
    most = 0
    ready = [0] * 8
    loads: dict[int, list[int]] = {}
    for x in path:
        for k in range(6):
            if x.waits >> k & 1:
                distances += [now - begun for begun in loads.pop(k, ())]
                now = max(now, ready[k])
        begins.append(now)
        kind = x.name.split(".")[0]
        if x.write < 6:
            ready[x.write] = max(ready[x.write], now + LATENCY.get(kind, 20))
            if kind in ("LDG", "LD"):
                loads.setdefault(x.write, []).append(now)
        if x.read < 6:
            ready[x.read] = max(ready[x.read], now + 15)
        most = max(most, sum(map(len, loads.values())))
        now += max(1, x.stall)
    return Timeline(begins, distances, most)


def _reaches(graph: list[Block], first: int, goals: set[int], header: int) -> bool:
    seen = {first, header}
    stack = [first]
    while stack:
        i = stack.pop()
        if i in goals:
            return True
        following = {*graph[i].successors} - seen
        seen |= following
        stack += following
    return False


def without_repeats(graph: list[Block], products: set[int], header: int) -> list[Block]:
    """Without the products that follow the vote of a warp: they are done again, exactly, where
    numbers are not finite."""
    found = []
    for block in graph:
        after = block.successors
        if any(x.name.startswith("VOTE") for x in block.instructions):
            after = [j for j in after if not _reaches(graph, j, products, header)]
        found.append(Block(block.instructions, after))
    return found


def without_clock(graph: list[Block]) -> list[Block]:
    """Without what a wait does once in 4096 polls: it looks at the clock."""
    clock = {i for i, b in enumerate(graph) if any("GLOBALTIMER" in x.text for x in b.instructions)}
    return [
        Block(block.instructions, [j for j in block.successors if j not in clock])
        for block in graph
    ]


def measure(cubin: bytes, log: str, scope: str, sends: int = 1) -> Report:
    graph = blocks(disassemble(cubin))
    loops = natural_loops(graph)
    products = {i for i, b in enumerate(graph) if any("MMA" in x.name for x in b.instructions)}
    header = max((h for h in loops if products & loops[h]), key=lambda h: len(loops[h]))
    once = without_repeats(without_clock(graph), products, header)
    path = costliest_path(once, loops, header, loops[header], sends)
    times = timeline(path)
    end = times.begins[-1] + path[-1].stall
    # what waits for other blocks: a barrier of the cluster, flags of the grid
    waits = [i for i, x in enumerate(path) if scope == "cluster" and "TRYWAIT" in x.name]
    after = max(waits, default=0)
    before = [costliest_path(graph, loops, h, loops[h]) for h in loops if h < header]
    before.append(costliest_path(graph, loops, 0, {*range(header)}))
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores", log)
    return Report(
        registers=int(used[1]) if used else 0,
        spills=int(spilled[1]) if spilled else 0,
        instructions=len(path),
        stall=sum(x.stall for x in path),
        cycles=end,
        stall_after_wait=sum(x.stall for x in path[after + 1 :]),
        cycles_after_wait=end - times.begins[after],
        mma=sum("MMA" in x.name for x in path),
        loads_of_w=max(timeline(way).in_flight for way in before),
        load_distance=min(timeline(path * 3).distances, default=0),
        fchk=sum(x.name == "FCHK" for block in graph for x in block.instructions),
        ivall=sum(x.name == "CCTL.IVALL" for i in loops[header] for x in graph[i].instructions),
    )


class Kernel(NamedTuple):
    """`blocks` is 0 for what the plan takes, or so many of a cluster; `masks` whether there are
    lengths or offsets, and resets; `even` whether H is, and pairs of numbers are aligned."""

    name: str
    mode: str
    H: int
    B: int
    adjoint: bool
    blocks: int = 0
    masks: cuda.Masks = cuda.Masks.NONE
    even: bool = True


def sends_of(cell: cells.Cell, plan: Plan, size: int, adjoint: bool) -> int:
    """Turns of a loop that sends chunks of 16 bytes to a cluster."""
    vectors = cell.gates if adjoint else 1
    splits = plan.warps * 16 // plan.units
    pairs = max(1, plan.sequences // 4 // splits)
    return -(-vectors * pairs * 4 * size * plan.blocks // 32)


@functools.cache
def report(kernel: Kernel, capability: int = 90) -> tuple[Plan, Report]:
    cell = getattr(cells, kernel.name)
    dtype, precision = MODES[kernel.mode]
    sizes = kernel.B, kernel.H, kernel.H, 1
    plans = cuda_plans(cell, sizes, dtype.itemsize, precision, GPUS[capability])
    plan = next(
        p for p in plans if not kernel.blocks or (p.scope, p.blocks) == ("cluster", kernel.blocks)
    )
    form = kernel.adjoint, kernel.masks, kernel.even
    code = cuda.program(cuda.text("ptx.cuh"), cell, plan, dtype, *form)
    cubin, log = cuda.build(code, capability)
    sends = sends_of(cell, plan, dtype.itemsize, kernel.adjoint)
    return plan, measure(cubin, log, plan.scope, sends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", default=["rnn_tanh", "lstm", "gru"])
    parser.add_argument("--modes", nargs="+", default=["bfloat16", "float16", "tf32", "tf32x3"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--batch", nargs="+", type=int, default=[16])
    parser.add_argument("--directions", nargs="+", default=["forward", "backward"])
    parser.add_argument("--blocks", type=int, default=0, help="only clusters of so many blocks")
    parser.add_argument("--masks", type=str.upper, default="NONE", choices=cuda.Masks.__members__)
    parser.add_argument("--odd", action="store_true", help="odd H, or pairs that are not aligned")
    parser.add_argument("--capability", type=int, default=90, choices=GPUS)
    asked = parser.parse_args()
    print("cell mode H B direction scope blocks units warps", *Report._fields, sep="\t")
    for name, mode, H, B, direction in itertools.product(
        asked.cells, asked.modes, asked.hidden, asked.batch, asked.directions
    ):
        form = asked.blocks, cuda.Masks[asked.masks], not asked.odd
        kernel = Kernel(name, mode, H, B, direction == "backward", *form)
        try:
            plan, numbers = report(kernel, asked.capability)
        except StopIteration:
            continue
        where = plan.scope, plan.blocks, plan.units, plan.warps
        print(name, mode, H, B, direction, *where, *numbers, sep="\t", flush=True)


if __name__ == "__main__":
    main()
