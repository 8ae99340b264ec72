"""PyTorch's toolbox on all three layers: transforms, compilers, parametrizations, processes."""

import copy
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import kept_bytes
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import rnn

T, B, I, H = 5, 4, 3, 6
LAYERS = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])


def pair(name: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Torch's layer and ours, with the same parameters."""
    theirs = getattr(nn, name)(*(sizes or (I, H)), **options).to(dtype)
    ours = getattr(rnn, name)(*(sizes or (I, H)), **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(layer: Any, x: Tensor) -> list[Tensor]:
    y, h = layer(x)
    loss = y.sin().sum() + sum(s.pow(2).sum() for s in (h if isinstance(h, tuple) else [h]))
    return [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


class TestTransforms:
    @LAYERS
    def test_gradient_of_each_sample(self, name: str) -> None:
        theirs, ours = pair(name, bidirectional=True, num_layers=2)
        x, weights = randn(7, T, I).detach(), dict(ours.named_parameters())

        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(ours, weights, (x,))[0].sin().sum()

        found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        for k, one in enumerate(x):
            want = torch.autograd.grad(theirs(one)[0].sin().sum(), list(theirs.parameters()))
            torch.testing.assert_close([found[n][k] for n in weights], list(want))

    @LAYERS
    def test_ensemble(self, name: str) -> None:
        models: list[Any] = [pair(name)[1] for _ in range(4)]
        weights, buffers = torch.func.stack_module_state(models)
        base, x = copy.deepcopy(models[0]).to("meta"), randn(T, B, I)

        def run(weights: Any, buffers: Any) -> Tensor:
            return torch.func.functional_call(base, (weights, buffers), (x,))[0]

        y = torch.vmap(run)(weights, buffers)
        torch.testing.assert_close(y, torch.stack([model(x)[0] for model in models]))
        grads = torch.autograd.grad(y.sin().sum(), list(weights.values()))
        for k, model in enumerate(models):
            want = torch.autograd.grad(model(x)[0].sin().sum(), list(model.parameters()))
            torch.testing.assert_close([g[k] for g in grads], list(want))

    def test_ensemble_is_quick(self) -> None:
        """Training eight small layers by vmap takes no more than twice the time of one in a loop over torch's cell."""
        models: list[Any] = [pair("GRU", 16, 16, dtype=torch.float32)[1] for _ in range(8)]
        weights, buffers = torch.func.stack_module_state(models)
        base, cell, x = models[0], nn.GRUCell(16, 16), torch.randn(64, 4, 16)
        times: dict[Any, list[float]] = {}

        def ensemble() -> Tensor:
            return torch.vmap(lambda w, b: torch.func.functional_call(base, (w, b), (x,))[0])(weights, buffers)

        def loop() -> Tensor:
            states = [cell(x[0])]
            for x_t in x[1:]:
                states.append(cell(x_t, states[-1]))
            return torch.stack(states)

        for _ in range(15):
            for function in (ensemble, loop):
                start = time.perf_counter()
                function().sum().backward()
                times.setdefault(function, []).append(time.perf_counter() - start)
        assert statistics.median(times[ensemble]) < 2 * statistics.median(times[loop])

    @LAYERS
    def test_forward_mode(self, name: str) -> None:
        theirs, ours = pair(name, bidirectional=True)
        x, v = randn(T, B, I).detach(), randn(T, B, I).detach()
        # torch.nn has no formula for this in every layer: its gradient, twice, has the same product.
        u = torch.zeros(T, B, 2 * H, dtype=torch.float64, requires_grad=True)
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(theirs(leaf)[0], leaf, u, create_graph=True)
        (want,) = torch.autograd.grad(g, u, v)
        torch.testing.assert_close(torch.func.jvp(lambda x: ours(x)[0], (x,), (v,))[1], want)

    @LAYERS
    def test_derivatives_with_lengths_and_of_packed_sequences(self, name: str) -> None:
        layer, x, lengths = pair(name)[1], randn(7, T, B, I).detach(), torch.tensor([5, 3, 2, 1])

        def masked(x: Tensor, lengths: Tensor) -> Tensor:
            return layer(x, lengths=lengths)[0].sin().sum()

        found = torch.vmap(torch.func.grad(masked))(x, lengths.expand(7, B))
        torch.testing.assert_close(found, torch.stack([torch.func.grad(masked)(one, lengths) for one in x]))
        packed = nn.utils.rnn.pack_padded_sequence(x[0], lengths)

        def unpadded(data: Tensor) -> Tensor:
            return layer(nn.utils.rnn.PackedSequence(data, packed.batch_sizes))[0].data.sin().sum()

        leaf = packed.data.clone().requires_grad_()
        (want,) = torch.autograd.grad(unpadded(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(unpadded)(packed.data), want)
        torch.testing.assert_close(torch.vmap(torch.func.grad(unpadded))(packed.data.expand(2, -1, -1))[1], want)
        torch.testing.assert_close(torch.vmap(unpadded)(packed.data.expand(2, -1, -1))[1], unpadded(packed.data))
        slope = torch.func.jvp(unpadded, (packed.data,), (packed.data,))[1]
        torch.testing.assert_close(slope, (want * packed.data).sum())

    def test_bad_input_under_vmap(self) -> None:
        layer, x = pair("GRU")[1], randn(7, T, B, I).detach()
        for lengths, text in (([9, 1, 1, 1], "lengths between 0"), ([-1, 1, 1, 1], "lengths between 0"),
                              ([2], "lengths of shape")):
            with pytest.raises(RuntimeError, match=text):
                torch.vmap(lambda x, n=lengths: layer(x, lengths=torch.tensor(n))[0])(x)
        with pytest.raises(RuntimeError, match="larger than 0"):
            torch.vmap(lambda x: layer(x[:0])[0])(x)

    @LAYERS
    def test_autocast(self, name: str) -> None:
        layer, x = pair(name, dtype=torch.float32)[1], torch.randn(7, T, B, I)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = torch.vmap(layer)(x), layer(x[0])
        torch.testing.assert_close(torch.utils._pytree.tree_map(lambda t: t[0], got), want, rtol=0.05, atol=0.05)

    @LAYERS
    def test_many_gradients_at_once(self, name: str) -> None:
        theirs, ours = pair(name)
        x, v = randn(T, B, I), torch.randn(3, T, B, H, dtype=torch.float64)
        found = [torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], v, is_grads_batched=True)
                 for layer in (ours, theirs)]
        torch.testing.assert_close(*found)
        hessian = [torch.autograd.functional.hessian(lambda x, f=f: f(x)[0].pow(3).sum(), x[:2, :1], vectorize=True)
                   for f in (ours, theirs)]
        torch.testing.assert_close(*hessian)


class TestCompilers:
    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        torch.compiler.reset()

    @LAYERS
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_inside_a_model(self, name: str, dynamic: bool) -> None:
        layer = pair(name, I, H, 2, dropout=0.5, bidirectional=True, batch_first=True)[1]
        model = nn.ModuleDict({"a": nn.Linear(2, I).double(), "rnn": layer, "b": nn.Linear(2 * H, 2).double()})

        def run(x: Tensor) -> Tensor:
            return model["b"](model["rnn"](model["a"](x).tanh())[0]).sum(-1)

        compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for sizes in ((4, 6), (3, 9)):
            x, found = torch.randn(*sizes, 2, dtype=torch.float64), []
            for function in (run, compiled):
                torch.manual_seed(1)
                with torch._dynamo.config.patch(error_on_recompile=dynamic and sizes[1] == 9):
                    y = function(x)
                found.append([y, *torch.autograd.grad(y.sin().sum(), list(model.parameters()))])
            torch.testing.assert_close(*found)
        assert not torch.equal(compiled(x), compiled(x)), "dropout is active"

    @LAYERS
    def test_export(self, name: str, tmp_path: Path) -> None:
        layer = pair(name, I, H, 2, bidirectional=True)[1]
        dims = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
        path = tmp_path / "layer.pt2"
        torch.export.save(torch.export.export(layer, (randn(T, B, I),), dynamic_shapes=(dims,)), path)
        loaded = torch.export.load(path).module()
        for sizes in ((T, B), (11, 2)):
            x = randn(*sizes, I)
            torch.testing.assert_close(loaded(x), layer(x))

    @pytest.mark.parametrize("how", ["export", "trace"])
    def test_projections_with_initial_states(self, how: str) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = rnn.LSTM(I, H, proj_size=2, bidirectional=True)

            def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
                return self.layer(x, (h, c))

        def given(T: int, B: int) -> tuple[Tensor, ...]:
            return torch.randn(T, B, I), torch.randn(2, B, 2), torch.randn(2, B, H)

        model, dims = Model(), {"T": torch.export.Dim("T", min=2), "B": torch.export.Dim("B", min=2)}
        if how == "trace":
            other: Any = torch.jit.trace(model, given(T, B))
        else:
            shapes = {0: dims["T"], 1: dims["B"]}, {1: dims["B"]}, {1: dims["B"]}
            other = torch.export.export(model, given(T, B), dynamic_shapes=shapes).module()
        arguments = given(9, 2)
        torch.testing.assert_close(other(*arguments), model(*arguments))

    @LAYERS
    def test_trace(self, name: str) -> None:
        layer = pair(name, I, H, 2, bidirectional=True)[1]
        traced = torch.jit.trace(layer, (randn(T, B, I),))
        for sizes in ((T, B), (11, 2)):
            x = randn(*sizes, I)
            torch.testing.assert_close(traced(x), layer(x))
            grads = [torch.autograd.grad(run(x)[0].sin().sum(), x) for run in (traced, layer)]
            torch.testing.assert_close(*grads)


class TestTraining:
    @LAYERS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, name: str, dtype: torch.dtype) -> None:
        layer, x = pair(name, dtype=torch.float32)[1], randn(T, B, I, dtype=torch.float32)
        want, scaler = gradients(layer, x), torch.amp.GradScaler("cpu")
        with torch.autocast("cpu", dtype):
            y, h = layer(x)
        assert y.dtype == dtype
        assert all(s.dtype == dtype for s in (h if isinstance(h, tuple) else [h]))
        with torch.autocast("cpu", dtype):
            got = gradients(layer, x)
        assert [g.dtype for g in got[1:]] == [torch.float32] * (len(got) - 1)
        torch.testing.assert_close([g.float() for g in got], want, rtol=0.05, atol=0.1)  # 8 bits of 0.5 rounded 5 times
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        before = layer.weight_hh_l0.detach().clone()
        with torch.autocast("cpu", dtype):
            loss = layer(x)[0].float().pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        assert layer.weight_hh_l0.isfinite().all() and not torch.equal(layer.weight_hh_l0, before)

    @LAYERS
    def test_backward_stays_in_the_precision_of_forward(self, name: str) -> None:
        layer, x = pair(name, dtype=torch.float32)[1], randn(T, B, I, dtype=torch.float32)
        loss = layer(x)[0].sin().sum()
        want = torch.autograd.grad(loss, x, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True), want, rtol=0, atol=0)
            torch.testing.assert_close(torch.autograd.grad(loss, x, create_graph=True), want)

    @LAYERS
    @pytest.mark.parametrize("reparametrize", [parametrizations.weight_norm, parametrizations.orthogonal,
                                               parametrizations.spectral_norm, prune.random_unstructured],
                             ids=lambda f: f.__name__)
    def test_parametrizations(self, name: str, reparametrize: Callable[..., Any]) -> None:
        theirs, ours = pair(name)
        options = {"amount": 0.5} if reparametrize is prune.random_unstructured else {}
        for layer in (theirs, ours):
            torch.manual_seed(2)
            reparametrize(layer, "weight_hh_l0", **options)
        ours.load_state_dict(theirs.state_dict())
        x = randn(T, B, I)
        for layer in (theirs, ours):
            layer.eval()
        torch.testing.assert_close(gradients(ours, x), gradients(theirs, x))

    @LAYERS
    def test_dropped_and_tied_weights(self, name: str) -> None:
        theirs, ours = pair(name, H, H, 2)
        x, found = randn(T, B, H), []
        for layer in (ours, theirs):
            layer.weight_ih_l1 = layer.weight_ih_l0
            raw = layer.weight_hh_l0
            del layer.weight_hh_l0
            torch.manual_seed(4)
            layer.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
            layer._flat_weights = [getattr(layer, n) for n in layer._flat_weights_names]
            found.append(torch.autograd.grad(layer(x)[0].sin().sum(), [x, raw, layer.weight_ih_l0]))
        torch.testing.assert_close(*found)

    @LAYERS
    def test_checkpoint(self, name: str) -> None:
        layer, x = pair(name, num_layers=2)[1], randn(T, B, I)
        want = torch.autograd.grad(layer(x)[0].sin().sum(), [x, *layer.parameters()])
        for reentrant in (False, True):
            layer.zero_grad()
            x.grad = None
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)[0].sin().sum().backward()
            torch.testing.assert_close([x.grad, *(p.grad for p in layer.parameters())], list(want))

    @LAYERS
    def test_hooks(self, name: str) -> None:
        layer, x, seen = pair(name)[1], randn(T, B, I), list[str]()
        layer.register_forward_pre_hook(lambda *_: seen.append("before"))
        layer.register_forward_hook(lambda *_: seen.append("after"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        layer.weight_hh_l0.register_hook(lambda _: seen.append("weight"))
        layer(x)[0].sum().backward()
        assert sorted(seen) == ["after", "backward", "before", "weight"]

    @LAYERS
    def test_files(self, name: str) -> None:
        (_, layer), file, x = pair(name), io.BytesIO(), randn(T, B, I)
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = getattr(rnn, name)(I, H).double()
        other.load_state_dict(torch.load(file, weights_only=True))
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)

    @LAYERS
    def test_deterministic(self, name: str) -> None:
        layer, x = pair(name, num_layers=2, bidirectional=True)[1], randn(T, B, I)
        torch.use_deterministic_algorithms(True)
        try:
            torch.testing.assert_close(gradients(layer, x), gradients(layer, x), rtol=0, atol=0)
            y, _ = layer(x, lengths=torch.tensor([5, 0, 3, 1]))
            y.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)

    @LAYERS
    def test_only_what_is_needed(self, name: str) -> None:
        """With the weights frozen no product for their gradients is made."""
        layer, x, products = pair(name, 40, 50)[1].requires_grad_(False), randn(600, B, 40), []
        for frozen in (True, False):
            layer.requires_grad_(not frozen)
            y, _ = layer(x)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                torch.autograd.grad(y.sum(), x)
            products.append(sum(e.count for e in profile.key_averages() if e.key == "aten::mm"))
        assert products[0] == 1 < products[1], "that for the gradient of the input"


def train(layer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(T, B, I))[0].pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_share_parameters(method: str) -> None:
    """Two processes train the same memory."""
    layer: Any = rnn.LSTM(I, H).share_memory()
    before = [p.detach().clone() for p in layer.parameters()]
    context: Any = torch.multiprocessing.get_context(method)
    workers = [context.Process(target=train, args=(layer, seed)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters()))


@pytest.mark.gpu
@LAYERS
def test_cuda_graph(name: str) -> None:
    layer, x = getattr(rnn, name)(I, H, device="cuda"), torch.randn(T, B, I, device="cuda")
    graphed = torch.cuda.make_graphed_callables(layer, (x.clone().requires_grad_(),))
    new = torch.randn(T, B, I, device="cuda", requires_grad=True)
    torch.testing.assert_close(graphed(new), layer(new))


class TestSequences:
    """lengths, resets and the states of every step, in the layouts of the layer."""

    @LAYERS
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_resets_cut_sequences(self, name: str, batch_first: bool) -> None:
        theirs, ours = pair(name, I, H, 1, batch_first=batch_first, bidirectional=True)
        x, h = randn(T, B, I), torch.randn(2, B, H, dtype=torch.float64)
        resets = torch.zeros(T, B, dtype=torch.bool)
        resets[2], resets[0, 1] = True, True
        hx = (h, h) if name == "LSTM" else h
        first, last = h.clone(), h.clone()
        first[1] = 0  # nothing crosses the boundary before step 2, in either direction
        last[0] = 0
        first[0, 1] = 0
        halves = [theirs(part.transpose(0, 1) if batch_first else part, (s, s) if name == "LSTM" else s)[0]
                  for part, s in ((x[:2], first), (x[2:], last))]
        given = (x.transpose(0, 1), resets.T) if batch_first else (x, resets)
        y, _ = ours(given[0], hx, resets=given[1])
        torch.testing.assert_close(y, torch.cat(halves, 1 if batch_first else 0))
        alone, _ = ours(x[:, 1], (h[:, 1], h[:, 1]) if name == "LSTM" else h[:, 1], resets=resets[:, 1])
        torch.testing.assert_close(alone, y[1] if batch_first else y[:, 1])

    @LAYERS
    def test_resets_of_packed_sequences_go_with_them(self, name: str) -> None:
        layer, x = pair(name, bidirectional=True)[1], randn(T, B, I)
        lengths, resets = torch.tensor([2, 5, 3, 4]), torch.rand(T, B) < 0.4
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, h = layer(packed, resets=resets)
        want = layer(x, lengths=lengths, resets=resets)
        torch.testing.assert_close((nn.utils.rnn.pad_packed_sequence(y)[0], h), want)

    @pytest.mark.parametrize("form", ["padded", "batch_first", "unbatched", "packed"])
    @pytest.mark.parametrize(("name", "proj"), [("RNN", 0), ("LSTM", 0), ("LSTM", 2), ("GRU", 0)])
    def test_states_of_every_step(self, name: str, proj: int, form: str) -> None:
        """h and c after every step, of every layer: against the last states of shorter sequences."""
        options: dict[str, Any] = {"proj_size": proj} if proj else {}
        layer = pair(name, I, H, 2, batch_first=form == "batch_first", **options)[1]
        x = randn(T, B, I)
        lengths = torch.tensor([5, 4, 4, 2])
        given: Any = {"padded": x, "batch_first": x.transpose(0, 1), "unbatched": x[:, 0],
                      "packed": nn.utils.rnn.pack_padded_sequence(x, lengths)}[form]
        y, last, states = layer(given, return_states=True)
        torch.testing.assert_close(layer(given), (y, last), rtol=0, atol=0)
        for k, column in enumerate(states if name == "LSTM" else [states]):
            for t in range(T):
                prefix = x[: t + 1, :1] if form == "unbatched" else x[: t + 1]
                _, want = layer(prefix.transpose(0, 1) if form == "batch_first" else prefix)
                want = want[k] if name == "LSTM" else want
                got = column[:, :, t] if form == "batch_first" else column[:, t]
                if form == "packed":
                    running = int((lengths > t).sum())
                    start = int(lengths.clamp(max=t).sum())
                    got, want = column[:, start : start + running], want[:, :running]
                torch.testing.assert_close(got, want[:, 0] if form == "unbatched" else want)
        assert torch.autograd.grad(sum(c.sin().sum() for c in (states if name == "LSTM" else [states])), x)[0].any()

    @LAYERS
    def test_refused_by_name(self, name: str) -> None:
        layer, x = pair(name)[1], randn(T, B, I)
        for resets in (torch.zeros(T, B), torch.zeros(B, T, dtype=torch.bool), torch.zeros(T, dtype=torch.bool)):
            with pytest.raises(RuntimeError, match="Expected resets of shape"):
                layer(x, resets=resets)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 5, 3, 4]), enforce_sorted=False)
        with pytest.raises(RuntimeError, match="Expected resets of shape"):
            layer(packed, resets=torch.zeros(T, B + 1, dtype=torch.bool))
        if name == "LSTM":
            with pytest.raises(RuntimeError, match="two hidden states"):
                layer(x, (torch.zeros(1, B, H),))
        for lengths in (torch.zeros(B), torch.zeros(B + 1, dtype=torch.int64)):
            with pytest.raises(RuntimeError, match="Expected lengths of shape"):
                layer(x, lengths=lengths)


class TestRecompute:
    @pytest.mark.parametrize(("name", "values"), [("LSTM", 2 * H), ("GRU", H)])
    def test_memory(self, name: str, values: int) -> None:
        more = [kept_bytes(getattr(rnn, name)(I, H, recompute=True), torch.randn(steps, B, I)) for steps in (50, 100)]
        assert more[1] - more[0] <= 50 * B * (I + values) * 4

    @LAYERS
    def test_gradients(self, name: str) -> None:
        layer, x = pair(name, num_layers=2, bidirectional=True)[1], randn(T, B, I)
        want = gradients(layer, x)
        layer.recompute = True
        torch.testing.assert_close(gradients(layer, x), want, rtol=0, atol=0)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(compiled, x), want)
