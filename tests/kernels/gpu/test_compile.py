"""Every kernel that a plan can choose, compiled ahead of time: it fits its GPU, and what is
resident stays so."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rnn.kernels import cells
from rnn.kernels.planner import BLOCK_UNITS
from rnn.regularisers import extended_cell, norm_of
from tests.cases import NAMES

Row = tuple[str, str, int, int, int, int, list[str]]
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
BYTES = {"ieee": 2, "tf32": 4, "tf32x3": 8}
MASKS = ["offsets", "resets", "states"]

# One of each kind: block at its largest, fused or not, grid, launch, library.
FEW: list[Row] = [
    ("rnn_tanh", "bfloat16", 8, 256, 256, 1, []),
    ("rnn_tanh", "float16", 8, 32, 256, 2, ["lengths", "resets"]),
    ("rnn_tanh", "float32", 8, 128, 128, 2, ["tf32"]),
    ("rnn_relu", "float32", 8, 128, 128, 1, []),
    ("lstm", "bfloat16", 8, 128, 128, 1, []),
    ("lstm", "bfloat16", 8, 32, 128, 1, MASKS),
    ("lstm", "float32", 64, 1024, 1024, 1, ["launch"]),
    ("lstm", "bfloat16", 64, 1024, 1024, 1, ["launch", "graph"]),
    ("lstm", "float32", 64, 1024, 1024, 1, []),
    ("gru", "bfloat16", 64, 1024, 1024, 2, ["graph"]),
    ("gru", "bfloat16", 8, 128, 128, 1, []),
    ("gru", "float32", 8, 32, 64, 2, ["tf32"]),
    ("rnn_tanh", "bfloat16", 8, 384, 384, 1, []),
    ("lstm", "bfloat16", 8, 128, 128, 1, ["norm"]),
    ("gru", "float32", 8, 64, 64, 2, ["tf32", "norm"]),
    # These have the fewest registers to spare
    ("rnn_tanh", "float32", 8, 100, 128, 2, ["tf32", *MASKS]),
    ("lstm", "bfloat16", 8, 300, 97, 2, MASKS),
    ("lstm", "bfloat16", 8, 300, 97, 2, ["norm", *MASKS]),
]


def all_rows() -> list[Row]:
    """Of each cell and dtype: block at its smallest and largest, with and without W_ih, grid,
    launch for few sequences and many; the plain kernels, and those with everything that a layer can
    be given."""
    rows: list[Row] = []
    for name in NAMES:
        gates = getattr(cells, name).gates
        for dtype, tf32 in (
            ("bfloat16", []),
            ("float16", []),
            ("float32", ["tf32"]),
            ("float32", []),
        ):
            size = 2 if dtype != "float32" else 4 if tf32 else 8
            largest = BLOCK_UNITS[gates][size]
            layers = [
                (8, 16, 13),
                (8, 32, largest),
                (8, 100, largest),
                (8, 300, largest * 3 // 4 + 1),
                (8, 300, largest * 3 // 2),
                (2, 1024, 1024),
                (64, 1024, 1024),
            ]
            rows += [
                (name, dtype, B, I, H, 2, tf32 + masks)
                for B, I, H in layers
                for masks in ([], MASKS)
            ]
            rows += [
                (name, dtype, *layers[-1], 2, [*tf32, scope, *graph])
                for scope in ("launch", "library")
                for graph in ([], ["graph"])
            ]
            rows += [
                (name, dtype, *layer, 2, [*tf32, "norm", *masks])
                for layer in (layers[0], layers[1], layers[3])
                for masks in ([], MASKS)
            ]
    return rows


def compiled(rows: list[Row], capability: int) -> list[dict[str, Any]]:
    """What the forward and the backward kernel of each row use. Two processes compile, as one uses
    one core."""
    halves = [half for half in (rows[::2], rows[1::2]) if half]
    with ThreadPoolExecutor(2) as processes:
        found = [iter(used) for used in processes.map(partial(_compiled, capability), halves)]
    return [next(found[k % 2]) for k in range(len(rows)) for _ in ("forward", "backward")]


def _compiled(capability: int, rows: list[Row]) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    lines = "".join(json.dumps([*row[:6], capability, row[6]]) + "\n" for row in rows)
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "compile_kernels.py"],
        input=lines,
        text=True,
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(rows)
    return found


def may_spill(H: int, weights: int, norm: bool) -> tuple[int, int]:
    """Bytes of the stack, and words in the time loop, where they are read at every step, of a
    kernel that has W_hh in so many registers of a thread.

    A launch of one step may spill a few words, as may what comes before the loop, in which W_hh is
    read number by number where it is not aligned."""
    # Half of all registers are too few for the tensors of layer norm (up to 9 saved, 5 constants
    # and 7 gradients, of 4 numbers a thread), the more so with an address for every number; without
    # it for an LSTM's on capability 8.0. (Triton 3.6 spills only there, of layer norm, 7 words.)
    if weights == 128 and norm:
        return (384, 20) if H % 16 else (32, 3)
    return (128, 4 if weights == 128 else 0) if H % 16 else (32, 0)


def check(row: Row, used: dict[str, Any], capability: int) -> str:
    """What is wrong with a kernel, if anything."""
    (name, _, _, _, H, _, options) = row
    _, scope, units, sequences, depth, warps, fused, precision, *_ = used["plan"]
    cell = getattr(cells, name)
    norm = "norm" in options
    if norm:
        cell = extended_cell(cell, None, (), False, norm_of(cell, True))
    G = cell.gates
    S = cell.states
    A = cell.saved
    forward = used["kernel"] == "forward_kernel"
    size = BYTES[precision]
    weights = G * units * depth * min(size, 4) // (128 * warps)
    stack, spilled = may_spill(H, weights, norm)
    if used["stack"] > stack:
        return f"spills {used['stack']} bytes"
    if scope not in ("launch", "library") and used["local"] > spilled:
        return f"spills in the time loop: {used['local']} words"
    # Each product and each operand changes its layout, which takes two barriers: what is loaded
    # does not.
    moved = G + 2 + forward * fused * (G + 1 if cell.split else 1)
    # and each mean, of sums over warps
    moved += 4 if norm else 0
    if (
        scope == "block"
        and set(options) <= {"tf32", "norm"}
        and not H % 16
        and size < 8
        and used["barriers"] > 2 * moved
    ):
        return f"waits {used['barriers']} times in a step"
    if name == "lstm" and scope == "block" and not used["fused"]:
        return "multiplies and adds apart, as Triton's default is from 3.10 on"
    if used["shared"] > SHARED_MEMORY[capability]:
        return f"wants {used['shared']} bytes of shared memory"
    if scope == "launch":
        return ""
    # Loads in the time loop: x and constants, or what the adjoint is given; lengths, offsets and
    # resets; h or dr of the grid, and its counter. W_hh read again would be many more.
    given = 2 * S + A + 1 + (S - 1) * ("states" in options)
    streams = (1 if fused else G) + cell.constants if forward else given
    streams += 5 if {"lengths", "offsets", "resets"} & {*options} else 0
    if scope == "grid":
        streams += -(-H // depth) * (1 if forward else G) + 1
    if scope == "library":
        streams += G if forward else 1
    if H % 16:  # without alignment each number by itself
        streams *= units * sequences // (32 * warps)
    if used["LDG"] > streams:
        return f"reads {used['LDG']} times in the time loop, {streams} expected"
    # Shared memory read by each thread in a step: an operand and a change of layout, less than W_hh
    # would be. Only in half precision do instructions of their own read operands, so that there
    # W_hh would be among them.
    operand = depth * sequences * size * (1 if forward else G) // 32
    if scope == "block" and H >= 64 and set(options) <= {"tf32"}:
        weights = G * units * depth * min(size, 4) // (32 * warps)
        read = (
            used["shared_bytes"]["LDSM"]
            + (used["shared_bytes"]["LDS"] if size > 2 else 0)
            - operand
        )
        if read >= weights:
            return f"reads {read} bytes in the time loop: is W_hh of {weights} among them?"
    return ""


@pytest.mark.parametrize(
    ("rows", "capability"),
    [
        pytest.param(FEW, 90, id="few-90"),
        *(
            pytest.param(all_rows(), chip, id=f"all-{chip}", marks=pytest.mark.slow)
            for chip in SHARED_MEMORY
        ),
    ],
)
def test_kernels(rows: list[Row], capability: int) -> None:
    found = compiled(rows, capability)
    wrong = [
        (row, used["kernel"], used["plan"], text)
        for k, used in enumerate(found)
        if (text := check(row := rows[k // 2], used, capability))
    ]
    assert not wrong, "\n".join(map(str, wrong))
    scopes = {used["plan"][1] for used in found}
    assert scopes == {"block", "grid", "launch", "library"}


@pytest.mark.slow
def test_amd() -> None:
    """Only compiled: block at its largest, and launch."""
    rows: list[Row] = [
        ("lstm", "bfloat16", 8, 64, 64, 1, []),
        ("rnn_tanh", "float16", 64, 1024, 1024, 2, ["launch", "graph"]),
    ]
    found = compiled(rows, 942)
    assert [used["plan"][1] for used in found] == ["block", "block", "launch", "launch"]
    assert all(used["stack"] == 0 and used["shared"] <= 65536 for used in found)


def test_batch_sizes_and_steps_share_a_kernel() -> None:
    rows = [
        ("lstm", "bfloat16", 8, 64, 64, 1, ["kinds", "lengths", "resets"]),
        ("rnn_tanh", "bfloat16", 8, 384, 384, 1, ["kinds"]),
        ("gru", "float32", 64, 500, 500, 2, ["kinds", "launch"]),
        ("gru", "float32", 64, 500, 500, 2, ["kinds"]),
    ]
    found = compiled(rows, 90)
    assert [used["plan"][1] for used in found[::2]] == ["block", "grid", "launch", "library"]
    assert all(used["kinds"] == 1 for used in found), found


def test_barrier_gives_up() -> None:
    """A program that waits in vain ends by the clock, instead of hanging."""
    found = compiled([("rnn_tanh", "bfloat16", 8, 384, 384, 1, [])], 90)
    assert [used["plan"][1] for used in found] == ["grid", "grid"]
    assert all(used["gives_up"] for used in found)


def test_resident_layers() -> None:
    """The sizes up to which W_hh of one layer stays within one block."""
    assert {2: 256, 4: 128}.items() <= BLOCK_UNITS[1].items()
    assert BLOCK_UNITS[3][2] >= 128
    assert BLOCK_UNITS[4][2] >= 128
