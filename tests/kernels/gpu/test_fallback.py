"""Clusters and cooperative launches that a device refuses: another plan is in their place."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rnn.kernels import cells
from rnn.kernels.gpu import fallback
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.gpu.fallback import with_fallback
from rnn.kernels.gpu.faults import Refused, faults_of
from rnn.kernels.plan import Gpu, Plan, plan_text
from rnn.kernels.planner import cuda_plans
from rnn.kernels.types import Layout, Weights
from tests.cases import check_recurrence
from tests.kernels.gpu.emulator import COMPILER, loader

H200 = Gpu(90, 132, 232448, cuda=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fallback, "describe", lambda device, cuda: H200._replace(cuda=cuda))
    yield
    fallback._instead.clear()
    fallback._refused.clear()


def plan_of_scope(scope: str, H: int, blocks: int = 0, half: bool = True) -> Plan:
    number = (2, "ieee") if half else (4, "tf32x3")
    plans = cuda_plans(cells.lstm, (8, H, H, 1), *number, H200)
    return next(p for p in plans if p.scope == scope and blocks in (0, p.blocks))


def launched(plan: Plan, refuses: Callable[[Plan], bool], H: int = 512) -> list[Plan]:
    """The plans that a call tries."""
    tried = list[Plan]()

    def run(cell: Any, plan: Plan, *_: Any) -> int:
        tried.append(plan)
        if refuses(plan):
            with faults_of(plan, CPU):
                raise RuntimeError("CUDA_ERROR_INVALID_CLUSTER_SIZE: no")
        return 7

    w = torch.empty(4 * H, H, dtype=torch.bfloat16)
    weights = Weights(w, w, None, None)
    x = torch.empty(24, H, dtype=torch.bfloat16)
    found = with_fallback(run, cells.lstm, plan, Layout(3, [0], sequences=8), x, weights, None, 0)
    assert found == 7
    return tried


@pytest.mark.skipif(COMPILER is None, reason="there is no g++, which runs CUDA C++ on the CPU")
@pytest.mark.parametrize("scope", ["cluster", "grid"])
def test_another_plan_is_right(scope: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In forward and in backward, with one warning for all calls."""
    run = loader(tmp_path)
    refused = list[Plan]()

    def load(cell: cells.Cell, plan: Plan, *choices: Any) -> Any:
        if plan.scope == scope:
            refused.append(plan)
            raise Refused(f"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: {plan_text(plan)}")
        return run(cell, plan, *choices)

    monkeypatch.setattr(cuda, "load", load)
    plan = plan_of_scope(scope, 27, half=False)

    def twice() -> None:
        for _ in range(2):
            check_recurrence("lstm", plan, (3, 5, 3, 27), form="lengths")

    with pytest.warns(RuntimeWarning, match=rf"rnn: .*scope={scope}.* is in its place") as seen:
        twice()
    assert len(seen) == 1 and refused == [plan]


def test_plans_that_follow() -> None:
    """Each is tried once, none needs as many blocks at a time as what was refused; the next call
    begins with the last."""
    first = plan_of_scope("cluster", 512, 16)
    with pytest.warns(RuntimeWarning) as seen:
        tried = launched(first, lambda plan: plan.scope in ("cluster", "grid"))
    assert {w.filename for w in seen} == {__file__}
    assert tried[0] == first and tried[-1].scope not in ("cluster", "grid")
    assert len(set(tried)) == len(tried) == len(seen) + 1 >= 3
    clusters = [plan.blocks for plan in tried if plan.scope == "cluster"]
    assert clusters == sorted(set(clusters), reverse=True)
    assert sum(plan.scope == "grid" for plan in tried) <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launched(first, lambda plan: plan.scope in ("cluster", "grid")) == tried[-1:]


def test_smaller_clusters() -> None:
    with pytest.warns(RuntimeWarning):
        tried = launched(plan_of_scope("cluster", 512, 16), lambda plan: plan.blocks > 8)
    assert all(plan.blocks <= 8 or plan.scope == "grid" for plan in tried[1:])


@pytest.mark.filterwarnings("ignore")
def test_where_no_plan_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "find_spec", lambda name: None)
    first = plan_of_scope("cluster", 512, 16)
    with pytest.raises(
        RuntimeError, match=r"does not run the plan .*Another can be given as plan="
    ):
        launched(first, lambda plan: True)


@pytest.mark.parametrize(
    ("scope", "text", "refused"),
    [
        ("cluster", "CUDA_ERROR_INVALID_CLUSTER_SIZE: x", True),
        ("cluster", "CUDA_ERROR_INVALID_VALUE: invalid argument", True),
        ("grid", "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: x", True),
        ("grid", "Triton Error [CUDA]: too many blocks in cooperative launch", True),
        ("grid", "CUDA_ERROR_NOT_SUPPORTED: operation not supported", True),
        ("block", "CUDA_ERROR_INVALID_VALUE: invalid argument", False),
        ("grid", "CUDA_ERROR_ASSERT: device-side assert triggered", False),
        ("cluster", "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure", False),
        ("grid", "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access", False),
    ],
)
def test_what_is_a_refusal(scope: str, text: str, refused: bool) -> None:
    """A wait that timed out, and what an earlier kernel left broken, is none: it is raised."""
    plan = plan_of_scope(scope, 64) if scope != "block" else Plan("cuda", "block", 64, 8, 0, 4)
    words = "does not run the plan"
    with pytest.raises(RuntimeError, match=words) as caught, faults_of(plan, CPU):
        raise RuntimeError(text)
    assert isinstance(caught.value, Refused) == refused


def test_other_faults_are_raised() -> None:
    def run(*_: Any) -> None:
        raise RuntimeError("CUDA_ERROR_ASSERT")

    w = torch.empty(4 * 64, 64)
    plan = plan_of_scope("cluster", 64)
    given = cells.lstm, plan, Layout(3, [0], sequences=8), w, Weights(w, w, None, None), None
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ASSERT"):
        with_fallback(run, *given)
    assert not fallback._instead and not fallback._refused
