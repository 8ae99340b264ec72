"""The CUDA C++ kernels without a GPU: run in fibers (emulator.py), compiled by NVRTC. On a GPU they
are tested in test_gpu.py."""

import importlib
import itertools
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rnn.kernels import cells
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.plan import Gpu, Plan, cuda_plans, shared_bytes
from tests.cases import NAMES, OF_EACH_SIZE, check_recurrence
from tests.kernels.gpu import test_gpu
from tests.kernels.gpu.emulator import COMPILER, library, loader

real_load = cuda.load  # before tests put the emulator in its place
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="there is no g++, which runs CUDA C++ on the CPU"
)
HALF = torch.float16
BRAIN = torch.bfloat16
SINGLE = torch.float32


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(cuda, "load", loader(folder))


def plan_for(
    scope: str, H: int, dtype: torch.dtype, blocks: int, splits: int, sequences: int = 8
) -> Plan:
    units = -(-H // (16 * blocks)) * 16
    precision = "tf32x3" if dtype == SINGLE else "ieee"
    return Plan("cuda", scope, units, sequences, 0, units // 16 * splits, False, precision, blocks)


# Cell, scope, H, dtype, blocks, splits of a sum, sequences, form, resets. Odd and even H, sums in
# one part and several, more of these than pairs to a warp, batches that fill no tile, clusters that
# are no power of 2.
RUNS: list[tuple[Any, ...]] = [
    ("rnn_tanh", "block", 27, SINGLE, 1, 1, 8, "padded", False),
    ("rnn_tanh", "block", 48, BRAIN, 1, 2, 8, "padded", False),
    ("lstm", "block", 32, HALF, 1, 4, 16, "lengths", True),
    ("gru", "block", 21, SINGLE, 1, 2, 16, "packed", True),
    ("lstm", "cluster", 64, BRAIN, 2, 2, 8, "padded", False),
    ("gru", "cluster", 61, SINGLE, 4, 2, 8, "lengths", True),
    ("rnn_relu", "cluster", 90, HALF, 3, 1, 16, "padded", True),
    ("rnn_tanh", "grid", 61, BRAIN, 4, 4, 8, "padded", False),
    ("gru", "grid", 40, HALF, 3, 8, 8, "packed", False),
    ("lstm", "grid", 30, SINGLE, 2, 1, 16, "lengths", True),
]


def name_of(run: tuple[Any, ...]) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in run)


@needs_compiler
@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_runs(run: tuple[Any, ...]) -> None:
    cell, scope, H, dtype, blocks, splits, sequences, form, resets = run
    plan = plan_for(scope, H, dtype, blocks, splits, sequences)
    check_recurrence(cell, plan, (3, 11, 3, H), (False, True), form, resets, dtype=dtype)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("scope", ["block", "cluster", "grid"])
@pytest.mark.parametrize(
    ("form", "resets"), [("padded", False), ("padded", True), ("lengths", True), ("packed", True)]
)
@pytest.mark.parametrize("cell", NAMES)
def test_every_scope(cell: str, form: str, resets: bool, scope: str) -> None:
    for dtype, H, steps in ((SINGLE, 33, 1), (BRAIN, 34, 4), (HALF, 50, 2)):
        plan = plan_for(scope, H, dtype, 1 if scope == "block" else 2, 2)
        check_recurrence(cell, plan, (steps, 9, 2, H), (False, True), form, resets, dtype=dtype)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("H", "blocks", "splits"), [(256, 16, 2), (512, 8, 2), (256, 2, 1)])
def test_large_clusters(H: int, blocks: int, splits: int) -> None:
    check_recurrence(
        "rnn_tanh", plan_for("cluster", H, BRAIN, blocks, splits), (4, 9, 2, H), dtype=BRAIN
    )


@needs_compiler
@pytest.mark.parametrize(
    ("name", "form", "resets", "scope"),
    [
        ("lstm", "lengths", True, "cuda cluster"),
        pytest.param("gru", "padded", True, "cuda block", marks=pytest.mark.slow),
        pytest.param("rnn_relu", "packed", True, "cuda grid", marks=pytest.mark.slow),
    ],
)
def test_what_numbers_depend_on(name: str, form: str, resets: bool, scope: str) -> None:
    """Not by a bit on other sequences, nor on what lies around tensors in memory."""
    test_gpu.test_a_sequence_depends_on_no_other(name, form, resets, scope)
    test_gpu.test_surroundings_in_memory(name, form, resets, scope)


FAULTS = {
    "no barrier after a step": (
        "block",
        "#if SCOPE == BLOCK\n    __syncthreads();",
        "#if SCOPE == BLOCK\n",
    ),
    "one buffer": (
        "block",
        "&shared.inbox[c & 1][b][word] = pair;",
        "&shared.inbox[0][b][word] = pair;",
    ),
    "partial sums read too early": ("block", "group_sync(1 + wm, 32 * WK);", ""),
    "no wait for the others' h": (
        "cluster",
        "while (!barrier_passed(barrier, c >> 1 & 1)) wait_more(spin_count);",
        "",
    ),
    "barrier never set again": (
        "cluster",
        "if (threadIdx.x == 0) barrier_expect(barrier, 4 * NB * WORDS);",
        "",
    ),
    "wrong number of bytes": ("cluster", "4 * NB * WORDS);\n    }", "4 * NB * WORDS + 16);\n    }"),
    "a chunk sent before it is written": (
        "cluster",
        "SCOPE == CLUSTER\n    __syncwarp();",
        "SCOPE == CLUSTER\n",
    ),
    "a chunk of the wrong sequence": (
        "cluster",
        "b = p / 2 * 8 + number % 4 * 2 + p % 2;\n      const int word",
        "b = p / 2 * 8 + number % 4 * 2;\n      const int word",
    ),
    "flags not looked at": ("grid", "ready &= (u32)(seen[k][half] >> 32) == (u32)c + 1;", ""),
    "flags of another step": (
        "grid",
        "((const u32*)&pair)[e], c + 1);",
        "((const u32*)&pair)[e], c + 2);",
    ),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    scope, *change = FAULTS[fault]
    monkeypatch.setattr(cuda, "load", loader(folder, (change[0], change[1])))
    plan = plan_for(scope, 64, BRAIN, 1 if scope == "block" else 2, 2)
    with pytest.raises((AssertionError, RuntimeError)):
        check_recurrence("rnn_tanh", plan, (6, 9, 2, 64), dtype=BRAIN)


@needs_compiler
def test_shared_memory(folder: Path) -> None:
    """The plan's figure is the compiler's."""
    for scope, blocks, splits, adjoint in (
        ("block", 1, 1, False),
        ("cluster", 2, 2, True),
        ("grid", 3, 4, True),
    ):
        plan = plan_for(scope, 90, SINGLE, blocks, splits, 16)
        built = library(folder, ("", ""), cells.lstm, plan, SINGLE, adjoint, False, True)
        assert built.emulate_shared() == shared_bytes(cells.lstm, plan, 4, adjoint)


def test_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What CuPy and torch would be asked for on a GPU; compiled once, and found on disk by the next
    process."""
    pytest.importorskip("cupy", reason="there is no CuPy, whose NVRTC compiles CUDA C++")
    asked = list[Any]()
    cupy_cuda = importlib.import_module("cupy").cuda

    class Kernel:
        kernel = SimpleNamespace(ptr=7)
        max_dynamic_shared_size_bytes = 0

        def __call__(self, *given: Any, **options: Any) -> None:
            asked.append((given, options, self.max_dynamic_shared_size_bytes))

    def module(path: str, enable_cooperative_groups: bool) -> Any:
        cubin = Path(path).read_bytes()
        headers, size, count = (
            struct.unpack_from("<Q", cubin, 32)[0],
            *struct.unpack_from("<HH", cubin, 54),
        )
        assert headers + size * count <= len(cubin)  # it is whole: CuPy leaves out a last zero byte
        asked.append((cubin[:4], enable_cooperative_groups))
        return SimpleNamespace(get_function=lambda name: Kernel())

    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr("cupy.RawModule", module)
    monkeypatch.setattr(cupy_cuda, "Device", lambda index: nullcontext())
    monkeypatch.setattr(
        cupy_cuda, "Stream", SimpleNamespace(from_external=lambda stream: nullcontext())
    )
    monkeypatch.setattr(cupy_cuda.driver, "funcSetAttribute", lambda *given: asked.append(given))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    plan = plan_for("cluster", 256, BRAIN, 16, 1)
    device = torch.device("cuda", 0)
    for _ in range(2):
        real_load.cache_clear()
        real_load(cells.rnn_tanh, plan, BRAIN, False, False, True, device)((16, 2, 1), (1, 2, 3))
    assert len(list(tmp_path.glob("cache/*"))) == 1
    shared = shared_bytes(cells.rnn_tanh, plan, 2, False)
    call = ((16, 2, 1), (32,), (1, 2, 3)), {"shared_mem": shared}, shared
    assert asked == 2 * [(b"\x7fELF", False), (7, 14, 1), call]
    launch = real_load(
        cells.rnn_tanh, plan_for("grid", 256, BRAIN, 16, 8), BRAIN, False, False, True, device
    )
    with pytest.raises(RuntimeError, match=r"needs .* blocks at a time"):
        launch((16, 9, 1), ())


GPUS = {80: Gpu(80, 108, 166912), 90: Gpu(90, 132, 232448), 100: Gpu(100, 148, 232448)}
Kernel = tuple[cells.Cell, Plan, torch.dtype, bool, bool, bool]


def kernels(capability: int, shapes: list[tuple[int, int]], names: list[str]) -> list[Kernel]:
    """Each kernel that a plan for B sequences of H units chooses: the plainest and, with masks and
    odd sizes, the largest."""
    found: dict[Kernel, None] = {}
    modes = (BRAIN, "ieee"), (SINGLE, "tf32"), (SINGLE, "tf32x3")
    for (B, H), name, (dtype, precision) in itertools.product(shapes, names, modes):
        cell = getattr(cells, name)
        plan = next(
            iter(cuda_plans(cell, (B, H, H, 1), dtype.itemsize, precision, GPUS[capability])), None
        )
        if plan is not None:
            for masks, adjoint in itertools.product((False, True), (False, True)):
                found[cell, plan, dtype, adjoint, masks, not masks] = None
    return list(found)


def check_kernels(capability: int, chosen: list[Kernel]) -> None:
    """They compile, and neither spill nor want more registers or shared memory than there is."""
    pytest.importorskip("cupy", reason="there is no CuPy, whose NVRTC compiles CUDA C++")

    def usage(kernel: Kernel) -> str:
        return cuda.build(cuda.program(cuda.text("ptx.cuh"), *kernel), capability)[1]

    with ThreadPoolExecutor(2) as pool:
        for kernel, log in zip(chosen, pool.map(usage, chosen)):
            (cell, plan, dtype, adjoint, *_) = kernel
            used = re.search(r"Used (\d+) registers", log)
            assert used and "0 bytes stack frame, 0 bytes spill stores" in log, (
                cell.name,
                kernel,
                log,
            )
            assert int(used[1]) * 32 * plan.warps <= 65536
            assert (
                shared_bytes(cell, plan, dtype.itemsize, adjoint) <= GPUS[capability].shared_memory
            )


def test_compiles() -> None:
    chosen = [
        kernel
        for kernel in kernels(90, [(64, 128), (16, 512)], ["rnn_tanh", "lstm"])
        if kernel[1].precision != "tf32"
    ]
    chosen += [
        kernel for kernel in kernels(90, [(8, 1024)], ["gru"]) if kernel[2] == BRAIN and kernel[5]
    ]
    cell, plan, _, adjoint, masks, even = chosen[0]
    chosen.append((cell, plan, HALF, adjoint, masks, even))
    assert {kernel[1].scope for kernel in chosen} == {"block", "cluster", "grid"}
    check_kernels(90, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
def test_compiles_all(capability: int) -> None:
    shapes = [
        (B, H) for B in (1, 64, 4096) for H in (20, 64, 128, 192, 256, 360, 512, 768, 1024, 2048)
    ]
    check_kernels(capability, kernels(capability, shapes, OF_EACH_SIZE))


def test_resident_layers() -> None:
    """Which layers' weights stay in registers, in half precision: up to these H within a block, a
    cluster, the grid."""

    def largest(name: str, scope: str) -> int:
        return max(
            H
            for H in range(16, 2049, 16)
            for plan in cuda_plans(getattr(cells, name), (8, H, H, 1), 2, "ieee", GPUS[90])
            if plan.scope == scope
        )

    assert (largest("rnn_tanh", "block"), largest("lstm", "block"), largest("gru", "block")) >= (
        256,
        128,
        128,
    )
    assert largest("rnn_tanh", "cluster") >= 1024
    assert min(largest("lstm", "cluster"), largest("gru", "cluster")) >= 512
    assert largest("rnn_tanh", "grid") >= 2048
    assert min(largest("lstm", "grid"), largest("gru", "grid")) >= 1024
