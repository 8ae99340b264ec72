"""The transforms of functions and forward mode, on the operator and on all three layers."""

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rnn
from rnn.kernels import cells
from tests.cases import NAMES, step_by_step
from tests.small import LAYERS, B, H, I, T, data, outputs, pair, randn

recurrence: Any = rnn.functional.recurrence


class Recorded(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


class TestOperator:
    def test_forward_mode_where_operators_are_recorded(self) -> None:
        """A tangent is never silently 0."""
        layer = rnn.RNN(I, H)
        x = torch.randn(T, B, I)
        v = torch.randn(T, B, I)

        def tangent(x: Tensor, v: Tensor) -> Tensor:
            return torch.func.jvp(lambda x: layer(x)[0], (x,), (v,))[1]

        want = tangent(x, v)
        assert want.any()
        torch.testing.assert_close(
            torch.compile(tangent, fullgraph=True, backend="aot_eager")(x, v), want
        )
        with FlopCounterMode(display=False):
            torch.testing.assert_close(tangent(x, v), want)

    def test_gradients_in_a_compiled_function(self) -> None:
        layer = rnn.RNN(I, H)
        x = torch.randn(T, B, I)
        grad = torch.func.grad(lambda x: layer(x)[0].sin().sum())
        torch.testing.assert_close(torch.compile(grad, backend="aot_eager")(x), grad(x))

    def test_tangent_of_a_gradient(self) -> None:
        ours = rnn.RNN(I, H).double()
        theirs = nn.RNN(I, H).double()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(T, B, I, dtype=torch.float64)
        found = []
        primal, direction = torch.randn(2, T, B, H, dtype=torch.float64)
        for layer in (ours, theirs):
            y = layer(x)[0]
            with forward_ad.dual_level():
                grads = torch.autograd.grad(
                    y, list(layer.parameters()), forward_ad.make_dual(primal, direction)
                )
                found.append([forward_ad.unpack_dual(g).tangent for g in grads])
        torch.testing.assert_close(*found)

    def test_second_derivatives_under_a_mode(self) -> None:
        layer = rnn.RNN(I, H)
        x = torch.randn(T, B, I, requires_grad=True)
        want = torch.autograd.grad(
            torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)[0].sum(), x
        )
        with Recorded():
            got = torch.autograd.grad(
                torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)[0].sum(), x
            )
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("name", NAMES)
    def test_forward_mode(self, name: str) -> None:
        given = [t.detach() for t in data(name)]
        tangents = [torch.randn_like(t) for t in given]

        def run(*given: Any) -> Any:
            return outputs(*recurrence(getattr(cells, name), *given, reverse=(False, True)))

        want = torch.func.jvp(
            lambda *given: step_by_step(name, list(given), (None, None), (False, True))[0],
            tuple(given),
            tuple(tangents),
        )[1]
        torch.testing.assert_close(torch.func.jvp(run, tuple(given), tuple(tangents))[1][0], want)
        with forward_ad.dual_level():
            y = run(*map(forward_ad.make_dual, given, tangents))[0]
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, want)

    def test_vmap(self) -> None:
        layer = rnn.RNN(I, H, 2, bidirectional=True)
        x = torch.randn(7, T, B, I)
        want = [layer(one) for one in x]
        torch.testing.assert_close(
            torch.vmap(layer, randomness="error")(x), tuple(map(torch.stack, zip(*want)))
        )

    def test_hessian_vector_product(self) -> None:
        ours = rnn.RNN(I, H).double()
        theirs = nn.RNN(I, H).double()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(T, B, I, dtype=torch.float64)
        v = torch.randn(T, B, I, dtype=torch.float64)
        found = []
        for layer in (ours, theirs):
            grad = torch.func.grad(lambda x, layer=layer: layer(x)[0].pow(3).sum())
            found.append(torch.func.vjp(grad, x)[1](v)[0])
        torch.testing.assert_close(*found)


class TestLayers:
    @LAYERS
    def test_gradient_of_each_sample(self, name: str) -> None:
        theirs, ours = pair(name, bidirectional=True, num_layers=2)
        x = randn(7, T, I).detach()
        weights = dict(ours.named_parameters())

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
        base = copy.deepcopy(models[0]).to("meta")
        x = randn(T, B, I)

        def run(weights: Any, buffers: Any) -> Tensor:
            return torch.func.functional_call(base, (weights, buffers), (x,))[0]

        y = torch.vmap(run)(weights, buffers)
        torch.testing.assert_close(y, torch.stack([model(x)[0] for model in models]))
        grads = torch.autograd.grad(y.sin().sum(), list(weights.values()))
        for k, model in enumerate(models):
            want = torch.autograd.grad(model(x)[0].sin().sum(), list(model.parameters()))
            torch.testing.assert_close([g[k] for g in grads], list(want))

    def test_ensemble_is_quick(self) -> None:
        """Training eight small layers by vmap takes no more than twice the time of one in a loop
        over torch's cell."""
        models: list[Any] = [pair("GRU", 16, 16, dtype=torch.float32)[1] for _ in range(8)]
        weights, buffers = torch.func.stack_module_state(models)
        base = models[0]
        cell = nn.GRUCell(16, 16)
        x = torch.randn(64, 4, 16)
        times: dict[Any, list[float]] = {}

        def ensemble() -> Tensor:
            return torch.vmap(lambda w, b: torch.func.functional_call(base, (w, b), (x,))[0])(
                weights, buffers
            )

        def loop() -> Tensor:
            states = [cell(x[0])]
            for x_t in x[1:]:
                states.append(cell(x_t, states[-1]))
            return torch.stack(states)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for _ in range(15):
                for function in (ensemble, loop):
                    start = time.process_time()  # others use this machine too
                    function().sum().backward()
                    times.setdefault(function, []).append(time.process_time() - start)
        finally:
            torch.set_num_threads(threads)
        assert min(times[ensemble]) < 2 * min(times[loop])

    @LAYERS
    def test_forward_mode(self, name: str) -> None:
        theirs, ours = pair(name, bidirectional=True)
        x = randn(T, B, I).detach()
        v = randn(T, B, I).detach()
        # torch.nn has no formula for this in every layer: its gradient, twice, has the same
        # product.
        u = torch.zeros(T, B, 2 * H, dtype=torch.float64, requires_grad=True)
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(theirs(leaf)[0], leaf, u, create_graph=True)
        (want,) = torch.autograd.grad(g, u, v)
        torch.testing.assert_close(torch.func.jvp(lambda x: ours(x)[0], (x,), (v,))[1], want)

    @LAYERS
    def test_derivatives_with_lengths_and_of_packed_sequences(self, name: str) -> None:
        layer = pair(name)[1]
        x = randn(7, T, B, I).detach()
        lengths = torch.tensor([5, 3, 2, 1])

        def masked(x: Tensor, lengths: Tensor) -> Tensor:
            return layer(x, lengths=lengths)[0].sin().sum()

        found = torch.vmap(torch.func.grad(masked))(x, lengths.expand(7, B))
        torch.testing.assert_close(
            found, torch.stack([torch.func.grad(masked)(one, lengths) for one in x])
        )
        packed = nn.utils.rnn.pack_padded_sequence(x[0], lengths)

        def unpadded(data: Tensor) -> Tensor:
            return layer(nn.utils.rnn.PackedSequence(data, packed.batch_sizes))[0].data.sin().sum()

        leaf = packed.data.clone().requires_grad_()
        (want,) = torch.autograd.grad(unpadded(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(unpadded)(packed.data), want)
        torch.testing.assert_close(
            torch.vmap(torch.func.grad(unpadded))(packed.data.expand(2, -1, -1))[1], want
        )
        torch.testing.assert_close(
            torch.vmap(unpadded)(packed.data.expand(2, -1, -1))[1], unpadded(packed.data)
        )
        slope = torch.func.jvp(unpadded, (packed.data,), (packed.data,))[1]
        torch.testing.assert_close(slope, (want * packed.data).sum())

    def test_bad_input_under_vmap(self) -> None:
        layer = pair("GRU")[1]
        x = randn(7, T, B, I).detach()
        for lengths, text in (
            ([9, 1, 1, 1], "lengths between 0"),
            ([-1, 1, 1, 1], "lengths between 0"),
            ([2], "lengths of shape"),
        ):
            with pytest.raises(RuntimeError, match=text):
                torch.vmap(lambda x, n=lengths: layer(x, lengths=torch.tensor(n))[0])(x)
        with pytest.raises(RuntimeError, match="larger than 0"):
            torch.vmap(lambda x: layer(x[:0])[0])(x)

    @LAYERS
    def test_autocast(self, name: str) -> None:
        layer = pair(name, dtype=torch.float32)[1]
        x = torch.randn(7, T, B, I)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.vmap(layer)(x)
            want = layer(x[0])
        torch.testing.assert_close(
            torch.utils._pytree.tree_map(lambda t: t[0], got), want, rtol=0.05, atol=0.05
        )

    @LAYERS
    def test_many_gradients_at_once(self, name: str) -> None:
        theirs, ours = pair(name)
        x = randn(T, B, I)
        v = torch.randn(3, T, B, H, dtype=torch.float64)
        found = [
            torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], v, is_grads_batched=True)
            for layer in (ours, theirs)
        ]
        torch.testing.assert_close(*found)
        hessian = [
            torch.autograd.functional.hessian(
                lambda x, f=f: f(x)[0].pow(3).sum(), x[:2, :1], vectorize=True
            )
            for f in (ours, theirs)
        ]
        torch.testing.assert_close(*hessian)
