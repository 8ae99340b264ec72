"""Measures on a GPU what a step costs before it computes anything: barriers within a block, a
cluster and a grid, exchanges of h between blocks, the rate of the matrix units, kernel launches and
nodes of a CUDA graph. Prints the constants and writes them to a JSON file, and what of them the
plans' model uses to kernels/gpu/costs/. `--compile` only compiles, which needs no GPU."""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from run import RESULTS, environment

from rnn.kernels import costs
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.gpu.cuda.occupancy import active_clusters

SOURCE = Path(__file__).with_suffix(".cu")
CLUSTERS = (1, 2, 4, 8, 16)
STEPS = 2000
THREADS = 256
SHARED = 200 * 1024
# CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: clusters of 16
NON_PORTABLE_CLUSTER_SIZE = 14


def compile_cubin(arch: str, cluster: int) -> tuple[bytes, str]:
    """The kernels for `arch` (sm_90...) by CuPy's binding of NVRTC, and the compiler's words on
    what they use. Raises RuntimeError with its words if it refuses."""
    capability = int(arch.removeprefix("sm_"))
    choices: dict[str, object] = dict(
        FLOAT16=1, BFLOAT16=2, TYPE=2, CLUSTER=1, SCOPE=int(capability >= 90), BLOCKS=cluster
    )
    # of waits that the kernels here do not have
    choices |= dict(PLAN='"microbench"', WAIT_LIMIT=cuda.WAIT_LIMIT)
    defined = "".join(f"#define {name} {value}\n" for name, value in choices.items())
    return cuda.build(defined + cuda.text("ptx.cuh") + SOURCE.read_text(), capability)


class Bench:
    """The compiled kernels on the current GPU."""

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        self.device: Any = self.cupy.cuda.Device()
        self.blocks = self.device.attributes["MultiProcessorCount"]
        self.modern = int(self.device.compute_capability) >= 90
        self.cycles: Any = self.cupy.zeros(4096, "int64")
        self.modules = {}
        self.folder = tempfile.TemporaryDirectory()
        for cluster in CLUSTERS if self.modern else (1,):
            path = Path(self.folder.name) / f"{cluster}.cubin"
            path.write_bytes(compile_cubin(f"sm_{self.device.compute_capability}", cluster)[0])
            self.modules[cluster] = [
                self.cupy.RawModule(path=str(path), enable_cooperative_groups=cooperative)
                for cooperative in (False, True)
            ]

    def kernel(
        self, name: str, cluster: int = 1, shared: int = 0, cooperative: bool = False
    ) -> Any:
        """`cooperative`: of a launch whose blocks are all resident together."""
        kernel = self.modules[cluster][cooperative].get_function(name)
        if cluster > 8:
            self.cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, NON_PORTABLE_CLUSTER_SIZE, 1)
        if shared > 48 * 1024:
            kernel.max_dynamic_shared_size_bytes = shared
        return kernel

    def steps(
        self,
        name: str,
        *arguments: Any,
        blocks: int = 1,
        threads: int = THREADS,
        cluster: int = 1,
        shared: int = 0,
        cooperative: bool = False,
        zero: Any = None,
    ) -> float | None:
        """Cycles a step, the median of five launches; None where the blocks do not fit or gave up
        waiting. `zero` is an array that has to be 0 before each."""
        kernel = self.kernel(name, cluster, shared, cooperative)
        driver = self.cupy.cuda.driver
        if cooperative:  # CuPy would launch fewer blocks than asked for
            fit = driver.occupancyMaxActiveBlocksPerMultiprocessor(
                kernel.kernel.ptr, threads, shared
            )
            if fit * self.blocks < blocks:
                return None
        taken = []
        for _ in range(5):
            if zero is not None:
                zero.fill(0)
            try:
                kernel(
                    (blocks,),
                    (threads,),
                    (self.cycles, self.cupy.int32(STEPS), *arguments),
                    shared_mem=shared,
                )
            # Refused, as clusters of 16 are where a GPC is too small
            except driver.CUDADriverError:
                return None
            cycles = self.cycles[:blocks].get()
            if cycles.min() < 0:
                return None
            taken.append(float(cycles[0]) / STEPS)
        return statistics.median(taken)

    def clock(self) -> float:
        """Cycles a microsecond, under load."""
        kernel = self.kernel("clock_rate")
        for _ in range(2):
            kernel((1,), (THREADS,), (self.cycles, self.cupy.int32(500_000)))
        cycles, nanoseconds = self.cycles[:2].get()
        return float(1000 * cycles / nanoseconds)

    def launches(self, count: int = 1000) -> dict[str, float]:
        """Microseconds: of the host to launch a kernel that does nothing, from one such kernel to
        the next on the GPU, and of such a node of a CUDA graph."""
        kernel = self.kernel("nothing")
        cuda = self.cupy.cuda
        stream = cuda.Stream(non_blocking=True)

        def many() -> None:
            for _ in range(count):
                kernel((1,), (32,), (self.cycles, self.cupy.int32(0)))

        def between(function: Any) -> float:
            events = cuda.Event(), cuda.Event()
            events[0].record(stream)
            function()
            events[1].record(stream)
            events[1].synchronize()
            return float(1000 * cuda.get_elapsed_time(*events) / count)

        with stream:
            many()
            stream.synchronize()
            start = time.perf_counter()
            many()
            host = 1e6 * (time.perf_counter() - start) / count
            stream.synchronize()
            launched = statistics.median(between(many) for _ in range(5))
            stream.begin_capture()
            many()
            graph = stream.end_capture()
            graph.launch(stream)
            node = statistics.median(between(lambda: graph.launch(stream)) for _ in range(5))
        return dict(host_launch=host, launch=launched, graph_node=node)


def constants(bench: Bench) -> dict[str, Any]:
    """All of them, in cycles but for those in microseconds."""
    int32 = bench.cupy.int32
    zeros = bench.cupy.zeros
    results: dict[str, Any] = dict(
        cycles_per_us=bench.clock(), us=bench.launches(), multiprocessors=bench.blocks
    )
    results["block_barrier"] = {
        threads: bench.steps("block_barrier", threads=threads) for threads in (128, 256, 512)
    }
    # Of one warp on one of the four quarters of a multiprocessor
    for name in ("product_bf16", "product_tf32"):
        per_step = {warps: bench.steps(name, threads=32 * warps) for warps in (4, 8, 16)}
        results[name] = {
            warps: cycles and cycles / 4 / (warps / 4) for warps, cycles in per_step.items()
        }
    results["grid_barrier"] = {}
    results["grid_exchange"] = {}
    for blocks in (16, 32, 64, bench.blocks):
        arrived = zeros(1, "uint32")
        results["grid_barrier"][blocks] = bench.steps(
            "grid_barrier", arrived, blocks=blocks, cooperative=True, zero=arrived
        )
        results["grid_exchange"][blocks] = {}
        for size in (2048, 8192, 32768, 131072):  # bytes that every block gets
            packets = max(1, size // 16 // blocks)
            buffers = zeros(2 * packets * blocks * 4, "uint32")
            results["grid_exchange"][blocks][size] = bench.steps(
                "grid_exchange",
                buffers,
                int32(packets),
                blocks=blocks,
                cooperative=True,
                zero=buffers,
            )
    if bench.modern:
        results["cluster_barrier"] = {}
        results["cluster_exchange"] = {}
        results["active_clusters"] = {}
        capability = int(bench.device.compute_capability)
        active = active_clusters(capability, SHARED) or (None,) * len(CLUSTERS[1:])
        for cluster, running in zip(CLUSTERS[1:], active):
            results["active_clusters"][cluster] = running
            results["cluster_barrier"][cluster] = bench.steps(
                "cluster_barrier", blocks=cluster, cluster=cluster
            )
            results["cluster_exchange"][cluster] = {
                size: [
                    bench.steps(
                        "cluster_exchange",
                        int32(size // cluster),
                        blocks=cluster * clusters,
                        cluster=cluster,
                        shared=2 * size,
                    )
                    for clusters in (1, running or 1)
                ]
                # One cluster alone, and as many as run at once
                for size in (2048, 4096, 8192, 16384, 32768)
            }
    return results


def line_through(cycles: dict[int, float | None]) -> tuple[float, float] | None:
    """Cycles of no byte and of each further byte, by least squares; None without two sizes."""
    points = [(size, taken) for size, taken in cycles.items() if taken is not None]
    if len(points) < 2:
        return None
    slope, first = statistics.linear_regression(*zip(*points))
    return (first, slope) if slope > 0 and first > 0 else None


def model_costs(found: dict[str, Any], device: str, commit: str) -> costs.Costs:
    """The costs of the plans' model, from `constants`; what these do not tell stays predicted."""
    us = found["us"]
    clock = found["cycles_per_us"]
    measured: dict[str, Any] = dict(
        cycles_per_us=clock,
        block_barrier=found["block_barrier"].get(THREADS),
        product=found["product_bf16"].get(8),
        graph_node_us=us["graph_node"],
    )
    exchanges = found["grid_exchange"]
    few, all_blocks = (line_through(exchanges[pick(exchanges)]) for pick in (min, max))
    if few and all_blocks:
        measured["grid_latency"] = few[0]
        measured["l2_bytes"] = 1 / few[1]
        measured["l2_bytes_per_us"] = max(exchanges) * clock / all_blocks[1]
    active = [*found.get("active_clusters", {}).values()]
    if active and None not in active:
        measured["clusters"] = tuple(active)
        measured["multiprocessors"] = found["multiprocessors"]
    # those of 16, of as many as run at once
    sizes = found.get("cluster_exchange", {}).get(16, {})
    line = line_through({size: taken[1] for size, taken in sizes.items()})
    if line:
        measured["cluster_latency"] = line[0]
        measured["cluster_bytes"] = 1 / line[1]
    known = {name: value for name, value in measured.items() if value is not None}
    predicted = costs.costs_of()
    others = tuple(name for name in predicted.predicted if name not in known)
    return predicted._replace(device=device, commit=commit, predicted=others, **known)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", metavar="ARCH", help="compile for sm_90, say, and no more")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the JSON file (default: bench/results)"
    )
    parser.add_argument(
        "--costs", type=Path, default=costs.FOLDER, help="of the model's (default: where it reads)"
    )
    options = parser.parse_args(arguments)
    if options.compile:
        for cluster in CLUSTERS if int(options.compile.strip("sm_af")) >= 90 else (1,):
            print(
                f"{options.compile}, clusters of {cluster}: "
                f"{len(compile_cubin(options.compile, cluster)[0])} bytes"
            )
        return 0
    results = environment("cuda") | dict(suite="microbench", constants=constants(Bench()))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("-".join(filter(None, ("cuda-microbench", results["commit"]))) + ".json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    commit = results["commit"] or "an unknown commit"
    found = model_costs(results["constants"], torch.cuda.get_device_name(), commit)
    written = costs.write(found, options.costs)
    for name, value in results["constants"].items():
        print(f"{name:18} {value}")
    print(path, written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
