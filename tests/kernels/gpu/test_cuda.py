"""The CUDA C++ kernels without a GPU: run in fibers (emulator.py), compiled by NVRTC. On a GPU they
are tested in test_gpu.py."""

import importlib
import itertools
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rnn.kernels import cells
from rnn.kernels import gpu as device
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.gpu.cuda import occupancy
from rnn.kernels.plan import (
    Gpu,
    Plan,
    exchange_bytes,
    plan_text,
    shared_bytes,
    slices,
    stored_fragments,
)
from rnn.kernels.planner import cuda_plans
from rnn.kernels.types import Gradients, Layout, OutputGrads, Save, Weights
from tests.cases import NAMES, OF_EACH_SIZE, check_recurrence, evaluate, operands
from tests.kernels.gpu import test_gpu
from tests.kernels.gpu.emulator import COMPILER, EMULATION, library, loader

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


def plant_in_adjoint(fault: tuple[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    right = loader(folder)
    wrong = loader(folder, fault)

    def load(cell: Any, plan: Any, dtype: Any, adjoint: bool, *choices: Any) -> Any:
        return (wrong if adjoint else right)(cell, plan, dtype, adjoint, *choices)

    monkeypatch.setattr(cuda, "load", load)


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
    # W in half of the registers
    ("lstm", "block", 117, BRAIN, 1, 1, 8, "padded", False),
    pytest.param(("lstm", "block", 117, HALF, 1, 1, 8, "lengths", False), marks=pytest.mark.slow),
    # blocks without a unit
    ("gru", "grid", 20, SINGLE, 4, 4, 8, "lengths", True),
]


def name_of(run: tuple[Any, ...]) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in run)


@needs_compiler
@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_runs(run: tuple[Any, ...]) -> None:
    cell, scope, H, dtype, blocks, splits, sequences, form, resets = run
    plan = plan_for(scope, H, dtype, blocks, splits, sequences)
    check_recurrence(cell, plan, (3, 11, 3, H), (False, True), form, resets, dtype=dtype)


# As RUNS, of batches in several launches: of a tile or two each, with a smaller one at the end.
SLICED: list[tuple[Any, ...]] = [
    ("gru", "block", 21, SINGLE, 1, 2, 16, "packed", True),
    ("lstm", "cluster", 61, HALF, 2, 2, 8, "lengths", True),
    ("rnn_tanh", "grid", 61, BRAIN, 4, 4, 8, "padded", False),
    ("lstm", "grid", 30, SINGLE, 2, 1, 16, "lengths", True),
    ("gru", "grid", 40, HALF, 3, 8, 8, "packed", True),
]


@needs_compiler
@pytest.mark.parametrize("tiles", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", SLICED, ids=name_of)
def test_slices_of_the_batch(run: tuple[Any, ...], tiles: int) -> None:
    """Values and gradients; and not a bit differs from those of the batch at once."""
    cell, scope, H, dtype, blocks, splits, sequences, form, resets = run
    whole = plan_for(scope, H, dtype, blocks, splits, sequences)
    sliced = whole._replace(slice_tiles=tiles)
    sizes = (3, 2 * sequences + 5, 3, H)
    both_ways = (False, True)
    check_recurrence(cell, sliced, sizes, both_ways, form, resets, dtype=dtype)
    o = operands(cell, sizes, both_ways, form, resets, dtype=dtype)
    torch.testing.assert_close(evaluate(o, sliced), evaluate(o, whole), rtol=0, atol=0)


# As RUNS, with so many registers for weights, of which there are more in every warp.
STORED: list[tuple[Any, ...]] = [
    ("rnn_tanh", "block", 64, SINGLE, 1, 2, 8, "padded", False, 8),
    ("lstm", "cluster", 61, HALF, 2, 1, 8, "lengths", True, 32),
    ("gru", "grid", 45, SINGLE, 3, 2, 8, "packed", True, 24),
    ("lstm", "grid", 64, BRAIN, 4, 1, 16, "padded", False, 32),
]


@needs_compiler
@pytest.mark.parametrize("run", STORED, ids=name_of)
def test_weights_in_shared_memory(run: tuple[Any, ...]) -> None:
    """Values and gradients; and not a bit differs from those of weights in registers."""
    cell, scope, H, dtype, blocks, splits, sequences, form, resets, registers = run
    whole = plan_for(scope, H, dtype, blocks, splits, sequences)
    stored = whole._replace(weight_registers=registers)
    for adjoint in (False, True):
        assert stored_fragments(getattr(cells, cell), stored, dtype.itemsize, adjoint) > 0
    sizes = (3, 2 * sequences + 5, 3, H)
    check_recurrence(cell, stored, sizes, (False, True), form, resets, dtype=dtype)
    o = operands(cell, sizes, (False, True), form, resets, dtype=dtype)
    torch.testing.assert_close(evaluate(o, stored), evaluate(o, whole), rtol=0, atol=0)


@needs_compiler
@pytest.mark.parametrize(
    "fault",
    [
        (
            "words = shared.weights[(k - HELD) * ROWS + row]",
            "words = shared.weights[0]",
        ),
        ("* ROWS + row][threadIdx.x] =", "* ROWS + row][threadIdx.x ^ 1] ="),
    ],
    ids=["another k-step's", "another thread's"],
)
def test_faults_in_stored_weights_are_found(
    fault: tuple[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(cuda, "load", loader(folder, fault))
    plan = plan_for("grid", 64, BRAIN, 2, 1)._replace(weight_registers=8)
    with pytest.raises((AssertionError, RuntimeError)):
        check_recurrence("rnn_tanh", plan, (3, 9, 2, 64), dtype=BRAIN)


SLICE_FAULTS = {
    "a slice that starts a sequence late": (
        "b0((first + blockIdx.y) * NB),",
        "b0((first + blockIdx.y) * NB + (first > 0)),",
    ),
    "every slice the first": ("b0((first + blockIdx.y) * NB),", "b0((i64)blockIdx.y * NB),"),
}


@needs_compiler
@pytest.mark.parametrize("fault", SLICE_FAULTS)
def test_faults_in_slices_are_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(cuda, "load", loader(folder, SLICE_FAULTS[fault]))
    plan = plan_for("grid", 32, BRAIN, 2, 2)._replace(slice_tiles=1)
    with pytest.raises((AssertionError, RuntimeError)):
        check_recurrence("rnn_tanh", plan, (3, 19, 2, 32), dtype=BRAIN)


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [
        lambda plan, B: slices(plan, B)[:-1],
        lambda plan, B: [part._replace(tiles=1) for part in slices(plan, B)],
    ],
    ids=["one forgotten", "the second tile forgotten"],
)
def test_slices_that_are_forgotten_are_found(
    wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "slices", wrong)
    plan = plan_for("grid", 32, BRAIN, 2, 2)._replace(slice_tiles=2)
    with pytest.raises((AssertionError, RuntimeError)):
        check_recurrence("rnn_tanh", plan, (3, 19, 2, 32), dtype=BRAIN)


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


PADDING_FAULTS = {
    "": ("", ""),
    "rows that are not set to 0": ("* H + unit] = 0;", "* H + unit];"),
    "rows of another sequence": ("for (i64 t = lengths[b]; t", "for (i64 t = lengths[0]; t"),
    "padding marked as steps": ("t < lengths[b] ? (Bits)~0 : (Bits)0", "(Bits)~0"),
    "a row of another sequence marked": ("marks[t * B + b] = ", "marks[t * B + (b + 1) % B] = "),
}


@needs_compiler
@pytest.mark.parametrize("fault", PADDING_FAULTS)
def test_padding(fault: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """And rows that are wrong are found."""
    plan = plan_for("cluster", test_gpu.SIZES[3], SINGLE, 2, 2)
    if not fault:
        return test_gpu.check_padding("lstm", plan)
    monkeypatch.setattr(cuda, "load", loader(folder, PADDING_FAULTS[fault]))
    with pytest.raises((AssertionError, RuntimeError)):
        test_gpu.check_padding("lstm", plan)


MARK_FAULTS = {
    "gradients of NaN": ("comes |= ds_next[k] != 0.f;", "comes = true;"),
    "a state left out": ("EACH(k, CARRIED) comes", "EACH(k, 1) comes"),
    "a row of another sequence marked": ("worker.b0 + worker.sequence(p),", "worker.b0,"),
    "a row of another direction marked": (" 1 + worker.n, R,", " 2 - worker.n, R,"),
}


@needs_compiler
@pytest.mark.parametrize(
    ("scope", "form"),
    [
        ("cluster", "lengths"),
        *(
            pytest.param(scope, form, marks=pytest.mark.slow)
            for scope in ("block", "cluster", "grid")
            for form in ("padded", "packed")
        ),
    ],
)
def test_steps_not_asked_for(scope: str, form: str) -> None:
    plan = plan_for(scope, 18, SINGLE, 1 if scope == "block" else 2, 2)
    test_gpu.check_not_asked_for("lstm", plan, form)


@needs_compiler
@pytest.mark.parametrize("fault", MARK_FAULTS)
def test_wrong_marks_are_found(fault: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    plant_in_adjoint(MARK_FAULTS[fault], monkeypatch, folder)
    with pytest.raises(AssertionError, match="d_"):
        test_gpu.check_not_asked_for("lstm", plan_for("cluster", 18, SINGLE, 2, 2), "lengths")


STATE_FAULTS = {
    "no initial states": ("given = worker.inside(p) && first[k];", "given = false;"),
    "of another state": ("joined(worker.load(first[k] +", "joined(worker.load(first[0] +"),
    "of another sequence": ("worker.s0 + worker.at(p, H), given", "worker.s0, given"),
    "of the step after": ("worker.runs(t, p), initial[p][k]", "true, initial[p][k]"),
}


@needs_compiler
@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_wrong_initial_states_are_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    plant_in_adjoint(STATE_FAULTS[fault], monkeypatch, folder)
    with pytest.raises(AssertionError, match="d_"):
        check_recurrence("lstm", plan_for("block", 18, SINGLE, 1, 1), (3, 9, 2, 18), form="lengths")


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "same"),
    [(("", ""), True), (("at(p, H), given", "at(p, H), given, {1, 1}"), False)],
    ids=["", "not 0"],
)
@pytest.mark.parametrize("form", ["padded", "lengths"])
def test_states_that_are_not_given(
    form: str,
    fault: tuple[str, str],
    same: bool,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    """All numbers and gradients are, to the bit, those of zeros."""
    plant_in_adjoint(fault, monkeypatch, folder)
    plan = plan_for("block", 18, SINGLE, 1, 2)
    (T, B, H) = (3, 9, 18)
    lengths = None if form == "padded" else torch.arange(B) % (T + 1)
    layout = Layout(T, (False,), (), lengths, sequences=B)
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 4

    x = random(T * B, 3)
    weights = Weights(random(4 * H, 3), random(4 * H, H), None, None)
    d = OutputGrads(random(T * B, H), None, [random(1, B, H), random(1, B, H)])

    def found(s0: Any) -> Any:
        outputs = device.forward(cells.lstm, plan, layout, x, weights, s0, Save.ACTIVATIONS)
        needs = Gradients(True, False, True, False, False, s0 is not None)
        grads = device.backward(cells.lstm, plan, layout, x, weights, s0, outputs, d, needs)
        return outputs.y, *outputs.last, grads.x, grads.w_hh

    pairs = list(zip(found(None), found([torch.zeros(1, B, H)] * 2)))
    assert all(torch.equal(a, b) for a, b in pairs) == same


FAULTS = {
    "no barrier after a step": (
        "block",
        "#if SCOPE == BLOCK\n    __syncthreads();",
        "#if SCOPE == BLOCK\n",
    ),
    "one buffer": (
        "block",
        "&shared.inbox[c & 1][sequence(p)]",
        "&shared.inbox[0][sequence(p)]",
    ),
    "partial sums read too early": ("block", "group_sync(1 + wm, 32 * WK);", ""),
    "no wait for the others' h": (
        "cluster",
        "while (!barrier_passed(barrier, c >> 1 & 1)) wait_more(waited, c);",
        "",
    ),
    "a chain of products left out": ("block", "if (chain)\n", "if (chain > 1)\n"),
    "no fence after the wait": ("cluster", "    acquire_shared();\n", ""),
    "weights of the neighbour": (
        "block",
        "to[1] = select_bytes(row, next, 0x7632);",
        "to[1] = to[0];",
    ),
    "barrier never set again": (
        "cluster",
        "if (lane + wm + wk == 0) barrier_expect(barrier, 4 * NB * WORDS);",
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
    "a peer left out": (
        "cluster",
        "const u32 to = (peer + rank) % C;",
        "const u32 to = peer % (C - 1);",
    ),
    "the row of another step": ("block packed", "offsets + t + (", "offsets + t / 2 + ("),
    "the reset of another sequence": (
        "block packed",
        "resets + boundary + sequence(p)",
        "resets + boundary",
    ),
    "a number in place of the next": (
        "block packed",
        "load_if(p + 1, there && two,",
        "load_if(p, there && two,",
    ),
    "what was loaded for the step before": (
        "block packed",
        "if (!EARLY) fetch(u + 1);",
        "if (!EARLY) fetch(u);",
    ),
    "what was loaded for the step before, in a cluster": (
        "cluster packed",
        "if (EARLY) fetch(u + 1);",
        "if (EARLY) fetch(u);",
    ),
    "what was loaded for the next step": (
        "cluster packed",
        "const Inputs now = ahead;",
        "const Inputs& now = ahead;",
    ),
    "phases of packets not looked at": ("grid", "wrong |= word(pair, 3) ^ phase(c);", ""),
    "phases of signs not looked at": ("grid", "wrong |= sign(pair) ^ phase(c);", ""),
    "the last sequence left out": ("grid", "(u32)(B - b0 - 1)", "(u32)(B - b0 - 2)"),
    "one phase for all steps": ("grid", "return c & 2 ? 0 : SIGN;", "return SIGN;"),
    "the phase of another step": (
        "grid",
        "packet.w = with_sign(packet.w, phase(c));",
        "packet.w = with_sign(packet.w, phase(c + 2));",
    ),
    "one buffer of packets": ("grid", "packets + (c & 1) * PACKETS;", "packets;"),
    "one buffer of signs": ("grid", " + (c & 1) * SIGNS;", ";"),
    "a packet in two stores": (
        "grid",
        "emulate::in_flight.push_back([=] { *p = v; }); }\nDEVICE uint4",
        "EACH(k, 2) emulate::in_flight.push_back([=] { ((u64*)p)[k] = ((const u64*)&v)[k]; }); }\n"
        "DEVICE uint4",
    ),
    "a phase before its packet": (
        "grid",
        "store_packet(packets_of(c) + (at * PARTS + part), packet);",
        "store_word(&packets_of(c)[at * PARTS + part].w, packet.w),\n"
        "            store_packet(packets_of(c) + (at * PARTS + part), packet);",
    ),
    "signs that are not restored": ("grid", "      seen.restore_signs(lane);\n", ""),
    "the sign of another packet": ("grid", "lane % PARTS * (32 / PARTS);", "0;"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    where, *change = FAULTS[fault]
    shared = EMULATION + cuda.text("packets.cuh") + cuda.text("worker.cuh")
    assert all(change[0] in shared + cuda.text(kernel) for kernel in ("forward.cu", "backward.cu"))
    monkeypatch.setattr(cuda, "load", loader(folder, (change[0], change[1])))
    scope = where.split()[0]
    packed = "packed" in where
    form = "packed" if packed else "padded"
    H = 61 if packed else 64
    plan = plan_for(scope, H, BRAIN, 1 if scope == "block" else 2, 2)
    with pytest.raises((AssertionError, RuntimeError)):
        check_recurrence("rnn_tanh", plan, (6, 9, 2, H), form=form, resets=packed, dtype=BRAIN)


@needs_compiler
@pytest.mark.parametrize("fault", ["", "if (any_of_warp(nan)) {", "EXACT ? finite(v1.high) : "])
@pytest.mark.parametrize("scope", ["block", "cluster", "grid"])
def test_infinite_numbers(
    fault: str, scope: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """In three parts a product of an infinite number is what it is in one; without the second try,
    or with the parts of an infinite number multiplied too, it is not."""
    change = (fault, "if (false) {" if fault.startswith("if") else "") if fault else ("", "")
    monkeypatch.setattr(cuda, "load", loader(folder, change))
    given = operands("rnn_relu", (2, 9, 2, 32), (False,))
    given.given[5][0, 3, 7] = float("inf")
    # exact in TF32: their low parts are 0
    given.given[2][::3] = given.given[2][::3].sign() / 4
    want = evaluate(given, dtype=torch.float64, oracle=True)["y"]
    assert want.isinf().any()
    plan = plan_for(scope, 32, SINGLE, 1 if scope == "block" else 2, 2)
    got = evaluate(given, plan)["y"]
    same = torch.allclose(got.double(), want, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert same == (not fault)


@needs_compiler
def test_memory(folder: Path) -> None:
    """The plan's figure is the compiler's."""
    for scope, blocks, splits, adjoint in (
        ("block", 1, 1, False),
        ("cluster", 2, 2, True),
        ("grid", 3, 4, True),
    ):
        plan = plan_for(scope, 90, SINGLE, blocks, splits, 16)
        for registers in (0, 32):
            kept = plan._replace(weight_registers=registers)
            built = library(folder, ("", ""), cells.lstm, kept, SINGLE, adjoint, False, True)
            assert built.emulate_shared() == shared_bytes(cells.lstm, kept, 4, adjoint)
            if scope == "grid":
                assert built.emulate_exchange() == exchange_bytes(cells.lstm, kept, 4, adjoint)


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
        real_load(cells.rnn_tanh, plan, BRAIN, False, False, True, True, device)(
            (16, 2, 1), (1, 2, 3)
        )
    assert len(list(tmp_path.glob("cache/*"))) == 1
    shared = shared_bytes(cells.rnn_tanh, plan, 2, False)
    call = ((16, 2, 1), (32,), (1, 2, 3)), {"shared_mem": shared}, shared
    assert asked == 2 * [(b"\x7fELF", False), (7, 14, 1), call]
    launch = real_load(
        cells.rnn_tanh, plan_for("grid", 256, BRAIN, 16, 8), BRAIN, False, False, True, True, device
    )
    with pytest.raises(RuntimeError, match=r"needs .* blocks at a time"):
        launch((16, 9, 1), ())


THREADS = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from rnn.kernels.gpu.cuda.launch import build

ready = Barrier(4)

def compiled(k):
    ready.wait()
    return build('extern "C" __global__ void f(int* p) {{ *p = {k}; }}'.format(k=k), 90)

with ThreadPoolExecutor(4) as pool:
    assert all(cubin for cubin, _ in pool.map(compiled, range(4)))
"""


def test_threads_that_compile_first() -> None:
    """At the same time, in a process that has not loaded the compiler."""
    pytest.importorskip("cupy", reason="there is no CuPy, whose NVRTC compiles CUDA C++")
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr


class Driver:
    """Answers as the CUDA driver does: `active` clusters by size, and an error for other sizes.
    `contexts`: of each device; `current` is that of the thread, 0 for none."""

    def __init__(self, active: dict[int, int], error: int = 912, current: int = 5) -> None:
        self.active = active
        self.error = error
        self.loaded = 0
        self.attributes = list[tuple[int, int]]()
        self.current = current
        self.contexts = {0: 5, 1: 6}

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.current
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = self.contexts.get(device.value, 0)
        return 0 if device.value in self.contexts else 101

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.current = context.value
        return 0

    def cuModuleLoadData(self, module: Any, cubin: bytes) -> int:
        if not self.current:
            return 201
        self.loaded += 1
        return 0

    def cuModuleUnload(self, module: Any) -> int:
        self.loaded -= 1
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        assert name.decode() in occupancy.PROBE
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        self.attributes.append((attribute, value))
        return 0

    def cuOccupancyMaxActiveClusters(self, count: Any, function: Any, config: Any) -> int:
        given = config._obj
        attribute = given.attributes[0]
        assert given.attribute_count == 1 and attribute.kind == 4 and given.shared == 232448
        assert given.grid_x % attribute.size[0] == 0 and [*attribute.size[1:3]] == [1, 1]
        count._obj.value = self.active.get(attribute.size[0], 7)
        return 0 if attribute.size[0] in self.active else self.error


@pytest.mark.parametrize(
    ("driver", "want"),
    [
        (Driver({2: 60, 4: 30, 8: 14, 16: 6}), (60, 30, 14, 6)),
        (Driver({2: 60, 4: 30, 8: 14, 16: 0}), (60, 30, 14, 0)),
        (Driver({2: 60, 4: 30, 8: 14}), (60, 30, 14, 0)),
        (Driver({2: 60}, error=1), ()),
    ],
    ids=["all", "none of 16 fits", "16 is refused", "another error"],
)
def test_active_clusters(
    driver: Driver, want: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(occupancy, "_driver", lambda: driver)
    monkeypatch.setattr(occupancy, "build", lambda code, capability: (b"cubin", ""))
    assert occupancy.active_clusters(90, 232448) == want
    assert driver.loaded == 0 and (8, 232448) in driver.attributes and (14, 1) in driver.attributes


@pytest.mark.parametrize(("device", "context"), [(0, 5), (1, 6), (2, 0)])
def test_a_thread_without_a_context(
    device: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has not called CUDA in it yet: it gets the context of its device."""
    driver = Driver({2: 60, 4: 30, 8: 14, 16: 6}, current=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(occupancy, "_driver", lambda: driver)
    monkeypatch.setattr(occupancy, "build", lambda code, capability: (b"cubin", ""))
    found = occupancy.active_clusters(90, 232448)
    assert driver.current == context and found == ((60, 30, 14, 6) if context else ())


def test_no_driver_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(occupancy, "_driver", missing)
    assert occupancy.active_clusters(90, 232448) == ()


class Refusing:
    """CuPy's module and kernel, where the driver refuses something."""

    def __init__(self, refused: str, machine: SimpleNamespace) -> None:
        self.refused = refused
        self.kernel = SimpleNamespace(ptr=7)
        self.max_dynamic_shared_size_bytes = 0
        machine.set_attribute = lambda *_: self.refuse("attribute")

    def refuse(self, what: str) -> None:
        if what == self.refused:
            raise RuntimeError("CUDA_ERROR_INVALID_CLUSTER_SIZE: cluster size is not valid")

    def get_function(self, name: str) -> Any:
        self.refuse("load")
        return self

    def __call__(self, *_: Any, **__: Any) -> None:
        self.refuse("launch")


@pytest.mark.parametrize("refused", ["load", "attribute", "launch"])
def test_what_cuda_refuses_names_the_plan(
    refused: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("cupy", reason="there is no CuPy, whose NVRTC compiles CUDA C++")
    cupy_cuda = importlib.import_module("cupy").cuda
    machine = SimpleNamespace()
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(cuda, "_cubin", lambda *_: tmp_path)
    monkeypatch.setattr(cuda, "on_stream", lambda *_: nullcontext())
    monkeypatch.setattr("cupy.RawModule", lambda **_: Refusing(refused, machine))
    monkeypatch.setattr(cupy_cuda, "Device", lambda index: nullcontext())
    monkeypatch.setattr(cupy_cuda.driver, "funcSetAttribute", lambda *_: machine.set_attribute())
    plan = plan_for("cluster", 256, BRAIN, 16, 1)
    real_load.cache_clear()
    words = r"cuda:0 does not run the plan .*cluster .*blocks=16.*: CUDA_ERROR_INVALID_CLUSTER_SIZE"
    with pytest.raises(RuntimeError, match=words) as caught:
        real_load(cells.rnn_tanh, plan, BRAIN, False, False, True, True, torch.device("cuda", 0))(
            (16, 2, 1), ()
        )
    assert "plan=" in str(caught.value) and caught.value.__cause__ is not None


def test_a_wait_that_does_not_end() -> None:
    """By the clock, not by the number of polls; the message has the plan and the step."""
    pytest.importorskip("cupy", reason="there is no CuPy, whose NVRTC compiles CUDA C++")
    assert 60 < cuda.WAIT_LIMIT * 2**32 / 1e9 < 600
    # the LSTM in a grid has no registers for a message, nor has the RNN forward in the largest
    for scope, cell in (("cluster", cells.lstm), ("grid", cells.gru)):
        plan = plan_for(scope, 64, BRAIN, 2, 2)
        code = cuda.program(cuda.text("ptx.cuh"), cell, plan, BRAIN, True, cuda.Masks.NONE, True)
        cubin, _ = cuda.build(code, 90)
        assert f"came in time for {plan_text(plan)}".encode() in cubin
        assert "wait_more(waited, c)" in code and f"#define WAIT_LIMIT {cuda.WAIT_LIMIT}" in code


GPUS = {80: Gpu(80, 108, 166912), 90: Gpu(90, 132, 232448), 100: Gpu(100, 148, 232448)}
Kernel = tuple[cells.Cell, Plan, torch.dtype, bool, cuda.Masks, bool]
NONE, ENDS, RESETS = cuda.Masks
# Masks, and whether sizes are even: the plainest kernels and the largest
EXTREMES = [(NONE, True), (RESETS, False)]


def kernels(
    capability: int,
    shapes: list[tuple[int, int]],
    names: list[str],
    kinds: list[tuple[cuda.Masks, bool]] = EXTREMES,
) -> list[Kernel]:
    """Each kernel of these kinds that a plan for B sequences of H units chooses."""
    found: dict[Kernel, None] = {}
    modes = (BRAIN, "ieee"), (SINGLE, "tf32"), (SINGLE, "tf32x3")
    for (B, H), name, (dtype, precision) in itertools.product(shapes, names, modes):
        cell = getattr(cells, name)
        plan = next(
            iter(cuda_plans(cell, (B, H, H, 1), dtype.itemsize, precision, GPUS[capability])), None
        )
        if plan is not None:
            for (masks, even), adjoint in itertools.product(kinds, (False, True)):
                found[cell, plan, dtype, adjoint, masks, even] = None
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
            spilt = re.search(r"(\d+) bytes spill stores", log)
            assert used and spilt and int(spilt[1]) == 0, (cell.name, kernel, log)
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
    stored = [
        kernel
        for kernel in kernels(90, [(16, 768)], ["lstm", "gru"])
        if kernel[1].precision == "tf32" and kernel[5]
    ]
    assert len(stored) == 4 and all(kernel[1].weight_registers for kernel in stored)
    chosen += stored
    cell, plan, _, adjoint, masks, even = chosen[0]
    chosen.append((cell, plan, HALF, adjoint, masks, even))
    assert {kernel[1].scope for kernel in chosen} == {"block", "cluster", "grid"}
    check_kernels(90, chosen)


# Kernels that only just have enough registers: capability, cell, B, H, dtype, precision, adjoint,
# masks, even.
FULL = [
    (80, "gru", 16, 64, SINGLE, "tf32x3", False, RESETS, True),
    (80, "rnn_tanh", 16, 256, BRAIN, "ieee", True, RESETS, True),
    (80, "gru", 4096, 360, BRAIN, "ieee", True, RESETS, False),
    (80, "lstm", 64, 360, BRAIN, "ieee", True, RESETS, False),
    (90, "lstm", 4096, 128, BRAIN, "ieee", True, RESETS, False),
    (90, "gru", 256, 64, SINGLE, "tf32x3", False, NONE, True),
    (90, "lstm", 256, 64, SINGLE, "tf32x3", False, NONE, True),
    (90, "rnn_tanh", 256, 256, SINGLE, "tf32x3", False, NONE, False),
    (90, "lstm", 1, 360, SINGLE, "tf32x3", False, NONE, True),
    (90, "gru", 1, 360, SINGLE, "tf32x3", True, RESETS, False),
    (90, "rnn_tanh", 16, 2048, BRAIN, "ieee", False, NONE, False),
    (90, "gru", 4096, 128, SINGLE, "tf32x3", False, ENDS, False),
    (90, "rnn_tanh", 256, 256, SINGLE, "tf32x3", False, ENDS, True),
    (90, "lstm", 64, 1024, BRAIN, "ieee", False, RESETS, True),
    (100, "rnn_tanh", 16, 1024, SINGLE, "tf32", True, RESETS, True),
    (100, "rnn_tanh", 16, 2048, BRAIN, "ieee", False, RESETS, False),
]


@pytest.mark.parametrize("full", FULL, ids=name_of)
def test_compiles_with_few_registers_left(full: tuple[Any, ...]) -> None:
    capability, name, B, H, dtype, precision, *form = full
    cell = getattr(cells, name)
    gpu = GPUS[capability]
    plan = cuda_plans(cell, (B, H, H, 1), dtype.itemsize, precision, gpu)[0]
    adjoint, masks, even = form
    check_kernels(capability, [(cell, plan, dtype, adjoint, masks, even)])


@pytest.mark.slow
@pytest.mark.parametrize("even", [True, False], ids=["even", "odd"])
@pytest.mark.parametrize("masks", cuda.Masks, ids=lambda masks: masks.name)
@pytest.mark.parametrize("capability", GPUS)
def test_compiles_all(capability: int, masks: cuda.Masks, even: bool) -> None:
    units = 20, 64, 128, 192, 256, 360, 512, 768, 1024, 2048
    shapes = [(B, H) for B in (1, 16, 64, 256, 4096) for H in units]
    check_kernels(capability, kernels(capability, shapes, OF_EACH_SIZE, [(masks, even)]))


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
