"""PyTorch's own inputs for its RNN modules, and what they refuse: all must hold for ours, without an exception."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, ModuleInput, module_db
from torch.utils._pytree import tree_leaves

import rnn

OURS = {nn.RNN: rnn.RNN, nn.RNNCell: rnn.RNNCell}
INFOS = {OURS[info.module_cls]: info for info in module_db if info.module_cls in OURS}


def inputs(cls: Any, training: bool = True, **kwargs: Any) -> list[ModuleInput]:
    info: ModuleInfo = INFOS[cls]
    return info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training, **kwargs)


SAMPLES = [(cls, i) for cls in INFOS for i in range(len(inputs(cls, with_packed_sequence=True)))]
all_samples = pytest.mark.parametrize(("cls", "i"), SAMPLES, ids=lambda v: getattr(v, "__name__", str(v)))


def sample(cls: Any, i: int, training: bool = True) -> tuple[nn.Module, nn.Module, list[Any]]:
    """Torch's module and ours with the same parameters, and the arguments."""
    given = inputs(cls, training, with_packed_sequence=True)[i]
    options = given.constructor_input
    theirs = INFOS[cls].module_cls(*options.args, **options.kwargs, dtype=torch.float64).train(training)
    ours = cls(*options.args, **options.kwargs, dtype=torch.float64).train(training)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, list(given.forward_input.args)


def tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def leaves(arguments: list[Any]) -> list[Tensor]:
    return [t for t in tensors([tuple(a) if isinstance(a, PackedSequence) else a for a in arguments])
            if t.is_floating_point()]


def with_gradients(module: nn.Module, arguments: list[Any]) -> list[Tensor]:
    outputs = leaves(list(out) if isinstance(out := module(*arguments), tuple) else [out])
    wanted = [*leaves(arguments), *module.parameters()]
    return [*outputs, *torch.autograd.grad([o.sin().sum() for o in outputs], wanted, allow_unused=True)]


@all_samples
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_values_and_gradients(cls: Any, i: int, training: bool) -> None:
    theirs, ours, arguments = sample(cls, i, training)
    found = [with_gradients(module, arguments) for module in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cls", INFOS)
def test_references(cls: Any) -> None:
    for given in inputs(cls):
        options, arguments = given.constructor_input, given.forward_input.args
        ours = cls(*options.args, **options.kwargs, dtype=torch.float64)
        torch.testing.assert_close(ours(*arguments), given.reference_fn(ours, *arguments))


@all_samples
def test_second_derivatives(cls: Any, i: int) -> None:
    _, ours, arguments = sample(cls, i)
    names, weights = [name for name, _ in ours.named_parameters()], list(ours.parameters())
    packed = arguments[0] if isinstance(arguments[0], PackedSequence) else None
    data = [t.detach().requires_grad_() for t in leaves(arguments)]

    def run(*given: Tensor) -> Any:
        first: Any = given[0] if packed is None else PackedSequence(given[0], *packed[1:])
        out = torch.func.functional_call(ours, dict(zip(names, given[len(data) :])), (first, *given[1 : len(data)]))
        return tuple(leaves(list(out) if isinstance(out, tuple) else [out]))

    assert torch.autograd.gradcheck(run, [*data, *weights], fast_mode=True)
    assert torch.autograd.gradgradcheck(run, [*data, *weights], fast_mode=True)


@all_samples
def test_memory_layouts(cls: Any, i: int) -> None:
    _, ours, arguments = sample(cls, i)
    strided = [torch.stack([a.detach()] * 3, -1)[..., 1].requires_grad_() if isinstance(a, Tensor) else a
               for a in arguments]
    assert not any(isinstance(a, Tensor) and a.is_contiguous() for a in strided)
    torch.testing.assert_close(with_gradients(ours, strided), with_gradients(ours, arguments), rtol=0, atol=0)


@all_samples
def test_copies(cls: Any, i: int) -> None:
    theirs, ours, arguments = sample(cls, i)
    assert repr(ours) == repr(theirs)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(with_gradients(copied, arguments), with_gradients(ours, arguments), rtol=0, atol=0)


@pytest.mark.parametrize("cls", INFOS)
def test_error_inputs(cls: Any) -> None:
    info = INFOS[cls]
    found = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert found
    for error in found:
        options, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                cls(*options.args, **options.kwargs)
        else:
            module = cls(*options.args, **options.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*given.args, **given.kwargs)


def new(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


# With torch.nn's type, and its words where these are clear: the text is what they must contain.
REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: m(new(4)), ""),
    (lambda m: m(new(1, 5, 3, 4)), ""),
    (lambda m: m(new(5, 3, 9)), ""),
    (lambda m: m(new(5, 9)), ""),
    (lambda m: m(new(5, 3, 4), new(4, 3, 9)), ""),
    (lambda m: m(new(5, 3, 4), new(2, 3, 8)), ""),
    (lambda m: m(new(5, 3, 4), new(4, 2, 8)), ""),
    (lambda m: m(new(5, 3, 4), new(4, 8)), ""),
    (lambda m: m(new(5, 4), new(4, 1, 8)), ""),
    (lambda m: m(new(5, 3, 4, dtype=torch.int64)), ""),
    (lambda m: m(new(5, 3, 4, dtype=torch.float64)), ""),
    (lambda m: m(new(0, 3, 4)), ""),
    (lambda m: m(pack_padded_sequence(new(5, 3, 9), torch.tensor([5, 3, 1]))), ""),
    (lambda m: m(pack_padded_sequence(new(5, 3, 4), torch.tensor([5, 3, 1])), new(4, 2, 8)), ""),
    (lambda m: m(new(5, 3, 4), new(4, 3, 8, dtype=torch.float64)), "torch.float32.*torch.float64"),
    (lambda m: m(new(5, 3, 4), new(4, 3, 8, dtype=torch.int64)), "torch.float32.*torch.int64"),
    (lambda m: type(m)(4, 8, nonlinearity="sigmoid"), ""),
    (lambda m: type(m)(4, 8, proj_size=2), ""),
    (lambda m: type(m)(4, 8, dropout=2), ""),
    (lambda m: type(m)(4, 8, dropout="yes"), ""),
    (lambda m: type(m)(4, 2.5), ""),
    (lambda m: type(m)(4, -1), ""),
    (lambda m: type(m)(4, 8, 0), ""),
]


@pytest.mark.parametrize("i", range(len(REFUSED)))
def test_refused(i: int) -> None:
    call, text = REFUSED[i]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        call(nn.RNN(4, 8, 2, bidirectional=True))
    with pytest.raises(theirs.type, match=text or None) as ours:
        call(rnn.RNN(4, 8, 2, bidirectional=True))
    assert text or str(ours.value) == str(theirs.value)


REFUSED_BY_CELL: list[Callable[[Any], Any]] = [
    lambda m: m(new(1, 3, 4)),
    lambda m: m(new(3, 9)),
    lambda m: m(new(3, 4), new(3, 9)),
    lambda m: m(new(3, 4), new(2, 8)),
    lambda m: m(new(3, 4), new(1, 3, 8)),
    lambda m: m(new(3, 4), new(2, 9)),
    lambda m: type(m)(4, 8, nonlinearity="sigmoid")(new(3, 4)),
]


@pytest.mark.parametrize("i", range(len(REFUSED_BY_CELL)))
def test_refused_by_cell(i: int) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        REFUSED_BY_CELL[i](nn.RNNCell(4, 8))
    with pytest.raises(theirs.type) as ours:
        REFUSED_BY_CELL[i](rnn.RNNCell(4, 8))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(("lengths", "text"), [
    (torch.tensor([1, -1, 2]), "lengths between 0 and"),
    (torch.tensor([1, 6, 2]), "lengths between 0 and"),
    (torch.tensor([1, 2]), "lengths of shape .3."),
    (torch.tensor([1.0, 2.0, 3.0]), "torch.int64"),
])
def test_refused_lengths(lengths: Tensor, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        rnn.RNN(4, 8)(new(5, 3, 4), lengths=lengths)


def test_lengths_of_a_packed_sequence() -> None:
    packed = pack_padded_sequence(new(5, 3, 4), torch.tensor([5, 3, 1]))
    with pytest.raises(RuntimeError, match="its own lengths"):
        rnn.RNN(4, 8)(packed, lengths=torch.tensor([5, 3, 1]))


def test_refused_before_a_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rnn.ops.compute, "forward", lambda *_: pytest.fail("a kernel ran"))
    layer = rnn.RNN(4, 8, 2)
    with pytest.raises(RuntimeError, match="lengths between 0 and"):
        layer(new(5, 3, 4), lengths=torch.tensor([1, 6, 2]))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        layer(new(5, 3, 4), new(2, 3, 8, device="meta"))
