"""The cells' algebra: adjoints against autograd, and that a cell of one's own needs nothing
else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rnn
from rnn.kernels.cells import Cell, sigmoid, tanh, zeros_like
from rnn.kernels.plan import Plan
from rnn.layer_types import NO_MASKS
from tests.cases import CELLS, TORCH_CELLS


def randn(count: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(200, dtype=torch.float64, requires_grad=True) for _ in range(count))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_adjoint(cell: Cell) -> None:
    x = randn(cell.gates)
    r = randn(cell.gates)
    s = randn(cell.states)
    s_next, saved = cell.forward(x, r, s)
    ds = randn(cell.states)
    given = torch.autograd.grad(s_next, (*x, *r, *s), ds, allow_unused=True)
    want = [torch.zeros(200, dtype=torch.float64) if d is None else d for d in given]
    got = [d for group in cell.backward(saved, s, s_next, ds) for d in group]
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("cell", "step"),
    [*zip(CELLS, TORCH_CELLS.values(), strict=True)],
    ids=lambda cell: getattr(cell, "name", ""),
)
def test_formula(cell: Cell, step: Callable[..., Any]) -> None:
    assert TORCH_CELLS[cell.name] is step
    G = cell.gates
    S = cell.states
    x = randn(G)
    r = randn(G)
    s = randn(S)
    eye = torch.eye(200 * G, dtype=torch.float64)
    # Pre-activations come through unchanged where the input is one-hot: x alone has a weight, r is
    # all bias.
    want = step(
        torch.cat(x)[None],
        tuple(v[None] for v in s) if S > 1 else s[0][None],
        eye,
        torch.zeros(200 * G, 200, dtype=torch.float64),
        torch.zeros_like(eye[0]),
        torch.cat(r),
    )
    got = cell.forward(x, r, s)[0]
    torch.testing.assert_close(
        [v[None] for v in got], list(want) if S > 1 else [want], rtol=1e-14, atol=1e-14
    )


def _twice(saved, s, s_next, ds):
    d = (2 * ds[0],)
    return d, d, (zeros_like(ds[0]),)


def _no_comma(x, r, s):
    return tanh(x[0] + r[0]), ()


def _no_saved(x, r, s):
    return (tanh(x[0] + r[0]),)


def _too_many(x, r, s):
    return (x[0], s[0]), ()


def _method(x, r, s):
    y = x[0].tanh()
    return (y,), ()


def _power(x, r, s):
    y = x[0] ** 2
    return (y,), ()


def _branch(x, r, s):
    y = x[0] if x[0] > 0 else r[0]
    return (y,), ()


def _default(x, r, s, scale=2):
    return (x[0] * scale,), ()


def _made(scale):
    def closure(x, r, s):
        return (x[0] * scale,), ()

    return closure


def _wrong_adjoint(saved, s, s_next, ds):
    return (ds[0],), (ds[0],), ()


@pytest.mark.parametrize(
    ("step", "adjoint", "words", "line"),
    [
        (_no_comma, _twice, ("_no_comma", "s_next", "(value,)"), "return tanh(x[0] + r[0]), ()"),
        (_no_saved, _twice, ("_no_saved", "s_next, saved", "got 1"), "return (tanh(x[0] + r[0]),)"),
        (_too_many, _twice, ("_too_many", "s_next of length 1, got 2"), "return (x[0], s[0]), ()"),
        (_method, _twice, ("_method", "'tanh'", "rnn.kernels.cells"), "y = x[0].tanh()"),
        (_power, _twice, ("_power", "**", "+ - * /"), "y = x[0] ** 2"),
        (_branch, _twice, ("_branch", "'>'"), "y = x[0] if x[0] > 0 else r[0]"),
        (_default, _twice, ("_default", "default arguments"), "def _default(x, r, s, scale=2):"),
        (_made(2), _twice, ("closure", "closure over scale"), "def closure(x, r, s):"),
        (_too_many, len, ("to be functions", "builtin"), ""),
        (
            lambda x, r, s: ((x[0],), ()),
            _wrong_adjoint,
            ("_wrong_adjoint", "ds_prev of length 1, got 0"),
            "return (ds[0],), (ds[0],), ()",
        ),
    ],
)
def test_mistakes(
    step: Callable[..., Any], adjoint: Callable[..., Any], words: tuple[str, ...], line: str
) -> None:
    """What a backend could not compute is refused at once, with the function's name and line."""
    with pytest.raises(TypeError) as caught:
        Cell("wrong", step, adjoint, gates=1, states=1)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(line), message


def _squares(x, r, s):
    """Of one gate, and it comes back to r after its first result."""
    a = x[0] + r[0]
    return (a * sigmoid(a), 0.5 * s[1] - a / 2), (a,)


def _squares_backward(saved, s, s_next, ds):
    (a,) = saved
    f = sigmoid(a)
    d = (ds[0] * (f + a * f * (1 - f)) - ds[1] / 2,)
    return d, d, (zeros_like(a), 0.5 * ds[1])


@pytest.mark.parametrize(
    "plan",
    [
        # The compiler takes its time
        Plan("numpy"),
        pytest.param(Plan("native"), marks=pytest.mark.slow),
    ],
    ids=lambda plan: plan.backend,
)
def test_cell_that_reads_after_it_writes(plan: Plan) -> None:
    cell = Cell("squares", _squares, _squares_backward, gates=1, states=2)
    if plan.backend == "native" and not rnn.dispatch.native_available(cell, torch.float32):
        pytest.skip("there is no C++ compiler that works")
    dtype = torch.float32 if plan.backend == "native" else torch.float64
    given: Any = [
        (torch.randn(n, dtype=dtype) / 2).requires_grad_()
        for n in ((5, 2, 3), (4, 3), (4, 4), (4,), (4,), (2, 2, 4))
    ]
    recurrence: Any = rnn.functional.recurrence
    found: Any = [
        recurrence(cell, *given, keep=1, plan=plan),
        rnn.composite.composite(cell, given, NO_MASKS, (False,), 1),
    ]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(
        *(torch.autograd.grad([t.sin().sum() for t in out], given) for out in found)
    )


def mgu(x, r, s):
    """The minimal gated unit, in the form in which the gate multiplies W_hh h."""
    f = sigmoid(x[0] + r[0])
    n = tanh(x[1] + f * r[1])
    return (s[0] + f * (n - s[0]),), (f, n, r[1])


def mgu_backward(saved, s, s_next, ds):
    f, n, rn = saved
    dn = ds[0] * (f * (1 - n * n))
    df = (ds[0] * (n - s[0]) + dn * rn) * (f * (1 - f))
    return (df, dn), (df, dn * f), (ds[0] * (1 - f),)


def mgu_by_hand(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, s0: Tensor
) -> list[Tensor]:
    h = s0[0]
    out = []
    for x_t in x:
        (xf, xn) = (x_t @ w_ih.T + b_ih).chunk(2, -1)
        (rf, rn) = (h @ w_hh.T + b_hh).chunk(2, -1)
        f = torch.sigmoid(xf + rf)
        h = (1 - f) * h + f * torch.tanh(xn + f * rn)
        out.append(h)
    return [torch.stack(out), h[None]]


@pytest.mark.parametrize(
    "plan",
    [
        None,
        Plan("numpy"),
        Plan("native"),
        pytest.param(
            Plan("triton", "block", 16, 8, 16, 1, True, "tf32x3"), marks=pytest.mark.interpreted
        ),
        pytest.param(
            Plan("triton", "launch", 16, 16, 16, 1, False, "tf32x3"), marks=pytest.mark.interpreted
        ),
    ],
    ids=lambda plan: f"{plan.backend}-{plan.scope}" if plan else "chosen",
)
def test_own_cell(plan: Plan | None) -> None:
    cell = Cell("mgu", mgu, mgu_backward, gates=2, states=1)
    if plan == Plan("native") and not rnn.dispatch.native_available(cell, torch.float32):
        pytest.skip("there is no C++ compiler that works")
    assert (cell.saved, cell.split) == (3, True)
    T = 6
    B = 3
    I = 4
    H = 10
    shapes = (T, B, I), (2 * H, I), (2 * H, H), (2 * H,), (2 * H,), (1, B, H)
    given = [torch.randn(shape, dtype=torch.float64) / 2 for shape in shapes]
    dtype = torch.float64 if plan is None else torch.float32

    def run(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in given]
        outputs = [t for t in function(*leaves) if t is not None]
        return [*outputs, *torch.autograd.grad([(t * t).sum() for t in outputs], leaves)]

    exact = run(mgu_by_hand, torch.float64)
    limit = 1e-12 if plan is None else 1e-5
    got = run(partial(rnn.functional.recurrence, cell, plan=plan), dtype)
    torch.testing.assert_close([t.double() for t in got], exact, rtol=limit, atol=limit)
