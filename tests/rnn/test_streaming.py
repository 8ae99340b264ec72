"""A layer fed step by step and in chunks, against torch.nn's over the whole sequence; and its
exports."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import rnn
from rnn.kernels.cpu import native
from rnn.kernels.plan import Plan
from rnn.single_step import order
from tests.cases import check_recurrence, close
from tests.small import LAYERS, B, H, I, pair

T = 7
SIZES = [1, 2, 1, 3]  # of chunks, T steps in all
needs_compiler = pytest.mark.skipif(not native.compiler(), reason="there is no C++ compiler")
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, dict(num_layers=2, batch_first=True, bias=False)],
    ids=["plain", "deep"],
)


def flat(state: Any) -> list[Tensor]:
    return [*state] if isinstance(state, tuple) else [state]


def fed(streaming: Any, x: Tensor, sizes: list[int], time: int) -> Tensor:
    """The output for x [T, B, I], a chunk of one being a step [B, I]."""
    found = []
    for rows in x.split(sizes):
        if len(rows) == 1:
            found.append(streaming(rows[0])[None])
        else:
            found.append(streaming(rows.transpose(0, time)).transpose(0, time))
    return torch.cat(found)


@OPTIONS
@LAYERS
def test_whole_sequence(name: str, options: dict[str, Any]) -> None:
    """Within torch's own error, step by step and in chunks, once more after a reset."""
    torch.manual_seed(0)
    theirs, ours = pair(name, I, H, dtype=torch.float32, **options)
    exact = copy.deepcopy(theirs).double()
    time = int(bool(options.get("batch_first")))
    x = torch.randn(T, B, I)

    def results(layer: Any, x: Tensor) -> dict[str, Tensor]:
        y, last = layer(x.transpose(0, time))
        states = {f"state {k}": s.detach() for k, s in enumerate(flat(last))}
        return {"y": y.detach().transpose(0, time), **states}

    allowed = results(theirs, x)
    want = results(exact, x.double())
    streaming = rnn.Streaming(ours)
    for sizes in ([1] * T, SIZES, [T]):
        y = fed(streaming, x, sizes, time).detach()
        states = {f"state {k}": s for k, s in enumerate(flat(streaming.state))}
        close({"y": y, **states}, allowed, want)
        streaming.reset()
        assert streaming.state is None


@OPTIONS
@LAYERS
def test_layer_by_hand(name: str, options: dict[str, Any]) -> None:
    """The bits of the layer's own calls with the state in hand, where asked for."""
    layer = getattr(rnn, name)(I, H, **options).eval()
    time = int(bool(options.get("batch_first")))
    streaming = rnn.Streaming(layer, same_bits=False)
    state = None
    x = torch.randn(T, B, I)
    for rows in x.split(SIZES):
        want, state = layer(rows.transpose(0, time), state)
        got = fed(streaming, rows, [len(rows)], time)
        assert torch.equal(got, want.transpose(0, time))
        assert all(map(torch.equal, flat(streaming.state), flat(state)))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, dict(num_layers=2, bias=False), dict(num_heads=2, learned_state=True)],
    ids=lambda options: "-".join(options) or "plain",
)
@LAYERS
def test_same_bits(name: str, options: dict[str, Any], threads: int, set_threads: Any) -> None:
    """Step by step, in chunks and as a whole, y and the last states, with gradients and without:
    fewer sequences than a tile of rows has, as many, and more; of one group and of two."""
    torch.manual_seed(0)
    set_threads(threads)
    steps = 9
    for batch, inputs, units in [(1, 5, 4), (3, 24, 34), (6, 7, 80), (14, 17, 16), (40, 3, 8)]:
        layer = getattr(rnn, name)(inputs, units, **options).eval()
        x = torch.randn(steps, batch, inputs)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                y, last = layer(x)
                for size in (1, 2, 4):
                    streaming = rnn.Streaming(layer)
                    sizes = [size] * (steps // size) + [steps % size] * bool(steps % size)
                    assert torch.equal(fed(streaming, x, sizes, 0), y)
                    assert all(map(torch.equal, flat(streaming.state), flat(last)))


@needs_compiler
@LAYERS
def test_steps_by_hand_have_their_own_order(name: str) -> None:
    """What a Streaming does to its calls ends with them, with an error too."""
    layer = getattr(rnn, name)(64, 64).eval()
    x = torch.randn(1, 1, 64)
    before = layer(x)[0]
    streaming = rnn.Streaming(layer)
    streaming(x[0])
    with pytest.raises(RuntimeError):
        streaming(torch.randn(1, 3))
    assert torch.equal(layer(x)[0], before)
    assert not order.of_sequences
    own = rnn.Streaming(layer, same_bits=False)
    seen: list[Tensor] = []
    outer = getattr(rnn, name)(64, 64)
    outer.register_forward_pre_hook(lambda *_: seen.append(own(x[0])))
    rnn.Streaming(outer)(x[0])
    assert torch.equal(seen[0], before[0])


@needs_compiler
@pytest.mark.parametrize(
    "name", ["LSTM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("RNN", "GRU"))]
)
def test_fixed_order(name: str) -> None:
    """The same bits for a sequence by itself and in a batch, by steps, in chunks and whole, on one
    thread and on two."""
    steps = 25
    plan = Plan("native", precision="fixed")
    threads = torch.get_num_threads()
    for batch, inputs, units in [(1, 5, 3), (2, 24, 48), (5, 24, 48), (13, 100, 130)]:
        layer = getattr(rnn, name)(inputs, units, num_layers=2, plan=plan).eval()
        x = torch.randn(steps, batch, inputs)
        lengths = torch.randint(0, steps + 1, (batch,))
        running = (torch.arange(steps)[:, None] < lengths)[..., None]
        with torch.no_grad():
            try:
                torch.set_num_threads(1)
                whole = layer(x)[0]
                torch.set_num_threads(2)
                assert torch.equal(layer(x)[0], whole)
            finally:
                torch.set_num_threads(threads)
            for size in (1, 2, 3, 23):
                sizes = [size] * (steps // size) + [steps % size] * bool(steps % size)
                assert torch.equal(fed(rnn.Streaming(layer), x, sizes, 0), whole)
            assert torch.equal(layer(x[:, :1])[0], whole[:, :1])
            assert torch.equal(layer(x, lengths=lengths)[0], torch.where(running, whole, 0))


@needs_compiler
def test_fixed_order_is_right() -> None:
    plan = Plan("native", precision="fixed")
    check_recurrence("lstm", plan, (7, 5, 24, 40), (False, True), "lengths", True)


def test_projection() -> None:
    theirs, ours = pair("LSTM", I, H, proj_size=2)
    streaming = rnn.Streaming(ours)
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, last = theirs(x)
    torch.testing.assert_close(fed(streaming, x, SIZES, 0), y)
    torch.testing.assert_close(streaming.state, last)
    assert [s.shape for s in streaming.initial_state(5)] == [(1, 5, 2), (1, 5, H)]


@LAYERS
def test_reset(name: str) -> None:
    """Of some sequences: the others go on."""
    theirs, ours = pair(name)
    streaming = rnn.Streaming(ours)
    x = torch.randn(2, B, I, dtype=torch.float64)
    streaming.reset([True] * B)
    streaming(x[0])
    before = flat(streaming.state)
    copies = [s.clone() for s in before]
    streaming.reset([False, True, False, True])
    assert all(map(torch.equal, before, copies)), "states that were read stay as they are"
    y = streaming(x[1])
    whole = theirs(x)[0][1]
    alone = theirs(x[1:])[0][0]
    cut = torch.tensor([False, True, False, True])[:, None]
    torch.testing.assert_close(y, torch.where(cut, alone, whole))
    streaming.reset(torch.ones(B, dtype=torch.bool))
    torch.testing.assert_close(streaming(x[1]), alone)
    streaming.reset()
    assert streaming(x[0, :2]).shape == (2, H)


def test_learned_state() -> None:
    """Where a stream and a sequence that is reset begin."""
    layer: Any = rnn.LSTM(I, H, num_layers=2, learned_state=True, dtype=torch.float64)
    for k in range(2):
        nn.init.normal_(layer.get_parameter(f"initial_states_l{k}"))
    streaming = rnn.Streaming(layer)
    x = torch.randn(2, B, I, dtype=torch.float64)
    streaming(x[0])
    streaming.reset([True, False, False, False])
    whole, _ = layer(x)
    alone, _ = layer(x[1:])
    y = streaming(x[1])
    torch.testing.assert_close(y[0], alone[0, 0])
    torch.testing.assert_close(y[1:], whole[1, 1:])
    first = streaming.initial_state(B)
    torch.testing.assert_close(layer(x, first)[0], whole)


@LAYERS
def test_state(name: str) -> None:
    """Read, put elsewhere, and put back: of some sequences, in another module."""
    _, ours = pair(name)
    streaming = rnn.Streaming(ours)
    other = rnn.Streaming(ours)
    x = torch.randn(3, B, I, dtype=torch.float64)
    streaming(x[:2])
    kept = [s[:, 1:3] for s in flat(streaming.state)]
    want = streaming(x[2])[1:3]
    other.state = kept if len(kept) > 1 else kept[0]
    torch.testing.assert_close(other(x[2, 1:3]), want)
    other.state = None
    assert other.state is None


@LAYERS
def test_output_of_its_own(name: str) -> None:
    """What is done to an output in place does not reach the state."""
    streaming = rnn.Streaming(getattr(rnn, name)(I, H))
    with torch.no_grad():
        for x in (torch.randn(B, I), torch.randn(3, B, I)):
            y = streaming(x)
            before = [s.clone() for s in flat(streaming.state)]
            y.zero_()
            assert all(map(torch.equal, flat(streaming.state), before))


def test_gradients() -> None:
    """End at the calls; with detach=False they are those of the whole sequence."""
    theirs, ours = pair("LSTM")
    x = torch.randn(T, B, I, dtype=torch.float64)
    streaming = rnn.Streaming(ours)
    assert fed(streaming, x, SIZES, 0).requires_grad
    assert not any(s.requires_grad for s in streaming.state)
    streaming.reset()
    steps = []
    for row in x:
        steps.append(row.clone().requires_grad_())
        y = streaming(steps[-1])
    y.sum().backward()
    assert steps[-1].grad is not None and all(step.grad is None for step in steps[:-1])
    ours.zero_grad()
    fed(rnn.Streaming(ours, detach=False), x, SIZES, 0).sin().sum().backward()
    theirs(x)[0].sin().sum().backward()
    torch.testing.assert_close(
        [t.grad for t in ours.parameters()], [t.grad for t in theirs.parameters()]
    )


def test_module() -> None:
    """The state moves with the module, and in copies, but is in no state_dict."""
    layer = rnn.LSTM(I, H)
    streaming = rnn.Streaming(layer)
    fresh = {f"layer.{name}" for name in layer.state_dict()}
    x = torch.randn(2, B, I)
    with torch.no_grad():
        streaming(x[0])
        assert {*streaming.state_dict()} == fresh
        assert {name for name, _ in streaming.named_buffers()} == {"state_0", "state_1"}
        file = io.BytesIO()
        torch.save(streaming, file)
        file.seek(0)
        copies = [copy.deepcopy(streaming), torch.load(file, weights_only=False)]
        want = streaming(x[1])
        assert all(torch.equal(other(x[1]), want) for other in copies)
        rnn.Streaming(rnn.LSTM(I, H)).load_state_dict(streaming.state_dict())
        streaming.double()
        assert all(s.dtype == torch.float64 for s in streaming.state)
        assert streaming(x[1].double()).dtype == torch.float64
        streaming.to("meta")
        assert streaming(x[1].double().to("meta")).is_meta


def test_compiled() -> None:
    layer = rnn.GRU(I, H)
    streaming = rnn.Streaming(layer)
    compiled = torch.compile(rnn.Streaming(layer), fullgraph=True, backend="aot_eager")
    for x in torch.randn(3, B, I):
        torch.testing.assert_close(compiled(x), streaming(x))


def test_errors() -> None:
    make: Any = rnn.Streaming
    with pytest.raises(TypeError, match="layer of rnn"):
        make(nn.GRU(I, H))
    with pytest.raises(ValueError, match="direction"):
        make(rnn.GRU(I, H, bidirectional=True))
    with pytest.raises(TypeError, match="detach"):
        make(rnn.GRU(I, H), detach=1)
    with pytest.raises(TypeError, match="same_bits to be a bool, got str"):
        make(rnn.GRU(I, H), same_bits="yes")
    streaming = make(rnn.LSTM(I, H))
    x = torch.randn(B, I)
    with pytest.raises(TypeError, match="PackedSequence"):
        streaming(pack_sequence([x]))
    with pytest.raises(ValueError, match="1D"):
        streaming(x[0])
    streaming(x)
    before = streaming.state
    wrong: Any
    error: Any
    for wrong, error, words in (
        (x[:2], ValueError, "sequences"),
        (x[:2, None], ValueError, "sequences"),
        (x.double(), ValueError, "dtype"),
        (x[:, :-1], RuntimeError, "input_size"),
    ):
        with pytest.raises(error, match=words):
            streaming(wrong)
    assert all(map(lambda a, b: a is b, streaming.state, before))
    for mask, error, words in (
        ([True], ValueError, "mask"),
        (torch.zeros(B), TypeError, "mask"),
        ("all", TypeError, "mask"),
    ):
        with pytest.raises(error, match=words):
            streaming.reset(mask)
    for state, error in (
        (before[0], TypeError),
        ((before[0], None), TypeError),
        ((before[0], before[1][:, :1]), ValueError),
        ((before[0][0], before[1][0]), ValueError),
    ):
        with pytest.raises(error, match="state"):
            streaming.state = state
    with pytest.raises(TypeError, match="2 states"):
        streaming.step_module()(x, before[0])


def dynamic(count: int, *names: str) -> Any:
    """Dynamic shapes of x, whose dimensions are `names`, and so many states."""
    dims = {name: torch.export.Dim(name) for name in names}
    of_x = {k: dims[name] for k, name in enumerate(names)}
    return of_x, tuple({1: dims["batch"]} for _ in range(count))


@LAYERS
def test_export(name: str) -> None:
    """With the state as input and output, for any batch."""
    streaming = rnn.Streaming(getattr(rnn, name)(I, H, num_layers=2).eval())
    zeros = streaming.initial_state(3)
    program = torch.export.export(
        streaming.step_module(),
        (torch.randn(3, I), *zeros),
        dynamic_shapes=dynamic(len(zeros), "batch"),
    )
    state = streaming.initial_state(B)
    for x in torch.randn(3, B, I):
        y, *state = program.module()(x, *state)
        torch.testing.assert_close(y, streaming(x))
    torch.testing.assert_close(state, flat(streaming.state))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", dict(num_layers=2, batch_first=True)),
        pytest.param("GRU", {}, marks=pytest.mark.slow),
        pytest.param("RNN", dict(num_layers=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_onnx(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A file for whole sequences and one for steps, in onnxruntime: the one begins where the other
    ends."""
    torch.manual_seed(0)
    streaming = rnn.Streaming(getattr(rnn, name)(I, H, **options).eval())
    time = int(bool(options.get("batch_first")))
    zeros = streaming.initial_state(3)
    names = ["batch", "time"] if time else ["time", "batch"]
    paths = tmp_path / "step.onnx", tmp_path / "chunk.onnx"
    modules = streaming.step_module(), streaming.chunk_module()
    examples = torch.randn(3, I), torch.randn((3, 5, I) if time else (5, 3, I))
    for path, module, example, dims in zip(paths, modules, examples, (["batch"], names)):
        torch.onnx.export(
            module,
            (example, *zeros),
            path,
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic(len(zeros), *dims),
        )
    step, chunk = (onnxruntime.InferenceSession(path) for path in paths)

    def run(session: Any, x: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        inputs = [i.name for i in session.get_inputs()]
        y, *state = session.run(None, dict(zip(inputs, (x.numpy(), *state), strict=True)))
        return torch.from_numpy(y), state

    state = [s.numpy() for s in streaming.initial_state(B)]
    rows = torch.randn(T, B, I)
    with torch.no_grad():
        whole, _ = streaming.layer(rows.transpose(0, time))
        y, state = run(chunk, rows[:3].transpose(0, time).contiguous(), state)
        found = [*y.transpose(0, time)]
        for x in rows[3:]:
            y, state = run(step, x, state)
            found.append(y)
    torch.testing.assert_close(torch.stack(found), whole.transpose(0, time), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("detach", [True, False])
@LAYERS
def test_after_inference_mode(name: str, detach: bool) -> None:
    """A stream that inference mode began can be trained on."""
    layer = getattr(rnn, name)(I, H, dtype=torch.float64)
    stream = rnn.Streaming(layer, detach)
    x = torch.randn(6, B, I, dtype=torch.float64)
    with torch.inference_mode():
        stream(x[:3])
        _, state = layer(x[:3])
    ends = state if isinstance(state, tuple) else (state,)
    ends = tuple(s.clone() for s in ends)
    want = layer(x[3:], ends if len(ends) > 1 else ends[0])[0]
    parameters = [*layer.parameters()]
    grads = [torch.autograd.grad(y.sin().sum(), parameters) for y in (stream(x[3:]), want)]
    torch.testing.assert_close(*grads)


def test_copies_of_a_stream_with_a_graph() -> None:
    """They go on from the same state, as leaves; the stream keeps its graph."""
    stream = rnn.Streaming(rnn.LSTM(I, H), detach=False, same_bits=False)
    x = torch.randn(B, I)
    stream(x)
    before = stream.state
    for other in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert not other.state[0].requires_grad
        assert torch.equal(other(x), stream.layer(x[None], before)[0][0])
    assert stream.state[0] is before[0] and before[0].requires_grad
