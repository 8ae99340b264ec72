"""Memory: in which layout tensors come, what is returned, and tensors whose memory is not there."""

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn
from rnn import layer_call
from rnn.kernels.plan import Plan
from tests import fuzzing, gone
from tests.cases import LAYER_NAMES, cell_of
from tests.conftest import check_ready
from tests.fuzz_layouts import edits, forms, shared
from tests.fuzzing import ByCells
from tests.kernels.cpu.test_cpu import KINDS, PLANS, available

LARGE = 2**20
every_name = pytest.mark.parametrize("name", LAYER_NAMES)
every_plan = pytest.mark.parametrize(
    "plan", [None, *PLANS], ids=lambda plan: plan.backend if plan else ""
)
directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
orders = pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])


def pair(name: str, *sizes: int, plan: Plan | None = None, **options: Any) -> tuple[Any, Any]:
    """Ours and torch.nn's, with the same weights."""
    ours = getattr(rnn, name)(*sizes, plan=plan, **options)
    theirs = getattr(nn, name)(*sizes, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def flat(out: Any) -> dict[str, Tensor]:
    """The output and the last states, by name."""
    y, last = out[:2]
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    return {
        "output": y,
        **{f"end_{k}": t for k, t in enumerate(last if isinstance(last, tuple) else [last])},
    }


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "last first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "sliced": lambda t: torch.stack((t, t + 9), -1)[..., 0],
    "offset": lambda t: torch.cat((t.new_full((3,), 9), t.flatten()))[3:].view(t.shape),
    "negative": lambda t: torch._neg_view(-t),
}


@every_plan
@directions
@pytest.mark.parametrize(
    "form", ["lengths", pytest.param("padded", marks=pytest.mark.slow), "packed"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_name
def test_gradients_in_another_layout(
    name: str, layout: str, form: str, bidirectional: bool, plan: Plan | None
) -> None:
    """Those of the output and of the last states, as a loss of `h.permute(...)` gives them."""
    available("lstm", plan or Plan("numpy"))
    ours = getattr(rnn, name)(3, 6, bidirectional=bidirectional, plan=plan)
    exact = getattr(nn, name)(3, 6, bidirectional=bidirectional).double()
    exact.load_state_dict(ours.state_dict())
    lengths = torch.tensor([5, 4, 3, 2])
    x = torch.randn(5, 4, 3)

    def run(module: Any, x: Tensor, place: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        x = x.clone().requires_grad_()
        given: Any = pack_padded_sequence(x, lengths) if form == "packed" else x
        keywords = dict(lengths=lengths) if form == "lengths" else {}
        found = flat(module(given, **keywords))
        generator = torch.Generator().manual_seed(1)
        grads = [
            place(torch.randn(t.shape, generator=generator).to(t.dtype))
            if t.dim() > 2
            else torch.randn(t.shape, generator=generator).to(t.dtype)
            for t in found.values()
        ]
        return torch.autograd.grad(list(found.values()), [x, *module.parameters()], grads)

    want = run(ByCells(exact) if form == "lengths" else exact, x.double(), lambda t: t)
    for got, right in zip(run(ours, x, LAYOUTS[layout]), want, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", ["padded", "lengths", "resets"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("H", [1, 4])
@every_plan
def test_first_states_in_another_layout(
    plan: Plan | None, H: int, layout: str, form: str, dtype: torch.dtype
) -> None:
    """What is returned in their place does not take over their layout."""
    if plan and (dtype == torch.bfloat16 or (plan.backend == "native" and dtype == torch.float64)):
        pytest.skip("the plan has another dtype")
    available("gru", plan or Plan("numpy"))
    layer = rnn.GRU(3, H, bidirectional=True, plan=plan, dtype=dtype)
    x = torch.randn(5, 4, 3, dtype=dtype)
    h = torch.randn(2, 4, H, dtype=dtype)
    masks: dict[str, Any] = {
        "lengths": dict(lengths=torch.tensor([3, 5, 0, 4])),
        "resets": dict(resets=torch.rand(5, 4) < 0.3),
    }.get(form, {})

    def run(h: Tensor) -> list[Tensor]:
        h = h.detach().requires_grad_()
        y, last = layer(x, h, **masks)
        return [
            y,
            last,
            *torch.autograd.grad(y.sin().sum() + last.sin().sum(), [h, *layer.parameters()]),
        ]

    placed = LAYOUTS[layout](h)
    for got, right in zip(run(placed), run(h), strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, right)


# What is returned: tensors of their own.


def checked(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert not forms(ours, theirs, {})
    assert not shared(ours, theirs, {})
    assert not edits(ours)


CALLS = ["padded", "unbatched", "packed", "lengths", "step"]


def attempt(
    module: Any, call: str, grad: bool, batch_first: bool, lengths: bool
) -> dict[str, Tensor]:
    T = 1 if call == "step" else 5
    x: Any = torch.ones(4, T, 3) if batch_first else torch.ones(T, 4, 3)
    keywords: dict[str, Any] = {}
    if call == "unbatched":
        x = torch.ones(5, 3)
    if call == "packed":
        x = pack_padded_sequence(x, torch.tensor([5, 4, 3, 2]), batch_first)
    if call == "lengths" and lengths:
        keywords["lengths"] = torch.tensor([3, 5, 0, 4])
    with torch.set_grad_enabled(grad):
        return flat(module(x, **keywords))


@every_plan
@orders
@directions
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("call", CALLS)
@every_name
def test_outputs_are_tensors_of_their_own(
    name: str, call: str, layers: int, bidirectional: bool, batch_first: bool, plan: Plan | None
) -> None:
    """In the layout that torch.nn's have: none is a view of another, or of memory that is more than
    it."""
    available("lstm", plan or Plan("numpy"))
    ours, theirs = pair(
        name, 3, 6, layers, plan=plan, bidirectional=bidirectional, batch_first=batch_first
    )
    for grad in (True, False):
        checked(
            attempt(ours, call, grad, batch_first, True),
            attempt(theirs, call, grad, batch_first, False),
        )


@every_plan
@orders
@directions
@pytest.mark.parametrize("large", [False, True], ids=["", "large"])
@every_name
def test_gradients_are_tensors_of_their_own(
    name: str, large: bool, bidirectional: bool, batch_first: bool, plan: Plan | None
) -> None:
    """As they come out of `autograd.grad` and into `.grad`."""
    available("lstm", plan or Plan("numpy"))
    T, B, I, H = (20, 16, 1024, 520) if large else (5, 4, 3, 6)
    ours, theirs = pair(name, I, H, plan=plan, bidirectional=bidirectional, batch_first=batch_first)
    for accumulated in (False, True):
        found = []
        for module in (ours, theirs):
            x = torch.ones(T, B, I, requires_grad=True)
            D = 1 + bidirectional
            sequences = T if batch_first else B
            states = [
                torch.ones(D, sequences, H, requires_grad=True)
                for _ in range(2 if name == "LSTM" else 1)
            ]
            y, last = module(x, tuple(states) if name == "LSTM" else states[0])
            loss = y.square().sum() + sum(t.sum() for t in (last if name == "LSTM" else [last]))
            leaves = {
                "d_input": x,
                **{f"d_hx_{k}": s for k, s in enumerate(states)},
                **{f"d_{key}": p for key, p in module.named_parameters()},
            }
            if accumulated:
                loss.backward()
                found.append({key: t.grad for key, t in leaves.items()})
            else:
                found.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())))))
        got: dict[str, Any] = found[0]
        want: dict[str, Any] = found[1]
        assert not forms(got, want, {key: [_dense(t)] for key, t in got.items()})
        assert not shared(got, want, {})
        assert not edits(got)


def _dense(t: Tensor) -> tuple[int, ...]:
    return tuple(
        stride
        for size, stride in zip(t.shape, torch.empty(t.shape, device="meta").stride())
        if size > 1
    )


@orders
@pytest.mark.parametrize("layers", [1, 2])
@every_name
def test_views_of_what_a_bidirectional_layer_returns(
    name: str, layers: int, batch_first: bool
) -> None:
    """As torch.nn's documentation tells them apart by direction."""
    layer = getattr(rnn, name)(3, 6, layers, bidirectional=True, batch_first=batch_first)
    x = torch.randn(4, 5, 3) if batch_first else torch.randn(5, 4, 3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, last = layer(x)
        for h in last if name == "LSTM" else [last]:
            assert h.view(layers, 2, 4, 6).shape == (layers, 2, 4, 6) and h.view(-1).is_contiguous()
        assert y.view(*y.shape[:2], 2, 6)[..., 0, :].equal(y[..., :6])


@every_name
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("carried", [False, True], ids=["", "carried"])
def test_truncated_backpropagation(name: str, layers: int, carried: bool) -> None:
    """The graph is cut with `detach_()` on the states: the gradients are torch.nn's."""
    found = []
    for layer in pair(name, 2, 3, layers):
        torch.manual_seed(1)
        state = None
        for _ in range(3):
            y, state = layer(torch.randn(4, 2, 2), state)
            (
                y.sum() + sum(s.sum() for s in (state if name == "LSTM" else [state])) * carried
            ).backward()
            for s in state if name == "LSTM" else [state]:
                s.detach_()
        found.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@directions
def test_states_have_versions_of_their_own(layers: int, bidirectional: bool) -> None:
    """One is needed for backward; the other is edited in place."""
    for edited in (0, 1):
        _, states = rnn.LSTM(2, 3, layers, bidirectional=bidirectional)(torch.randn(4, 2, 2))
        used = states[1 - edited].pow(2).sum()
        states[edited].mul_(0.5)
        (used + states[edited].sum()).backward()


@pytest.mark.parametrize("form", ["padded", "lengths", "step"])
@pytest.mark.parametrize("grad", [False, True], ids=["no gradients", ""])
def test_a_state_is_saved_alone(form: str, grad: bool) -> None:
    """What `torch.save` writes of h_n is h_n."""
    ours, theirs = pair("LSTM", 2, 300)
    sizes = []
    for layer in (ours, theirs):
        keywords = (
            dict(lengths=torch.tensor([2] * 7)) if form == "lengths" and layer is ours else {}
        )
        with torch.set_grad_enabled(grad):
            _, (h, c) = layer(torch.randn(1 if form == "step" else 2, 7, 2), **keywords)
        for t in (h, c):
            file = io.BytesIO()
            torch.save(t.detach(), file)
            sizes.append(len(file.getvalue()))
    assert max(sizes) - min(sizes) < 100


def _resized(t: Tensor) -> None:
    t.detach().resize_(3, t.numel())


def _emptied(t: Tensor) -> None:
    storage = t.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    with torch.no_grad():
        t.zero_()


def _written(t: Tensor) -> None:
    with torch.no_grad():
        torch.cat([torch.ones(2 * t.numel())], out=t.detach())


DEEDS: dict[str, Callable[[Tensor], Any]] = {
    "resize_": _resized,
    "untyped_storage().resize_(0)": _emptied,
    "out=": _written,
    "detach_()": torch.detach_,
    "set_": lambda t: t.detach().set_(),  # type: ignore[call-overload]
    "requires_grad_": lambda t: t.detach().requires_grad_(),
}


@every_plan
@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("size", [4, 300], ids=["small", "large"])
@every_name
def test_what_one_may_do_with_a_tensor(name: str, size: int, deed: str, plan: Plan | None) -> None:
    """With outputs, states and gradients, below and above 1 MiB: all that one may do with
    torch.nn's."""
    available("lstm", plan or Plan("numpy"))
    T, B = (40, 40) if size > 4 else (3, 2)
    layer = getattr(rnn, name)(size, size, plan=plan)
    x = torch.randn(T, B, size, requires_grad=True)
    out = flat(layer(x))
    grads = torch.autograd.grad(
        [t.sum() for t in out.values()], [x, *layer.parameters()], retain_graph=True
    )
    assert size == 4 or max(t.nbytes for t in out.values()) > LARGE
    with torch.no_grad():
        plain = flat(layer(x))
    for t in (*grads, *plain.values(), *out.values()):
        DEEDS[deed](t)


@every_plan
@pytest.mark.parametrize("large", [False, True], ids=["", "large"])
def test_inputs_keep_their_storage(large: bool, plan: Plan | None) -> None:
    """What was given can be resized afterwards, as FSDP does with its weights."""
    available("lstm", plan or Plan("numpy"))
    H = 300 if large else 5
    layer = rnn.LSTM(4, H, plan=plan)
    x = torch.randn(3, 2, 4)
    layer(x)[0].sum().backward()
    for t in (x, *layer.parameters()):
        assert t.untyped_storage().resizable()
        t.untyped_storage().resize_(0)


@pytest.mark.parametrize("mode", ["RNN", "GRU"])
@pytest.mark.parametrize("plan", [None, Plan("numpy"), Plan("native")], ids=["", "numpy", "native"])
@directions
@pytest.mark.parametrize("form", ["padded", "lengths"])
def test_a_bias_may_change_before_backward(
    mode: str, plan: Plan | None, bidirectional: bool, form: str
) -> None:
    """No gradient needs it: torch.nn's RNN and GRU allow it."""
    available("gru", plan or Plan("numpy"))
    found = []
    for layer in pair(mode, 3, 5, 2, bidirectional=bidirectional):
        keywords: dict[str, Any] = {}
        if isinstance(layer, rnn.stack.Stack):
            layer.plan = plan
            keywords = dict(lengths=torch.tensor([4, 4])) if form == "lengths" else {}
        y = layer(torch.ones(4, 2, 3), **keywords)[0]
        with torch.no_grad():
            for key, p in layer.named_parameters():
                if "bias" in key:
                    p.add_(1)
        y.sum().backward()
        found.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "float16": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "float64": Tensor.double,
    "int64": Tensor.long,
    "bool": Tensor.bool,
    "complex": lambda t: t.to(torch.complex64),
}


@pytest.mark.parametrize("which", [0, 1], ids=["h_0", "c_0"])
@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(
    "call", ["padded", "unbatched", "packed", "lengths", "step", "no gradients"]
)
@pytest.mark.parametrize("proj", [0, 3], ids=["", "projection"])
def test_states_of_two_dtypes_are_refused(proj: int, call: str, dtype: str, which: int) -> None:
    """As torch.nn refuses them; and not promoted."""
    ours, theirs = pair("LSTM", 4, 5, proj_size=proj)
    T = 1 if call == "step" else 3
    x: Any = torch.randn(T, 4) if call == "unbatched" else torch.randn(T, 2, 4)
    shapes = [[1, 2, width] if x.dim() == 3 else [1, width] for width in (proj or 5, 5)]
    states = [torch.zeros(shape) for shape in shapes]
    states[which] = STATES[dtype](states[which])
    if call == "packed":
        x = pack_padded_sequence(x, torch.tensor([3, 2]))
    with torch.set_grad_enabled(call not in ("step", "no gradients")):
        if not (which and (proj or call == "packed")):  # without oneDNN torch.nn promotes c_0
            with pytest.raises(RuntimeError):
                theirs(x, tuple(states))
        with pytest.raises(RuntimeError, match=r"hx|hidden|h_0|c_0|state"):
            ours(
                x,
                tuple(states),
                **(dict(lengths=torch.tensor([3, 2])) if call == "lengths" else {}),
            )


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize("name", ["RNN", "GRU"])
@pytest.mark.parametrize("T", [1, 3])
def test_a_state_of_another_dtype_is_refused(name: str, dtype: str, T: int) -> None:
    ours, theirs = pair(name, 4, 5)
    for grad, layer in itertools.product((False, True), (theirs, ours)):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError):
            layer(torch.randn(T, 2, 4), STATES[dtype](torch.zeros(1, 2, 5)))


# Memory that is not there.


def test_memory_that_is_not_there() -> None:
    """Every place, in a process of its own, which it may end."""
    found = fuzzing.run("tests.gone", 0, len(gone.CASES), 1)
    assert not found, fuzzing.report(found, "tests.gone", 0)


# What every backend is given.


@pytest.mark.parametrize("spoil", [*LAYOUTS, "zero", "shrunk", "float64"])
def test_what_a_backend_is_given_is_looked_at(spoil: str) -> None:
    """The check that every test has finds what a kernel cannot read; and it is called."""
    good = torch.randn(2, 3, 4)
    bad = {
        "zero": lambda t: torch._efficientzerotensor(t.shape),
        "shrunk": lambda t: gone.without(t, "shrunk"),
        "float64": Tensor.double,
        **LAYOUTS,
    }[spoil](good)
    check_ready((good, [good, None], 3))
    if bad.is_contiguous() and spoil == "offset":
        check_ready([good, bad])
    else:
        with pytest.raises(AssertionError, match="a backend was given"):
            check_ready([good, (None, bad)])


@pytest.mark.parametrize(("mode", "nonlinearity"), KINDS)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.backend)
def test_the_boundary_is_watched(
    mode: str, nonlinearity: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    available("lstm", plan)
    seen: list[str] = []
    find = layer_call.module

    def watched(name: str) -> Any:
        seen.append(name)
        return find(name)

    monkeypatch.setattr(layer_call, "module", watched)
    cell = cell_of(mode, nonlinearity)
    layer = getattr(rnn, mode)(
        3, 4, plan=plan, **({"nonlinearity": nonlinearity} if mode == "RNN" else {})
    )
    layer(torch.randn(3, 2, 3))[0].sum().backward()
    assert seen and cell.gates * 4 == layer.weight_ih_l0.shape[0]
    assert hasattr(find(seen[0]), "_module"), "the backend is looked at"
