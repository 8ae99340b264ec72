"""The GPU kernels' numbers, and what they may not depend on: on a GPU if there is one, else in
Triton's interpreter."""

import itertools
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rnn.kernels import cells
from rnn.kernels.plan import Gpu, Plan, power_of_2
from rnn.kernels.planner import cuda_plans, make_plan
from tests.cases import (
    CASES,
    NAMES,
    OF_EACH_SIZE,
    Case,
    Operands,
    cell_of,
    check,
    check_recurrence,
    close,
    evaluate,
    operands,
    thrice,
)
from tests.conftest import GPU, INHERITS_PRECISION, RNN_SWITCH

DEVICE = "cuda" if GPU else "cpu"
# One for each kind of plan that `plan_for` can force: a scope of Triton's, or of CUDA C++. (Without
# a GPU these run in test_cuda.py.)
CUDA = ["cuda block", "cuda cluster", "cuda grid"]
SCOPES = [
    "block",
    "fused",
    "grid",
    "launch",
    "library",
    *(CUDA if GPU and find_spec("cupy") else []),
]
HALF = (torch.float16, torch.bfloat16)
MODES = {
    "ieee": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
FORMS = [("padded", False), ("padded", True), ("lengths", True), ("packed", True)]
H200 = Gpu(90, 132, 232448)


def plan_for(scope: str, H: int, dtype: torch.dtype = torch.float32) -> Plan:
    """Tiles so small that a layer needs several, but for a block's, and no more than the
    interpreter is quick with."""
    precision = "ieee" if dtype in HALF else "tf32x3"
    tile = 16 if H < 64 else 64
    if scope in CUDA:
        capability = 10 * torch.cuda.get_device_capability()[0] if GPU else 90
        plans = cuda_plans(
            cells.lstm,
            (8, H, H, 2),
            dtype.itemsize,
            precision,
            H200._replace(capability=capability),
        )
        return next((plan for plan in plans if plan.scope == scope.removeprefix("cuda ")), plans[0])
    if scope in ("block", "fused") and H <= 128:
        units = power_of_2(H, 16)
        return Plan(
            "triton", "block", units, 8, units, max(1, units // 16), scope == "fused", precision
        )
    wide = scope if scope == "library" else "launch"
    return Plan(
        "triton",
        "grid" if scope == "grid" and H <= 128 else wide,
        tile,
        16,
        tile,
        4,
        False,
        precision,
    )


def chosen(case: Case, mode: str) -> Plan | None:
    """On a GPU the layer chooses; the interpreter gets what it would choose there."""
    cell = cell_of(case.mode)
    sizes = case.B, case.I, case.H, 1 + case.bidirectional
    return (
        None
        if GPU
        else make_plan(cell, sizes, str(MODES[mode]).removeprefix("torch."), H200, mode == "tf32")
    )


def by_turns(items: list[Any], first: int = 0) -> Any:
    """Every item in every scope. In the interpreter, which is slow, `make test` has each in one of
    them, by turns."""
    params = []
    for k, item in enumerate(items):
        scopes = SCOPES if getattr(item, "H", 1) <= 128 else ["launch"]
        for j, scope in enumerate(scopes):
            quick = GPU or (first + k + j) % len(scopes) == 0
            values = item if type(item) is tuple else (item,)
            name = "-".join(map(str, (*values, scope)))
            params.append(
                pytest.param(*values, scope, id=name, marks=[] if quick else pytest.mark.slow)
            )
    return params


def in_mode(mode: str) -> torch.dtype:
    """For this test: conftest sets it back."""
    RNN_SWITCH.fp32_precision = "tf32" if mode == "tf32" else "ieee"
    return MODES[mode]


@pytest.fixture(autouse=True)
def ieee() -> None:
    in_mode("ieee")


@pytest.mark.parametrize(
    ("case", "scope"), by_turns([case for case in CASES if case.dtype != torch.float64])
)
def test_cases(case: Case, scope: str) -> None:
    check(case, plan_for(scope, case.H, case.dtype), DEVICE)


EVERY = sorted({case._replace(dtype=torch.float32) for case in CASES}, key=str)


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(
            case,
            mode,
            id=f"{case}-{mode}",
            marks=[] if GPU or case == EVERY[11 * k] else pytest.mark.gpu,
        )
        for case in EVERY
        for k, mode in enumerate(MODES)
    ],
)
def test_cases_in_modes(case: Case, mode: str) -> None:
    """The plan that is chosen, in every dtype and both precisions of float32."""
    case = case._replace(dtype=in_mode(mode))
    thrice(lambda seed: check(case, chosen(case, mode), DEVICE, seed, mode == "tf32"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float64], ids=str)
def test_float64(case: Case) -> None:
    """No kernel has it: the formula does."""
    check(case, None, DEVICE)


@pytest.mark.parametrize(
    ("cell", "form", "resets", "scope"),
    by_turns([(cell, *form) for cell in OF_EACH_SIZE for form in FORMS]),
)
def test_cells(cell: str, form: str, resets: bool, scope: str) -> None:
    check_recurrence(
        cell, plan_for(scope, 18), (3, 9, 3, 18), (False, True), form, resets, device=DEVICE
    )


@pytest.mark.parametrize(
    ("cell", "form", "resets", "scope"),
    by_turns([(cell, *form) for cell, form in zip(("rnn_tanh", "lstm", "gru", "lstm"), FORMS)], 3),
)
def test_slices_of_the_batch(cell: str, form: str, resets: bool, scope: str) -> None:
    """Of one tile each, the last not full: values and gradients, and not by a bit others than those
    of the batch at once."""
    whole = plan_for(scope, 18)._replace(slice_tiles=0)
    sliced = whole._replace(slice_tiles=1)
    sizes = (3, 2 * whole.sequences + 3, 3, 18)
    check_recurrence(cell, sliced, sizes, (False, True), form, resets, device=DEVICE)
    o = operands(cell, sizes, form=form, resets=resets)
    torch.testing.assert_close(
        evaluate(o, sliced, DEVICE), evaluate(o, whole, DEVICE), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("cell", "dtype", "scope"), by_turns([*itertools.product(OF_EACH_SIZE, HALF)])
)
def test_half(cell: str, dtype: torch.dtype, scope: str) -> None:
    check_recurrence(
        cell, plan_for(scope, 18, dtype), (3, 9, 3, 18), bias=False, dtype=dtype, device=DEVICE
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
@pytest.mark.parametrize(
    "sizes", [(70, 3, 16, 100), (70, 130, 40, 250), (70, 16, 8, 500), (9, 70, 99, 1030)], ids=str
)
@pytest.mark.parametrize("cell", OF_EACH_SIZE)
def test_chosen_plans(
    cell: str, sizes: tuple[int, int, int, int], form: str, dtype: torch.dtype
) -> None:
    thrice(
        lambda seed: check_recurrence(
            cell, None, sizes, (False, True), form, dtype=dtype, device="cuda", seed=seed
        )
    )


# On a GPU several programs in every direction of the grid, more steps than a graph has, and no more
# units than a block can have of every cell in float32.
SIZES = (40, 37, 20, 27) if GPU else (3, 9, 2, 6)
LAYERS = [(name, *form) for name, form in itertools.product(NAMES, FORMS[1:])]


@pytest.mark.parametrize(
    ("name", "form", "resets", "scope"), by_turns(LAYERS if GPU else LAYERS[:1])
)
def test_repeatable(name: str, form: str, resets: bool, scope: str) -> None:
    o = operands(name, SIZES, form=form, resets=resets)
    plan = plan_for(scope, SIZES[3])
    torch.testing.assert_close(evaluate(o, plan, DEVICE), evaluate(o, plan, DEVICE), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "form", "resets", "scope"), by_turns(LAYERS, 1))
def test_a_sequence_depends_on_no_other(name: str, form: str, resets: bool, scope: str) -> None:
    """Not by a bit: whatever the others hold, which lengths and resets they have, which gradients
    come into them."""
    o = operands(name, SIZES, form=form, resets=resets)
    (T, B, _, H) = SIZES
    kept = [0, 3, B - 2]  # between are sequences of the same tile, and of another one
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, 0.0])[torch.arange(B) % 5][
        :, None
    ]
    others = torch.ones(B, dtype=torch.bool)
    others[kept] = False

    def spoilt(t: Tensor) -> Tensor:
        """Of [..., B, K], the other sequences."""
        return torch.where(others[:, None], bad.to(t.dtype), t)

    given = [spoilt(t) if k in (0, 5) else t for k, t in enumerate(o.given)]
    lengths = (
        o.lengths
        if o.lengths is None or form == "packed"
        else torch.where(others, T - o.lengths, o.lengths)
    )
    cuts = None if o.resets is None else o.resets ^ others
    worse = o._replace(given=given, d=[*map(spoilt, o.d)], lengths=lengths, resets=cuts)
    plan = plan_for(scope, H)
    found = [
        {
            key: t[..., kept, :]
            for key, t in evaluate(which, plan, DEVICE).items()
            if key in ("y", "states", "last", "d_x", "d_s0")
        }
        for which in (o, worse)
    ]
    assert all(t.isfinite().all() for t in found[0].values())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "form", "resets", "scope"), by_turns(LAYERS, 2))
def test_surroundings_in_memory(name: str, form: str, resets: bool, scope: str) -> None:
    """Fresh memory is NaN (see conftest) and so is what lies around every tensor, which begins at
    an odd place."""
    o = operands(name, SIZES, form=form, resets=resets)
    plan = plan_for(scope, SIZES[3])

    def surrounded(t: Tensor) -> Tensor:
        """A view of the same numbers, 1,001 places into a tensor of NaN, True or a length that none
        has."""
        bad = float("nan") if t.is_floating_point() else t.dtype == torch.bool or 2**40
        around = torch.full((1001,), bad, dtype=t.dtype, device=t.device)
        return torch.cat((around, t.flatten(), around))[1001:-1001].view(t.shape)

    close(
        evaluate(o, plan, DEVICE, place=surrounded),
        evaluate(o, oracle=True),
        evaluate(o, dtype=torch.float64, oracle=True),
    )


@pytest.mark.parametrize(
    ("name", "scope"), by_turns([("rnn_tanh",), ("lstm",), ("gru",)] if GPU else [("gru",)])
)
def test_padding(name: str, scope: str) -> None:
    check_padding(name, plan_for(scope, SIZES[3]))


def check_padding(name: str, plan: Plan) -> None:
    """What x holds past the end of a sequence reaches no gradient, and all that a pass gives is 0
    there; bit by bit."""
    o = operands(name, SIZES, form="lengths")
    assert o.lengths is not None
    past = (torch.arange(SIZES[0])[:, None] >= o.lengths)[..., None]
    assert past.any()
    found = [
        evaluate(o._replace(given=[torch.where(past, bad, o.given[0]), *o.given[1:]]), plan, DEVICE)
        for bad in (0.0, float("nan"))
    ]
    for key in ("y", "states", "d_x"):
        t = found[0].get(key)
        assert t is None or not torch.where(past, t.cpu(), 0).any()
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "form", "scope"),
    by_turns([*zip((*NAMES, "lstm"), ("padded", "lengths", "packed", "padded", "lengths"))], 1),
)
def test_steps_not_asked_for(name: str, form: str, scope: str) -> None:
    check_not_asked_for(name, plan_for(scope, 18), form)


def check_not_asked_for(name: str, plan: Plan, form: str, bad: float = float("nan")) -> None:
    """What x and initial states hold in steps from which no gradient comes, up to a reset, reaches
    none; what they hold in other steps reaches what it does in the reference."""
    (T, B, I, H) = (4, 9, 3, 18)
    o = operands(name, (T, B, I, H), form=form)
    S = getattr(cells, name).states
    step, sequence = torch.arange(T)[:, None], torch.arange(B)
    begins = (step + sequence // 2) % 2 == 1
    # every other episode of a sequence; of some sequences not by the second direction
    forward = (begins.cumsum(0) + sequence) % 2 == 1
    asked = torch.stack((forward, forward & (sequence % 3 > 0)))
    ends = torch.full((B,), T) if o.lengths is None else o.lengths
    outer = torch.stack((torch.zeros_like(ends), (ends - 1).clamp(min=0)))
    # whether the episodes that the first states enter are asked for, and those of the last states
    enters, leaves = (asked.gather(1, at[:, None])[:, 0] for at in (outer, outer.flip(0)))
    dropped, wanted = ~enters & (ends > 0), leaves | (ends == 0)
    assert dropped.any(1).all() and wanted.any(1).all()
    dropped, wanted = (t.repeat_interleave(S, 0)[..., None] for t in (dropped, wanted))
    into = asked.permute(1, 2, 0).repeat_interleave(H, 2)
    x, *weights, s0 = o.given
    *d, d_last = o.d
    if S > 1:
        # by the other states alone
        d[0] = torch.where((sequence % 4 == 1)[:, None], 0, d[0])

    def given(x: Tensor, bad: float) -> Operands:
        return o._replace(
            given=[
                torch.where(forward[..., None], x, bad),
                *weights,
                torch.where(dropped, bad, s0),
            ],
            d=[*(torch.where(into, t, 0) for t in d), torch.where(wanted, d_last, 0)],
            resets=begins,
        )

    def gradients(o: Operands, *how: Any, **more: Any) -> dict[str, Tensor]:
        found = evaluate(o, *how, **more)
        return {key: t.cpu() for key, t in found.items() if key.startswith("d_")}

    zero = given(x, 0.0)
    exact = gradients(zero, dtype=torch.float64, oracle=True)
    close(gradients(given(x, bad), plan, DEVICE), gradients(zero, oracle=True), exact)
    # and in a step that is asked for, of one sequence
    t, b = (forward & (step < ends)).nonzero()[0].tolist()
    worse = x.clone()
    worse[t, b] = float("nan")
    want, got = (
        {key: t.isnan() for key, t in gradients(given(worse, bad), *how).items()}
        for how in ((Plan("numpy"),), (plan, DEVICE))
    )
    assert want["d_w_ih"].any() and not want["d_x"].all()
    torch.testing.assert_close(got, want)


PRECISION = """
import torch, rnn
torch.backends.{setting}
plans, choose = [], rnn.dispatch._plan
rnn.dispatch._plan = lambda *given: plans.append(choose(*given)) or plans[-1]
layer, x = rnn.RNN(16, 64), torch.randn(5, 3, 16)
want = layer.double()(x.double())[0]
error = (layer.to("{device}", torch.float32)(x.to("{device}"))[0].cpu() - want).abs().max().item()
print(plans[-1].precision, error)
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("setting", "precision"),
    [
        ("cudnn.rnn.fp32_precision = 'tf32'", "tf32"),
        ("cudnn.rnn.fp32_precision = 'ieee'", "tf32x3"),
        ("cudnn.rnn.fp32_precision = 'none'", "tf32x3"),
        ("cudnn.fp32_precision = 'ieee'", "tf32x3" if INHERITS_PRECISION else "tf32"),
        ("fp32_precision = 'ieee'", "tf32x3" if INHERITS_PRECISION else "tf32"),
        ("fp32_precision = 'tf32'", "tf32"),
        ("cudnn.allow_tf32 = False", "tf32x3"),
        ("cudnn.allow_tf32 = True", "tf32"),
        ("cuda.matmul.allow_tf32 = False", "tf32"),
    ],
)
def test_precision_is_torchs_setting(setting: str, precision: str) -> None:
    """Each way in which it can be set, in a process in which nothing else was; TF32 is torch's
    default."""
    done = subprocess.run(
        [sys.executable, "-c", PRECISION.format(setting=setting, device=DEVICE)],
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    chosen, error = done.stdout.split()
    assert chosen == precision
    assert float(error) < (5e-3 if precision == "tf32" else 5e-6)
