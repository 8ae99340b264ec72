"""The other backends against the reference, kernels/reference.py: the second witness beside
torch.nn, and the only one for cells that torch.nn does not have."""

from typing import Any

import pytest
import torch

import rnn
from rnn import dispatch
from rnn.kernels import cells
from rnn.kernels.plan import Plan
from tests.cases import NAMES, close
from tests.kernels.gpu.test_gpu import plan_for

T, B, I, H = 5, 4, 3, 18
RESULTS = "y", "states", "last", "x", "w_ih", "w_hh", "b_ih", "b_hh", "s0"


def results(
    cell: cells.Cell, plan: Plan, form: str, reset: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Outputs and all gradients, of two directions."""
    torch.manual_seed(0)
    G, S, N = cell.gates, cell.states, 2
    rows = (9, I) if form == "packed" else (T, B, I)
    shapes = rows, (N * G * H, I), (N * G * H, H), (N * G * H,), (N * G * H,), (N * S, B, H)
    given: list[Any] = [(torch.randn(shape) / 3).to(dtype).requires_grad_() for shape in shapes]
    masks: dict[str, Any] = {}
    steps = T
    if form == "lengths":
        masks["lengths"] = torch.tensor([5, 0, 2, 3])
    if form == "packed":
        masks["batch_sizes"] = torch.tensor([4, 3, 2])
        steps = 3
    if reset:
        masks["resets"] = torch.rand(steps, B) < 0.4
    function: Any = rnn.functional.recurrence
    out = function(cell, *given, reverse=(False, True), keep=1, plan=plan, **masks)
    outputs = [t for t in out if t is not None]
    loss: Any = sum(
        (t.sin() * torch.arange(1, t.numel() + 1).view(t.shape)).mean() for t in outputs
    )
    grads = torch.autograd.grad(loss, given)
    names = [name for name, t in zip(RESULTS, out) if t is not None]
    return dict(zip([*names, *RESULTS[3:]], [*(t.detach() for t in outputs), *grads]))


NATIVE = Plan("native")
# The interpreter takes a second for each: the form that has everything.
CASES = [
    (NATIVE, form, reset) for form in ("padded", "lengths", "packed") for reset in (False, True)
]
CASES += [(plan_for(scope, H), "lengths", True) for scope in ("fused", "grid", "launch")]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("plan", "form", "reset"), CASES)
def test_as_the_reference(name: str, plan: Plan, form: str, reset: bool) -> None:
    cell = getattr(cells, name)
    if plan.backend == "native" and not dispatch.native_available(cell, torch.float32):
        pytest.skip("there is no C++ compiler")
    got = results(cell, plan, form, reset, torch.float32)
    allowed = results(cell, Plan("numpy"), form, reset, torch.float32)
    want = results(cell, Plan("numpy"), form, reset, torch.float64)
    close(got, allowed, want)
