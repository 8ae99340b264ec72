"""rnn.RNN and rnn.RNNCell take the place of torch.nn's."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn
from rnn.kernels.plan import Plan
from tests.cases import CASES, Case, check
from tests.kernels.cpu.test_cpu import PLANS, suited


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.backend)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, plan: Plan) -> None:
    check(case, suited(plan, case.dtype))


def test_tutorial_model() -> None:
    """The numbers of torch.nn from the same seed, with nothing changed but the module."""

    class Model(nn.Module):
        def __init__(
            self, library: Any, input_size: int, hidden_size: int, output_size: int
        ) -> None:
            super().__init__()
            self.hidden_size = hidden_size
            self.rnn = library.RNN(input_size, hidden_size, batch_first=True)
            self.fc = nn.Linear(hidden_size, output_size)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.rnn(x, torch.zeros(1, x.size(0), self.hidden_size))
            return self.fc(out[:, -1, :])

    losses: list[list[float]] = []
    for library in (nn, rnn):
        torch.manual_seed(0)
        model = Model(library, 10, 20, 1)
        x = torch.randn(5, 10, 10)
        target = torch.randn(5, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.1 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)


def test_parameters() -> None:
    """Those of torch.nn, by name, shape, order, and from the same seed by value."""
    for options in (dict(), dict(num_layers=3, bidirectional=True), dict(bias=False)):
        found = []
        for library in (nn, rnn):
            torch.manual_seed(1)
            found.append(library.RNN(4, 8, **options))
        theirs, ours = found
        assert list(ours.state_dict()) == list(theirs.state_dict())
        torch.testing.assert_close(
            list(ours.parameters()), list(theirs.parameters()), rtol=0, atol=0
        )
        assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(
            ours.state_dict()
        )
        assert isinstance(ours, nn.RNNBase)
        assert len(ours.all_weights) == len(theirs.all_weights)
    positional = rnn.RNN(4, 8, 2, "relu", False, True, 0.0, True)
    assert repr(positional) == repr(nn.RNN(4, 8, 2, "relu", False, True, 0.0, True))


def test_copies_and_files() -> None:
    layer = rnn.RNN(4, 8, 2, bidirectional=True, plan=Plan("numpy"))
    x = torch.randn(5, 3, 4)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert other.plan == layer.plan
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
        with torch.no_grad():
            other.get_parameter("weight_hh_l0").mul_(2)
        assert not torch.equal(other(x)[0], layer(x)[0])


def test_dtypes() -> None:
    layer = rnn.RNN(4, 8, 2, bidirectional=True)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        y, h = layer.to(dtype)(torch.randn(5, 3, 4, dtype=dtype))
        assert y.dtype == h.dtype == dtype
    assert layer.half()(torch.randn(5, 3, 4).half())[0].dtype == torch.float16
    assert layer.double()(torch.randn(5, 3, 4).double())[0].dtype == torch.float64


def test_complex_numbers_are_right() -> None:
    """No kernel has them: the formula does."""
    ours, theirs = (
        library.RNN(4, 8, dtype=torch.float64).to(torch.complex128) for library in (rnn, nn)
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 4, dtype=torch.complex128)
    torch.testing.assert_close(ours(x), theirs(x))


def test_weights_may_be_replaced() -> None:
    """Functional calls, parametrizations, tied and frozen weights."""
    layer = rnn.RNN(4, 8)
    x = torch.randn(5, 3, 4)
    other = rnn.RNN(4, 8)
    torch.testing.assert_close(
        torch.func.functional_call(layer, dict(other.named_parameters()), x), other(x)
    )
    layer.weight_hh_l0 = other.weight_hh_l0
    layer(x)[0].sum().backward()
    assert other.weight_hh_l0.grad is not None
    normed = nn.utils.parametrizations.weight_norm(rnn.RNN(4, 8), "weight_hh_l0")
    normed(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in normed.parameters())
    frozen = rnn.RNN(4, 8)
    frozen.weight_ih_l0.requires_grad_(False)
    frozen(x)[0].sum().backward()
    assert frozen.weight_ih_l0.grad is None
    assert frozen.weight_hh_l0.grad is not None


def test_backward_in_eval_mode() -> None:
    layer = rnn.RNN(4, 8, 2, dropout=0.5).eval()
    x = torch.randn(5, 3, 4, requires_grad=True)
    theirs = nn.RNN(4, 8, 2, dropout=0.5).eval()
    theirs.load_state_dict(layer.state_dict())
    grads = [
        torch.autograd.grad(module(x)[0].sin().sum(), [x, *module.parameters()])
        for module in (layer, theirs)
    ]
    torch.testing.assert_close(*grads)


def test_dropout() -> None:
    """As torch.nn's, between layers alone, from the same state of the generator."""
    ours, theirs = (library.RNN(4, 8, 3, dropout=0.5) for library in (rnn, nn))
    theirs.load_state_dict(ours.state_dict())
    found = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        found.append(module(torch.ones(6, 3, 4)))
    torch.testing.assert_close(*found)
    assert not torch.equal(ours(torch.ones(6, 3, 4))[0], ours(torch.ones(6, 3, 4))[0])
    dropped = rnn.RNN(4, 8, 2, dropout=1.0)
    with torch.no_grad():
        dropped.load_state_dict(
            {k: v.abs() if "bias" not in k else v * 0 for k, v in dropped.state_dict().items()}
        )
    assert not dropped(torch.ones(6, 3, 4))[0].any()
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        rnn.RNN(4, 8, dropout=0.5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_packing_without_packing(batch_first: bool) -> None:
    layer = rnn.RNN(4, 8, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(5, 6, 4)
    lengths = torch.tensor([3, 1, 5, 5, 2] if batch_first else [3, 1, 5, 5, 2, 4])
    packed, want_h = layer(pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False))
    want, _ = pad_packed_sequence(packed, batch_first, total_length=x.shape[batch_first])
    y, h = layer(x, lengths=lengths)
    torch.testing.assert_close((y, h), (want, want_h))
    torch.testing.assert_close(layer(x, lengths=lengths.int()), (y, h), rtol=0, atol=0)


def test_packed_sequences_keep_their_order() -> None:
    layer = rnn.RNN(4, 8)
    x = torch.randn(5, 3, 4)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
    y, _ = layer(packed)
    assert isinstance(y, PackedSequence)
    torch.testing.assert_close(tuple(y)[1:], tuple(packed)[1:], rtol=0, atol=0)
    alone = [layer(x[:n, b : b + 1])[1] for b, n in enumerate((2, 5, 3))]
    torch.testing.assert_close(layer(packed)[1], torch.cat(alone, 1))


def test_state_carried_over() -> None:
    layer = rnn.RNN(4, 8, 2)
    x = torch.randn(9, 3, 4)
    want = layer(x)
    h = None
    parts = []
    for part in x.split([1, 3, 5]):
        y, h = layer(part, h)
        parts.append(y)
    torch.testing.assert_close((torch.cat(parts), h), want)


def test_cell_steps_as_the_layer() -> None:
    layer = rnn.RNN(4, 8)
    cell = rnn.RNNCell(4, 8)
    cell.load_state_dict(
        {name.removesuffix("_l0"): value for name, value in layer.state_dict().items()}
    )
    x = torch.randn(5, 3, 4)
    h = None
    outputs = []
    for x_t in x:
        h = cell(x_t, h)
        outputs.append(h)
    torch.testing.assert_close(torch.stack(outputs), layer(x)[0])


def test_inference_mode() -> None:
    layer = rnn.RNN(4, 8)
    x = torch.randn(5, 3, 4)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), rnn.RNN.forward(layer, x))
        assert layer(x)[0].is_inference()


def test_threads() -> None:
    """Calls from several threads at once, each with its own gradients."""
    from concurrent.futures import ThreadPoolExecutor

    layer = rnn.RNN(4, 8, 2, bidirectional=True)
    inputs = [torch.randn(7, 3, 4) for _ in range(16)]

    def work(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x)[0].sin().sum(), list(layer.parameters()))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, inputs))
    torch.testing.assert_close(found, list(map(work, inputs)), rtol=0, atol=0)
