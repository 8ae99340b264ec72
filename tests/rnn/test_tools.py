"""PyTorch's toolbox on all three layers: training, parametrizations, processes; and what torch.nn's
layers lack."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import rnn
from rnn.kernels import cpu
from rnn.kernels.plan import Plan
from tests.cases import kept_bytes
from tests.small import LAYERS, B, H, I, T, check_scaled_step, gradients, pair, randn


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """What other tests compiled counts for Dynamo's limit of one code's versions."""
    torch._dynamo.reset()


class TestTraining:
    @LAYERS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, name: str, dtype: torch.dtype) -> None:
        layer = pair(name, dtype=torch.float32)[1]
        x = randn(T, B, I, dtype=torch.float32)
        want = gradients(layer, x)
        with torch.autocast("cpu", dtype):
            y, h = layer(x)
        assert y.dtype == dtype
        assert all(s.dtype == dtype for s in (h if isinstance(h, tuple) else [h]))
        with torch.autocast("cpu", dtype):
            got = gradients(layer, x)
        assert [g.dtype for g in got[1:]] == [torch.float32] * (len(got) - 1)
        # 8 bits of 0.5 rounded 5 times
        torch.testing.assert_close([g.float() for g in got], want, rtol=0.05, atol=0.1)
        check_scaled_step(layer, x, "cpu", dtype)

    @LAYERS
    def test_backward_stays_in_the_precision_of_forward(self, name: str) -> None:
        layer = pair(name, dtype=torch.float32)[1]
        x = randn(T, B, I, dtype=torch.float32)
        loss = layer(x)[0].sin().sum()
        want = torch.autograd.grad(loss, x, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(
                torch.autograd.grad(loss, x, retain_graph=True), want, rtol=0, atol=0
            )
            torch.testing.assert_close(torch.autograd.grad(loss, x, create_graph=True), want)

    @LAYERS
    @pytest.mark.parametrize(
        "reparametrize",
        [
            parametrizations.weight_norm,
            parametrizations.orthogonal,
            parametrizations.spectral_norm,
            prune.random_unstructured,
        ],
        ids=lambda f: f.__name__,
    )
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
        x = randn(T, B, H)
        found = []
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
        layer = pair(name, num_layers=2)[1]
        x = randn(T, B, I)
        want = torch.autograd.grad(layer(x)[0].sin().sum(), [x, *layer.parameters()])
        for reentrant in (False, True):
            layer.zero_grad()
            x.grad = None
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)[
                0
            ].sin().sum().backward()
            torch.testing.assert_close([x.grad, *(p.grad for p in layer.parameters())], list(want))

    @LAYERS
    def test_hooks(self, name: str) -> None:
        layer = pair(name)[1]
        x = randn(T, B, I)
        seen = list[str]()
        layer.register_forward_pre_hook(lambda *_: seen.append("before"))
        layer.register_forward_hook(lambda *_: seen.append("after"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        layer.weight_hh_l0.register_hook(lambda _: seen.append("weight"))
        layer(x)[0].sum().backward()
        assert sorted(seen) == ["after", "backward", "before", "weight"]

    @LAYERS
    def test_files(self, name: str) -> None:
        (_, layer) = pair(name)
        file = io.BytesIO()
        x = randn(T, B, I)
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = getattr(rnn, name)(I, H).double()
        other.load_state_dict(torch.load(file, weights_only=True))
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)

    @LAYERS
    def test_deterministic(self, name: str) -> None:
        layer = pair(name, num_layers=2, bidirectional=True)[1]
        x = randn(T, B, I)
        torch.use_deterministic_algorithms(True)
        try:
            torch.testing.assert_close(gradients(layer, x), gradients(layer, x), rtol=0, atol=0)
            y, _ = layer(x, lengths=torch.tensor([5, 0, 3, 1]))
            y.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)

    @LAYERS
    def test_only_what_is_needed(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the weights frozen their gradients are not made."""
        layer = pair(name, dtype=torch.float32)[1]
        layer.plan = Plan("numpy")
        x = torch.randn(T, B, I, requires_grad=True)
        made: list[tuple[bool, ...]] = []

        def noted(*given: Any) -> Any:
            found = backward(*given)
            made.append(tuple(grad is not None for grad in found))
            return found

        backward = cpu.backward
        monkeypatch.setattr(cpu, "backward", noted)
        for frozen in (True, False):
            layer.requires_grad_(not frozen)
            torch.autograd.grad(layer(x)[0].sum(), x)
        assert made == [(True, False, False, False, False, False), (True,) * 5 + (False,)]


def train(layer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(T, B, I))[0].pow(2).mean().backward()
        optimizer.step()


def train_together(method: str) -> None:
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


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_share_parameters(method: str) -> None:
    """From a process of their own: torch refuses autograd in a fork of one whose autograd has
    threads."""
    code = f"from tests.rnn import test_tools; test_tools.train_together({method!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr


class TestSequences:
    """lengths, resets and the states of every step, in the layouts of the layer."""

    @LAYERS
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_resets_cut_sequences(self, name: str, batch_first: bool) -> None:
        theirs, ours = pair(name, I, H, 1, batch_first=batch_first, bidirectional=True)
        x = randn(T, B, I)
        h = torch.randn(2, B, H, dtype=torch.float64)
        resets = torch.zeros(T, B, dtype=torch.bool)
        resets[2] = True
        resets[0, 1] = True
        hx = (h, h) if name == "LSTM" else h
        first = h.clone()
        last = h.clone()
        first[1] = 0  # nothing crosses the boundary before step 2, in either direction
        last[0] = 0
        first[0, 1] = 0
        halves = [
            theirs(part.transpose(0, 1) if batch_first else part, (s, s) if name == "LSTM" else s)[
                0
            ]
            for part, s in ((x[:2], first), (x[2:], last))
        ]
        given = (x.transpose(0, 1), resets.T) if batch_first else (x, resets)
        y, _ = ours(given[0], hx, resets=given[1])
        torch.testing.assert_close(y, torch.cat(halves, 1 if batch_first else 0))
        alone, _ = ours(
            x[:, 1], (h[:, 1], h[:, 1]) if name == "LSTM" else h[:, 1], resets=resets[:, 1]
        )
        torch.testing.assert_close(alone, y[1] if batch_first else y[:, 1])

    @LAYERS
    def test_resets_of_packed_sequences_go_with_them(self, name: str) -> None:
        layer = pair(name, bidirectional=True)[1]
        x = randn(T, B, I)
        lengths = torch.tensor([2, 5, 3, 4])
        resets = torch.rand(T, B) < 0.4
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, h = layer(packed, resets=resets)
        want = layer(x, lengths=lengths, resets=resets)
        torch.testing.assert_close((nn.utils.rnn.pad_packed_sequence(y)[0], h), want)

    @pytest.mark.parametrize("form", ["padded", "batch_first", "unbatched", "packed"])
    @pytest.mark.parametrize(("name", "proj"), [("RNN", 0), ("LSTM", 0), ("LSTM", 2), ("GRU", 0)])
    def test_states_of_every_step(self, name: str, proj: int, form: str) -> None:
        """h and c after every step, of every layer: against the last states of shorter
        sequences."""
        options: dict[str, Any] = {"proj_size": proj} if proj else {}
        layer = pair(name, I, H, 2, batch_first=form == "batch_first", **options)[1]
        x = randn(T, B, I)
        lengths = torch.tensor([5, 4, 4, 2])
        given: Any = {
            "padded": x,
            "batch_first": x.transpose(0, 1),
            "unbatched": x[:, 0],
            "packed": nn.utils.rnn.pack_padded_sequence(x, lengths),
        }[form]
        y, last, states = layer(given, return_states=True)
        # Without the states it is for torch's own operator, if there is no compiler.
        torch.testing.assert_close(layer(given), (y, last), rtol=1e-12, atol=1e-14)
        layer.plan = Plan("numpy")
        same = layer(given, return_states=True)[:2]
        torch.testing.assert_close(layer(given), same, rtol=0, atol=0)
        for k, column in enumerate(states if name == "LSTM" else [states]):
            for t in range(T):
                prefix = x[: t + 1, :1] if form == "unbatched" else x[: t + 1]
                _, want = layer(prefix.transpose(0, 1) if form == "batch_first" else prefix)
                want = want[k] if name == "LSTM" else want
                got = column[:, :, t] if form == "batch_first" else column[:, t]
                if form == "packed":
                    running = int((lengths > t).sum())
                    start = int(lengths.clamp(max=t).sum())
                    got = column[:, start : start + running]
                    want = want[:, :running]
                torch.testing.assert_close(got, want[:, 0] if form == "unbatched" else want)
        assert torch.autograd.grad(
            sum(c.sin().sum() for c in (states if name == "LSTM" else [states])), x
        )[0].any()

    @LAYERS
    def test_refused_by_name(self, name: str) -> None:
        layer = pair(name)[1]
        x = randn(T, B, I)
        for resets in (
            torch.zeros(T, B),
            torch.zeros(B, T, dtype=torch.bool),
            torch.zeros(T, dtype=torch.bool),
        ):
            with pytest.raises(RuntimeError, match="Expected resets of shape"):
                layer(x, resets=resets)
        packed = nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor([2, 5, 3, 4]), enforce_sorted=False
        )
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
        more = [
            kept_bytes(getattr(rnn, name)(I, H, recompute=True), torch.randn(steps, B, I))
            for steps in (50, 100)
        ]
        assert more[1] - more[0] <= 50 * B * (I + values) * 4

    @LAYERS
    def test_gradients(self, name: str) -> None:
        layer = pair(name, num_layers=2, bidirectional=True)[1]
        layer.plan = Plan("numpy")  # or float64 would be for torch's own operator
        x = randn(T, B, I)
        want = gradients(layer, x)
        layer.recompute = True
        torch.testing.assert_close(gradients(layer, x), want, rtol=0, atol=0)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(compiled, x), want)
