"""Libraries that were compiled ahead, for machines without a compiler: `python -m rnn build` writes
them.

They lie in the installed package or in the user's cache, and go before what this machine compiles.
A file's name has two hashes: of what it was made from, which takes no compiler to know, and of its
content. What others can write to, what is spoilt, and what is for another CPU is not loaded."""

import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .. import build_cache
from ..notices import warn_once
from . import build, targets

IN_PACKAGE = Path(__file__).parent / "prebuilt"


class Found(NamedTuple):
    """A library of ctypes, or None if none of those for its code can be used, and why not."""

    library: Any
    refused: list[str]


def in_cache() -> Path | None:
    """The folder of a user who may not write to the package; None for one without a home."""
    cache = build.cache_folder()
    return None if cache is None else cache / "prebuilt"


def folders() -> list[Path]:
    """Where they are looked for, if they are there."""
    # That of os.path raises no error for what may not be looked into
    return [place for place in (IN_PACKAGE, in_cache()) if place and os.path.isdir(place)]


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.*.so"))


def library_key(code: str, flags: Sequence[str]) -> str:
    """The first part of a file's name."""
    kind = "prebuilt", sys.platform, platform.machine()
    return hashlib.sha256("\n".join([*kind, *flags, code]).encode()).hexdigest()[:32]


def files(code: str, flags: Sequence[str]) -> list[Path]:
    """The libraries of that text, for whatever CPU."""
    key = library_key(code, flags)
    return [path for folder in folders() for path in folder.glob(f"{key}.*.so")]


def refusal(path: Path) -> str:
    """Why a file may not be loaded; "" if it may."""
    owners = set()
    if hasattr(os, "geteuid"):
        # root, and whoever wrote the code that runs here, could do worse
        owners = {0, os.geteuid(), Path(__file__).stat().st_uid}
    try:
        for part in (path.parent, path):
            if trouble := build_cache.trouble(part, owners):
                return f"is not trusted: {part} {trouble}"
        if not build_cache.intact(path):
            return "is spoilt: its content is not what its name says"
        return targets.refusal(targets.target_of_library(path.read_bytes()))
    except OSError as error:
        return f"cannot be read: {error}"


def find(code: str, flags: Sequence[str], names: Sequence[str]) -> Found:
    """The library of that text, with functions of these names. Of several that can be used, that
    for the CPU which has most. Where none of them can, one warning says why."""
    usable: list[tuple[int, Path]] = []
    refused: list[str] = []
    for path in files(code, flags):
        if trouble := refusal(path):
            refused.append(f"{path} {trouble}")
            continue
        with suppress(OSError):  # it has been deleted since
            target = targets.target_of_library(path.read_bytes())
            usable.append((len(target.features) if target else 0, path))
    for _, path in sorted(usable, reverse=True):
        try:
            return Found(build.open_library(path, names), refused)
        except OSError as error:
            refused.append(f"{path} cannot be loaded: {error}")
    if refused:
        _warn(refused)
    return Found(None, refused)


def _warn(reasons: list[str]) -> None:
    text = f"rnn does without prebuilt libraries: {'; '.join(reasons)}"
    warn_once(text, text)


def missed() -> list[str]:
    """What there is to say where no library is found, and there is no compiler: a warning, once."""
    reasons = [
        f"{folder} has no library of this cell, dtype and version of rnn"
        for folder in folders()
        if libraries(folder)
    ]
    if reasons:
        _warn(reasons)
    return reasons


def write(code: str, flags: Sequence[str], march: str, sources: Path, folder: Path) -> Path:
    """Compile that text for the CPUs of `-march=`; the library's file in `folder`, which is made if
    it is not there. Raises RuntimeError if it cannot be compiled, OSError if not written."""
    command = build.required_compiler()
    options = [*flags, f"-march={march}"]
    target = targets.target_of_macros(build.macros(command, march))
    content = build.compile_library(
        command, code + targets.mark(target), [*options, "-I", str(sources)], None
    )
    folder.mkdir(0o755, parents=True, exist_ok=True)
    path = build_cache.write(folder, library_key(code, flags), ".so", content)
    path.chmod(0o644)
    return path
