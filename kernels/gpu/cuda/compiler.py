"""NVRTC, which compiles CUDA C++, as CuPy has it."""

from importlib import import_module
from threading import Lock
from typing import Any

_loading = Lock()


def nvrtc() -> Any:
    """CuPy's module for it, with its libraries loaded.

    Its first call loads them one after another: another thread that compiled between them would
    fail, and from then on each time. Raises what CuPy raises where it, or they, cannot be loaded.
    """
    with _loading:
        found = import_module("cupy").cuda.nvrtc
        found.getVersion()
    return found
