"""The machine's own C++ compiler, $CXX or c++, and the libraries that it makes. Whatever is wrong
with it is a RuntimeError: nothing that it does ends the process, or keeps it waiting for ever."""

import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .. import build_cache

ROOM = 2**25  # bytes on a disk that a compiler may need
# What a sanitizer's runtime is started by. One that is not in the process from its start on ends it
# when it is loaded.
SANITIZERS = ("__asan_init", "__hwasan_init", "__msan_init", "__tsan_init")

_silent: set[tuple[str, ...]] = set()  # commands that took too long, and are not tried again


class _NoAnswer(RuntimeError):
    pass


def compiler() -> list[str]:
    """The command of the machine's compiler; none if it has none."""
    named = os.environ.get("CXX", "c++")
    if shutil.which(named):  # whatever is in its path
        return [named]
    with suppress(ValueError):  # a quote that is not closed
        command = shlex.split(named)
        if command and shutil.which(command[0]):
            return command
    return []


def required_compiler() -> list[str]:
    """The command. Raises RuntimeError if there is none."""
    command = compiler()
    if not command:
        raise RuntimeError('The plan "native" needs a C++ compiler: c++, or what $CXX names')
    return command


def open_library(path: Path, names: Sequence[str]) -> ctypes.CDLL:
    """Raises OSError if it is none, or does not have functions of these names."""
    library = ctypes.CDLL(str(path))
    for name in names:
        if not hasattr(library, name):
            raise OSError(f"{path} has no function {name}")
    return library


def load_library(
    code: str, flags: Sequence[str], sources: Path, names: Sequence[str]
) -> ctypes.CDLL:
    """The library of that text, which may include files of the folder `sources`, with functions of
    these names: as it was compiled before, or compiled now. Raises RuntimeError if that cannot
    be."""
    command = required_compiler()
    folder = cache_folder()

    def use(path: Path) -> ctypes.CDLL:
        return open_library(path, names)

    try:
        key = hashlib.sha256(
            "\n".join([_identity(command, folder), *command, *flags, code]).encode()
        ).hexdigest()[:32]
        options = [*flags, "-I", str(sources)]
        return build_cache.build_once(
            key, ".so", folder, lambda: compile_library(command, code, options, folder), use
        )
    except OSError as error:
        raise RuntimeError(f"{shlex.join(command)}: {error}") from error


def cache_folder() -> Path | None:
    """Where this user's libraries are kept; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification says
        base = os.path.expanduser("~/.cache")
    return Path(base) / "fused_rnn" if os.path.isabs(base) else None


def _identity(command: Sequence[str], folder: Path | None) -> str:
    """What the compiler is, and what it says of itself and of this machine: other machines may
    share the disk."""
    program = os.path.realpath(shutil.which(command[0]) or command[0])
    status = os.stat(program)
    return _described((*command,), program, status.st_size, status.st_mtime_ns, folder)


@cache
def _described(
    command: tuple[str, ...], program: str, size: int, time: int, folder: Path | None
) -> str:
    return f"{program} {size} {time} {macros(command, 'native', folder)}"


def macros(command: Sequence[str], march: str, folder: Path | None = None) -> str:
    """What a compiler defines for `-march=`. Raises RuntimeError if it does not know it."""
    with _workshop(folder) as place:
        return _run(command, [f"-march={march}", "-dM", "-E", "-x", "c++", os.devnull], place)


def compile_library(
    command: Sequence[str], code: str, flags: Sequence[str], folder: Path | None
) -> bytes:
    """Its content. Raises RuntimeError if the compiler fails, or makes none that can be loaded."""
    with _workshop(folder) as place:
        source = place / "cell.cpp"
        made = place / "cell.so"
        source.write_text(code)
        rest = ["-x", "c++", str(source), "-o", str(made)]
        try:
            _run(command, [*flags, "-fopenmp", *rest], place)
        except _NoAnswer:
            raise
        except RuntimeError:  # Apple's compiler has no OpenMP: one thread
            _run(command, [*flags, *rest], place)
        content = made.read_bytes() if made.exists() else b""
    if not content:
        raise RuntimeError(f"{shlex.join(command)} made no library, and said nothing of it")
    process = ctypes.CDLL(None)
    for name in SANITIZERS:
        if name.encode() in content and not hasattr(process, name):
            raise RuntimeError(
                f"{shlex.join(command)} makes libraries for a sanitizer that this process does "
                "not have"
            )
    return content


@contextmanager
def _workshop(folder: Path | None) -> Iterator[Path]:
    """A folder for the compiler's files: where temporary files are, or beside the libraries if
    there is no room."""
    places: list[Path | None] = [None, folder]
    for place in places:
        with suppress(OSError):
            if shutil.disk_usage(place or tempfile.gettempdir()).free >= ROOM:
                break
    else:
        place = None
    with tempfile.TemporaryDirectory(
        prefix="fused_rnn_", dir=place, ignore_cleanup_errors=True
    ) as made:
        yield Path(made)


def _run(command: Sequence[str], arguments: Sequence[str], place: Path) -> str:
    """What it prints. It and all that it starts end with this call, however that ends."""
    if (*command,) in _silent:
        raise _NoAnswer(f"{shlex.join(command)} gave no answer before")
    # Not pipes, which something that it leaves behind could keep open
    out = place / "out"
    errors = place / "errors"
    environment = {**os.environ, "TMPDIR": str(place)}
    with open(out, "wb") as to, open(errors, "wb") as said:
        process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=to,
            stderr=said,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(build_cache.PATIENCE)
        except subprocess.TimeoutExpired as error:
            _silent.add((*command,))
            raise _NoAnswer(
                f"{shlex.join(command)} gave no answer in {build_cache.PATIENCE:g} seconds"
            ) from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status:
        raise RuntimeError(f"{shlex.join(command)}: {errors.read_text(errors='replace')[-4000:]}")
    return out.read_text(errors="replace")
