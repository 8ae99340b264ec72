"""Models exported to ONNX: standard nodes, any batch and number of steps, and onnxruntime's
numbers."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import rnn
from tests.cases import LAYER_NAMES


class Model(nn.Module):
    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(rnn, name)(3, 6, **options)

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, h: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        y, h = self.layer(
            x,
            h if h is None or not isinstance(self.layer, rnn.LSTM) else (h, 2 * h),
            lengths=lengths,
        )
        return y, *(h if isinstance(h, tuple) else (h,))


@pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}],
    ids=["plain", "deep", "bare"],
)
@pytest.mark.parametrize("name", LAYER_NAMES)
def test_export(name: str, options: dict[str, Any], with_lengths: bool, tmp_path: Path) -> None:
    model = Model(name, **options).eval()
    path = tmp_path / "model.onnx"
    time, batch = (1, 0) if options.get("batch_first") else (0, 1)
    example = torch.randn(4, 4, 3), torch.tensor([4, 2, 1, 3])
    shapes = {time: torch.export.Dim("time"), batch: torch.export.Dim("batch")}
    given = example if with_lengths else example[:1]
    torch.onnx.export(
        model,
        given,
        path,
        dynamo=True,
        verbose=False,
        dynamic_shapes=(shapes, {0: shapes[batch]}) if with_lengths else (shapes,),
    )
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count(name) == options.get("num_layers", 1)
    assert not {"Loop", "Scan"} & {*nodes}
    session = onnxruntime.InferenceSession(path)
    for T, B in ((4, 4), (9, 2)):
        x = torch.randn((B, T, 3) if time else (T, B, 3))
        lengths = torch.randint(1, T + 1, (B,))
        arguments = (x, lengths) if with_lengths else (x,)
        got = session.run(
            None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), arguments, strict=True)}
        )
        with torch.no_grad():
            want = list(model(*arguments))
        torch.testing.assert_close([torch.from_numpy(a) for a in got], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_no_steps(name: str, tmp_path: Path) -> None:
    """A sequence of no steps keeps its initial state, there too."""
    model = Model(name, bidirectional=True).eval()
    path = tmp_path / "model.onnx"
    given = torch.randn(4, 3, 3), torch.tensor([2, 0, 4]), torch.randn(2, 3, 6)
    torch.onnx.export(model, given, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    got = session.run(
        None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), given, strict=True)}
    )
    with torch.no_grad():
        want = list(model(*given))
    torch.testing.assert_close([torch.from_numpy(a) for a in got], want, rtol=1e-5, atol=1e-5)


def test_what_has_no_node(tmp_path: Path) -> None:
    class WithResets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnn.GRU(3, 6)

        def forward(self, x: Tensor, resets: Tensor) -> Tensor:
            return self.layer(x, resets=resets)[0]

    model = WithResets().eval()
    path = tmp_path / "model.onnx"
    given = (torch.randn(4, 3, 3), torch.rand(4, 3) < 0.4)
    torch.onnx.export(model, given, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (got,) = session.run(
        None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), given, strict=True)}
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(*given), rtol=1e-5, atol=1e-5)
