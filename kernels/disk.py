"""Compiled programs that are kept on disk."""

import os
from collections.abc import Callable
from pathlib import Path


def kept(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, which `make` writes if it is not there: all at once, so that no other process reads half of it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.urandom(8).hex()}")
        make(made)
        made.replace(path)
    return path
