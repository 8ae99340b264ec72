"""What the host does around the kernels: how long it takes, what it decides and says, and
faults."""

import ast
import inspect
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rnn
from rnn import dispatch, functional, layer_call
from rnn.kernels import cells
from rnn.kernels import cpu as host
from rnn.kernels import gpu as device
from rnn.kernels.gpu.device import describe
from rnn.kernels.plan import Plan
from rnn.kernels.types import Outputs, Weights
from tests.cases import LAYER_NAMES, NAMES, check_recurrence
from tests.conftest import INHERITS_PRECISION, TORCH

ROOT = Path(__file__).parents[2]
BLOCK = Plan("triton", "block", 16, 8, 16, 1, False, "tf32x3")


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_host_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of ours but the kernels, at sizes at which arithmetic is nothing: 0.9 of torch.nn's time
    at most, with backward all of it."""
    T = 4
    B = 1
    I = 8
    H = 8
    ours = getattr(rnn, name)(I, H, plan=BLOCK)
    theirs = getattr(nn, name)(I, H)
    x = torch.randn(T, B, I)
    dy = torch.randn(T, B, H)
    cell = ours.layer_cell()
    ready = list[Any]()
    S = cell.states
    A = cell.saved

    def results() -> tuple[Any, ...]:
        states = torch.zeros(S - 1, T * B, H) if S > 1 else None
        saved = torch.zeros(A, T * B, H) if A else None
        return torch.zeros(T * B, H), states, [torch.zeros(1, B, H) for _ in range(S)], saved

    def forward(cell: Any, plan: Any, layout: Any, x: Tensor, weights: Weights, *_: Any) -> Any:
        nn.functional.linear(x, weights.w_ih, weights.b_ih)
        return Outputs(*ready.pop())

    monkeypatch.undo()  # no poison, which takes time
    monkeypatch.setattr(device, "forward", forward)
    monkeypatch.setattr(device, "_launcher", lambda plan: lambda *_: None)

    def train(layer: Any) -> None:
        layer(x)[0].backward(dy)

    def ratio(call: Callable[[Any], Any]) -> float:
        times: tuple[list[float], list[float]] = [], []
        for _ in range(400):
            ready[:] = [results()]
            for layer, column in zip((ours, theirs), times):
                layer.zero_grad()
                start = time.process_time()  # others use this machine too
                call(layer)
                column.append(time.process_time() - start)
        return statistics.median(times[0]) / statistics.median(times[1])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            inference = min(ratio(lambda layer: layer(x)) for _ in range(3))
        training = min(ratio(train) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    # An RNN call is so short that looking at the memory of each tensor before a kernel reads it, 2
    # us, is seen: 0.94 to 0.96 and 1.05 to 1.08 of torch.nn's time beside ten other processes.
    forward_limit, training_limit = (1.0, 1.1) if name == "RNN" else (0.9, 1.0)
    # Whose own part takes up to a sixth less time
    if TORCH != (2, 13) or sys.version_info >= (3, 12):
        forward_limit = forward_limit * 1.2
        training_limit = training_limit * 1.05
    within = inference <= forward_limit and training <= training_limit
    assert within, f"{inference:.2f} and {training:.2f} of torch.nn's time"


@pytest.fixture
def gpu(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As if there were a GPU, for decisions: tensors on it hold nothing."""
    has = SimpleNamespace(capability=(9, 0), triton=True, cupy=True)
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(nn.RNNBase, "reset_parameters", lambda layer: None)
    monkeypatch.setattr(dispatch, "_available", lambda library: getattr(has, library))
    describe.cache_clear()
    with FakeTensorMode():
        yield has
    describe.cache_clear()


def on_gpu(H: int, dtype: torch.dtype = torch.float32) -> str:
    return rnn.explain(
        rnn.GRU(8, H, dtype=dtype, device="cuda"), torch.empty(5, 3, 8, dtype=dtype, device="cuda")
    )


@pytest.mark.parametrize(
    ("H", "dtype", "has", "texts"),
    [
        (
            64,
            torch.bfloat16,
            {},
            ["cuda, scope block", "64 units of 3 gates by 8 sequences", "the fastest that fits"],
        ),
        (
            512,
            torch.bfloat16,
            {},
            ["cuda, scope grid", "16 units", "32 blocks to a sequence", "not measured"],
        ),
        (
            64,
            torch.bfloat16,
            {"cupy": False},
            ["triton, scope block", "64 units of 3 gates by 8 sequences", "in ieee"],
        ),
        (
            512,
            torch.float32,
            {"cupy": False},
            ["triton, scope library", "cudnn.rnn.fp32_precision is 'tf32'"],
        ),
        (64, torch.float64, {}, ["the formula", "no kernel for torch.float64"]),
        (64, torch.float32, {"capability": (7, 5)}, ["the formula", "8.0, this one has 7.5"]),
        (2048, torch.float32, {"triton": False}, ["float32 on cuda:0: CuPy", "Triton is missing"]),
        (
            64,
            torch.bfloat16,
            {"triton": False},
            ["float32 on cuda:0: cuda", "bfloat16 is cast", "Triton is missing"],
        ),
        (
            64,
            torch.float32,
            {"triton": False, "cupy": False},
            ["the formula", "neither Triton nor CuPy"],
        ),
    ],
)
def test_explain_on_a_gpu(
    H: int, dtype: torch.dtype, has: dict[str, Any], texts: list[str], gpu: Any
) -> None:
    vars(gpu).update(has)
    said = on_gpu(H, dtype)
    assert all(text in said for text in texts), said


@pytest.mark.parametrize(
    ("layer", "B", "texts"),
    [
        pytest.param(
            rnn.RNN(3, 8, plan=BLOCK),
            2,
            ["triton, scope block", "(plan=)"],
            marks=pytest.mark.interpreted,
        ),
        (
            rnn.LSTM(3, 8, 2, dropout=0.5, bidirectional=True),
            2,
            ["lstm B=2 I=3 H=8 N=2", "layer 1: lstm B=2 I=16"],
        ),
        (rnn.GRU(3, 8, batch_first=True), 2, ["I=3 H=8", "torch's own operator, gru"]),
        (rnn.LSTM(3, 8, proj_size=2), 2, ["I=3 H=8", "torch's own operator, lstm"]),
        (rnn.GRU(3, 8, recompute=True), 2, ["NumPy, step by step", "whole sequences alone"]),
        (
            rnn.GRU(3, 9, dtype=torch.bfloat16),
            2,
            ["float32 on cpu: torch's own", "torch.bfloat16 is cast"],
        ),
        (rnn.RNN(3, 9, dtype=torch.complex64), 2, ["the formula"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("compiler", [False, True], ids=["no compiler", "compiler"])
def test_explain_on_the_cpu(
    layer: Any,
    B: int,
    texts: list[str],
    compiler: bool,
    fresh: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what then happens is that."""
    if compiler and not dispatch.native_available(cells.rnn_tanh, torch.float32):
        pytest.skip("there is no C++ compiler that works")
    monkeypatch.setattr(dispatch, "native_available", lambda cell, dtype: compiler)
    if compiler:
        others = "NumPy", "torch's own", "whole sequences"
        texts = [
            "C++, compiled" if any(word in text for word in others) else text for text in texts
        ]
    x = torch.randn(5, B, 3, dtype=layer.weight_ih_l0.dtype)
    ran = list[str]()
    state = torch.get_rng_state()
    said = rnn.explain(layer, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(text in said for text in texts), said

    class Spy(layer_call.LayerCall):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            ran.append(self.plan.backend)

    monkeypatch.setattr(functional, "LayerCall", Spy)

    def note(name: str) -> None:
        function = getattr(functional, name)

        def noted(*args: Any) -> Any:
            ran.append(name)
            return function(*args)

        monkeypatch.setattr(functional, name, noted)

    note("composite")
    note("by_torch")
    layer(x)
    words = {
        "native": "C++, compiled",
        "by_torch": "torch's own operator",
        "numpy": "NumPy, step",
        "triton": "triton",
        "composite": "the formula",
    }
    assert len(ran) == len(said.splitlines()) == layer.num_layers
    assert all(words[backend] in line for backend, line in zip(ran, said.splitlines()))


def test_explain_refuses_what_the_call_does() -> None:
    with pytest.raises(RuntimeError, match="Expected 3, got 4"):
        rnn.explain(rnn.RNN(3, 8), torch.randn(5, 2, 4))
    with pytest.raises(RuntimeError, match="Expected lengths of shape"):
        rnn.explain(rnn.RNN(3, 8), torch.randn(5, 2, 3), lengths=torch.zeros(3))
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.rnn\.RNN"):
        rnn.explain(nn.RNN(3, 8), torch.randn(5, 2, 3))
    with torch.autocast("cpu"):
        said = rnn.explain(rnn.RNN(3, 8), torch.randn(5, 2, 3))
    assert (
        any(f"float32 on cpu: {word}" in said for word in ("torch's own", "C++"))
        and "autocast" in said
    ), said


SWITCHES = {  # and whether cuDNN would then compute an RNN in TF32
    "pass": True,
    "b.cudnn.allow_tf32 = False": False,
    "b.cudnn.allow_tf32 = True": True,
    "b.cudnn.rnn.fp32_precision = 'ieee'": False,
    "b.cudnn.rnn.fp32_precision = 'tf32'": True,
    "b.cudnn.rnn.fp32_precision = 'none'": False,
    "b.cudnn.fp32_precision = 'ieee'": not INHERITS_PRECISION,
    "b.cudnn.fp32_precision = 'tf32'": True,
    "b.fp32_precision = 'ieee'": not INHERITS_PRECISION,
    "b.fp32_precision = 'tf32'": True,
    "b.cudnn.allow_tf32 = False; b.cudnn.rnn.fp32_precision = 'tf32'": True,
    "b.cudnn.rnn.fp32_precision = 'ieee'; b.cudnn.allow_tf32 = True": True,
    "b.cudnn.rnn.fp32_precision = 'none'; b.fp32_precision = 'tf32'": True,
    "flags = b.cudnn.flags(allow_tf32=False); flags.__enter__()": False,
    "torch.set_float32_matmul_precision('highest')": True,
    "torch.set_float32_matmul_precision('high')": True,
    "b.cuda.matmul.allow_tf32 = True": True,
}


def test_the_switch_for_tf32() -> None:
    """Each way to set it, in a process of its own: torch does not forget the one that was used
    before. Reading it never raises, as reading `allow_tf32` does after some."""
    code = """if True:
        import os, torch
        from types import SimpleNamespace
        from rnn import dispatch

        x = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(5, 3, 8), device="cuda")
        dispatch._plan = lambda cell, sizes, dtype, device, tf32: tf32
        b = torch.backends
        for way in {ways}:
            if os.fork():
                os.wait()
            else:
                exec(way)
                print(dispatch.choose_plan(None, x, 3, 8, (0,)), flush=True)
                os._exit(0)
    """.replace("{ways}", repr([*SWITCHES]))
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT)
    assert dict(zip(SWITCHES, map(ast.literal_eval, done.stdout.split()))) == SWITCHES, done.stderr


def test_compiled_code_reads_the_switch_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list[Plan]()
    choose = dispatch.choose_plan

    def noted(*args: Any) -> Plan:
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(dispatch, "choose_plan", noted)
    layer = torch.compile(rnn.RNN(3, 8), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        layer(x)
        first = len(chosen)
        layer(x)
    assert (first, len(chosen)) == (1, 2)


class Arrays(ModuleType):
    """NumPy in CuPy's place. Notes which functions are used, and which of them with out=."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.used: dict[str, bool] = {}
        vars(self).update(
            (name, self.noted(name, found)) for name, found in vars(np).items() if name[0] != "_"
        )
        # NumPy's would be read-only
        self.from_dlpack = lambda tensor: torch.from_dlpack(tensor).numpy()

    def noted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.used[name] = self.used.get(name, False) or "out" in kwargs
            return function(*args, **kwargs)

        return call


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # what CuPy would not say
@pytest.mark.parametrize("cell", NAMES)
def test_cupy(cell: str, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU's source asks of an array library, CuPy has; and the way there and back is
    right."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    arrays = Arrays()
    monkeypatch.setitem(sys.modules, "cupy", arrays)
    for form in ("padded", "lengths", "packed"):
        check_recurrence(
            cell, Plan("cupy"), (5, 6, 3, 9), (False, True), form, resets=form != "padded"
        )
    assert {"concatenate", "maximum" if cell == "rnn_relu" else "tanh"} <= arrays.used.keys()
    for name, out in arrays.used.items():
        function = getattr(cupy, name)
        assert (
            not out
            or isinstance(function, cupy.ufunc)
            or "out=" in function.__doc__
            or ("out" in inspect.signature(function).parameters)
        ), name


def test_cupy_shares_torchs_stream_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    entered = list[Any]()

    class Noted:
        def __init__(self, *what: Any) -> None:
            self.what = what

        def __enter__(self) -> None:
            entered.append(self.what)

        def __exit__(self, *_: object) -> None:
            entered.remove(self.what)

    monkeypatch.setattr(torch.cuda, "device", lambda index: Noted("device", index))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "stream")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        cupy.cuda.Stream, "from_external", lambda stream: Noted(stream), raising=False
    )
    monkeypatch.setattr(cupy.cuda, "using_allocator", lambda allocate: Noted("memory", allocate))
    x: Any = SimpleNamespace(is_cuda=True, get_device=lambda: 1, device="cpu")
    with layer_call.device_context("cupy", x):
        assert [what[0] for what in entered] == ["device", "stream", "memory"]
        pointer = entered[-1][1](64)
        assert pointer.mem.size == 64 and pointer.device_id == 1
    assert not entered
    with layer_call.device_context("triton", x):
        assert entered == [("device", 1)], "a tensor on another device than the current one"
    x.get_device = lambda: 0
    with layer_call.device_context("triton", x):
        assert not entered


NO_COMPILER = """
from types import SimpleNamespace
def getVersion(): raise OSError("no libnvrtc")
cuda = SimpleNamespace(nvrtc=SimpleNamespace(getVersion=getVersion))
"""
OLD_DRIVER = """
from types import SimpleNamespace
def getDeviceCount(): raise OSError("cudaErrorInsufficientDriver")
cuda = SimpleNamespace(nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
                       runtime=SimpleNamespace(getDeviceCount=getDeviceCount))
"""


@pytest.mark.parametrize(
    "source",
    ["raise OSError('no libcuda')", NO_COMPILER, OLD_DRIVER],
    ids=["no CUDA", "no compiler", "old driver"],
)
def test_broken_library(
    source: str, tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cupy.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(dispatch, "_FOUND", {"triton": False, "cupy": True})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match="without cupy, which is installed and fails: OSError"):
        serves, _, why = dispatch.served(torch.device("cuda", 0), torch.float32)
    assert (serves, why) == ("", "neither Triton nor CuPy can be imported")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.served(torch.device("cuda", 0), torch.float16)[0] == "", "once is enough"


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_no_memory(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's exception comes through, and afterwards all is as before."""
    layer = rnn.LSTM(3, 8, 2)
    x = torch.randn(5, 2, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    want = torch.autograd.grad(layer(x)[0].sum(), [*layer.parameters()])
    real = getattr(host, where)
    left = [1]

    def short(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(host, where, short)
    with pytest.raises(torch.OutOfMemoryError):
        layer(x)[0].sum().backward()
    monkeypatch.setattr(host, where, real)
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before))
    layer.zero_grad()
    layer(x)[0].sum().backward()
    got: list[Tensor] = [p.grad for p in layer.parameters() if p.grad is not None]
    torch.testing.assert_close(got, [*want], rtol=0, atol=0)
