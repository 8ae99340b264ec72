"""The C++ in float64: its errors, against those of torch in float64, by the reference in numbers of
more digits; its derivatives; and what extreme numbers make of it."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnn
from rnn.kernels import cells, reference
from rnn.kernels.cpu import native
from rnn.kernels.plan import Plan
from rnn.kernels.types import Gradients, Layout, OutputGrads, Outputs, Weights
from tests.cases import NAMES, Operands, cell_of, evaluate, operands, recurrence

pytestmark = [
    pytest.mark.skipif(not native.compiler(), reason="there is no C++ compiler"),
    pytest.mark.usefixtures("compiled"),
]
NATIVE = Plan("native")
KINDS = [("RNN", dict(nonlinearity="relu")), ("RNN", {}), ("LSTM", {}), ("GRU", {})]
LONG: Any = np.longdouble
needs_long_double = pytest.mark.skipif(
    np.finfo(LONG).eps > np.finfo("f8").eps / 100, reason="long double has the digits of double"
)
# Of tanh and sigmoid: up to where numbers are no longer normal, and close to 0, in both signs.
GRID = torch.cat(
    [
        torch.linspace(-708, 708, 2**16, dtype=torch.float64),
        torch.linspace(-20, 20, 2**16, dtype=torch.float64),
        *(s * torch.logspace(-323, 1, 2**15, dtype=torch.float64) for s in (1, -1)),
    ]
)
EXTREME = torch.tensor(
    [torch.nan, torch.inf, -torch.inf, 1e308, -1e308, 709.5, -709.5, -740, 5e-324, -5e-324, 0, 1],
    dtype=torch.float64,
)


@pytest.fixture
def compiled() -> None:
    if not rnn.dispatch.native_available(cells.gru, torch.float64):
        pytest.skip("there is no C++ compiler that works")


@pytest.fixture
def long_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes arrays as they are, of any number."""
    monkeypatch.setattr(reference, "_array", lambda xp, array: array)


def exact(o: Operands) -> dict[str, Any]:
    """As `evaluate`, by the reference in long double. Packed rows are joined, those past an end are
    left out."""
    cell = getattr(cells, o.name)
    S = cell.states
    N = len(o.reverse)
    T, B, _ = o.given[0].shape
    H = o.given[2].shape[1]
    running = torch.ones(T, B, dtype=torch.bool)
    if o.lengths is not None:
        running = torch.arange(T)[:, None] < o.lengths
    rows = running.flatten().numpy()

    def array(t: Tensor) -> Any:
        return t.numpy().astype(LONG)

    def flat(t: Tensor) -> Any:
        return array(t.reshape(T * B, t.shape[-1]))[rows]

    def parted(t: Tensor) -> list[Any]:
        """States or their gradients [N*S, B, H] as S of [N, B, H]."""
        return [array(t[k::S]) for k in range(S)]

    x, w_ih, w_hh, b_ih, b_hh, s0 = o.given
    sizes = running.sum(1).tolist()
    starts = [*accumulate(sizes, initial=0)]
    resets = None if o.resets is None else o.resets.numpy()
    layout = Layout(T, o.reverse, sizes, None, starts[:-1], resets, B)
    weights: Any = Weights(array(w_ih), array(w_hh), array(b_ih), array(b_hh))
    R = len(flat(x))

    def empty(*shape: int) -> Any:
        return np.full(shape, np.nan, LONG)

    outputs: Any = Outputs(
        empty(R, N * H),
        empty(S - 1, R, N * H),
        [empty(N, B, H) for _ in range(S)],
        empty(cell.saved, R, N * H),
    )
    given = cell, Plan("numpy"), layout, flat(x), weights, parted(s0)
    reference.forward(*given, outputs)
    of_weights = [np.full_like(w, np.nan) for w in weights]
    first = [empty(N, B, H) for _ in range(S)]
    found: Any = Gradients._make([np.zeros_like(flat(x)), *of_weights, first])
    d = flat(o.d[0]), None if S == 1 else flat(o.d[1][0])[None], parted(o.d[-1])
    reference.backward(*given, outputs, OutputGrads(*d), found)

    def padded(a: Any) -> Any:
        whole = np.zeros((T * B, a.shape[-1]), LONG)
        whole[rows] = a
        return whole.reshape(T, B, -1)

    def joined(parts: Any) -> Any:
        return np.stack(parts, 1).reshape(N * S, B, H)

    results = dict(y=padded(outputs.y), last=joined(outputs.last), d_x=padded(found.x))
    if S > 1:
        results["states"] = padded(outputs.states[0])[None]
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        results[f"d_{name}"] = getattr(found, name)
    results["d_s0"] = joined(found.s0)
    return results


def error(got: Any, want: Any) -> float:
    """Relative to `want`, in roundings."""
    difference = got.detach().numpy().astype(LONG) - want
    size = np.sqrt(np.square(want).sum())
    return float(np.sqrt(np.square(difference).sum()) / size / np.finfo("f8").eps)


@needs_long_double
@pytest.mark.usefixtures("long_reference")
@pytest.mark.parametrize(
    ("form", "reverse", "resets"),
    [
        ("padded", (False,), False),
        ("padded", (False, True), True),
        ("packed", (False, True), False),
        ("packed", (True,), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", NAMES)
def test_error(cell: str, form: str, reverse: tuple[bool, ...], resets: bool) -> None:
    """4 times that of torch's cells, at most."""
    o = operands(cell, (11, 14, 21, 43), reverse, form, resets, dtype=torch.float64)
    want = exact(o)
    ours = evaluate(o, NATIVE)
    theirs = evaluate(o, oracle=True)
    assert ours.keys() == theirs.keys() == want.keys()
    for name in want:
        other = error(theirs[name], want[name])
        assert error(ours[name], want[name]) <= 4 * other, name


def test_chosen() -> None:
    """For whole sequences and for others, as in float32."""
    layer = rnn.GRU(3, 8, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    some: list[dict[str, Any]] = [{}, dict(lengths=torch.tensor([5, 2])), dict(return_states=True)]
    for options in some:
        said = rnn.explain(layer, x, **options)
        assert "torch.float64 on cpu: C++, compiled" in said, said


@pytest.mark.parametrize("form", ["padded", "packed", "lengths", "resets"])
@pytest.mark.parametrize("cell", NAMES)
def test_derivatives(cell: str, form: str) -> None:
    """Of both directions, by differences."""
    resets = form == "resets"
    o = operands(cell, (3, 2, 2, 9), (False, True), "padded" if resets else form, resets)
    function = getattr(cells, cell)
    given = [t.double().requires_grad_() for t in o.given]
    sizes = None
    lengths = o.lengths
    if form == "packed":
        assert o.lengths is not None
        running = torch.arange(3)[:, None] < o.lengths
        sizes = running.sum(1)
        given[0] = given[0].detach()[running].requires_grad_()
        lengths = None

    def run(*given: Tensor) -> list[Tensor]:
        masks = lengths, sizes, o.resets
        found = recurrence(function, *given, *masks, o.reverse, 1, NATIVE)
        return [t for t in found if t is not None]

    assert torch.autograd.gradcheck(run, given)


def two_layers(kind: tuple[str, dict[str, Any]], I: int, H: int) -> list[Any]:
    """Ours and torch.nn's, with the same parameters."""
    torch.manual_seed(0)
    layers = [
        getattr(library, kind[0])(I, H, 2, dtype=torch.float64, **kind[1]) for library in (rnn, nn)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


@pytest.mark.parametrize("B", [1, 13])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_derivatives_of_a_step(
    kind: tuple[str, dict[str, Any]], B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows, which are multiplied with W in place, and more."""
    backward = rnn.single_step._backward
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(1)
        return backward(*given)

    monkeypatch.setattr(rnn.single_step, "_backward", counted)
    ours, _ = two_layers(kind, 3, 9)
    count = cell_of(kind[0]).states
    x, *first = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(1, B, 3), *[(2, B, 9)] * count]
    )
    names = [name for name, _ in ours.named_parameters()]

    def run(x: Tensor, *rest: Tensor) -> list[Tensor]:
        hx = tuple(rest[:count]) if count > 1 else rest[0]
        y, last = torch.func.functional_call(ours, dict(zip(names, rest[count:])), (x, hx))
        return [y, *(last if count > 1 else [last])]

    weights = [w.detach().requires_grad_() for w in ours.parameters()]
    assert torch.autograd.gradcheck(run, [x, *first, *weights], fast_mode=True)
    assert calls


@pytest.mark.parametrize("sizes", [(1, 70, 300), (3, 5, 41), (20, 17, 40)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps(kind: tuple[str, dict[str, Any]], sizes: tuple[int, int, int]) -> None:
    """A step with gradients, against torch.nn's layer: both have rounded some hundred times."""
    B, I, H = sizes
    found = []
    layers = two_layers(kind, I, H)
    x = torch.randn(1, B, I, dtype=torch.float64, requires_grad=True)
    for layer in layers:
        y, last = layer(x, layer(x)[1])
        ends = last if isinstance(last, tuple) else (last,)
        loss = y.sin().sum() + sum(end.cos().sum() for end in ends)
        found.append([y, *ends, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


def tanh_of(x: Tensor) -> Tensor:
    """By an RNN whose W_ih is 1."""
    layer: Any = rnn.RNN(8, 8, bias=False, plan=NATIVE, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(8))
        return layer(x.view(1, -1, 8))[0].flatten()


def sigmoid_of(x: Tensor) -> Tensor:
    """By a GRU's z: with h = 1 before and n = 0, it is h after."""
    layer: Any = rnn.GRU(8, 8, bias=False, plan=NATIVE, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.weight_ih_l0[8:16] = torch.eye(8)
        ones = torch.ones(1, x.numel() // 8, 8, dtype=torch.float64)
        return layer(x.view(1, -1, 8), ones)[0].flatten()


@needs_long_double
@pytest.mark.parametrize(
    ("function", "oracle"),
    [(tanh_of, np.tanh), (sigmoid_of, lambda x: 1 / (1 + np.exp(-x)))],
    ids=["tanh", "sigmoid"],
)
def test_functions(function: Callable[[Tensor], Tensor], oracle: Callable[[Any], Any]) -> None:
    """Within 3 units in the last place, everywhere."""
    want = oracle(GRID.numpy().astype(LONG))
    near = np.abs(want).astype("f8")
    unit = np.nextafter(near, np.inf) - near
    ulps = np.abs(function(GRID).numpy().astype(LONG) - want) / unit
    assert ulps.max() <= 3, f"{ulps.max():.2f} at {GRID[int(ulps.argmax())]}"


def test_saturated() -> None:
    """Denormal numbers come through, and far from 0 functions end where they should."""
    least = torch.tensor([5e-324, -5e-324, 2e-310, 0] * 2, dtype=torch.float64)
    assert torch.equal(tanh_of(least), least)
    far = torch.tensor([20, 1e3, 1e308, -20, -1e3, -1e308, 400, -400], dtype=torch.float64)
    assert torch.equal(tanh_of(far), far.sign())
    ends = torch.tensor([40, 1e3, 1e308, 709, -710, -750, -1e3, -1e308], dtype=torch.float64)
    y = sigmoid_of(ends)
    assert torch.equal(y[:4], torch.ones_like(y[:4]))
    assert (y[4:] >= 0).all() and (y[4:] <= 1e-308).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_extreme_numbers(kind: tuple[str, dict[str, Any]]) -> None:
    """Each in one sequence, and back: they go where torch.nn's go."""
    found = []
    x = torch.ones(3, len(EXTREME), 1, dtype=torch.float64)
    x[1, :, 0] = EXTREME
    for layer in two_layers(kind, 1, 9):
        leaf = x.clone().requires_grad_()
        y, last = layer(leaf)
        ends = last if isinstance(last, tuple) else (last,)
        found.append([y, *ends, *torch.autograd.grad(y.sum(), leaf)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12, equal_nan=True)
