"""torch.compile, torch.export and torch.jit.trace, on the operator and on all three layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn
from rnn.kernels import cells
from tests.cases import NAMES
from tests.small import LAYERS, B, H, I, T, data, pair, randn


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


class TestOperator:
    @pytest.mark.parametrize("name", NAMES)
    def test_operators(self, name: str) -> None:
        given = data(name)
        masks = (torch.tensor([5, 0, 3, 1]), None, torch.rand(T, B) < 0.3)
        cell = getattr(cells, name)
        torch.library.opcheck(
            torch.ops.fused_rnn.forward, (name, "", [False, True], 2, *given, *masks)
        )
        y, states, last, saved = torch.ops.fused_rnn.forward(
            name, "", [False, True], 2, *given, *masks
        )
        d = [torch.randn_like(t) if t.numel() else None for t in (y, states, last)]
        kept = [t.detach() if t.numel() else None for t in (y, states, saved)]
        assert (kept[1] is not None, kept[2] is not None) == (cell.states > 1, cell.saved > 0)
        plain = [t.detach() for t in given]
        arguments = (name, "", [False, True], [True] * 6, *plain, *masks, *kept, *d)
        torch.library.opcheck(torch.ops.fused_rnn.backward, arguments)

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
    def test_compile(self, form: str, dynamic: bool) -> None:
        layer = rnn.RNN(I, H, 2, bidirectional=True, batch_first=True)
        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for steps in (6, 9):
            x = torch.randn(B, steps, I)
            lengths = torch.tensor([5, 1, 3, 2])
            found = []
            for module in (layer, compiled):
                leaf = x.clone().requires_grad_()
                packed = (
                    pack_padded_sequence(leaf, lengths, True, enforce_sorted=False)
                    if form == "packed"
                    else None
                )
                kwargs = {"lengths": lengths} if form == "lengths" else {}
                with torch._dynamo.config.patch(error_on_recompile=dynamic and steps == 9):
                    out, h = module(leaf if packed is None else packed, **kwargs)
                if packed is not None:
                    assert isinstance(out, PackedSequence)
                    out = out.data
                found.append(
                    [
                        out,
                        h,
                        *torch.autograd.grad(
                            (out * out).sum() + h.sum(), [leaf, *layer.parameters()]
                        ),
                    ]
                )
            torch.testing.assert_close(*found)

    def test_compile_in_inference(self) -> None:
        layer = rnn.RNN(I, H)
        with torch.no_grad():
            x = torch.randn(T, B, I)
            torch.testing.assert_close(
                torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
            )

    def test_compile_a_cell(self) -> None:
        cell = rnn.RNNCell(I, H)
        x = torch.randn(B, I)
        h = torch.randn(B, H)
        torch.testing.assert_close(
            torch.compile(cell, fullgraph=True, backend="aot_eager")(x, h), cell(x, h)
        )

    def test_export(self) -> None:
        layer = rnn.RNN(I, H, 2, bidirectional=True)
        steps = torch.export.Dim("steps", min=2, max=1000)
        exported = torch.export.export(layer, (torch.randn(T, B, I),), dynamic_shapes=({0: steps},))
        for length in (T, 11):
            x = torch.randn(length, B, I)
            torch.testing.assert_close(exported.module()(x), layer(x))

    def test_fake_tensors(self) -> None:
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            y, h = rnn.RNN(I, H, 2, bidirectional=True)(torch.randn(T, B, I))
            assert (y.shape, h.shape) == ((T, B, 2 * H), (4, B, H))
        meta = rnn.RNN(I, H, device="meta")
        y, h = meta(torch.randn(T, B, I, device="meta"))
        assert (y.device.type, y.shape, h.shape) == ("meta", (T, B, H), (1, B, H))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        layer = rnn.RNN(I, H, 2)
        x = torch.randn(T, B, I, requires_grad=True)
        want = layer(x)
        with torch.autocast("cpu", dtype):
            y, h = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close((y.float(), h.float()), want, rtol=2e-2, atol=2e-2)
        grads = [
            torch.autograd.grad(out.float().sin().sum(), [x, *layer.parameters()])
            for out in (y, want[0])
        ]
        torch.testing.assert_close(*grads, rtol=5e-2, atol=5e-2)


class TestLayers:
    @LAYERS
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_inside_a_model(self, name: str, dynamic: bool) -> None:
        layer = pair(name, I, H, 2, dropout=0.5, bidirectional=True, batch_first=True)[1]
        model = nn.ModuleDict(
            {"a": nn.Linear(2, I).double(), "rnn": layer, "b": nn.Linear(2 * H, 2).double()}
        )

        def run(x: Tensor) -> Tensor:
            return model["b"](model["rnn"](model["a"](x).tanh())[0]).sum(-1)

        compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for sizes in ((4, 6), (3, 9)):
            x = torch.randn(*sizes, 2, dtype=torch.float64)
            found = []
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
        torch.export.save(
            torch.export.export(layer, (randn(T, B, I),), dynamic_shapes=(dims,)), path
        )
        loaded = torch.export.load(path).module()
        for sizes in ((T, B), (11, 2)):
            x = randn(*sizes, I)
            torch.testing.assert_close(loaded(x), layer(x))

    @pytest.mark.parametrize("how", ["export", "trace"])
    @pytest.mark.parametrize("proj", [0, 2])
    def test_initial_states(self, proj: int, how: str) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = rnn.LSTM(I, H, proj_size=proj, bidirectional=True)

            def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
                return self.layer(x, (h, c))

        def given(T: int, B: int) -> tuple[Tensor, ...]:
            return torch.randn(T, B, I), torch.randn(2, B, proj or H), torch.randn(2, B, H)

        model = Model()
        dims = {"T": torch.export.Dim("T", min=2), "B": torch.export.Dim("B", min=2)}
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
