"""What other tools of PyTorch do with a model of our layers: as with torch.nn's, whose results are
the oracle."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import rnn
from rnn.kernels import cells
from tests.small import LAYERS, B, H, I, T, pair, randn

CELLS = pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}],
    ids=["plain", "deep", "bare"],
)


class Model(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.first = nn.Linear(I, I, dtype=torch.float64)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x))[0]


def models(name: str, **options: Any) -> tuple[Any, Any]:
    """With torch.nn's layer and with ours, of the same weights."""
    theirs, ours = (Model(layer) for layer in pair(name, **options))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])]


class TestScript:
    @pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
    def test_cell_in_a_script_module(self, name: str) -> None:
        """It compiles the cell itself, with nothing put in its place."""
        cell = getattr(rnn, name)(3, 4)

        class Model(torch.jit.ScriptModule):
            def __init__(self) -> None:
                super().__init__()
                self.cell = cell

            @torch.jit.script_method
            def forward(self, x: Tensor):
                return self.cell(x)

        x = torch.randn(2, 3)
        torch.testing.assert_close(Model()(x), cell(x))

    @LAYERS
    @OPTIONS
    def test_results(self, name: str, options: dict[str, Any]) -> None:
        theirs, ours = models(name, **options)
        x = randn(T, B, I)
        scripted: Any = torch.jit.script(ours)
        torch.testing.assert_close(gradients(scripted, x), gradients(theirs, x), rtol=0, atol=0)
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), theirs(x), rtol=0, atol=0)

    @LAYERS
    def test_the_model_keeps_its_layer(self, name: str) -> None:
        """torch.jit.script puts what it compiles in the place of the model's layer."""
        _, ours = models(name)
        x = randn(T, B, I)
        parameters = list(ours.parameters())
        want = ours(x)
        scripted: Any = torch.jit.script(ours)
        copied = pickle.loads(pickle.dumps(ours))
        for model in (ours, copied):
            torch.testing.assert_close(model(x), want, rtol=0, atol=0)
            assert type(model.layer) is getattr(rnn, name)
            model.layer(x, lengths=torch.tensor([5, 0, 3, 1]))
        assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
        with torch.no_grad():
            ours.layer.weight_hh_l0.mul_(2)
        torch.testing.assert_close(scripted(x), ours(x))
        assert not torch.equal(scripted(x), want)

    @CELLS
    def test_cells(self, name: str) -> None:
        theirs = getattr(nn, name)(I, H)
        ours = getattr(rnn, name)(I, H)
        ours.load_state_dict(theirs.state_dict())
        scripted: Any = torch.jit.script(ours)
        x = torch.randn(B, I)
        torch.testing.assert_close(scripted(x), theirs(x), rtol=0, atol=0)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)

    def test_a_layer_alone(self) -> None:
        theirs, ours = pair("LSTM")
        x = randn(T, B, I)
        scripted: Any = torch.jit.script(ours)
        torch.testing.assert_close(scripted.forward__0(x), theirs(x), rtol=0, atol=0)
        assert type(ours) is rnn.LSTM


@LAYERS
@OPTIONS
@pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
def test_jit_trace(name: str, options: dict[str, Any], with_lengths: bool) -> None:
    """With its checks: a second trace has to be the same."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, I)
            self.layer = getattr(rnn, name)(I, H, **options)

        def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
            x = self.embedding(tokens)
            return (self.layer(x, lengths=lengths) if with_lengths else self.layer(x))[0]

    model = Text()
    tokens = torch.randint(0, 9, (T, T))
    lengths = torch.tensor([5, 1, 0, 3, 2])
    with warnings.catch_warnings(action="ignore"):
        traced: Any = torch.jit.trace(model, (tokens, lengths))
    torch.testing.assert_close(traced(tokens, lengths), model(tokens, lengths))


class TestFx:
    @LAYERS
    def test_one_node(self, name: str) -> None:
        theirs, ours = models(name)
        x = randn(T, B, I)
        graphs = [fx.symbolic_trace(model) for model in (theirs, ours, fx.symbolic_trace(ours))]
        nodes = [
            [(n.op, n.target, len(n.args), n.kwargs) for n in graph.graph.nodes] for graph in graphs
        ]
        assert nodes[0] == nodes[1] == nodes[2]
        torch.testing.assert_close(graphs[1](x), theirs(x))

    def test_arguments(self) -> None:
        class Step(nn.Module):
            def __init__(self, ns: Any) -> None:
                super().__init__()
                self.layer = ns.LSTM(I, H)
                self.cell = ns.LSTMCell(H, H)
                self.start = nn.Parameter(torch.ones(T, B, I))

            def forward(self, h: Tensor, c: Tensor) -> Any:
                _, (h, c) = self.layer(self.start, (h, c))
                return self.cell(h[0], (h[0], c[0]))

        theirs = Step(nn)
        ours = Step(rnn)
        ours.load_state_dict(theirs.state_dict())
        h = torch.randn(2, 1, B, H)
        torch.testing.assert_close(fx.symbolic_trace(ours)(*h), fx.symbolic_trace(theirs)(*h))

    def test_what_torch_lacks(self) -> None:
        class WithLengths(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = rnn.GRU(I, H)

            def forward(self, x: Tensor, lengths: Tensor, resets: Tensor) -> Any:
                return self.layer(x, None, lengths=lengths, resets=resets, return_states=True)

        model = WithLengths()
        x = torch.randn(T, B, I)
        masks = torch.tensor([5, 0, 3, 1]), torch.rand(T, B) < 0.3
        torch.testing.assert_close(
            fx.symbolic_trace(model)(x, *masks), model(x, *masks), rtol=0, atol=0
        )

    def test_hooks_do_not_run_twice(self) -> None:
        _, ours = models("GRU")
        ours.layer.register_forward_hook(lambda module, given, result: (result[0] * 2, result[1]))
        with pytest.raises(NotImplementedError, match="is_leaf_module"):
            fx.symbolic_trace(ours)

        class Leaves(fx.Tracer):
            def is_leaf_module(self, m: nn.Module, name: str) -> bool:
                return isinstance(m, nn.RNNBase) or super().is_leaf_module(m, name)

        x = randn(T, B, I)
        graph = fx.GraphModule(ours, Leaves().trace(ours))
        torch.testing.assert_close(graph(x), ours(x), rtol=0, atol=0)

    def test_pruned(self) -> None:
        theirs, ours = models("GRU")
        for model in (theirs, ours):
            torch.manual_seed(1)
            prune.random_unstructured(model.layer, "weight_hh_l0", 0.5)
        x = randn(T, B, I)
        torch.testing.assert_close(fx.symbolic_trace(ours)(x), theirs(x))

    @LAYERS
    def test_a_layer_alone(self, name: str) -> None:
        for layer in pair(name):
            with pytest.raises(fx.proxy.TraceError):
                fx.symbolic_trace(layer)


def export(model: nn.Module, given: tuple[Tensor, ...]) -> bytes:
    """To ONNX by a trace."""
    file: Any = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(model, given, file, dynamo=False)
    return file.getvalue()


class TestTracedOnnx:
    @LAYERS
    @OPTIONS
    def test_results(self, name: str, options: dict[str, Any]) -> None:
        theirs, ours = (model.float().eval() for model in models(name, **options))
        x = torch.randn(T, B, I)
        for model, want in ((ours, theirs(x)), (ours.layer, theirs.layer(x)[0])):
            session = onnxruntime.InferenceSession(export(model, (x,)))
            (given,) = session.get_inputs()
            got = session.run(None, {given.name: x.numpy()})[0]
            torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-5)

    def test_what_torch_lacks(self) -> None:
        class WithLengths(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = rnn.GRU(I, H)

            def forward(self, x: Tensor, lengths: Tensor) -> Any:
                return self.layer(x, lengths=lengths)

        given = torch.randn(T, B, I), torch.tensor([5, 0, 3, 1])
        with pytest.raises(NotImplementedError, match=r"lengths.*dynamo=True"):
            export(WithLengths(), given)


class TestExpandedWeights:
    @LAYERS
    @OPTIONS
    @pytest.mark.parametrize("with_states", [False, True], ids=["", "states"])
    def test_gradients_of_each_sample(
        self, name: str, options: dict[str, Any], with_states: bool
    ) -> None:
        _, ours = pair(name, **options)
        first = bool(options.get("batch_first"))
        D = options.get("num_layers", 1) * (1 + bool(options.get("bidirectional")))
        x = torch.randn((B, T, I) if first else (T, B, I), dtype=torch.float64)
        h = torch.randn(D, B, H, dtype=torch.float64)
        states: Any = ((h, 2 * h) if name == "LSTM" else h) if with_states else None
        y, _ = call_for_per_sample_grads(ours, batch_size=B, batch_first=first)(x, states)
        y.sin().sum().backward()
        got = [p.grad_sample for p in ours.parameters()]
        for b in range(B):
            one: Any = (
                ((h[:, [b]], 2 * h[:, [b]]) if name == "LSTM" else h[:, [b]])
                if with_states
                else None
            )
            y, _ = ours(x[[b]] if first else x[:, [b]], one)
            want = torch.autograd.grad(y.sin().sum(), list(ours.parameters()))
            torch.testing.assert_close([g[b] for g in got], list(want))

    @LAYERS
    def test_packed(self, name: str) -> None:
        theirs, ours = pair(name)
        packed = pack_padded_sequence(randn(T, B, I).detach(), torch.tensor([5, 4, 2, 1]))
        found = []
        for layer in (theirs, ours):
            y, _ = call_for_per_sample_grads(layer, batch_size=B)(packed)
            assert isinstance(y, PackedSequence)
            y.data.sin().sum().backward()
            found.append([p.grad_sample for p in layer.parameters()])
        torch.testing.assert_close(*found)

    def test_some_frozen(self) -> None:
        theirs, ours = pair("GRU")
        x = torch.randn(T, B, I, dtype=torch.float64)
        found = []
        for layer in (theirs, ours):
            for p in list(layer.parameters())[:3]:
                p.requires_grad_(False)
            call_for_per_sample_grads(layer, batch_size=B, batch_first=False)(x)[0].sum().backward()
            found.append(layer.bias_hh_l0.grad_sample)
        torch.testing.assert_close(*found)

    def test_what_torch_lacks(self) -> None:
        layer = rnn.GRU(I, H)
        with pytest.raises(NotImplementedError, match="lengths"):
            call_for_per_sample_grads(layer, batch_size=B)(
                torch.randn(T, B, I), lengths=torch.tensor([5, 0, 3, 1])
            )


class TestFlops:
    @LAYERS
    @pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
    @pytest.mark.parametrize("frozen", ["", "weight_ih", "weight_hh"])
    def test_as_in_torch(self, name: str, options: dict[str, Any], frozen: str) -> None:
        """In float64 torch.nn's layers are matrix products, which are counted one by one."""
        layers = pair(name, **options)
        D = options.get("num_layers", 1) * (1 + bool(options.get("bidirectional")))
        for of_x, of_h in ((False, False), (True, False), (True, True)):
            x = randn(T, B, I)
            h = randn(D, B, H)
            x.requires_grad_(of_x)
            h.requires_grad_(of_h)
            counts: list[tuple[int, int]] = []
            for layer in (*layers, layers[1]):
                for key, parameter in layer.named_parameters():
                    parameter.requires_grad_(not frozen or frozen not in key)
                forward = FlopCounterMode(display=False)
                backward = FlopCounterMode(display=False)
                hx = (h, h) if name == "LSTM" else h
                if len(counts) < 2:
                    with forward:
                        y, _ = layer(x, hx)
                else:  # only backward is counted
                    y, _ = layer(x, hx)
                with backward:
                    y.sum().backward()
                counts.append((forward.get_total_flops(), backward.get_total_flops()))
            assert counts[0] == counts[1]
            assert counts[0][1] == counts[2][1] > 0

    @LAYERS
    def test_by_hand(self, name: str) -> None:
        """float32, where torch's own LSTM on the CPU is not counted; packed, and computed once more
        for backward."""
        gates = {"RNN": 1, "LSTM": 4, "GRU": 3}[name]
        lengths = torch.tensor([5, 4, 2, 1])
        packed = pack_padded_sequence(torch.randn(T, B, I), lengths)
        forward = 2 * int(lengths.sum()) * gates * H * (I + H)
        for recompute in (False, True):
            layer = getattr(rnn, name)(I, H, recompute=recompute)
            with FlopCounterMode(display=False) as counter:
                y, _ = layer(packed)
            assert counter.get_total_flops() == forward
            with FlopCounterMode(display=False) as counter:
                y.data.sum().backward()
            again = forward if recompute and name != "RNN" else 0
            backward = forward + 2 * int(lengths.sum()) * gates * H * H - 2 * B * gates * H * H
            assert counter.get_total_flops() == backward + again

    def test_no_gradients(self) -> None:
        layer = rnn.LSTM(I, H)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, B, I))
        assert counter.get_total_flops() == 2 * B * 4 * H * (I + H)


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **kwargs or {})


class Marked(Tensor):
    pass


class TestTorchFunction:
    @LAYERS
    @pytest.mark.parametrize("steps", [1, T])
    @pytest.mark.parametrize("train", [True, False], ids=["train", "no_grad"])
    def test_a_mode_sees_the_layer(self, name: str, steps: int, train: bool) -> None:
        layer = pair(name, num_layers=2)[1]
        x = randn(steps, B, I)
        with torch.set_grad_enabled(train):
            want = layer(x)
            with Seen() as mode:
                torch.testing.assert_close(layer(x), want)
        assert mode.names.count("run_layer") == 2

    @LAYERS
    def test_subclasses_of_tensor(self, name: str) -> None:
        theirs, ours = pair(name)
        x: Any = randn(T, B, I).detach().as_subclass(Marked)
        want = theirs(x)
        got = ours(x)
        assert type(got[0]) is type(want[0]) is Marked
        torch.testing.assert_close(got, want)

    def test_what_answers_for_itself(self) -> None:
        class Answer(Tensor):
            @classmethod
            def __torch_function__(
                cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if func is rnn.functional.recurrence:
                    return 42
                return super().__torch_function__(func, types, args, kwargs)

        x: Any = torch.randn(T, B, I).as_subclass(Answer)
        w = torch.randn(H, I), torch.randn(H, H)
        assert (
            rnn.functional.recurrence(cells.rnn_tanh, x, *w, None, None, torch.zeros(1, B, H)) == 42
        )

    @LAYERS
    def test_default_device(self, name: str) -> None:
        """A mode, too."""
        theirs, ours = pair(name)
        x = randn(T, B, I)
        torch.set_default_device("cpu")
        try:
            torch.testing.assert_close(ours(x), theirs(x))
            compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), theirs(x))
        finally:
            torch.set_default_device(None)


class TestQuantization:
    @pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTMCell"])
    def test_says_that_it_does_nothing(self, name: str) -> None:
        model = nn.Sequential(getattr(rnn, name)(I, H)).eval()
        with pytest.warns(UserWarning, match=r"rnn\.restore\(model\)") as said:
            became = torch.ao.quantization.quantize_dynamic(
                model, {getattr(nn, name)}, dtype=torch.qint8
            )
        ours = [w.filename for w in said if "rnn.restore" in str(w.message)]
        assert ours and {*ours} == {__file__}
        assert type(became[0]) is getattr(rnn, name)
        assert not hasattr(copy.deepcopy(model)[0], "qconfig")

    def test_after_restore(self) -> None:
        model = nn.Sequential(rnn.LSTM(I, H)).eval()
        x = torch.randn(T, B, I)
        rnn.restore(model, verbose=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "torch.ao.quantization does not know")
            became = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
        assert type(became[0]) is torch.ao.nn.quantized.dynamic.LSTM
        torch.testing.assert_close(became(x)[0], model(x)[0], rtol=0.1, atol=0.1)


class TestFlatWeights:
    """`_flat_weights` is what torch.nn's layers compute with, until a parameter becomes another
    tensor."""

    @LAYERS
    @pytest.mark.parametrize(
        "kind", ["assigned", "and taken back", "and a parameter changed", "parameters deleted"]
    )
    def test_assigned(self, name: str, kind: str) -> None:
        x = randn(T, B, I)
        found = []
        for layer in pair(name, num_layers=2, bidirectional=True):
            flat = layer._flat_weights
            old = layer.weight_hh_l0
            dropped = [
                w * 0.5 if key.startswith("weight_hh") else w
                for w, key in zip(flat, layer._flat_weights_names)
            ]
            if kind == "parameters deleted":
                for key in layer._flat_weights_names:
                    delattr(layer, key)
            layer._flat_weights = dropped
            if kind == "and taken back":
                layer(x)
                layer._flat_weights = flat
            if kind == "and a parameter changed":
                layer.bias_hh_l0 = nn.Parameter(layer.bias_hh_l0.detach() + 1)
            y, _ = layer(x)
            with torch.no_grad():
                step, _ = layer(x[:1])
            found.append([y, step, *torch.autograd.grad(y.sin().sum(), [x, old])])
        torch.testing.assert_close(*found)

    @LAYERS
    def test_recurrent_dropout(self, name: str) -> None:
        """A subclass that drops weights for the time of a call."""

        def dropping(base: Any) -> Any:
            class Dropping(base):
                _flat_weights: Any

                def forward(self, input: Any, hx: Any = None) -> Any:
                    flat = self._flat_weights
                    self._flat_weights = [
                        nn.functional.dropout(w, 0.5) if "weight_hh" in key else w
                        for w, key in zip(flat, self._flat_weights_names)
                    ]
                    result = super().forward(input, hx)
                    self._flat_weights = flat
                    return result

            return Dropping(I, H).double()

        layers = [dropping(getattr(ns, name)) for ns in (nn, rnn)]
        x = randn(T, B, I)
        found = []
        layers[1].load_state_dict(layers[0].state_dict())
        for layer in layers:
            torch.manual_seed(3)
            found.append(torch.autograd.grad(layer(x)[0].sin().sum(), [x, *layer.parameters()]))
        torch.testing.assert_close(*found)

    @LAYERS
    def test_replaced_and_compiled(self, name: str) -> None:
        layer, _ = pair(name)
        x = randn(T, B, I)
        layer._flat_weights = [w * 0.5 for w in layer._flat_weights]
        want = layer(x)
        rnn.replace(layer, verbose=False)
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), want)
        rnn.restore(layer, verbose=False)
        torch.testing.assert_close(layer(x), want)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as found:
        call()
    return str(found.value)


def test_forms_of_an_lstm() -> None:
    theirs, ours = (layer(I, H, 2, proj_size=2) for layer in (nn.LSTM, rnn.LSTM))
    x = torch.randn(T, B, I)
    h = torch.randn(2, B, 2)
    c = torch.randn(2, B, H)
    order = torch.tensor([2, 0, 3, 1])
    for layer in (theirs, ours):
        layer.check_forward_args(x, (h, c), None)
        assert layer.get_expected_cell_size(x, None) == (2, B, H)
        assert layer.get_expected_hidden_size(x, torch.tensor([3, 1])) == (2, 3, 2)
    torch.testing.assert_close(
        ours.permute_hidden((h, c), order), theirs.permute_hidden((h, c), order)
    )
    for wrong in ((c, c), (h, h)):
        says = [
            refused(partial(layer.check_forward_args, x, wrong, None)) for layer in (theirs, ours)
        ]
        assert says[0] == says[1]


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_returns_what_torch_returns(name: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(name, num_layers=2, dtype=dtype)
    x = torch.randn(1, B, I, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x))
