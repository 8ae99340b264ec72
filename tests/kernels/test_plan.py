"""Plans are pure data from a pure function."""

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rnn.kernels import cells, costs
from rnn.kernels.cells import Cell
from rnn.kernels.plan import (
    Gpu,
    Plan,
    k_fragments,
    plan_of,
    plan_text,
    shared_bytes,
    slices,
    stored_fragments,
)
from rnn.kernels.planner import NoPlan, cuda_plans, make_plan
from rnn.kernels.prediction import Prediction, predict
from rnn.regularisers import extended_cell, norm_of
from tests.cases import CELLS

ROOT = Path(__file__).parents[2]
H200 = Gpu(90, 132, 232448)
SMALL = Gpu(86, 28, 101376)  # a laptop's


@pytest.mark.parametrize(
    ("cell", "sizes", "dtype", "tf32", "backend", "scope", "fused"),
    [
        (cells.rnn_tanh, (1, 10, 20, 1), "float32", False, "triton", "block", True),
        (cells.rnn_tanh, (64, 10, 256, 2), "bfloat16", False, "triton", "block", True),
        (cells.rnn_tanh, (64, 256, 256, 1), "float16", False, "triton", "block", False),
        (cells.rnn_tanh, (64, 10, 128, 1), "float32", True, "triton", "block", True),
        (cells.rnn_tanh, (64, 10, 257, 1), "bfloat16", False, "triton", "grid", False),
        (cells.rnn_tanh, (4096, 10, 257, 1), "bfloat16", False, "triton", "library", False),
        (cells.rnn_tanh, (64, 10, 1024, 1), "bfloat16", False, "triton", "library", False),
        (cells.lstm, (64, 10, 64, 1), "bfloat16", False, "triton", "block", True),
        (cells.lstm, (64, 10, 128, 1), "bfloat16", False, "triton", "block", True),
        (cells.lstm, (64, 10, 129, 1), "bfloat16", False, "triton", "library", False),
        (cells.gru, (64, 10, 128, 1), "bfloat16", False, "triton", "block", True),
    ],
)
def test_scope(
    cell: Cell,
    sizes: tuple[int, int, int, int],
    dtype: str,
    tf32: bool,
    backend: str,
    scope: str,
    fused: bool,
) -> None:
    plan = make_plan(cell, sizes, dtype, H200, tf32)
    assert (plan.backend, plan.scope, plan.fused) == (backend, scope, fused)


def test_weights_of_the_input_give_way() -> None:
    """Where W_hh and W_ih do not fit beside each other, W_hh stays."""
    plans = [
        make_plan(cells.lstm, (64, 10, 128, 1), "bfloat16", gpu)
        for gpu in (H200, Gpu(80, 108, 166912), SMALL)
    ]
    assert [(plan.scope, plan.fused) for plan in plans] == [
        ("block", True),
        ("block", False),
        ("launch", False),
    ]


@pytest.mark.parametrize("gpu", [H200, SMALL], ids=["H200", "small"])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_plans_fit(cell: Cell, gpu: Gpu) -> None:
    sizes = itertools.product(
        (1, 7, 64, 1000), (1, 32, 500), (1, 16, 63, 100, 128, 256, 500, 4096), (1, 2)
    )
    for (B, I, H, N), dtype, tf32 in itertools.product(
        sizes, ("float32", "float16", "bfloat16"), (False, True)
    ):
        plan = make_plan(cell, (B, I, H, N), dtype, gpu, tf32)
        assert plan == make_plan(cell, (B, I, H, N), dtype, gpu, tf32)
        assert (plan.precision == "ieee") == (dtype != "float32")
        assert plan.precision != "tf32" or tf32, "float32 loses digits only where it was allowed to"
        assert all(n & (n - 1) == 0 for n in (plan.units, plan.sequences, plan.depth, plan.warps))
        assert plan.depth >= 16 and plan.units >= 16
        tiles = [part.tiles for part in slices(plan, B)]
        assert sum(tiles) == -(-B // plan.sequences)
        programs = -(-H // plan.units) * max(tiles) * N
        if plan.scope == "block":
            assert plan.units >= H and plan.depth >= H
        if plan.scope == "grid":
            assert programs <= gpu.multiprocessors, (
                "a grid that is not resident would wait for ever"
            )


@pytest.mark.parametrize(
    ("cell", "dtype", "tf32", "largest"),
    [
        (cells.rnn_tanh, "float16", False, 256),
        (cells.rnn_tanh, "float32", False, 128),
        (cells.gru, "bfloat16", False, 128),
        (cells.lstm, "float32", True, 64),
        (cells.lstm, "float32", False, 32),
    ],
)
def test_rows_in_one_block(cell: Cell, dtype: str, tf32: bool, largest: int) -> None:
    """Layer norm: a mean over all units, of which a program has some alone in other scopes."""
    normal = extended_cell(cell, None, (), False, norm_of(cell, True))
    for H in (1, largest // 2 + 1, largest):
        plan = make_plan(normal, (8, 10, H, 2), dtype, WITH_CUDA, tf32)
        assert (plan.backend, plan.scope, plan.fused) == ("triton", "block", False)
        assert plan.units >= H
    with pytest.raises(NoPlan, match=f"no kernel has the {largest + 1} hidden units of"):
        make_plan(normal, (8, 10, largest + 1, 2), dtype, WITH_CUDA, tf32)
    with pytest.raises(NoPlan):
        make_plan(normal, (8, 10, largest, 2), dtype, WITH_CUDA._replace(shared_memory=1000), tf32)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_host(cell: Cell) -> None:
    assert make_plan(cell, (16, 32, 32, 1), "float32", None) == Plan("numpy")
    assert make_plan(cell, (64, 512, 512, 1), "float32", None) == Plan("numpy")
    assert make_plan(cell, (64, 512, 512, 1), "float32", None, native=True) == Plan("native")
    assert make_plan(cell, (16, 32, 32, 1), "float64", None, native=True) == Plan("native")
    assert make_plan(cell, (16, 32, 32, 1), "float32", H200, native=True).backend == "triton"


@pytest.mark.parametrize(
    "plan", [Plan("native"), Plan("triton", "block", 16, 8, 16, 1, True, "tf32x3"), Plan("numpy")]
)
def test_text(plan: Plan) -> None:
    assert plan_of(plan_text(plan)) == plan_of(json.dumps(plan)) == plan


WITH_CUDA = H200._replace(cuda=True)
REFUSED = WITH_CUDA._replace(clusters=(66, 31, 15, 0))


def test_clusters_that_run_at_once() -> None:
    """On an H200 until the driver was asked, and on smaller devices in proportion; else what it
    said."""
    active = [WITH_CUDA.active_clusters(blocks) for blocks in (2, 4, 8, 16)]
    assert active == [66, 31, 15, 7]
    assert WITH_CUDA._replace(multiprocessors=66).active_clusters(16) == 3
    assert REFUSED.active_clusters(4) == 31
    assert Gpu(80, 108, 166912, True).active_clusters(2) == 0


def test_a_refused_cluster_is_not_chosen() -> None:
    sizes = (16, 256, 256, 1)
    plans = [make_plan(cells.lstm, sizes, "bfloat16", gpu) for gpu in (WITH_CUDA, REFUSED)]
    assert plans[0].blocks == 16
    assert plans[1].backend == "cuda" and plans[1].blocks != 16
    nothing = WITH_CUDA._replace(clusters=(0, 0, 0, 0))
    assert all(
        plan.scope != "cluster" for plan in cuda_plans(cells.lstm, sizes, 2, "ieee", nothing)
    )


def test_waves_are_of_what_runs_at_once() -> None:
    """8 clusters of 16 blocks are 128 of 132 multiprocessors, and yet two waves."""
    plan = Plan("cuda", "cluster", 32, 8, 0, 8, False, "ieee", 16)
    waves = [
        predict(cells.rnn_tanh, plan, 2, (8 * tiles, 512, 512, 1), WITH_CUDA).waves
        for tiles in (1, 7, 8, 15)
    ]
    assert waves == [1, 1, 2, 3]
    block = plan._replace(scope="block", blocks=1, units=64)
    assert predict(cells.rnn_tanh, block, 2, (8 * 133, 64, 64, 1), WITH_CUDA).waves == 2


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_slices_of_a_grid_run_at_once(cell: Cell) -> None:
    for B, H, N, size in itertools.product((1, 64, 1000), (512, 1024, 2048), (1, 2), (2, 4)):
        plans = cuda_plans(cell, (B, H, H, N), size, "ieee" if size == 2 else "tf32", WITH_CUDA)
        for plan in (plan for plan in plans if plan.scope == "grid"):
            parts = slices(plan, B)
            assert plan.blocks * max(part.tiles for part in parts) * N <= WITH_CUDA.multiprocessors
            assert [part.first for part in parts[1:]] == [
                part.first + part.tiles for part in parts[:-1]
            ]
            assert sum(part.tiles for part in parts) == -(-B // plan.sequences)
            found = predict(cell, plan, size, (B, H, H, N), WITH_CUDA)
            assert (found.waves, found.slices) == (1, len(parts))


def test_prediction_counts_what_it_says() -> None:
    """The adjoint of a gated cell takes longer, and more of a batch; a cluster's step longer where
    it gets more bytes; a grid's where more blocks read the L2 cache."""
    plan = Plan("cuda", "cluster", 32, 8, 0, 8, False, "ieee", 16)

    def of(plan: Plan, cell: Cell, B: int, size: int = 2) -> Prediction:
        return predict(cell, plan, size, (B, 512, 512, 1), WITH_CUDA)

    lstm = of(plan, cells.lstm, 8)
    assert lstm.adjoint > lstm.forward > of(plan, cells.rnn_tanh, 8).forward
    costs = WITH_CUDA.costs
    more = 3 * 512 * 8 * 2 / costs.cluster_bytes / costs.cycles_per_us
    assert lstm.adjoint - lstm.forward > more
    grid = Plan("cuda", "grid", 16, 8, 0, 8, False, "ieee", 32)
    assert of(grid, cells.lstm, 32).adjoint > of(grid, cells.lstm, 8).adjoint
    sliced = of(grid._replace(slice_tiles=1), cells.lstm, 32)
    assert sliced.slices == 4 and sliced.forward == 4 * of(grid, cells.lstm, 8).forward


def test_costs_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are written, by the device's name; for another device those of the H200."""
    known = WITH_CUDA.costs
    monkeypatch.setattr(costs, "FOLDER", tmp_path)
    measured = known._replace(device="NVIDIA X 1", commit="abc", predicted=("overhead",))
    costs.write(measured, tmp_path)
    costs.write(known, tmp_path).rename(tmp_path / "default.json")
    costs.costs_of.cache_clear()
    try:
        assert costs.costs_of("NVIDIA X 1") == measured
        assert costs.costs_of("Y") == known
    finally:
        costs.costs_of.cache_clear()
    assert measured.source == "measured on NVIDIA X 1 at abc; overhead predicted"


def test_committed_costs_say_where_they_are_from() -> None:
    others = {"device", "commit", "predicted"}
    for path in costs.FOLDER.glob("*.json"):
        found = costs.read(path)
        assert path.stem in (costs.slug(found.device), costs.DEFAULT)
        assert {*found.predicted} <= {*costs.Costs._fields} - others
        if not found.commit:
            assert {*found.predicted} == {*costs.Costs._fields} - others
            assert "not measured" in found.source


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("plans")


def test_table_is_current(plans: Any) -> None:
    assert plans.PATH.read_text() == plans.text(), "python bench/plans.py writes it"


@pytest.mark.parametrize(("name", "largest"), [("RNN", 1024), ("LSTM", 768), ("GRU", 768)])
def test_no_common_layer_reads_its_weights_alone(plans: Any, name: str, largest: int) -> None:
    """Launch scope, which reads W_hh at every step in kernels of our own, is for no layer in TF32
    of up to these sizes, nor of any on which a library's product is faster."""
    for H, B in itertools.product(plans.HIDDEN, (1, 16, 64)):
        if largest >= H:
            plan = plans.entry(plans.CELLS[name], "tf32", H, B).plan
            assert plan.scope != "launch"
            assert B > 16 or plan.backend == "cuda", "W_hh is resident"
    for mode, H, B in itertools.product(plans.MODES, plans.HIDDEN, plans.BATCHES):
        cell = plans.CELLS[name]
        chosen = plans.entry(cell, mode, H, B)
        library = Plan("triton", "library", 32, 16, 16, 4, False, chosen.plan.precision)
        size = 2 if mode in ("bf16", "fp16") else 4
        other = predict(cell, library, size, (B, H, H, 1), plans.H200)
        assert chosen.predicted.both <= other.both


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cuda_plans_fit(cell: Cell) -> None:
    """In shared memory with the weights that are there, of blocks that run at once; more registers
    than the limit for weights has none that stores some."""
    small = Gpu(80, 108, 166912, True)
    for gpu, B, H, size in itertools.product(
        (WITH_CUDA, small), (1, 100), (100, 384, 768, 2048), (2, 4)
    ):
        for plan in cuda_plans(cell, (B, H, H, 1), size, "ieee" if size == 2 else "tf32", gpu):
            for adjoint in (False, True):
                assert shared_bytes(cell, plan, size, adjoint) <= gpu.shared_memory
                rows = 1 if adjoint else cell.gates
                words = 4 * rows * k_fragments(cell, plan, size, adjoint)
                stored = 4 * stored_fragments(cell, plan, size, adjoint)
                assert words - stored <= (plan.weight_registers or 128)
            assert plan.blocks * plan.units >= H and plan.warps <= 16
