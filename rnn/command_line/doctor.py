"""Runs every backend of this machine on a small case of each cell, and looks for what is broken.

Errors are those of outputs and gradients against torch.nn in float64, and may be four times those
of torch.nn in the same dtype (for float64 that in float32, scaled). Times are of a forward and a
backward pass; the first includes compiling. The status is 1 if something is broken."""

import argparse
import copy
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import dispatch, modules
from ..kernels import build_cache, cells, planner
from ..kernels.cells import Cell
from ..kernels.cpu import native
from ..kernels.plan import Plan
from ..kernels.prediction import predict
from . import machine
from .backends import Backend, backends, first_line
from .timing import compare, train

BATCH = 8
TIME = 32
INPUT = 32
HIDDEN = 64
TIMED_SECONDS = 0.1
# Of what torch.nn's is, and beside that roundings.
ALLOWED_ERROR = 4
ALLOWED_ROUNDINGS = 2
NAME_OF_PROGRAM = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{32}\.(so|cubin)")
LAYERS: dict[Cell, tuple[str, dict[str, str]]] = {
    cells.rnn_tanh: ("RNN", {}),
    cells.rnn_relu: ("RNN", {"nonlinearity": "relu"}),
    cells.lstm: ("LSTM", {}),
    cells.gru: ("GRU", {}),
}


class Finding(NamedTuple):
    """A line: its state is "ok", "repaired", "warning", "broken", or as a backend's."""

    state: str
    what: str
    words: str


class Case(NamedTuple):
    """A layer of torch.nn and its input, in float32 and as it is to be timed."""

    cell: Cell
    rounded: Any
    theirs: Any
    x: Tensor


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="(%(default)s)"
    )


def run(given: argparse.Namespace) -> int:
    states: Counter[str] = Counter()
    broken: dict[str, None] = {}
    print(machine.conditions(torch.device("cpu")), flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lines say it
        for state, what, words in examine(getattr(torch, given.dtype)):
            print(f"{state:9}{what:17}{words}", flush=True)
            states[state] += 1
            if state == "broken":
                broken[what.split()[0]] = None
    print(verdict(states, [*broken]))
    return int(bool(broken))


def verdict(states: Counter[str], broken: list[str]) -> str:
    if broken:
        return f"verdict: broken: {', '.join(broken)}"
    others = [f"{states[name]} {name}" for name in ("repaired", "warning") if states[name]]
    return f"verdict: works{', with ' if others else ''}{' and '.join(others)}"


def examine(dtype: torch.dtype) -> Iterator[Finding]:
    """What there is to say, as it is found."""
    found = backends()
    ready = [backend.name for backend in found if backend.state == "ready"]
    spoilt: list[Path] = []
    for cache, user in zip(machine.caches(), ("native", "cuda")):
        if user in ready or (cache.folder is not None and cache.folder.exists()):
            yield from check_folder(cache)
            spoilt += spoilt_programs(cache)
    yield from check_prebuilt()
    for backend in found:
        if backend.state != "ready":
            yield Finding(backend.state, backend.name, backend.why)
    failed: set[str] = set()
    for backend in found:
        # torch's own operators serve where the C++ cannot
        if backend.state == "ready" or (backend.name == "torch" and "native" in failed):
            for finding in check_backend(backend, dtype):
                yield finding
                if finding.state == "broken":
                    failed.add(backend.name)
    for path in spoilt:
        yield repair(path)


def check_folder(cache: machine.Cache) -> Iterator[Finding]:
    folder = cache.folder
    if folder is None:
        words = "this user has no home: every process compiles for itself"
        yield Finding("warning", "cache", f"{cache.name}: {words}")
        return
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
        trouble = build_cache.trouble(folder)
    except OSError as error:
        trouble = f"cannot be written to ({first_line(error)})"
    if trouble:
        words = f"{folder} {trouble}: every process compiles for itself"
        yield Finding("warning", "cache", f"{cache.name}: {words}")
        return
    programs = cache.programs()
    bytes_ = sum(path.stat().st_size for path in programs)
    words = f"{folder}, {machine.count(programs)}, {machine.size(bytes_)}"
    yield Finding("ok", "cache", f"{cache.name}: {words}")


def spoilt_programs(cache: machine.Cache) -> list[Path]:
    found = []
    for path in cache.programs():
        if NAME_OF_PROGRAM.fullmatch(path.name):
            try:
                if not build_cache.intact(path):
                    found.append(path)
            except OSError:
                found.append(path)
    return found


def repair(path: Path) -> Finding:
    """A program that was spoilt when this process began: where a backend needed it, it has been
    deleted and compiled anew."""
    name, _, _ = path.name.partition(".")
    why = f"{path} was spoilt (its content is not what its name says)"
    try:
        again = [p for p in path.parent.glob(f"{name}.*{path.suffix}") if build_cache.intact(p)]
        if not again:
            path.unlink(missing_ok=True)
    except OSError as error:
        return Finding("warning", "cache", f"{why}, and cannot be deleted: {first_line(error)}")
    done = "compiled anew" if again else "will be compiled anew when a layer needs it"
    return Finding("repaired", "cache", f"{why}: deleted, {done}")


def check_prebuilt() -> Iterator[Finding]:
    """Libraries that cannot be used; for another CPU they may lie beside those for this one."""
    libraries = machine.prebuilt()
    usable = {path.name.partition(".")[0] for path, trouble in libraries.items() if not trouble}
    for path, trouble in libraries.items():
        if trouble:
            state = "unused" if path.name.partition(".")[0] in usable else "warning"
            yield Finding(state, "prebuilt", f"{path} {trouble}")


def check_backend(backend: Backend, dtype: torch.dtype) -> Iterator[Finding]:
    """A line for each cell; only the first where it raises an error."""
    device = torch.device("cpu")
    if backend.name in ("triton", "cuda", "cupy"):
        device = torch.device("cuda", torch.cuda.current_device())
    compiler = not machine.missing_compiler()
    for cell in LAYERS:
        what = f"{backend.name:8}{cell.name}"
        if backend.name == "native" and not compiler and not native.prebuilt_files(cell, dtype):
            yield Finding("absent", what, f"no compiler, no prebuilt library for {dtype}")
            continue
        try:
            plan = plan_of(backend.name, cell, dtype, device)
            if backend.name in ("triton", "cuda") and plan is None:
                yield Finding("unused", backend.name, f"has no kernel for {dtype} of {cell.name}")
                return
            yield check_case(what, make_case(cell, dtype, device), plan)
        except Exception as error:
            yield Finding("broken", what, first_line(error))
            return


def plan_of(backend: str, cell: Cell, dtype: torch.dtype, device: torch.device) -> Plan | None:
    """The fastest by prediction of that backend, to float32's full precision. None where it has
    none; for torch's own operators, which have no plan, too."""
    if backend == "torch":
        return None
    if backend not in ("triton", "cuda"):
        return Plan(backend)
    if dtype != torch.float32:
        return None
    gpu = dispatch.gpu(device)
    sizes = BATCH, INPUT, HIDDEN, 2
    plans = (
        planner.cuda_plans(cell, sizes, 4, "tf32x3", gpu)
        if backend == "cuda"
        else planner.triton_plans(cell, sizes, 8, "tf32x3", gpu)
    )
    return min(plans, key=lambda plan: predict(cell, plan, 4, sizes, gpu).both, default=None)


def make_case(cell: Cell, dtype: torch.dtype, device: torch.device) -> Case:
    """Both directions of one layer."""
    name, options = LAYERS[cell]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layer: Any = getattr(nn, name)
        rounded = layer(INPUT, HIDDEN, bidirectional=True, device="cpu", **options).to(device)
        x = torch.randn(TIME, BATCH, INPUT, device="cpu")
    return Case(cell, rounded, copy.deepcopy(rounded).to(dtype), x.to(device, dtype))


def check_case(what: str, case: Case, plan: Plan | None) -> Finding:
    name, options = LAYERS[case.cell]
    ours = getattr(modules, name)(
        INPUT,
        HIDDEN,
        bidirectional=True,
        dtype=case.x.dtype,
        device=case.x.device,
        plan=plan,
        **options,
    )
    ours.load_state_dict(case.theirs.state_dict())
    exact = results(copy.deepcopy(case.rounded).cpu().double(), case.x.cpu().double())
    begin = time.perf_counter()
    error = largest_error(results(ours, case.x), exact)
    first = time.perf_counter() - begin
    # In float64 torch.nn is the oracle itself
    eps = torch.finfo(case.x.dtype).eps
    torch_error = largest_error(results(case.rounded, case.x.float()), exact)
    torch_error *= eps / torch.finfo(torch.float32).eps
    times = compare(train, case.theirs, ours, case.x, TIMED_SECONDS)
    allowed = ALLOWED_ERROR * torch_error + ALLOWED_ROUNDINGS * eps
    # A NaN is not within anything
    right = error <= allowed
    words = (
        f"error {error:.1e} (torch.nn {torch_error:.1e}) {machine.duration(times.ours):>7} "
        f"(torch.nn {machine.duration(times.theirs):>7}) first {machine.duration(first):>7}"
    )
    if not right:
        return Finding("broken", what, f"wrong results: {words}")
    return Finding("ok", what, words)


def results(layer: Any, x: Tensor) -> list[Tensor]:
    """Output, last states, gradients of the input and of every parameter, in float64."""
    leaf = x.detach().clone().requires_grad_()
    y, last = layer(leaf)
    ends = last if isinstance(last, tuple) else (last,)
    outputs = [y, *ends]
    loss = torch.stack([t.double().sin().sum() for t in outputs]).sum()
    grads = torch.autograd.grad(loss, [leaf, *layer.parameters()])
    return [t.detach().cpu().double() for t in (*outputs, *grads)]


def largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Of the tensors, each relative to its norm."""
    errors = [(g - w).norm() / w.norm() for g, w in zip(got, want)]
    return torch.stack(errors).max().item()
