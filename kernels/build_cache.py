"""Compiled programs, kept on disk for the processes to come.

The name of a file has the hash of its content, which is checked before the file is used: half a
file is deleted and made again. The folder and its files have to be this user's own, with nobody
else allowed to write to them. Where they are not, or where the disk takes no more, programs are
kept in a temporary folder of this process."""

import atexit
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from .notices import warn_once

try:
    import fcntl
except ImportError:  # not on Windows: there processes may do the same at the same time
    fcntl = None  # type: ignore[assignment]

Used = TypeVar("Used")

PATIENCE = 300.0  # seconds for a compiler, and for another process that may be compiling the same


class _Building(threading.local):
    depth = 0


_building = _Building()
# The temporary folder of a process, by its number: children of fork have their own
_private: dict[int, Path] = {}


def build_once(
    name: str,
    suffix: str,
    folder: Path | None,
    make: Callable[[], bytes],
    use: Callable[[Path], Used],
) -> Used:
    """What `use` returns for the file of that name, in `folder` if that can be; `make` returns its
    content if it is not there yet. `use` raises OSError for a file that is no good, which is
    deleted. Raises OSError if a new one is not."""
    shared = _trusted(folder, name, suffix)
    result = _use_kept(shared, name, suffix, use)
    if result is not None:
        return result
    with _alone(shared):
        result = _use_kept(shared, name, suffix, use)
        if result is not None:
            return result
        content = make()
        if shared is not None:
            with suppress(OSError):  # the disk is full or read-only, or nothing on it may be run
                return _use_new(shared, name, suffix, content, use)
        return _use_new(_private_folder(), name, suffix, content, use)


def _use_kept(
    shared: Path | None, name: str, suffix: str, use: Callable[[Path], Used]
) -> Used | None:
    for folder in (shared, _private.get(os.getpid())):
        for path in () if folder is None else folder.glob(f"{name}.*{suffix}"):
            try:
                if intact(path):
                    return use(path)
            except OSError:
                pass
            with suppress(OSError):
                path.unlink()
    return None


def _use_new(
    folder: Path, name: str, suffix: str, content: bytes, use: Callable[[Path], Used]
) -> Used:
    path = write(folder, name, suffix, content)
    try:
        return use(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write(folder: Path, name: str, suffix: str, content: bytes) -> Path:
    """The file of that name and content, which is there as a whole or not at all. Raises OSError if
    it cannot be written."""
    path = folder / f"{name}.{_hash(content)}{suffix}"
    descriptor, unfinished = tempfile.mkstemp(dir=folder, prefix=".")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # Or a machine that goes down now may leave a file of that name without content
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
    return path


def intact(path: Path) -> bool:
    """Whether a file's content has the hash that its name says. Raises OSError if it cannot be
    read."""
    return path.name.split(".")[1:2] == [_hash(path.read_bytes())]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _trusted(folder: Path | None, name: str, suffix: str) -> Path | None:
    """The folder, made if it is not there, if its programs of that name may be run."""
    if folder is None:
        return None
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        for path in (folder, *folder.glob(f"{name}.*{suffix}")):
            if why := trouble(path):
                text = (
                    f"rnn does not use compiled programs in {folder}, as {path} {why}; they "
                    "are compiled for this process alone"
                )
                warn_once(text, text)
                return None
    except OSError:
        return None
    return folder


def trouble(path: Path, owners: Collection[int] = ()) -> str:
    """Why somebody other than its `owners`, this user if none are named, may have written it; ""
    if nobody may."""
    if not hasattr(os, "geteuid"):
        return ""
    status = path.stat()
    if not {status.st_uid, path.lstat().st_uid} <= {*(owners or (os.geteuid(),))}:
        return "belongs to another user"
    return "can be written to by others" if status.st_mode & 0o022 else ""


def _private_folder() -> Path:
    process = os.getpid()
    if process not in _private or not _private[process].is_dir():
        _private[process] = Path(tempfile.mkdtemp(prefix="fused_rnn_"))
        atexit.register(_remove, process, _private[process])
    return _private[process]


def _remove(process: int, folder: Path) -> None:
    if process == os.getpid():  # a child of fork that ends leaves its parent's where it is
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(shared: Path | None) -> Iterator[None]:
    """No other thread or process builds there meanwhile, unless it takes too long or the disk has
    no locks. A call of a signal handler or a finalizer, while its own thread builds, does not
    wait."""
    descriptor = None
    if fcntl is not None and not _building.depth:
        with suppress(OSError):
            descriptor = os.open(shared or _private_folder(), os.O_RDONLY)
    _building.depth += 1
    try:
        if descriptor is not None:
            _lock(descriptor)
        yield
    finally:
        _building.depth -= 1
        if descriptor is not None:
            with suppress(OSError):
                # A child of fork may have the descriptor still
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return None
    return None
