"""rnn.patch and rnn.unpatch: torch.nn's own names are ours for a while."""

import io
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import rnn
from tests.small import B, H, I, T

NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
THEIRS = {name: getattr(nn, name) for name in NAMES}
EACH = pytest.mark.parametrize("name", NAMES)


class Before(nn.LSTM):
    pass


@pytest.fixture
def patched() -> Iterator[None]:
    with rnn.patch():
        yield
    assert nn.LSTM is THEIRS["LSTM"]


def names() -> list[Any]:
    return [getattr(space, name) for space in (nn, nn.modules, nn.modules.rnn) for name in NAMES]


def test_names() -> None:
    ours = [getattr(rnn, name) for name in NAMES] * 3
    theirs = [*THEIRS.values()] * 3
    assert names() == theirs
    with rnn.patch():
        assert names() == ours
        with rnn.patch():
            assert names() == ours
        assert names() == ours
        with pytest.raises(KeyError), rnn.patch():
            raise KeyError
        assert names() == ours
    assert names() == theirs
    rnn.patch()
    assert names() == ours
    rnn.patch()
    rnn.unpatch()
    assert names() == ours
    rnn.unpatch()
    assert names() == theirs
    with pytest.raises(RuntimeError, match=r"no rnn.patch\(\)"):
        rnn.unpatch()


def test_what_others_put_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "LSTM", Before)
    with rnn.patch():
        assert nn.LSTM is Before
        assert nn.GRU is rnn.GRU
    assert nn.LSTM is Before
    assert nn.GRU is THEIRS["GRU"]
    monkeypatch.undo()
    assert names() == [*THEIRS.values()] * 3


def test_threads() -> None:
    def work() -> None:
        for _ in range(200):
            with rnn.patch():
                kinds.add(nn.LSTM)

    kinds: set[type] = set()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kinds == {rnn.LSTM}
    assert names() == [*THEIRS.values()] * 3


@EACH
@pytest.mark.usefixtures("patched")
def test_modules(name: str) -> None:
    """Built, tested for and subclassed under torch.nn's names."""
    base: Any = getattr(nn, name)

    class Twice(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.factor = 2

        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(self.factor * input, hx)

    layer = base(I, H)
    twice = Twice(I, H)
    old = THEIRS[name](I, H)
    assert (
        isinstance(layer, getattr(rnn, name))
        and isinstance(layer, base)
        and isinstance(twice, base)
    )
    x = torch.randn(B, I) if name.endswith("Cell") else torch.randn(T, B, I)
    for module, given in ((layer, x), (twice, 2 * x)):
        old.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x), old(given))


@EACH
def test_pickles(name: str) -> None:
    """From without to within and back: those of torch.nn become ours within, and what was made
    before stays."""
    theirs = THEIRS[name](I, H)
    outside = pickle.dumps(theirs)
    own = pickle.dumps(Before(I, H))
    with rnn.patch():
        inside = [pickle.dumps(m) for m in (getattr(nn, name)(I, H), theirs, Before(I, H))]
        came = pickle.loads(outside)
        assert type(came) is getattr(rnn, name)
        assert type(pickle.loads(own)) is Before
        assert type(pickle.loads(pickle.dumps(theirs))) is THEIRS[name]
    for a, b in zip(came.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [type(pickle.loads(text)) for text in inside] == [
        getattr(rnn, name),
        THEIRS[name],
        Before,
    ]
    restored = pickle.loads(inside[1])
    x = torch.randn(B, I)
    torch.testing.assert_close(restored(x), theirs(x), rtol=0, atol=0)
    assert pickle.dumps(theirs) == outside


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(I, H, 2, batch_first=True)
        self.cell = nn.GRUCell(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.layer(x)[0][:, -1])


@pytest.mark.usefixtures("patched")
class TestTools:
    def test_compile(self) -> None:
        """Dynamo refuses what is an instance of torch.nn.LSTM."""
        model = Model()
        x = torch.randn(B, T, I)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))

    def test_script_and_fx(self) -> None:
        model = Model()
        x = torch.randn(B, T, I)
        want = model(x)
        assert [node.op for node in torch.fx.symbolic_trace(model).graph.nodes].count(
            "call_module"
        ) == 2
        torch.testing.assert_close(torch.jit.script(model)(x), want)
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        assert type(model.layer) is rnn.LSTM

    def test_replace_restore_and_explain(self) -> None:
        model: Any = Model()
        x = torch.randn(B, T, I)
        want = model(x)
        rnn.restore(model, verbose=False)
        assert type(model.layer) is THEIRS["LSTM"]
        torch.testing.assert_close(model(x), want)
        rnn.replace(model, verbose=False)
        assert type(model.layer) is rnn.LSTM
        assert "lstm B=4" in rnn.explain(model.layer, x)

    def test_quantization(self) -> None:
        with pytest.warns(UserWarning, match=r"rnn\.unpatch"):
            torch.ao.quantization.quantize_dynamic(Model())

    def test_files(self) -> None:
        model = Model()
        x = torch.randn(B, T, I)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        torch.testing.assert_close(
            torch.load(file, weights_only=False)(x), model(x), rtol=0, atol=0
        )

    def test_expanded_weights_and_onnx(self) -> None:
        layer = nn.GRU(I, H, batch_first=True)
        x = torch.randn(B, T, I)
        call_for_per_sample_grads(layer, batch_size=B)(x)[0].sum().backward()
        file: Any = io.BytesIO()
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(layer, (x,), file, dynamo=False)


def test_dynamo_is_as_before() -> None:
    config: Any = torch._dynamo.config
    with rnn.patch():
        assert config.allow_rnn
    assert not config.allow_rnn
    with config.patch(allow_rnn=True), rnn.patch():
        pass
    assert not config.allow_rnn


def test_first_of_all() -> None:
    """Before anything else of PyTorch is imported, and what is imported then."""
    code = (
        "import rnn; rnn.patch()\n"
        "import torch, torch.ao.quantization, torch.ao.nn.quantized.dynamic, torch.onnx, "
        "torch._dynamo\n"
        "from torch.nn import LSTM, Module\n"
        "assert LSTM is rnn.LSTM\n"
        "assert torch.compile(LSTM(2, 3), fullgraph=True, backend='eager')(torch.ones(4, 1, "
        "2))[0].shape[2] == 3"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
