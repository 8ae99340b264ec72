"""This machine, as the commands print it: versions, devices, the compiler, what is kept on disk."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels import cells
from ..kernels.cpu import build, native, shipping, targets
from ..kernels.gpu.cuda import launch as cuda

# The distributions that may have a module, the first that is installed.
DISTRIBUTIONS = dict(
    rnn=("fused-rnn",),
    torch=("torch",),
    numpy=("numpy",),
    triton=("triton", "pytorch-triton"),
    cupy=("cupy-cuda13x", "cupy-cuda12x", "cupy"),
)
# By the names of the command line.
BUILT_IN = dict(rnn=cells.rnn_tanh, rnn_relu=cells.rnn_relu, lstm=cells.lstm, gru=cells.gru)
COMPILER_SECONDS = 30


class Cache(NamedTuple):
    """Programs that are kept on disk; no folder for a user without a home."""

    name: str
    folder: Path | None
    suffix: str

    def programs(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob(f"*{self.suffix}"))


def caches() -> list[Cache]:
    return [
        Cache("C++ for the CPU", build.cache_folder(), ".so"),
        Cache("CUDA C++", cuda.cache_folder(), ".cubin"),
    ]


def version(module: str) -> str | None:
    """None if it is not installed."""
    if module == "torch":
        return torch.__version__
    for name in DISTRIBUTIONS[module]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {name: version(name) for name in DISTRIBUTIONS}
    return dict(python=platform.python_version(), cuda=torch.version.cuda) | found


def cpu_name() -> str:
    try:
        for line in targets.CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def devices() -> list[dict[str, Any]]:
    """The CPU, then GPUs that torch can use."""
    found: list[dict[str, Any]] = [
        dict(
            device="cpu",
            name=cpu_name(),
            machine=platform.machine(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
        )
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            dict(
                device=f"cuda:{index}",
                name=gpu.name,
                capability=f"{gpu.major}.{gpu.minor}",
                multiprocessors=gpu.multi_processor_count,
                memory=gpu.total_memory,
            )
        )
    return found


def compiler_version() -> str:
    """The first line of what it says of itself; "" if there is none, or if it fails."""
    command = build.compiler()
    if not command:
        return ""
    try:
        done = subprocess.run(
            [*command, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILER_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip().partition("\n")[0]


def missing_compiler() -> str:
    """Why there is none; "" if there is one."""
    if build.compiler():
        return ""
    named = os.environ.get("CXX")
    if named:
        return f"no compiler: $CXX is {named!r}, which is no program"
    return "no compiler: there is no c++, and $CXX names none"


def prebuilt() -> dict[Path, str]:
    """Libraries that were compiled ahead, and why they are not used; "" where they can be."""
    found = [path for folder in shipping.folders() for path in shipping.libraries(folder)]
    ours = {
        path
        for cell in BUILT_IN.values()
        for dtype in native.NUMBERS
        for path in native.prebuilt_files(cell, dtype)
    }
    return {
        path: shipping.refusal(path) if path in ours else "is of another version of rnn"
        for path in found
    }


def conditions(device: torch.device) -> str:
    """What figures depend on, in a line."""
    parts = [f"{name} {value}" for name, value in versions().items() if value and name != "cuda"]
    if device.type == "cuda":
        precision: Any = torch.backends.cudnn.rnn
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
        where += f", fp32_precision of cuDNN's RNNs {precision.fp32_precision!r}"
    else:
        count = torch.get_num_threads()
        where = f"{cpu_name()}, {count} thread{'s' * (count > 1)}"
    return f"{where}; {', '.join(parts)}"


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(bytes_: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= factor:
            return f"{bytes_ / factor:.1f} {unit}"
    return f"{bytes_} bytes"


def count(things: Sequence[Path], what: str = "program") -> str:
    plural = f"{what.removesuffix('y')}ies" if what.endswith("y") else f"{what}s"
    return f"{len(things)} {what if len(things) == 1 else plural}"
