"""Writes docs/plans.md: what `make_plan` chooses on an H200 for common sizes, and what its model
predicts. No GPU is needed."""

from itertools import product
from pathlib import Path
from typing import NamedTuple

from rnn.kernels import cells
from rnn.kernels.cells import Cell
from rnn.kernels.plan import Gpu, Plan
from rnn.kernels.planner import make_plan
from rnn.kernels.prediction import Prediction, predict

PATH = Path(__file__).parent.parent / "docs" / "plans.md"
H200 = Gpu(90, 132, 232448, cuda=True, device="NVIDIA H200")
CELLS = {"RNN": cells.rnn_tanh, "LSTM": cells.lstm, "GRU": cells.gru}
# by name: the dtype, and whether float32 may be TF32
MODES = {
    "tf32": ("float32", True),
    "bf16": ("bfloat16", False),
    "fp16": ("float16", False),
    "fp32": ("float32", False),
}
HIDDEN = (64, 128, 256, 384, 512, 768, 1024, 2048)
BATCHES = (1, 16, 64, 256)

INTRODUCTION = """# Plans

Written by `python bench/plans.py`; a test compares. For a layer of I = H and one direction, on
an H200 with CuPy: the scope, the blocks that share a sequence x units of a block x sequences of
a tile, the waves (w) in which the hardware runs it and the slices (s) of the batch that are
launched one after another, and the predicted microseconds of a step forward / back. `T:` is
Triton, the rest CUDA C++; [kernels](kernels.md#what-runs) says what the scopes are.

**The times are a model's, whose costs are {source}.**
`bench/microbench.py` measures those costs on a GPU and writes them to `kernels/gpu/costs/`; the
model is `kernels/prediction.py`.
"""


class Entry(NamedTuple):
    plan: Plan
    predicted: Prediction


def entry(cell: Cell, mode: str, H: int, B: int, gpu: Gpu = H200) -> Entry:
    dtype, tf32 = MODES[mode]
    sizes = B, H, H, 1
    plan = make_plan(cell, sizes, dtype, gpu, tf32)
    return Entry(plan, predict(cell, plan, 4 if dtype == "float32" else 2, sizes, gpu))


def words(found: Entry) -> str:
    plan, predicted = found
    shape = f"{plan.blocks} x {plan.units} x {plan.sequences}"
    parts = [f"{predicted.waves}w"] if predicted.waves > 1 else []
    parts += [f"{predicted.slices}s"] if predicted.slices > 1 else []
    times = f"{predicted.forward:.2f} / {predicted.adjoint:.2f}"
    name = f"T: {plan.scope}" if plan.backend == "triton" else f"{plan.scope} {shape}"
    return f"{name}{''.join(f', {part}' for part in parts)}: {times}"


def table(cell: Cell, mode: str) -> list[str]:
    lines = [
        f"| H | {' | '.join(f'B = {B}' for B in BATCHES)} |",
        f"|{' --: |'}{' --- |' * len(BATCHES)}",
    ]
    for H in HIDDEN:
        row = " | ".join(words(entry(cell, mode, H, B)) for B in BATCHES)
        lines.append(f"| {H} | {row} |")
    return lines


def text() -> str:
    lines = [INTRODUCTION.format(source=H200.costs.source)]
    for name, mode in product(CELLS, MODES):
        lines += [f"## {name}, {mode}", "", *table(CELLS[name], mode), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PATH.write_text(text())
    print(PATH)
