"""Plans are pure data from a pure function."""

import itertools
import json

import pytest

from rnn.kernels import cells
from rnn.kernels.cells import Cell
from rnn.kernels.plan import Gpu, Plan, make_plan, plan_of, plan_text
from tests.cases import CELLS

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
        (cells.rnn_tanh, (4096, 10, 257, 1), "bfloat16", False, "triton", "launch", False),
        (cells.rnn_tanh, (64, 10, 1024, 1), "bfloat16", False, "triton", "launch", False),
        (cells.lstm, (64, 10, 64, 1), "bfloat16", False, "triton", "block", True),
        (cells.lstm, (64, 10, 128, 1), "bfloat16", False, "triton", "block", True),
        (cells.lstm, (64, 10, 129, 1), "bfloat16", False, "triton", "launch", False),
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
        programs = -(-H // plan.units) * -(-B // plan.sequences) * N
        if plan.scope == "block":
            assert plan.units >= H and plan.depth >= H
        if plan.scope == "grid":
            assert programs <= gpu.multiprocessors, (
                "a grid that is not resident would wait for ever"
            )


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
