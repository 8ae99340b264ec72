"""The backends: which this machine has, and why it does not have the others."""

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

from .. import dispatch
from . import machine

NO_GPU = "torch finds no NVIDIA GPU"


class Backend(NamedTuple):
    """`state` is "ready", "unused" (there is nothing for it to do), "absent" (not installed) or
    "broken" (installed or asked for, and fails)."""

    name: str
    state: str
    why: str


def first_line(error: BaseException | str) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, str) else f"{type(error).__name__}: {lines[0]}"


def _gpu_trouble() -> str:
    """Why there is nothing to do for backends of a GPU; "" if there is."""
    if torch.version.hip is not None:
        return "torch is built for ROCm, kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return NO_GPU
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return ""


def _native() -> Backend:
    usable = [path for path, trouble in machine.prebuilt().items() if not trouble]
    if usable:
        folders = ", ".join(dict.fromkeys(str(path.parent) for path in usable))
        return Backend("native", "ready", f"{machine.count(usable, 'prebuilt library')}: {folders}")
    missing = machine.missing_compiler()
    if not missing:
        return Backend("native", "ready", f"compiled by {machine.compiler_version()}")
    return Backend("native", "broken" if "$CXX is" in missing else "absent", missing)


def _library(name: str, library: str, use: str) -> Backend:
    """A backend that a library of Python's compiles or computes."""
    gpu = _gpu_trouble()
    if find_spec(library) is None:
        return Backend(name, "absent", f"{library} is not installed")
    imported = False
    try:
        import_module(library)
        imported = True
        dispatch.use_library(library)
    except Exception as error:
        # Without a GPU there is nothing for a library to find
        if imported and gpu:
            return Backend(name, "unused", f"{gpu}; {library} says {first_line(error)}")
        what = "fails" if imported else "cannot be imported"
        return Backend(name, "broken", f"{library} is installed and {what}: {first_line(error)}")
    return Backend(name, "unused", gpu) if gpu else Backend(name, "ready", use)


def backends() -> list[Backend]:
    """In the order in which they are preferred, those of the CPU first. Nothing is compiled."""
    native = _native()
    cuda = _library("cuda", "cupy", "CUDA C++, compiled by NVRTC, launched by CuPy")
    arrays = Backend("cupy", cuda.state, "the reference on CuPy's arrays")
    if cuda.state != "ready":
        # What is wrong with the library is said once
        state = "unused" if cuda.state == "broken" else cuda.state
        arrays = Backend("cupy", state, "needs the library that cuda needs")
    return [
        native,
        Backend(
            "torch",
            "unused" if native.state == "ready" else "ready",
            "torch's own operators: whole sequences on the CPU, without a compiler",
        ),
        Backend("numpy", "ready", "the reference, on the CPU"),
        cuda,
        _library("triton", "triton", "compiled by Triton"),
        arrays,
    ]
