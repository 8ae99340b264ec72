"""The benchmark: what it counts, what it writes, and that the documentation has it."""

import contextlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from rnn.kernels import costs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of bench/, by name. They set torch's float32 mode: it is set back. One thread,
    because two that wait for each other on a busy machine take seconds."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    backends: list[Any] = [torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    modes = [backend.fp32_precision for backend in backends]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = ("suites", "peers", "measure", "pictures", "report", "run", "microbench", "prove")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for backend, mode in zip(backends, modes):
        backend.fp32_precision = mode
    torch.set_num_threads(threads)


def start(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "bench" / script, *map(str, arguments)],
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_documentation_is_what_report_writes(bench: Any) -> None:
    outputs = bench.report.outputs()
    pictures = {"speed.svg", "growth.svg"}
    assert {path.name for path in outputs} == {"README.md", "index.md", "performance.md"} | pictures
    for path, text in outputs.items():
        assert path.read_text() == text, "run python bench/report.py"


def test_picture(bench: Any) -> None:
    rows = [
        made_row(bench, 1e-3, seconds, 500, cell=cell)
        for cell, seconds in (("tanh", 4e-3), ("tanh", 1e-3), ("lstm", 0.5e-3))
    ]
    text = bench.report.picture(json.loads(made_results("cpu", "2031-02-03", rows)))
    words = {element.text for element in ElementTree.fromstring(text)}
    assert {"RNN", "LSTM", "2.00", "6.00", "0.50"} <= words


def test_growth(bench: Any) -> None:
    """Curves go through their points: twice as long is as far to the right for every cell, and
    twice the time a step as far up."""
    rows = [
        made_row(bench, 1e-6 * T * us, 4e-6 * T * us, 500, T=T, B=16, H=64, cell=cell)
        for cell, us in (("tanh", 1), ("gru", 2))
        for T in (64, 256)
    ]
    text = bench.report.growth(json.loads(made_results("cpu", "2031-02-03", rows)))
    elements = [*ElementTree.fromstring(text)]
    words = {element.text for element in elements}
    assert {"RNN, ours", "GRU, torch.nn", "64", "256", "µs a step"} <= words
    paths = [e.attrib["d"][1:].split("L") for e in elements if "stroke-width" in e.attrib]
    points = [[tuple(map(float, point.split())) for point in path] for path in paths]
    assert [[x for x, _ in line] for line in points] == [[56.0, 400.0]] * 4
    heights = [line[0][1] for line in points]  # ours 1, torch.nn's 12, ours 2, torch.nn's 24 us
    assert heights[0] - heights[2] == pytest.approx(heights[1] - heights[3], abs=0.2)
    assert bench.pictures.apart([10, 12, 50], 14) == [10, 24, 50]


def made_results(kind: str, date: str, rows: list[dict[str, Any]], **more: Any) -> str:
    results = dict(
        kind=kind,
        suite="core",
        device=f"a {kind}",
        versions=dict(torch="9.9", cupy=None),
        commit="abc",
        modified=False,
        date=f"{date}T00:00:00",
        rows=rows,
    )
    return json.dumps(results | more)


def made_row(bench: Any, ours: float, theirs: float, memory: float, **case: Any) -> dict[str, Any]:
    made = bench.suites.Case(**dict(B=2, T=100, H=8, I=8) | case)
    return made._asdict() | dict(
        forward={"rnn": ours, "torch.nn": theirs},
        training={"rnn": ours, "torch.nn": 3 * theirs, "other": 1},
        memory={"rnn": memory * 2**20, "torch.nn": 1000 * 2**20},
        error={"rnn": 2e-7, "torch.nn": 1e-7},
    )


def test_report(bench: Any, tmp_path: Path) -> None:
    report = bench.report
    frame = f"before\n{bench.report.BEGIN}\nstale\n{bench.report.END}\nafter\n"
    nothing = report.render(frame, tmp_path)
    assert nothing.startswith("before\n") and nothing.endswith("after\n") and "stale" not in nothing
    assert nothing.count("not measured yet") == 2
    assert report.render(nothing, tmp_path) == nothing

    rows = [
        made_row(bench, 1e-3, 4e-3, 500),
        made_row(bench, 1e-3, 0.5e-3, 1200, B=77, cell="lstm"),
        made_row(bench, 2e-3, 2e-3, 100, cell="lstm"),
    ]
    (tmp_path / "cpu-core-new.json").write_text(made_results("cpu", "2031-02-03", rows))
    slow = [made_row(bench, 1.0, 4e-3, 500)]
    for name, date, more in (
        ("old", "2030-01-01", {}),
        ("baseline", "2032-01-01", dict(baseline=True)),
        ("part", "2032-01-01", dict(cell="gru")),
    ):
        (tmp_path / f"cpu-core-{name}.json").write_text(made_results("cpu", date, slow, **more))
    text = report.render(frame, tmp_path)
    assert (
        "**CPU: a cpu**, torch 9.9; 2031-02-03, at abc." in text
        and text.count("not measured yet") == 1
    )
    assert (
        "|  | B | T | H | I | RNN forward | RNN training | LSTM forward | LSTM training |" in text
    )
    assert "|  | 2 | 100 | 8 | 8 | 10.0 (4.00) | 10.0 (12.0) | 20.0 (1.00) | 20.0 (3.00) |" in text
    assert "|  | 77 | 100 | 8 | 8 |  |  | 10.0 (0.50) | 10.0 (1.50) |" in text
    root = math.sqrt(0.5)
    assert f"| core, LSTM | 2 | {root:.2f} | 0.50 | {3 * root:.2f} | 1.50 | 1.20 | 2.00 |" in text
    assert "The 2 cases in which a ratio is below 1.1:" in text
    assert "| core, LSTM | 77 | 100 | 8 | 8 | 0.50 | 1.50 |" in text
    assert "| core, RNN | 2 | 100 | 8 | 8 |" not in text

    (tmp_path / "cuda-core-a.json").write_text(
        made_results(
            "cuda",
            "2031-02-03",
            [made_row(bench, 1e-4, 2e-4, 1, dtype=dtype) for dtype in ("tf32", "bfloat16")],
        )
    )
    text = report.render(frame, tmp_path)
    assert "not measured yet" not in text
    assert (
        "| B | T | H | I | tf32 forward | tf32 training | bfloat16 forward | bfloat16 training |"
        in text
    )


def test_benchmark(tmp_path: Path) -> None:
    done = start(
        "run.py",
        "--device",
        "cpu",
        "--suite",
        "smoke",
        "--seconds",
        0.02,
        "--out",
        tmp_path,
        "--peer",
        "torch.nn:RNN",
        "--peer",
        "flashrnn",
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert {"device", "versions", "commit", "date", "kind", "suite"} <= found.keys()
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        kinds = ("forward", "training") if row["form"] != "streaming" else ("forward",)
        names = {"rnn", "torch.nn", *(["torch.nn:RNN"] if row["cell"] == "tanh" else [])}
        for kind in kinds:
            assert row[kind].keys() == names
            assert min(row[kind].values()) > 0
        assert ("training" in row) == (len(kinds) == 2)
        assert row["first"].keys() == row["memory"].keys() == names
        for error in ("error", "gradient_error")[: len(kinds)]:
            assert 0 < row[error]["rnn"] <= 4 * row[error]["torch.nn"] + 1e-6
        assert row["failed"].keys() == {
            "flashrnn",
            *(["torch.nn:RNN"] if row["cell"] != "tanh" else []),
        }
        assert all(f"{name:16} n/a: {why}" in done.stdout for name, why in row["failed"].items())
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_no_time_and_failure(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be measured is told, and loses nothing of the rest."""

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "-".join(options)
        given = ["--device", "cpu", "--suite", "smoke", "--seconds", "0.01", "--out", str(out)]
        status = bench.run.main([*given, *options])
        (path,) = out.glob("*.json")
        return status, json.loads(path.read_text())

    measure = bench.run.measure
    monkeypatch.setattr(
        bench.run, "measure", lambda case, *rest: 1 / (case.cell != "lstm") and measure(case, *rest)
    )
    monkeypatch.setattr(bench.run, "plot", lambda *_: importlib.import_module("no_such_module"))
    status, found = run("--minutes=-1")
    assert status == 0 and not found["rows"] and len(found["left_out"]) == 4
    status, found = run("--cell=tanh")
    assert status == 0 and [row["cell"] for row in found["rows"]] == ["tanh", "tanh"]
    status, found = run("--dtype=float32")
    assert status == 1 and len(found["rows"]) == 3
    assert [row["failed"]["all"] for row in found["failed"]] == [
        "ZeroDivisionError: division by zero"
    ]
    with pytest.raises(SystemExit):
        run("--suite=none")


def test_chosen(bench: Any) -> None:
    Case = bench.suites.Case
    chosen = bench.run.chosen
    cases = [Case(1, 2, 3), Case(1, 2, 3, cell="gru")]
    assert chosen(cases, dict(cell="gru")) == cases[1:]
    assert chosen(cases, dict(cell="lstm")) == [Case(1, 2, 3, cell="lstm")]
    assert chosen(cases, dict(dtype="tf32")) == [case._replace(dtype="tf32") for case in cases]


def test_cases(bench: Any) -> None:
    """None is there twice, and each is one that there is."""
    suites = bench.suites
    assert suites.SUITES["cuda"].keys() >= {*bench.prove.SUITES}
    for device, by_name in suites.SUITES.items():
        for name, cases in by_name.items():
            assert len({*cases}) == len(cases), (device, name)
            for case in cases:
                assert (
                    case.cell in suites.GATES
                    and case.dtype in suites.DTYPES
                    and case.form in suites.FORMS
                )
                assert min(case.B, case.T, case.H, case.inputs) > 0 and (
                    case.layers > 1 or not case.dropout
                )


def test_defaults_set_no_switch(bench: Any) -> None:
    """Also where a case before set one."""
    switches: list[Any] = [torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    suite = bench.suites.SUITES["cuda"]["defaults"]
    assert {case.dtype for case in suite} == {"default"}
    for mode in ("tf32", "float32"):
        bench.measure.set_precision(mode)
        before = [switch.fp32_precision for switch in switches]
        work = bench.measure.Workload(bench.suites.Case(2, 3, 4, dtype="default"), "cpu")
        assert work.dtype == torch.float32
        assert [switch.fp32_precision for switch in switches] == before


@pytest.mark.parametrize(
    "options", [{}, dict(cell="lstm", layers=2, bidirectional=True), dict(cell="gru", I=5)]
)
def test_flop(bench: Any, options: dict[str, Any]) -> None:
    case = bench.suites.Case(3, 7, 16, **options)
    layer = bench.peers.of_package(nn, case)
    x = torch.randn(7, 3, case.inputs, requires_grad=True)
    h = torch.zeros(case.layers * (1 + case.bidirectional), 3, 16, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with torch.backends.mkldnn.flags(enabled=False), counter:  # which hides the products of an LSTM
        y = layer(x, (h, h) if case.cell == "lstm" else h)[0]
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == case.flop(3 * 7)
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("make", [torch.ones, np.ones])
def test_peak(bench: Any, make: Any) -> None:
    """It sees memory of both libraries, and what is freed before the end."""
    if bench.measure.peak(lambda: None, "cpu") is None:
        pytest.skip("this system does not let a process set its high-water mark back")
    found = bench.measure.peak(lambda: make(5_000_000).sum(), "cpu")
    want = 5_000_000 * make(1).itemsize
    assert 0.95 * want < found < 1.05 * want + 2**20


def stand_in(Wx: Tensor, R: Tensor, b: Tensor, function: str, dtype: str) -> tuple[Tensor, None]:
    """flashrnn's contract: Wx [B, T, G, 1, H], R [G, 1, H, H], b [G, 1, H]; the states [S, B, T, 1,
    H]. Its gates are torch's but of a GRU, where R's are n r z and b's are n (recurrent) r z n (of
    the input)."""
    out = []
    h = torch.zeros(len(Wx), Wx.shape[-1], dtype=Wx.dtype)
    c = h
    for step in Wx[:, :, :, 0].unbind(1):
        x = step.unbind(1)
        r = torch.einsum("gij,bj->gbi", R[:, 0], h).unbind(0)
        v = b[:, 0]
        if function == "elman":
            h = torch.tanh(x[0] + r[0] + v[0])
        elif function == "lstm":
            i, f, z, o = (p + q + s for p, q, s in zip(x, r, v))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            reset = torch.sigmoid(x[0] + r[1] + v[1])
            z = torch.sigmoid(x[1] + r[2] + v[2])
            h = z * h + (1 - z) * torch.tanh(x[2] + v[3] + reset * (r[0] + v[0]))
        out.append(h)
    return torch.stack(out, 1)[None, :, :, None], None


@pytest.mark.parametrize("name", ["rnn", "compile", "flashrnn", "torch.nn:"])
@pytest.mark.parametrize("cell", ["tanh", "lstm", "gru"])
def test_peers(bench: Any, name: str, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer computes what the oracle does, from its weights."""
    module: Any = ModuleType("flashrnn.flashrnn")
    module.flashrnn = stand_in
    monkeypatch.setitem(sys.modules, "flashrnn", ModuleType("flashrnn"))
    monkeypatch.setitem(sys.modules, "flashrnn.flashrnn", module)
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)  # the loop is what is tested here
    case = bench.suites.Case(3, 5, 8, 4, cell)
    oracle = bench.peers.of_package(nn, case).double()
    name = f"{name}{'RNN' if cell == 'tanh' else cell.upper()}" if name.endswith(":") else name
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    found = bench.peers.find(name)(case, oracle).double()(x)[0]
    torch.testing.assert_close(found, oracle(x)[0])


class OnTheCpu(TorchFunctionMode):
    """Whoever asks for a GPU gets the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def place(value: Any) -> Any:
            return (
                "cpu" if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value
            )

        return function(
            *map(place, args), **{name: place(value) for name, value in (kwargs or {}).items()}
        )


def test_gpu_figures(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, with stand-ins for what torch.cuda does: events, graphs that replay, and
    one that fails."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, other: Any) -> float:
            return 1000 * (other.at - self.at)

    graphs: list[Any] = []

    @contextlib.contextmanager
    def capture(graph: Any) -> Iterator[None]:
        graphs.append(graph)
        if len(graphs) == 2:
            raise RuntimeError("capture is not for this")
        yield

    anything = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(
        is_available=lambda: True,
        get_device_name=lambda: "none",
        synchronize=lambda: None,
        Event=Event,
        # CuDNN's version asks for them
        device_count=lambda: 1,
        get_device_capability=lambda device=None: (9, 0),
        Stream=lambda: anything,
        current_stream=lambda: anything,
        stream=contextlib.nullcontext,
        graph=capture,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        memory_allocated=lambda: 100,
        reset_peak_memory_stats=lambda: None,
        max_memory_allocated=lambda: 350,
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    with OnTheCpu():
        options = [
            "--device",
            "cuda",
            "--suite",
            "smoke",
            "--seconds",
            "0.01",
            "--out",
            str(tmp_path),
        ]
        assert bench.run.main(options) == 0
    (path,) = tmp_path.glob("*.json")
    first, *others = json.loads(path.read_text())["rows"]
    assert first["failed"] == {"rnn graph": "RuntimeError: capture is not for this"}
    assert first["training"].keys() == {"rnn", "torch.nn", "torch.nn graph"}
    for row in others:
        assert row["failed"] == {}
        assert row["forward"].keys() == {"rnn", "rnn graph", "torch.nn", "torch.nn graph"}
        assert row["memory"] == {"rnn": 250, "torch.nn": 250}
        for kind in ("forward", "training")[: 1 + ("training" in row)]:
            for name, wall in row["wall"][kind].items():
                assert 0 < row["host"][kind][name] <= wall * 1.001
                assert row[kind][name] <= wall * 1.001


@pytest.mark.parametrize(
    ("arch", "cluster"), [("sm_80", 1), ("sm_90", 1), ("sm_90", 16), ("sm_100", 8)]
)
def test_microbench_compiles(bench: Any, arch: str, cluster: int) -> None:
    """For GPUs that need not be here: every kernel, none of which spills."""
    try:
        cubin, said = bench.microbench.compile_cubin(arch, cluster)
    except (ImportError, RuntimeError) as error:
        if "libnvrtc" not in str(error) and not isinstance(error, ImportError):
            raise
        pytest.skip(f"CuPy or NVRTC is missing: {error}")
    assert cubin.startswith(b"\x7fELF")
    kernels = {
        "nothing",
        "clock_rate",
        "block_barrier",
        "product_bf16",
        "product_tf32",
        "grid_barrier",
        "grid_exchange",
    }
    clusters = {"cluster_barrier", "cluster_exchange"} if arch != "sm_80" else set()
    assert {*re.findall(r"Compiling entry function '(\w+)'", said)} == kernels | clusters
    assert {*re.findall(r"(\d+) bytes (?:stack|spill)", said)} == {"0"}


def measured_constants() -> dict[str, Any]:
    """As microbench finds them, of a device whose costs are round numbers."""

    def line(first: float, each: float) -> dict[int, float]:
        return {size: first + each * size for size in (2048, 8192, 32768)}

    return dict(
        cycles_per_us=2000.0,
        us=dict(host_launch=3.0, launch=2.0, graph_node=1.5),
        multiprocessors=100,
        block_barrier={128: 20.0, 256: 25.0, 512: 40.0},
        product_bf16={4: 9.0, 8: 7.0, 16: 7.0},
        product_tf32={4: 9.0, 8: 7.0, 16: 7.0},
        grid_barrier={16: 900.0},
        grid_exchange={16: line(1000, 1 / 16), 32: line(1000, 1 / 16), 100: line(1100, 1 / 8)},
        cluster_barrier={16: 200.0},
        cluster_exchange={
            16: {size: [t - 50, t] for size, t in line(500, 1 / 10).items()},
        },
        active_clusters={2: 50, 4: 24, 8: 11, 16: 5},
    )


def test_microbench_writes_costs(bench: Any, tmp_path: Path) -> None:
    """What the plans' model reads: all that was measured, and the names of what was not."""
    known = costs.costs_of()
    found = bench.microbench.model_costs(measured_constants(), "NVIDIA X", "abc")
    want = dict(
        cycles_per_us=2000,
        graph_node_us=1.5,
        multiprocessors=100,
        block_barrier=25,
        product=7,
        grid_latency=1000,
        l2_bytes=16,
        l2_bytes_per_us=100 * 8 * 2000,
        cluster_latency=500,
        cluster_bytes=10,
        clusters=(50, 24, 11, 5),
    )
    for name, value in found._asdict().items():
        if name in want:
            assert value == pytest.approx(want[name]) and name not in found.predicted
        elif name not in ("device", "commit", "predicted"):
            assert value == getattr(known, name) and name in found.predicted
    assert costs.read(costs.write(found, tmp_path)) == found
    assert (tmp_path / "nvidia-x.json").exists()


def test_microbench_measures_less(bench: Any) -> None:
    """A device without clusters, where waits were given up."""
    constants = measured_constants()
    for name in ("cluster_barrier", "cluster_exchange", "active_clusters"):
        del constants[name]
    constants["grid_exchange"] = {16: {2048: None}, 100: {2048: 1000.0}}
    constants["block_barrier"] = {256: None}
    found = bench.microbench.model_costs(constants, "NVIDIA X", "abc")
    predicted = {"clusters", "cluster_latency", "grid_latency", "l2_bytes", "block_barrier"}
    assert predicted | {"multiprocessors"} <= {*found.predicted}
    assert "graph_node_us" not in found.predicted


def test_prove(tmp_path: Path) -> None:
    done = start(
        "prove.py",
        "--device",
        "cpu",
        "--suite",
        "smoke",
        "--out",
        tmp_path,
        "--only",
        "versions",
        "smoke",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step["step"] for step in json.loads((tmp_path / "prove.json").read_text())] == [
        "versions",
        "smoke",
    ]
    assert len(list(tmp_path.glob("cpu-smoke-*.json"))) == 1
    assert "torch.nn" in (tmp_path / "prove-smoke.log").read_text()
    assert start("prove.py", "--only", "no such step").returncode == 2


@pytest.mark.slow
def test_prove_all(tmp_path: Path) -> None:
    done = start("prove.py", "--device", "cpu", "--suite", "smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = {
        step["step"]: step["outcome"] for step in json.loads((tmp_path / "prove.json").read_text())
    }
    assert [*said] == ["versions", "driver", "microbench", "baseline", "tests", "smoke", "sanitize"]
    assert said["baseline"] == said["tests"] == said["smoke"] == "done"


def test_prove_goes_on(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step that fails, one that hangs, whose first line is kept, and one that cannot be."""
    hangs = "import time; print('begun', flush=True); time.sleep(60)"
    steps = [
        bench.prove.Step(name, minutes, [sys.executable, "-c", code], missing)
        for name, minutes, code, missing in (
            ("fails", 1, "raise SystemExit(3)", ""),
            ("hangs", 0.03, hangs, ""),
            ("lacks", 1, "1 / 0", "there is no such"),
            ("ends", 1, "print('last')", ""),
        )
    ]
    monkeypatch.setattr(bench.prove, "plan", lambda *_: steps)
    assert bench.prove.main(["--out", str(tmp_path)]) == 1
    told = {
        step["step"]: (step["status"], step["outcome"])
        for step in json.loads((tmp_path / "prove.json").read_text())
    }
    assert told == {
        "fails": (3, "failed with status 3"),
        "hangs": (None, "ended after 0.0 minutes"),
        "lacks": (None, "there is no such"),
        "ends": (0, "done"),
    }
    assert (tmp_path / "prove-hangs.log").read_text() == "begun\n"
    assert (tmp_path / "prove-ends.log").read_text() == "last\n"
    told_of_tests = tmp_path / bench.prove.TOLD
    told_of_tests.write_text("by the call before")
    assert bench.prove.main(["--out", str(tmp_path), "--minutes", "0", "--only", "ends"]) == 0
    assert "no time left" in (tmp_path / "prove.json").read_text()
    assert told_of_tests.exists()
