"""One step a call, as in streaming and decoding, on a path of its own: in C++ or by torch's own
operators."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn
from rnn import dispatch, single_step
from tests.cases import close

KINDS = [("RNN", dict(nonlinearity="relu")), ("RNN", {}), ("LSTM", {}), ("GRU", {})]
OPTIONS: list[dict[str, Any]] = [
    {},
    dict(bias=False),
    dict(num_layers=3),
    dict(batch_first=True),
    dict(num_layers=2, dropout=0.5),
]


def compare(found: Iterable[Any]) -> None:
    """Ours, torch's and the exact ones."""
    ours, theirs, exact = found
    close(ours, theirs, exact)


@pytest.fixture(params=["compiler", "no compiler"])
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the path gives, call after call, with a compiler and without."""
    if request.param == "no compiler":
        monkeypatch.setattr(dispatch, "native_available", lambda cell, dtype: False)
    elif not dispatch.native_available(rnn.kernels.cells.gru, torch.float32):
        pytest.skip("there is no C++ compiler")
    found: list[Any] = []
    plain = single_step.single_step

    def watched(*given: Any) -> Any:
        found.append(plain(*given))
        return found[-1]

    monkeypatch.setattr(rnn.stack, "single_step", watched)
    return found


def made(kind: tuple[str, dict[str, Any]], I: int, H: int, **options: Any) -> tuple[Any, Any, Any]:
    """Ours, torch.nn's, and torch.nn's in float64, with the same weights."""
    torch.manual_seed(0)
    name, chosen = kind
    layers = [getattr(library, name)(I, H, **chosen, **options).eval() for library in (rnn, nn, nn)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    return layers[0], layers[1], layers[2].double()


def flat(found: Any) -> dict[str, Tensor]:
    y, last = found
    return dict(
        y=y, **{f"last {k}": s for k, s in enumerate(last if isinstance(last, tuple) else [last])}
    )


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        *((options, (5, 17, 40)) for options in OPTIONS),
        *(({}, sizes) for sizes in ((1, 3, 5), (1, 64, 64), (3, 300, 100), (40, 7, 33), (0, 3, 4))),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps(
    kind: tuple[str, dict[str, Any]],
    options: dict[str, Any],
    sizes: tuple[int, int, int],
    taken: list[Any],
) -> None:
    """Four steps, each with the state of the one before."""
    B, I, H = sizes
    layers = made(kind, I, H, **options)
    ends = [None] * 3
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, B, I).transpose(0, int(bool(options.get("batch_first"))))
            found: list[Any] = []
            for k, (layer, dtype) in enumerate(
                zip(layers, (torch.float32, torch.float32, torch.float64))
            ):
                y, ends[k] = layer(x.to(dtype), ends[k])
                found.append(flat((y, ends[k])))
                assert y.is_contiguous()
            assert [(n, t.shape) for n, t in found[0].items()] == [
                (n, t.shape) for n, t in found[1].items()
            ]
            if B:
                compare(found)
    assert len(taken) == 4 and None not in taken


def test_memory_of_its_own(taken: list[Any]) -> None:
    """Nothing that is returned is in the place of another thing, or of what was given."""
    layer = rnn.LSTM(4, 4)
    x, h, c = (torch.randn(1, 2, 4) for _ in range(3))
    with torch.no_grad():
        y, (h_n, c_n) = layer(x, (h, c))
    assert taken and len({t.untyped_storage().data_ptr() for t in (x, h, c, y, h_n, c_n)}) == 6


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_float64(kind: tuple[str, dict[str, Any]], taken: list[Any]) -> None:
    ours, _, theirs = made(kind, 3, 5)
    with torch.inference_mode():
        x = torch.randn(1, 2, 3, dtype=torch.float64)
        torch.testing.assert_close(flat(ours.double()(x)), flat(theirs(x)), rtol=1e-13, atol=1e-13)
    assert None not in taken


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_not_plain(kind: tuple[str, dict[str, Any]], taken: list[Any]) -> None:
    """Left to the layer's other ways, which are right."""
    ours, _, theirs = made(kind, 3, 4)
    rows = torch.randn(6, 1, 2, 3)
    with torch.no_grad():
        want = theirs(rows[0].double())[0]
        strided = rows[0].mT.contiguous().mT
        layer = nn.utils.parametrizations.weight_norm(made(kind, 3, 4)[0], "weight_hh_l0")
        for got in (
            ours(strided)[0],
            ours(torch._neg_view(-rows[0]))[0],
            layer(rows[0])[0],
            torch.vmap(lambda x: ours(x)[0])(rows)[0],
        ):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        with pytest.raises((RuntimeError, ValueError)):
            ours(rows[0].double())
        with pytest.raises(RuntimeError):
            ours(torch.randn(1, 2, 5))
        with pytest.raises(RuntimeError):
            ours(
                rows[0], (torch.zeros(1, 3, 4),) * 2 if kind[0] == "LSTM" else torch.zeros(1, 3, 4)
            )


def test_shapes_of_weights(taken: list[Any]) -> None:
    """Weights of another shape are refused, not read past their end."""
    layer: Any = rnn.RNN(3, 4)
    layer.weight_hh_l0.data = torch.randn(2, 2)
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight_hh"):
        layer(torch.randn(1, 2, 3))
    assert taken == [None]


def leaves(
    layer: Any, B: int, x_grad: bool = True, given: bool = True
) -> tuple[Tensor, Any, list[Tensor]]:
    """x, the states if they are `given`, and all that can have a gradient, with the same numbers in
    every dtype."""
    generator = torch.Generator().manual_seed(3)
    dtype = layer.weight_ih_l0.dtype
    shape = (B, 1) if layer.batch_first else (1, B)
    x = torch.randn(*shape, layer.input_size, generator=generator).to(dtype).requires_grad_(x_grad)
    pair = layer.mode == "LSTM"
    states = [
        torch.randn(layer.num_layers, B, layer.hidden_size, generator=generator)
        .to(dtype)
        .requires_grad_()
        for _ in range(1 + pair)
    ]
    hx = (tuple(states) if pair else states[0]) if given else None
    wanted = [*([x] if x_grad else []), *(states if given else []), *layer.parameters()]
    return x, hx, [t for t in wanted if t.requires_grad]


def outputs(found: Any) -> list[Tensor]:
    return list(flat(found).values())


def gradients(layer: Any, B: int, used: str = "all", **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients from a loss of y, of the last states, or of `all`."""
    x, hx, wanted = leaves(layer, B, **options)
    found = outputs(layer(x, hx))
    some = dict(y=found[:1], last=found[1:], all=found)[used]
    generator = torch.Generator().manual_seed(4)
    d = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in some]
    grads = torch.autograd.grad(some, wanted, d, allow_unused=True)
    return {
        str(k): torch.zeros_like(w) if g is None else g
        for k, (g, w) in enumerate(zip((*found, *grads), (*found, *wanted)))
    }


@pytest.mark.parametrize(
    ("sizes", "options", "how"),
    [
        *(((5, 17, 40), options, {}) for options in OPTIONS[:4]),
        *(((B, 16, 32), dict(num_layers=2), {}) for B in (1, 2, 3, 4, 7, 11, 12, 13, 33)),
        *(
            (sizes, {}, {})
            for sizes in (
                (1, 3, 5),
                (3, 1, 1),
                (14, 300, 100),
                (40, 7, 33),
                (1, 64, 520),
                (6, 260, 65),
            )
        ),
        *(
            ((4, 5, 6), dict(num_layers=2, batch_first=True), how)
            for how in (
                dict(used="y"),
                dict(used="last"),
                dict(given=False),
                dict(x_grad=False),
                dict(x_grad=False, given=False),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients(
    kind: tuple[str, dict[str, Any]],
    sizes: tuple[int, int, int],
    options: dict[str, Any],
    how: dict[str, Any],
    taken: list[Any],
) -> None:
    B, I, H = sizes
    ours, theirs, exact = made(kind, I, H, **options)
    compare(gradients(layer, B, **how) for layer in (ours, theirs, exact))
    assert None not in taken
    if dispatch.native_available(rnn.kernels.cells.gru, torch.float32):
        assert taken[0][0].grad_fn.name() == "_SingleStepBackward"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_threads(kind: tuple[str, dict[str, Any]], threads: int, taken: list[Any]) -> None:
    layers = made(kind, 70, 100, num_layers=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(gradients(layer, 14) for layer in layers)
    finally:
        torch.set_num_threads(before)
    assert None not in taken


@pytest.mark.parametrize(
    "frozen", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l1", "bias_hh_l0", "l0", "weight", "bias"]
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_frozen(kind: tuple[str, dict[str, Any]], frozen: str, taken: list[Any]) -> None:
    layers = made(kind, 5, 6, num_layers=2)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(frozen not in name)
    compare(gradients(layer, 3) for layer in layers)
    compare(gradients(layer, 3, x_grad=False, given=False) for layer in layers)
    assert None not in taken


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layouts(kind: tuple[str, dict[str, Any]], taken: list[Any]) -> None:
    """Inputs, states and incoming gradients in any layout."""
    ours, _, exact = made(kind, 6, 8)
    found = []
    for layer in (ours, exact):
        dtype = layer.weight_ih_l0.dtype
        x = torch.arange(48.0, dtype=dtype).view(6, 8).sin().requires_grad_()
        h = torch.arange(64.0, dtype=dtype).view(8, 8).cos().requires_grad_()
        states = h.t()[None], h.flip(0)[None]
        y, last = layer(x.t()[None], states if kind[0] == "LSTM" else states[0])
        last = last if kind[0] == "LSTM" else (last,)
        loss = (y[0].t() * h.detach()).sum() + sum(
            s.mean() + s.flip(1).permute(2, 0, 1).sin().sum() for s in last
        )
        found.append(torch.autograd.grad(loss, (x, h, *layer.parameters())))
        found.append(torch.autograd.grad(layer(x.t()[None])[0].sum(), layer.parameters()))
    for got, want in zip(found[0] + found[1], found[2] + found[3]):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert None not in taken


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_results_of_their_own(
    kind: tuple[str, dict[str, Any]], batch_first: bool, taken: list[Any]
) -> None:
    """Neither results nor gradients share memory, and none is a view."""
    layer = made(kind, 4, 6, num_layers=2, batch_first=batch_first)[0]
    x, hx, wanted = leaves(layer, 3)
    found = outputs(layer(x, hx))
    grads = torch.autograd.grad([t.sum() for t in found], wanted)
    every = [x, *([*hx] if kind[0] == "LSTM" else [hx]), *found, *grads, *layer.parameters()]
    assert len({t.untyped_storage().data_ptr() for t in every}) == len(every)
    if taken[0][0].grad_fn.name() == "_SingleStepBackward":
        assert not any(t._is_view() for t in (*found, *grads))
        for t in found:
            t.detach_()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_in_place(kind: tuple[str, dict[str, Any]], taken: list[Any]) -> None:
    """What backward needs is watched; what is returned may be edited, as with most of torch.nn."""
    layers = made(kind, 4, 6)
    for name in ("x", "state", "weight_ih_l0", "weight_hh_l0"):
        layer = layers[0]
        x, hx, _ = leaves(layer, 3)
        x = x * 1
        state = (hx[0] if kind[0] == "LSTM" else hx) * 1
        y = layer(x, (state, hx[1]) if kind[0] == "LSTM" else state)[0]
        with torch.no_grad():
            {"x": x, "state": state, **dict(layer.named_parameters())}[name].mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            y.sum().backward()

    def edited(layer: Any) -> dict[Any, Tensor]:
        x, hx, wanted = leaves(layer, 3)
        found = outputs(layer(x, hx))
        loss = sum(t.sin().sum() for t in found)
        with torch.no_grad():
            for t in found:
                t.add_(0)
        again = [t * 2 for t in outputs(layer(x, hx))]
        for t in outputs(layer(x, hx)):
            t.mul_(3)
        return (
            dict(enumerate(torch.autograd.grad([t.sum() for t in again], wanted))) if loss else {}
        )

    compare({str(k): t for k, t in edited(layer).items()} for layer in made(kind, 4, 6))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bias_in_place(kind: tuple[str, dict[str, Any]]) -> None:
    """A bias may be edited before backward, but not where its gradients are to be differentiated
    again."""
    if not dispatch.native_available(rnn.kernels.cells.gru, torch.float32):
        pytest.skip("there is no C++ compiler")
    layer = made(kind, 4, 6)[0]
    x, hx, wanted = leaves(layer, 3)
    want = torch.autograd.grad(layer(x, hx)[0].sum(), wanted)
    y = layer(x, hx)[0]
    with torch.no_grad():
        layer.bias_ih_l0.add_(1)
    got = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    with pytest.raises(RuntimeError, match="a bias"):
        torch.autograd.grad(y.sum(), wanted, create_graph=True)


@pytest.mark.parametrize(
    "options", [{}, dict(num_layers=2, batch_first=True), dict(bias=False)], ids=str
)
@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_double_backward(kind: tuple[str, dict[str, Any]], options: dict[str, Any]) -> None:
    """Against torch's own operators in float64, those of one step being differentiable twice, and
    by numbers."""
    found = []
    for layer in made(kind, 3, 4, **options)[::2]:
        x, hx, wanted = leaves(layer, 2)
        first = torch.autograd.grad(
            [t.sin().sum() for t in outputs(layer(x, hx))], wanted, create_graph=True
        )
        found.append([*first, *torch.autograd.grad([g.cos().sum() for g in first], wanted)])
    for got, want in zip(*found):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_batched_gradients(kind: tuple[str, dict[str, Any]]) -> None:
    layer = made(kind, 3, 4)[0]
    x, hx, wanted = leaves(layer, 2)
    y = layer(x, hx)[0]
    d = torch.randn(3, *y.shape)
    every = torch.autograd.grad(y, wanted, d, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        for got, want in zip(every, torch.autograd.grad(y, wanted, d[k], retain_graph=True)):
            torch.testing.assert_close(got[k], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_saved_tensors_hooks(kind: tuple[str, dict[str, Any]]) -> None:
    """Everything that is kept goes through the hooks, which may give it back elsewhere, and in
    another layout."""
    if not dispatch.native_available(rnn.kernels.cells.gru, torch.float32):
        pytest.skip("there is no C++ compiler")
    layer = made(kind, 4, 6, num_layers=2)[0]
    x, hx, wanted = leaves(layer, 3)
    want = torch.autograd.grad(layer(x, hx)[0].sum(), wanted)
    unpacked = []

    def pack(t: Tensor) -> Any:
        return t.detach().double()

    def unpack(t: Any) -> Tensor:
        unpacked.append(t)
        return t.float().mT.contiguous().mT

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = layer(x, hx)[0]
    got = torch.autograd.grad(y.sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert len(unpacked) == 1 + len(outputs(layer(x, hx))) - 1 + 4 + 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.double()):
        y = layer(x, hx)[0]
    with pytest.raises(RuntimeError, match="float32"):
        y.sum().backward()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_memory_that_is_not_there(kind: tuple[str, dict[str, Any]]) -> None:
    """RuntimeError where torch raises it, and no read past an end."""
    pair = kind[0] == "LSTM"
    for enabled in (True, False):
        for name, size in itertools.product(
            ("x", "state", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"), (0, 16)
        ):
            layer = made(kind, 8, 8)[0]
            x = torch.randn(1, 3, 8)
            state = torch.randn(1, 3, 8)
            {"x": x, "state": state, **dict(layer.named_parameters())}[
                name
            ].data.untyped_storage().resize_(size)
            with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError):
                layer(x, (state, torch.randn(1, 3, 8)) if pair else state)
    layer = made(kind, 8, 8)[0]
    x = torch.randn(1, 3, 8, requires_grad=True) * 1
    y = layer(x)[0]
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        y.sum().backward()
    layer = made(kind, 8, 8)[0]
    x = torch.randn(1, 3, 8, requires_grad=True)
    y = layer(x)[0]
    y.backward(torch._efficientzerotensor(y.shape))
    assert x.grad is not None and not x.grad.any()


def test_decoder(taken: list[Any]) -> None:
    """A loop of steps, whose states go from call to call, and whose gradients come together."""
    for kind in KINDS:
        layers = made(kind, 8, 12, num_layers=2)
        found = []
        for layer in layers:
            x = (
                torch.linspace(-1, 1, 6 * 3 * 8, dtype=layer.weight_ih_l0.dtype)
                .view(6, 1, 3, 8)
                .requires_grad_()
            )
            ends = None
            ys = []
            for step in x:
                y, ends = layer(step, ends)
                ys.append(y)
            torch.cat(ys).sin().sum().backward()
            grads = dict(layer.named_parameters(), x=x)
            found.append({name: t.grad for name, t in grads.items()})
        compare(found)
    assert None not in taken


def test_left_to_the_general_path(taken: list[Any]) -> None:
    """What asks for more than plain tensors, with gradients too."""
    layer: Any = made(KINDS[2], 4, 6)[0]
    x = torch.randn(1, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    torch.func.grad(lambda x: layer(x)[0].sum())(x)
    torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
    assert taken == [None] * len(taken) and len(taken) == 3
    taken.clear()
    x.requires_grad_()
    for other in (dict(bidirectional=True), dict(proj_size=3), dict(recompute=True)):
        layer = rnn.LSTM(4, 6, **other)
        layer(x)[0].sum().backward()
    assert not taken
