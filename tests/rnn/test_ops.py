"""What autograd sees of the operator, what never leaks through it, and what it refuses."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import rnn
from rnn.kernels import cells
from rnn.kernels.plan import Plan
from tests.cases import NAMES, check_recurrence, kept_bytes, step_by_step
from tests.kernels.gpu.test_gpu import plan_for
from tests.small import B, H, I, T, data, outputs

recurrence: Any = rnn.functional.recurrence
NUMPY = Plan("numpy")
BLOCK = plan_for("fused", 6)
LAUNCH = plan_for("launch", 6)
PLANS = pytest.mark.parametrize(
    "plan",
    [
        pytest.param(NUMPY, id="numpy"),
        pytest.param(BLOCK, id="block", marks=pytest.mark.interpreted),
        pytest.param(LAUNCH, id="launch", marks=[pytest.mark.interpreted, pytest.mark.slow]),
    ],
)


class TestMasks:
    """NaN and infinity in one sequence, or in padding."""

    @PLANS
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_padding_reaches_nothing(self, name: str, plan: Plan, bad: float) -> None:
        lengths = torch.tensor([2, 0, 5, 3])
        found = []
        padding = torch.arange(T)[:, None] >= lengths
        given = data(name, dtype=torch.float32)
        resets = torch.rand(T, B) < 0.3
        for value in (bad, 0.0):
            alone = [t.detach().clone().requires_grad_() for t in given]
            with torch.no_grad():
                alone[0][padding] = value
            out = outputs(
                *recurrence(
                    getattr(cells, name), *alone, lengths, None, resets, (False, True), 1, plan
                )
            )
            grads = torch.autograd.grad([o.sin().sum() for o in out], alone)
            assert all(t.isfinite().all() for t in (*out, *grads))
            assert not out[0][padding].any()
            assert not grads[0][padding].any()
            found.append((*out, *grads))
        torch.testing.assert_close(*found, rtol=0, atol=0)

    @PLANS
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_sequence_reaches_no_other(self, name: str, plan: Plan, bad: float) -> None:
        given = data(name, dtype=torch.float32)
        found = []
        for value in (bad, 0.0):
            alone = [t.detach().clone().requires_grad_() for t in given]
            with torch.no_grad():
                alone[0][2, 1] = value
            y, states, last = recurrence(
                getattr(cells, name), *alone, reverse=(False, True), keep=1, plan=plan
            )
            dx, ds0 = torch.autograd.grad(y.sin().sum() + last.sin().sum(), [alone[0], alone[5]])
            others = [0, 2, 3]
            found.append([y[:, others], last[:, others], dx[:, others], ds0[:, others]])
            if states is not None:
                found[-1].append(states.view(-1, T, B, 2 * H)[:, :, others])
            if value != 0:  # as in torch.nn, a NaN is seen, by the steps that it comes before
                assert not y[2, 1].isfinite().all() or name != "rnn_tanh" or bad != bad
        assert all(t.isfinite().all() for t in found[0])
        torch.testing.assert_close(*found, rtol=0, atol=0)

    @PLANS
    def test_relu_and_its_gradient_keep_nan(self, plan: Plan) -> None:
        given = data("rnn_relu", dtype=torch.float32)
        with torch.no_grad():
            given[0][2, 1] = float("nan")
        y, _, last = recurrence(cells.rnn_relu, *given, reverse=(False, True), plan=plan)
        assert y[2:, 1, :H].isnan().all()
        assert y[:3, 1, H:].isnan().all()
        assert last[:, 1].isnan().all()

    @PLANS
    @pytest.mark.parametrize("steps", [1, 3])
    def test_a_gradient_of_nan_times_no_state(self, steps: int, plan: Plan) -> None:
        """In the first steps, whose initial states are 0, gives NaN, as in torch.nn."""
        ours = rnn.LSTM(I, H, bidirectional=True, plan=plan)
        theirs = nn.LSTM(I, H, bidirectional=True)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(steps, B, I)
        dy = torch.randn(steps, B, 2 * H)
        dy[0, 0, 1] = dy[-1, 1, H + 2] = float("nan")
        found = [
            [grad.isnan() for grad in torch.autograd.grad(y, list(layer.parameters()), dy)]
            for layer in (ours, theirs)
            for y in (layer(x)[0],)
        ]
        assert any(bad.any() and not bad.all() for bad in found[1])
        torch.testing.assert_close(*found)

    @PLANS
    def test_infinite_gradients_of_what_is_off(self, plan: Plan) -> None:
        """The square root's at 0, where relu is off, counts for nothing, as in torch.nn."""
        ours = rnn.RNN(I, H, nonlinearity="relu", plan=plan)
        theirs = nn.RNN(I, H, nonlinearity="relu")
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(T, B, I)
        grads = [
            torch.autograd.grad(layer(x)[0].sqrt().sum(), list(layer.parameters()))
            for layer in (ours, theirs)
        ]
        assert all(g.isfinite().all() for g in grads[1])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)

    @PLANS
    @pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
    def test_infinite_input_is_torchs(self, nonlinearity: str, plan: Plan) -> None:
        """tanh makes 1 of it, and all is finite again: also in a tile that is larger than H."""
        ours, theirs = (
            library.RNN(I, H, nonlinearity=nonlinearity, bidirectional=True, **options)
            for library, options in ((rnn, {"plan": plan}), (nn, {}))
        )
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(T, B, I)
        x[2, 1, 0] = float("inf")
        y = ours(x)[0]
        want = theirs(x)[0]
        assert want.isfinite().all() == (nonlinearity == "tanh")
        torch.testing.assert_close(y, want, equal_nan=True)

    @PLANS
    def test_infinite_gradient_is_torchs(self, plan: Plan) -> None:
        """Of one unit, in a tile of sixteen: infinite at every step before, and no NaN."""
        ours = rnn.RNN(I, 1, plan=plan)
        theirs = nn.RNN(I, 1)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(T, B, I, requires_grad=True)
        found = []
        for layer in (ours, theirs):
            found.append(
                torch.autograd.grad(layer(x)[0][-1], x, torch.full((B, 1), float("inf")))[0]
            )
        assert found[1].isinf().all()
        assert torch.equal(*found)

    @PLANS
    def test_no_steps(self, plan: Plan) -> None:
        """A sequence of no steps has its initial state as its last, and passes on the gradient of
        that alone."""
        given = data("lstm", dtype=torch.float32)
        y, _, last = recurrence(
            cells.lstm, *given, torch.tensor([0, 3, 0, 5]), None, None, (False, True), plan=plan
        )
        assert torch.equal(last[:, [0, 2]], given[5][:, [0, 2]])
        grad = torch.randn_like(last)
        (ds0,) = torch.autograd.grad([y, last], given[5], [torch.ones_like(y), grad])
        assert torch.equal(ds0[:, [0, 2]], grad[:, [0, 2]])

    @PLANS
    @pytest.mark.parametrize("lengths", [[0, 0, 0, 0], [5, 5, 5, 5], [1, 1, 0, 0]])
    def test_extreme_lengths(self, plan: Plan, lengths: list[int]) -> None:
        given = data("gru", dtype=torch.float32)
        masks = torch.tensor(lengths), None
        out = recurrence(cells.gru, *given, masks[0], None, None, (False, True), plan=plan)
        want = step_by_step("gru", given, masks, (False, True))
        mask = (torch.arange(T)[:, None] < masks[0])[..., None]
        torch.testing.assert_close([out[0], out[2]], [want[0] * mask, want[1]])
        grads = [
            torch.autograd.grad(y.sin().sum() + last.sin().sum(), given, allow_unused=True)
            for y, last in ((out[0], out[2]), (want[0] * mask, want[1]))
        ]
        zeros = [torch.zeros_like(a) if b is None else b for a, b in zip(*grads)]
        torch.testing.assert_close(list(grads[0]), zeros, rtol=1e-4, atol=1e-5)


class TestGradients:
    @pytest.mark.parametrize("plan", [None, NUMPY], ids=["", "numpy"])
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
    def test_numerical(self, name: str, plan: Plan, form: str) -> None:
        given = data(name)
        reverse = (False, True)
        ends = torch.tensor([5, 3, 3, 1])
        sizes = (ends > torch.arange(T)[:, None]).sum(1) if form == "packed" else None
        if sizes is not None:
            given[0] = given[0].detach().flatten(0, 1)[: int(sizes.sum())].requires_grad_()
        masks = ends if form == "lengths" else None, sizes, torch.rand(T, B) < 0.3

        def run(*given: Tensor) -> tuple[Tensor, ...]:
            return outputs(*recurrence(getattr(cells, name), *given, *masks, reverse, 1, plan))

        assert torch.autograd.gradcheck(run, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, given, fast_mode=True)

    @PLANS
    def test_each_gradient_alone(self, plan: Plan) -> None:
        given = data("gru", dtype=torch.float32)
        run = lambda: recurrence(cells.gru, *given, reverse=(False, True), plan=plan)[0].sin().sum()  # noqa: E731
        every = torch.autograd.grad(run(), given)
        for k, t in enumerate(given):
            for other in given:
                other.requires_grad_(other is t)
            torch.testing.assert_close(torch.autograd.grad(run(), t)[0], every[k], rtol=0, atol=0)

    @PLANS
    def test_each_output_alone(self, plan: Plan) -> None:
        given = data("lstm", dtype=torch.float32)
        found = outputs(*recurrence(cells.lstm, *given, reverse=(False, True), keep=1, plan=plan))
        want = step_by_step("lstm", given, (None, None), (False, True))
        want[1] = want[1].view(1, T * B, 2 * H)
        torch.testing.assert_close(found, tuple(want))
        for ours, theirs in zip(found, want):
            grads = [
                torch.autograd.grad(out.sin().sum(), given, retain_graph=True)
                for out in (ours, theirs)
            ]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    def test_states_of_gated_cells_in_half_precision(self) -> None:
        for name, dtype in itertools.product(("lstm", "gru"), (torch.float16, torch.bfloat16)):
            check_recurrence(name, None, (6, 5, 3, 20), (False, True), "lengths", True, dtype=dtype)

    def test_input_that_is_computed_from_a_weight(self) -> None:
        """One tensor for several arguments: a second derivative must not count a path twice."""
        w = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)

        def run(w: Tensor) -> Tensor:
            return recurrence(cells.rnn_tanh, w.sin()[None], w, w, None, None, w.cos()[None])[0]

        assert torch.autograd.gradcheck(run, w)
        assert torch.autograd.gradgradcheck(run, w)

    @PLANS
    def test_memory_of_any_layout(self, plan: Plan) -> None:
        """Views with strides of their own, of every tensor: what the same numbers give in a row."""
        given = data("gru", dtype=torch.float32)
        lengths = torch.tensor([[2, 9], [5, 9], [0, 9], [3, 9]])[:, 0]
        resets = torch.rand(B, T).T < 0.4
        strided = [
            torch.stack((t.detach(), t.detach()), -1)[..., 0].requires_grad_() for t in given
        ]
        assert not any(t.is_contiguous() for t in (*strided, lengths, resets))
        found = []
        for tensors, masks in (
            (strided, (lengths, None, resets)),
            (given, (lengths.contiguous(), None, resets.contiguous())),
        ):
            out = outputs(*recurrence(cells.gru, *tensors, *masks, (False, True), 1, plan))
            grads = torch.autograd.grad([o.sin().sum() for o in out], tensors)
            found.append([*out, *grads])
        torch.testing.assert_close(*found)

    @PLANS
    def test_editing_the_output(self, plan: Plan) -> None:
        """Right, or torch's own error."""
        given = data("rnn_tanh", dtype=torch.float32)
        y = recurrence(cells.rnn_tanh, *given, reverse=(False, True), plan=plan)[0]
        assert not y._is_view()
        y += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        layer = rnn.RNN(I, H, plan=plan)
        x = torch.randn(T, B, I)
        with torch.no_grad():
            y, h = layer(x)
            copied = y.clone(), h.clone()
            y += 1
            torch.testing.assert_close(h, copied[1], rtol=0, atol=0)
            torch.testing.assert_close(layer(x), copied, rtol=0, atol=0)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_kept_for_backward(self, bidirectional: bool) -> None:
        """Of an Elman layer: its input and output, nothing more that grows with T."""
        more = [
            kept_bytes(rnn.RNN(I, H, bidirectional=bidirectional), torch.randn(steps, B, I))
            for steps in (50, 100)
        ]
        assert more[1] - more[0] == 50 * B * (I + (1 + bidirectional) * H) * 4

    def test_nothing_kept_without_gradients(self) -> None:
        layer = rnn.RNN(I, H)
        with torch.no_grad():
            assert layer(torch.randn(T, B, I))[0].grad_fn is None
        assert rnn.RNN(I, H).requires_grad_(False)(torch.randn(T, B, I))[0].grad_fn is None


def test_no_kernel_of_torch_runs() -> None:
    """rnn.RNN is not torch.nn.RNN in disguise, where there is a compiler."""
    if not rnn.dispatch.native_available(cells.rnn_tanh, torch.float32):
        pytest.skip("there is no C++ compiler that works")
    x = torch.randn(T, B, I)
    found = {}
    for library in (rnn, nn):
        layer = library.RNN(I, H, bidirectional=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(x)[0].sum().backward()
        found[library] = {
            e.key
            for e in profile.key_averages()
            if "rnn" in e.key.lower() and "fused_rnn" not in e.key
        }
    assert "aten::rnn_tanh" in found[nn]
    assert not found[rnn]


@pytest.mark.parametrize("sizes", [[3, 1, 2], [2, 3, 1], [3, 0, 3], [4, 1, 1], [3, 2], [3, 2, 2]])
def test_bad_batch_sizes(sizes: list[int]) -> None:
    weights = data("rnn_tanh", 1, torch.float32)[1:5]
    with pytest.raises(RuntimeError, match="batch_sizes"):
        recurrence(
            cells.rnn_tanh,
            torch.zeros(6, I),
            *weights,
            torch.zeros(1, 3, H),
            None,
            torch.tensor(sizes),
        )


def test_bad_shapes() -> None:
    x, *weights, s0 = (t.detach() for t in data("gru", 1))
    for bad in (
        [x[0], *weights, s0],
        [x, *weights, s0[0]],
        [x, *weights[:3], None, s0],
        [x, weights[0][:-1], *weights[1:], s0],
        [x, *weights, s0.float()],
        [x.long(), *weights, s0],
    ):
        with pytest.raises(RuntimeError, match="Expected"):
            recurrence(cells.gru, *bad)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"torch\.int64"):
        recurrence(cells.gru, x.long(), *weights, s0)


@pytest.mark.parametrize("hidden", [H, 600])
def test_default_device(hidden: int) -> None:
    """It is not asked for where the data are."""
    layer = rnn.RNN(I, hidden)
    x = torch.randn(T, B, I)
    lengths = torch.tensor([2, 5, 0, 3])
    packed = pack_padded_sequence(x, torch.tensor([5, 3, 2, 1]))
    want = layer(x), layer(x, lengths=lengths), layer(packed)
    with torch.device("meta"):
        torch.testing.assert_close((layer(x), layer(x, lengths=lengths), layer(packed)), want)


def test_lazily_negated_input() -> None:
    layer = rnn.RNN(I, H)
    x = torch.fft.fft(torch.randn(T, B, I)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(layer(x), layer(x.resolve_neg()))


def test_results_have_memory_of_their_own() -> None:
    layer = rnn.RNN(I, H)
    x = torch.randn(T, B, I)
    h = torch.randn(1, B, H)
    held = {t.untyped_storage().data_ptr() for t in (x, h, *layer.parameters())}
    assert not held & {t.untyped_storage().data_ptr() for t in tree_leaves(layer(x, h))}
