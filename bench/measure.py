"""The figures of one case: times, memory and errors of several layers with the same weights and the
same input."""

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import Builder, of_package
from suites import Case
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn
from rnn.kernels.cpu.workspace import release

# Of calls between two events on a GPU: beside it the events' own time is nothing
BATCH_SECONDS = 0.004


def set_precision(dtype: str) -> torch.dtype:
    """Of a case. float32 has the same mode in every layer: torch.nn and ours follow the first of
    these switches, loops of torch's cells the other. "default" leaves both as they are."""
    if dtype == "default":
        return torch.float32
    for backend in (torch.backends.cudnn.rnn, torch.backends.cuda.matmul):
        backend.fp32_precision = "tf32" if dtype == "tf32" else "ieee"  # type: ignore[union-attr]
    chosen: torch.dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    return chosen


class Workload:
    """The input of a case and what is done with it, for any layer."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.device = device
        self.dtype = set_precision(case.dtype)
        torch.manual_seed(0)
        B = case.B
        T = case.T
        D = 1 + case.bidirectional
        self.oracle: Any = of_package(nn, case).double()
        for p in self.oracle.parameters():  # what the other layers get of them
            p.data = p.data.to(self.dtype).double()
        made: Any = torch.randn((B, T, case.inputs) if case.batch_first else (T, B, case.inputs))
        made = made.to(device, self.dtype)
        self.steps = B * T
        self.hx = None
        if case.form == "packed":
            lengths = torch.randint(1, T + 1, (B,))
            self.steps = int(lengths.sum())
            made = pack_padded_sequence(
                made, lengths, batch_first=case.batch_first, enforce_sorted=False
            )
        if case.hx:
            states = [
                torch.randn(case.layers * D, B, case.H).to(device, self.dtype)
                for _ in range(1 + (case.cell == "lstm"))
            ]
            self.hx = tuple(states) if case.cell == "lstm" else states[0]
        self.leaf = (made.data if isinstance(made, PackedSequence) else made).requires_grad_(
            case.trains
        )
        self.rest = made[1:] if isinstance(made, PackedSequence) else None
        self.dy = torch.randn(*self.leaf.shape[:-1], D * case.H).to(device, self.dtype)

    def run(self, layer: nn.Module) -> Tensor:
        x = self.leaf.to(next(layer.parameters()).dtype)
        hx = self.hx
        if self.rest is not None:
            return layer(PackedSequence(x, *self.rest))[0].data
        if layer is self.oracle and hx is not None:
            hx = tuple(h.double() for h in hx) if isinstance(hx, tuple) else hx.double()
        if self.case.trains:
            return layer(x, hx)[0]
        out = []
        for step in x.split(1, int(self.case.batch_first)):
            y, hx = layer(step, hx)
            out.append(y)
        return torch.cat(out, int(self.case.batch_first))

    def explain(self, layer: nn.Module) -> list[str]:
        """What our layer does for that, and why."""
        x: Any = self.leaf if self.rest is None else PackedSequence(self.leaf, *self.rest)
        if not self.case.trains:
            x = x.split(1, int(self.case.batch_first))[0]
        return rnn.explain(layer, x, self.hx).splitlines()

    def forward(self, layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.run(layer)

    def training(self, layer: nn.Module) -> None:
        y = self.run(layer)
        y.backward(self.dy.to(y.dtype))
        layer.zero_grad()
        self.leaf.grad = None

    def results(self, layer: nn.Module) -> list[Tensor]:
        """The output and, where the layer trains, the gradient of the input."""
        if not self.case.trains:
            return [self.forward(layer)]
        y = self.run(layer)
        return [y.detach(), *torch.autograd.grad(y, self.leaf, self.dy.to(y.dtype))]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _batch(function: Callable[[], Any], calls: int, device: str) -> tuple[float, float, float]:
    """Seconds a call: between events on the GPU, until all is done, until the host has submitted
    all."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start,) * 3
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    synchronize(device)
    start = time.perf_counter()
    events[0].record()
    for _ in range(calls):
        function()
    events[1].record()
    submitted = time.perf_counter()
    synchronize(device)
    done = time.perf_counter()
    return (
        events[0].elapsed_time(events[1]) / 1000 / calls,
        (done - start) / calls,
        (submitted - start) / calls,
    )


def timed(
    functions: Mapping[str, Callable[[], Any]], seconds: float, device: str
) -> list[dict[str, float]]:
    """For each function the medians of what `_batch` measures; the functions take turns for some
    `seconds`."""
    calls = {}
    for name, function in functions.items():
        _batch(function, 1, device)
        calls[name] = 1 + int(BATCH_SECONDS / _batch(function, 1, device)[1])
    rounds: list[dict[str, tuple[float, float, float]]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or (time.perf_counter() < end and len(rounds) < 1000):
        # Backwards every other time: nobody always comes after the same other.
        order = list(functions)[:: 1 if len(rounds) % 2 else -1]
        rounds.append({name: _batch(functions[name], calls[name], device) for name in order})
    return [
        {name: statistics.median(measured[name][k] for measured in rounds) for name in functions}
        for k in range(3)
    ]


def _status(key: str) -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return 1024 * int(line.split()[1])


def peak(function: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call needs at its peak beyond what there was before. On the CPU it is the growth
    of the process, which sees every library's memory, if the system lets its high-water mark be set
    back; else None."""
    release()  # so that what is kept counts as well
    gc.collect()
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _distance(value: Tensor, exact: Tensor) -> float:
    error = ((value.double() - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else sys.float_info.max  # JSON has no infinity


def measure(
    case: Case, builders: Mapping[str, Builder], seconds: float, device: str
) -> dict[str, Any]:
    """The row of a case: for each figure, a value of each layer. "forward" and "training" are
    seconds a call, on a GPU with "wall" and "host" (until all is done, until the host is free);
    "first" is the first call of all, compilation included; "memory" bytes at the peak of training
    (of forward, if it does not train); "error" and "gradient_error" relative to float64, of the
    output and of the input's gradient. On a GPU a layer is also timed as a CUDA graph, as `NAME
    graph`. "plan" is what ours says of itself; "failed" says why a layer has no figures."""
    work = Workload(case, device)
    row: dict[str, Any] = dict(
        case._asdict(), I=case.inputs, steps=work.steps, flop=case.flop(work.steps)
    )
    row |= {key: {} for key in ("first", "memory", "error", "gradient_error", "failed")}
    kinds = [work.forward, work.training][: 1 + case.trains]
    functions: dict[str, dict[str, Callable[[], Any]]] = {kind.__name__: {} for kind in kinds}
    want = None
    if not case.dropout:
        work.oracle.to(device)
        want = work.results(work.oracle)
    for name, build in builders.items():
        try:
            layer = build(case, work.oracle).to(device, work.dtype)
            synchronize(device)
            start = time.perf_counter()
            kinds[-1](layer)
            synchronize(device)
            row["first"][name] = time.perf_counter() - start
            if name == "rnn":
                row["plan"] = work.explain(layer)
            row["memory"][name] = peak(partial(kinds[-1], layer), device)
            for key, value, exact in zip(
                ("error", "gradient_error"), work.results(layer), want or ()
            ):
                row[key][name] = _distance(value, exact)
        except Exception as error:  # one layer's failure leaves the others their figures
            row["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        for kind in kinds:
            call = functions[kind.__name__][name] = partial(kind, layer)
            if device == "cuda":
                try:
                    functions[kind.__name__][f"{name} graph"] = graphed(call)
                except Exception as error:
                    row["failed"][f"{name} graph"] = (
                        f"{type(error).__name__}: {error}".splitlines()[0]
                    )
    del want
    for kind_name, calls in functions.items():
        row[kind_name], wall, host = timed(calls, seconds, device)
        if device == "cuda":
            row.setdefault("wall", {})[kind_name] = wall
            row.setdefault("host", {})[kind_name] = host
    return row
