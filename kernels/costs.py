"""What the parts of a time step cost on a GPU: the constants of the model in prediction.py.

A kind of device that was measured has a file in gpu/costs/, which bench/microbench.py writes; for
others there is default.json, predicted for an H200. A file names those of its constants that are
predicted, which nobody has measured."""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "gpu" / "costs"
DEFAULT = "default"


class Costs(NamedTuple):
    """In cycles of a multiprocessor where no other unit is said."""

    device: str
    # of the measurement; empty without one
    commit: str
    # the names of those that were not measured
    predicted: tuple[str, ...]
    cycles_per_us: float
    # what every step has: h published, its fragments read, sums of several warps
    overhead: float
    # of an exchange of h within a block, a cluster, the grid; in Triton within a block
    block_barrier: float
    cluster_latency: float
    grid_latency: float
    triton_barriers: float
    # bytes a cycle that a block can receive from its cluster; that one can read from the L2 cache
    cluster_bytes: float
    l2_bytes: float
    # of all multiprocessors together
    l2_bytes_per_us: float
    # of a warp on its quarter: a product of 16 x 8 numbers over 32 bytes, until the next may begin
    # and until a sum has it; in three parts, with the instructions that split the operands
    product: float
    product_latency: float
    product_in_parts: float
    # bytes a cycle from shared memory
    shared_bytes: float
    # instructions of a warp on a gate of 32 pairs of unit and sequence, and adjoint
    algebra: float
    adjoint_algebra: float
    # microseconds of a node of a CUDA graph, and of a large product besides its arithmetic
    graph_node_us: float
    library_us: float
    # floating-point operations a microsecond of large products, by precision
    ieee_flops: float
    tf32_flops: float
    fp32_flops: float
    # microseconds of a pass through `depth` units in Triton's launch scope, and for each gate
    launch_pass_us: float
    launch_gate_us: float
    # clusters of 2, 4, 8 and 16 blocks of a multiprocessor each that run at once
    clusters: tuple[int, int, int, int]
    # multiprocessors of the device that those were counted on
    multiprocessors: int

    @property
    def source(self) -> str:
        if not self.commit:
            return f"predicted for {self.device}, not measured"
        others = f"; {', '.join(self.predicted)} predicted" if self.predicted else ""
        return f"measured on {self.device} at {self.commit}{others}"


def slug(device: str) -> str:
    """The name of a device's file, from its name as the driver says it: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read(path: Path) -> Costs:
    values = json.loads(path.read_text())
    for name in ("clusters", "predicted"):
        values[name] = tuple(values[name])
    return Costs(**values)


def write(costs: Costs, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(costs.device)}.json"
    path.write_text(json.dumps(costs._asdict(), indent=1) + "\n")
    return path


@lru_cache
def costs_of(device: str = DEFAULT) -> Costs:
    """Those of a device of this name, or the default ones where it was not measured."""
    path = FOLDER / f"{slug(device)}.json"
    return read(path if path.exists() else FOLDER / f"{DEFAULT}.json")
