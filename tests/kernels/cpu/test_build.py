"""The library of the CPU, attacked: how it is compiled, kept on disk and loaded, and what
interrupts its calls."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rnn
from rnn import dispatch
from rnn.kernels import build_cache, cells
from rnn.kernels.cpu import build as native_build
from rnn.kernels.cpu import native
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.plan import Plan
from tests.cases import LAYER_NAMES, OF_EACH_SIZE
from tests.small import pair

ROOT = Path(__file__).parents[3]
needs_compiler = pytest.mark.skipif(not native.compiler(), reason="there is no C++ compiler")


def python(code: str, timeout: float = 120, **environment: str) -> str:
    """What a program of its own prints; it ends well, and in time. Threads that wait leave their
    core to others: on a busy machine a call of torch's takes seconds else."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "passive",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        env=environment,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr[-3000:]}"
    return done.stdout


FORK = """
import multiprocessing, torch, rnn
x = torch.randn(50, 32, 64)
theirs = torch.nn.GRU(64, 256)
layer = rnn.GRU(64, 256)
layer.load_state_dict(theirs.state_dict())

def use(answers, deeper):
    # All products but the layer's are on one thread: torch's own threads are missing here as well.
    with torch.no_grad():
        y = layer(x)[0]
    torch.set_num_threads(1)
    rnn.RNN(64, 64)(x)[0].sum().backward()
    answers.put(y.sum().item())
    if deeper:
        start(answers, deeper - 1)

def start(answers, deeper):
    process = context.Process(target=use, args=(answers, deeper))
    process.start()
    process.join(60)
    hangs = process.exitcode is None
    process.kill()
    assert not hangs and process.exitcode == 0, process.exitcode

torch.set_num_threads(2)
(torch.randn(1000, 1000) @ torch.randn(1000, 1000)).tanh_()  # torch has its threads now
want = theirs(x)[0].sum().item()
if "{what}" == "used before":
    layer(x)[0].sum().backward()
context = multiprocessing.get_context("fork")
answers = context.SimpleQueue()
start(answers, 1)
for _ in range(2):
    assert abs(answers.get() - want) < 1e-3 * abs(want)
assert abs(layer(x)[0].sum().item() - want) < 1e-3 * abs(want)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("what", ["imported", "used before"])
def test_fork(what: str) -> None:
    """A child, and a child of it, do not wait for threads that only the parent has."""
    assert python(FORK.replace("{what}", what)) == "done\n"


SMALL_STACK = """
import threading, torch, rnn
torch.set_num_threads(2)
done = []

def work():
    for layer in (rnn.RNN, rnn.LSTM, rnn.GRU):
        for bidirectional in (False, True):
            y = layer(40, 72, bidirectional=bidirectional)(torch.randn(100, 24, 40))[0]
            y.sum().backward()
            done.append(y)

threading.stack_size(64 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(len(done))
"""


def test_small_stacks() -> None:
    """Of a thread of Python's, and of OpenMP's threads, which have what $OMP_STACKSIZE says."""
    assert python(SMALL_STACK, OMP_STACKSIZE="64k") == "6\n"


@needs_compiler
@pytest.mark.parametrize("cell", OF_EACH_SIZE)
def test_frames_are_small(cell: str, tmp_path: Path) -> None:
    """No function has more than 20 KiB on the stack, even without the compiler's help."""
    flags = [
        "-O1",
        "-fopenmp",
        "-Wframe-larger-than=20480",
        "-Werror",
        "-I",
        str(native.SOURCES),
        "-x",
        "c++",
        "-",
    ]
    done = subprocess.run(
        [*native.compiler(), *native._FLAGS, *flags, "-o", str(tmp_path / "cell.so")],
        input=native.program(getattr(cells, cell), torch.float32),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


class Place:
    """A cache on disk, and a compiler that counts."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once: Path) -> None:
        self.path = tmp_path
        self.monkeypatch = monkeypatch
        self.once = once
        self.made = tmp_path / "made"
        self.script = tmp_path / "quick"
        self.home = tmp_path / "cache"
        self.compiler('exec {compiler} "$@" -O0')
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.home))

    def compiler(self, body: str, name: str = "quick") -> Path:
        """A script, in $CXX. Where it is asked for a library it writes a line."""
        self.script = self.path / name
        self.script.parent.mkdir(exist_ok=True)
        said = f"case $* in *-shared*) echo made >> {shlex.quote(str(self.made))};; esac"
        body = body.replace("{compiler}", str(self.once))
        self.script.write_text(f"#!/bin/sh\n{said}\n{body}\n")
        self.script.chmod(0o755)
        self.made.write_text("")
        self.monkeypatch.setenv("CXX", shlex.quote(str(self.script)))
        return self.script

    @property
    def count(self) -> int:
        return len(self.made.read_text().splitlines())

    @property
    def folder(self) -> Path:
        return self.home / "fused_rnn"

    @property
    def library(self) -> Path:
        (path,) = self.folder.iterdir()
        assert path.suffix == ".so"
        return path

    def again(self) -> None:
        """As a process that starts now, and does not know what this one did."""
        native.load.cache_clear()
        dispatch.native_available.cache_clear()
        dispatch._plan.cache_clear()


REAL = native.compiler()
# What a compiler made of a text with some flags, it does not make once more: it only says so.
ONCE = """#!/bin/sh
for last; do case $last in *cell.so) break;; esac; done
for source; do case $source in *cell.cpp) break;; esac; done
case $* in *-shared*);; *) exec {compiler} "$@";; esac
flags=$(for one; do case $one in */*);; *) echo "$one";; esac; done)
made={store}/$( (echo "$flags"; cat "$source") | sha256sum | cut -c 1-32)
if ! test -f "$made"; then
  {compiler} "$@" || exit 1
  cp "$last" "$made.$$" && mv "$made.$$" "$made"
fi
exec cp "$made" "$last"
"""


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real compiler, which is quick the second time."""
    store = tmp_path_factory.mktemp("store")
    script = store / "compiler"
    script.write_text(ONCE.replace("{compiler}", shlex.join(REAL)).replace("{store}", str(store)))
    script.chmod(0o755)
    return script


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None, once: Path
) -> Iterator[Place]:
    if not REAL:
        pytest.skip("there is no C++ compiler")
    yield Place(tmp_path, monkeypatch, once)
    monkeypatch.undo()


def check(name: str = "RNN", plan: str = "native") -> None:
    """A layer is right, forward and back, and is computed so."""
    theirs, layer = pair(name, 4, 24, dtype=torch.float32)
    x = torch.randn(5, 3, 4)
    words = {"native": "C++, compiled", "torch": "torch's own operator"}[plan]
    torch.testing.assert_close(layer(x)[0], theirs(x)[0])
    found, exact = (
        torch.autograd.grad(one(x)[0].square().sum(), [*one.parameters()])
        for one in (layer, theirs)
    )
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert words in rnn.explain(layer, x)


def falls_back(*words: str) -> None:
    """Layers are right, by torch's own operators; one warning says why, in these words; `plan=`
    raises."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name in ("RNN", "GRU", "RNN"):
            check(name, "torch")
    texts = [str(w.message) for w in said if "rnn does" in str(w.message)]
    assert len(texts) == 1 and all(word in texts[0] for word in words), texts
    with pytest.raises(RuntimeError):
        rnn.RNN(4, 8, plan=Plan("native"))(torch.randn(5, 3, 4))


class TestKept:
    """Libraries on disk."""

    @pytest.mark.parametrize("part", [0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
    def test_truncated(self, part: float, place: Place) -> None:
        """Loaded as it is, it would end the process."""
        check()
        library = place.library
        content = library.read_bytes()
        library.unlink()  # not written over: it is in use
        library.write_bytes(content[: int(part * len(content))])
        place.again()
        check()
        assert place.count == 2 and place.library.read_bytes() == content

    @pytest.mark.parametrize(
        "kind", ["another library", "one of an honest name", "a folder", "a bit"]
    )
    def test_foreign(self, kind: str, place: Place) -> None:
        check()
        library = place.library
        content = bytearray(library.read_bytes())
        library.unlink()
        other = place.path / "other.so"
        command = [*REAL, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(other)]
        subprocess.run(command, input='extern "C" int other() { return 1; }', text=True, check=True)
        if kind == "another library":
            library.write_bytes(other.read_bytes())
        elif kind == "one of an honest name":
            name = library.name.split(".")[0]
            other.rename(library.with_name(f"{name}.{build_cache._hash(other.read_bytes())}.so"))
        elif kind == "a folder":
            library.mkdir()
        else:
            content[len(content) // 2] ^= 1
            library.write_bytes(content)
        place.again()
        check()
        assert place.count == 2
        if kind != "a folder":
            place.again()
            check()
            assert place.count == 2 and place.library.is_file()

    def test_spoilt_and_no_compiler_any_more(self, place: Place) -> None:
        check()
        place.library.rename(place.library.with_name(place.library.name.replace(".", ".0", 1)))
        place.script.write_text("#!/bin/sh\nexit 1\n")
        place.again()
        falls_back("installed and fails")

    def test_eight_processes_at_once(self, place: Place) -> None:
        code = (
            "import sys, torch, rnn\nsys.stdin.read()\ntorch.manual_seed(0)\n"
            "y = rnn.GRU(3, 40)(torch.ones(5, 2, 3))[0]\ny.sum().backward()\nprint(y.sum().item())"
        )
        command = [sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        running = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(8)
        ]
        for process in running:
            assert process.stdin
            process.stdin.close()
            process.stdin = None
        said = {process.communicate(timeout=200)[0] for process in running}
        assert [process.returncode for process in running] == [0] * 8 and len(said) == 1
        assert place.count == 1 and place.library.is_file()

    def test_a_process_that_never_ends_its_turn(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build_cache, "PATIENCE", 0.5)
        monkeypatch.setattr(native_build, "_run", patient(native_build._run))
        with build_cache._alone(build_cache._trusted(place.folder, "", "")):
            thread = threading.Thread(target=native.load, args=(cells.rnn_tanh, torch.float32))
            thread.start()
            thread.join()
        assert place.count == 1
        check()
        assert place.count == 1

    def test_eight_threads_at_once(self, place: Place) -> None:
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.append(native.load(cells.gru, torch.float32)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and place.count == 1

    def test_a_layer_in_a_signal_handler_while_compiling(self, place: Place) -> None:
        """It does not wait for the call that it interrupts."""
        place.compiler('sleep 1\nexec {compiler} "$@" -O0')
        done: list[int] = []

        def handle(*_: Any) -> None:
            check("GRU")
            check("RNN")
            done.append(1)

        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        try:
            check("RNN")
        finally:
            signal.signal(signal.SIGALRM, before)
        assert done

    @pytest.mark.parametrize("what", ["folder", "library"])
    @pytest.mark.parametrize("how", ["another's", "group", "all"])
    def test_not_ours_alone(self, how: str, what: str, place: Place) -> None:
        """Not used, which is said once; what is compiled then lasts as long as the process."""
        check()
        target = place.folder if what == "folder" else place.library
        planted = place.library.read_bytes()
        if how == "another's":
            if os.geteuid() != 0:
                pytest.skip("only root can give a file away")
            os.chown(target, 12345, 12345)
        else:
            target.chmod(target.stat().st_mode | {"group": 0o020, "all": 0o002}[how])
        place.again()
        words = "belongs to another user" if how == "another's" else "can be written to by others"
        with pytest.warns(UserWarning, match=f"does not use compiled programs in .*{words}"):
            check()
        assert place.count == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                place.again()
                check()
        assert place.count == 2
        assert place.library.read_bytes() == planted, "nothing was written there"
        private = build_cache._private[os.getpid()]
        assert private.stat().st_mode & 0o777 == 0o700

    def test_folders_of_ours_are_private(self, place: Place) -> None:
        before = os.umask(0)
        try:
            check()
        finally:
            os.umask(before)
        assert (
            place.folder.stat().st_mode & 0o777 == 0o700
            and place.library.stat().st_mode & 0o777 == 0o600
        )

    def test_another_compiler_has_its_own(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or other flags in $CXX: what is not optimized does not serve everybody."""
        check()
        for count, value in enumerate(
            [f"{shlex.quote(str(place.script))} -O1", f"{place.script} -O1 -g"], 2
        ):
            monkeypatch.setenv("CXX", value)
            place.again()
            check()
            assert place.count == count == len([*place.folder.iterdir()])
        place.compiler('exec {compiler} -O1 "$@" -O0')  # the same name
        place.again()
        check()
        assert place.count == 1 and len([*place.folder.iterdir()]) == 4

    def test_a_file_in_the_way(self, place: Place) -> None:
        place.home.write_text("")
        for name in ("RNN", "RNN", "GRU"):
            place.again()
            check(name)
        assert place.count == 2, "once for each cell, not for each layer"

    @pytest.mark.parametrize("error", ["full", "full at the end", "read-only"])
    def test_a_disk_that_takes_no_more(
        self, error: str, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Compiled once, into a temporary folder."""
        sync = os.fsync
        make = tempfile.mkstemp

        def refuse(*given: Any, **options: Any) -> Any:
            if error != "read-only":
                if place.folder in Path(os.readlink(f"/proc/self/fd/{given[0]}")).parents:
                    raise OSError(28, "No space left on device")
                return sync(*given)
            if options.get("dir") == place.folder:
                raise OSError(30, "Read-only file system")
            return make(*given, **options)

        if error == "read-only":
            monkeypatch.setattr(tempfile, "mkstemp", refuse)
        else:
            monkeypatch.setattr(os, "fsync", refuse)
        for _ in range(3):
            place.again()
            check()
        assert place.count == 1 and not [*place.folder.iterdir()]

    def test_a_full_disk(self, place: Place) -> None:
        """A real one, in a namespace of its own."""
        code = (
            f"mount -t tmpfs -o size=16k none {place.home} && {sys.executable} -c "
            "'import torch, rnn; from rnn.kernels import cells; from rnn.kernels.cpu import "
            "native; "
            "a = native.load(cells.gru, torch.float32); native.load.cache_clear(); "
            "native.load(cells.gru, torch.float32); "
            "print(rnn.explain(rnn.GRU(3, 4), torch.ones(1, 1, 3)))'"
        )
        place.home.mkdir()
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", code],
            text=True,
            capture_output=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
            pytest.skip(f"there are no namespaces: {done.stderr}")
        assert "C++, compiled" in done.stdout, done.stderr
        assert place.count == 1

    @pytest.mark.parametrize("case", ["relative", "no home", "home of nobody"])
    def test_where_it_is(self, case: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(place.path)
        home = place.path / "home"
        if case == "relative":  # ignored, as its specification says
            monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
            monkeypatch.setenv("HOME", str(home))
        else:
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setenv("HOME", "/proc/none")
        if case == "no home":
            import pwd

            def unknown(uid: int) -> Any:
                raise KeyError(uid)

            monkeypatch.delenv("HOME")
            monkeypatch.setattr(pwd, "getpwuid", unknown)
        before = {p.name for p in place.path.iterdir()}
        for _ in range(2):
            place.again()
            check()
        assert place.count == 1
        assert {p.name for p in place.path.iterdir()} - before <= {"home"}
        assert [p.suffix for p in home.glob(".cache/fused_rnn/*")] == [".so"] * (case == "relative")

    def test_temporary_folders_go(self, place: Place) -> None:
        """With the process, and not with a child of it; and those of compilers at once."""
        place.home.write_text("")
        temporary = place.path / "temporary"
        temporary.mkdir()
        code = (
            "import os, sys\nimport torch, rnn\nfrom rnn.kernels import build_cache, cells\n"
            "from rnn.kernels.cpu import native\n"
            "native.load(cells.rnn_tanh, torch.float32)\n"
            "if not os.fork():\n    sys.exit()\nos.wait()\n"
            "native.load.cache_clear()\nnative.load(cells.rnn_tanh, torch.float32)\n"
            "print(len(os.listdir(os.environ['TMPDIR'])))"
        )
        assert python(code, TMPDIR=str(temporary)) == "1\n"
        assert place.count == 1 and not [*temporary.iterdir()]


def patient(run: Any) -> Any:
    """As it is, whatever the patience of others."""

    def longer(*given: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_cache, "PATIENCE", 300.0)
            return run(*given)

    return longer


class TestCompiler:
    """$CXX."""

    def test_none(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody asked for one: quiet."""
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", str(place.path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(plan="torch")

    @pytest.mark.parametrize(
        "value", ["{place}/missing", "{place}", "'{script}", "{script} 'a", "'' -x", "\\"]
    )
    def test_no_program(self, value: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        value = value.replace("{place}", str(place.path)).replace("{script}", str(place.script))
        monkeypatch.setenv("CXX", value)
        falls_back("$CXX is", "no program")
        assert place.count == 0

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("exit 0", "made no library"),
            ("for last; do :; done; case $* in *-shared*) : > $last;; esac", "made no library"),
            (
                "for last; do :; done; case $* in *-shared*) seq 1000 > $last;; esac",
                "invalid ELF header",
            ),
            ("printf '\\377\\376 out of \\351order' >&2; exit 1", "out of"),
            (
                "case $* in *-shared*) printf '\\377 later' >&2; exit 3;; esac; printf '\\377'",
                "later",
            ),
            ("kill -9 $$", "installed and fails"),
            ('exec {compiler} "$@" -c -O0', "installed and fails"),
            ('exec {compiler} "$@" -fsanitize=address -O0', "sanitizer"),
            ('exec {compiler} "$@" -fsanitize=thread -O0', "sanitizer"),
            (
                "for last; do :; done; case $* in *-shared*) echo 'int other;' > $0.cpp; "
                "exec c++ -shared -fPIC $0.cpp -o $last;; esac",
                "no function needed",
            ),
        ],
        ids=[
            "nothing",
            "empty",
            "text",
            "messages",
            "messages later",
            "killed",
            "object",
            "address",
            "thread",
            "other",
        ],
    )
    def test_that_fails(self, body: str, words: str, place: Place) -> None:
        place.compiler(body)
        falls_back("installed and fails", words)
        assert not place.folder.exists() or not [*place.folder.iterdir()]

    def test_not_executable_text(self, place: Place) -> None:
        place.script.write_bytes(b"\x00\x01 this is no program")
        falls_back("installed and fails", "Exec format error")

    @pytest.mark.parametrize("when", ["at once", "later"])
    def test_that_hangs(self, when: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        """It ends, with all that it has started, and is not tried again."""
        started = place.path / "started"
        hang = f"sleep 1000 & echo $! >> {started}; echo $$ >> {started}; wait"
        monkeypatch.setattr(build_cache, "PATIENCE", 1.0)
        if when == "at once":
            place.compiler(hang)
        else:
            place.compiler("case $* in *-shared*) " + hang + ";; esac; echo macros")
        begin = time.monotonic()
        falls_back("no answer in 1 seconds")
        assert time.monotonic() - begin < 60
        ids = started.read_text().split()
        assert len(ids) == 2 and not any(runs(int(process)) for process in ids)

    @pytest.mark.parametrize(
        "name", ["with space/c++", "it's/c++", 'double "quote"/c++', "-c++", "ünï/c++"]
    )
    @pytest.mark.parametrize("quoted", [False, True])
    def test_names(
        self, quoted: bool, name: str, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = place.compiler('exec {compiler} "$@" -O0', name)
        monkeypatch.setenv("CXX", shlex.quote(str(script)) + " -DX" if quoted else str(script))
        check()
        assert place.count == 1

    @pytest.mark.parametrize("flags", ["-fsanitize=undefined", "-Wall", "--coverage"])
    def test_flags(self, flags: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", f"{place.script} {flags}")
        monkeypatch.chdir(place.path)
        said = python(
            "import torch, rnn; x = torch.ones(2, 2, 3); layer = rnn.RNN(3, 8); "
            "layer(x)[0].sum().backward(); print(rnn.explain(layer, x))"
        )
        assert "C++, compiled" in said and place.count == 1

    def test_without_openmp(self, place: Place) -> None:
        place.compiler('case $* in *-fopenmp*) exit 1;; esac; exec {compiler} "$@" -O0')
        check()
        assert place.count == 2

    def test_temporary_disk_full(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then it works beside the libraries."""
        free = build_cache.shutil.disk_usage
        temporary = tempfile.gettempdir()
        full = type("Full", (), {"free": 0})
        monkeypatch.setattr(
            native_build.shutil, "disk_usage", lambda p: full if str(p) == temporary else free(p)
        )
        monkeypatch.setenv("TMPDIR", "/nowhere")
        check()
        place.again()
        check()
        assert place.count == 1 and place.library.is_file()

    def test_interrupted(self, place: Place) -> None:
        """SIGINT ends the compiler as well, and leaves nothing behind."""
        started = place.path / "started"
        temporary = place.path / "temporary"
        temporary.mkdir()
        place.compiler(
            "case $* in *-shared*) sleep 1000 & "
            f"echo $! $$ > {started}.new; mv {started}.new {started}; wait;; esac; echo macros"
        )
        code = INTERRUPTIBLE + "import torch, rnn; rnn.RNN(3, 4)(torch.ones(2, 2, 3))"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        )
        wait_for(started.exists)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode != 0 and "KeyboardInterrupt" in said
        assert not any(runs(int(one)) for one in started.read_text().split())
        assert not [*place.folder.iterdir()] and not [*temporary.iterdir()]


def runs(process: int) -> bool:
    """Whether it does, or could: not as a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_for(what: Any, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


# What scripts begin with that are to be interrupted: where tests run in the background, SIGINT is
# ignored.
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
# What scripts begin with that look whether a layer of ours still gives what torch.nn's does.
COMPARE = """
import torch

def compare(theirs, ours, x):
    found, exact = (layer(x)[0] for layer in (ours, theirs))
    torch.testing.assert_close(found, exact)
    found, exact = (torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
                    for layer in (ours, theirs))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
"""

LONG_CALL = """
import os, signal, threading, time, torch, rnn
torch.set_num_threads(2)
theirs, ours = torch.nn.LSTM(32, 64), rnn.LSTM(32, 64)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(20, 4, 32)

def check():
    compare(theirs, ours, x)

check()
big = torch.randn(3000, 64, 32)
y = ours(big)[0]
interrupted = 0


def backward():
    torch.autograd.grad(y.sum(), list(ours.parameters()), retain_graph=True)


for work in (lambda: ours(big), backward):
    times = []
    for _ in range(3):
        begin = time.monotonic()
        work()
        times.append(time.monotonic() - begin)
    for part in (0.2, 0.5, 0.8):
        until = time.monotonic() + 30
        threading.Timer(part * min(times), os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while time.monotonic() < until:
                work()
        except KeyboardInterrupt:
            interrupted += 1
        check()
print(interrupted)
"""


class TestCalls:
    """What comes between."""

    @needs_compiler
    def test_interrupted(self) -> None:
        """SIGINT in a call: KeyboardInterrupt after it, and the next call is right."""
        assert python(INTERRUPTIBLE + COMPARE + LONG_CALL, timeout=300) == "6\n"

    @needs_compiler
    def test_eight_threads(self) -> None:
        """With torch's number of threads set in between."""
        pairs = {name: pair(name, 24, 40, dtype=torch.float32) for name in LAYER_NAMES}
        x = torch.randn(30, 8, 24)
        count = torch.get_num_threads()
        exact = {}
        for name, (theirs, _) in pairs.items():
            exact[name] = gradients(theirs.double(), x.double())
        failed: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(12):
                    torch.set_num_threads(1 + (number + turn) % 4)
                    name = LAYER_NAMES[(number + turn) % 3]
                    for got, want in zip(gradients(pairs[name][1], x), exact[name]):
                        torch.testing.assert_close(
                            got.double(), want, rtol=1e-3, atol=1e-4 * want.abs().max().item()
                        )
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            torch.set_num_threads(count)
        assert not failed, failed[0]

    @needs_compiler
    def test_little_memory(self) -> None:
        assert python(COMPARE + LITTLE_MEMORY, timeout=300).split()[-1] == "done"


def gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = layer(x)[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [*layer.parameters()])]


LITTLE_MEMORY = """
import resource, torch, rnn
torch.set_num_threads(2)
x = torch.randn(20, 4, 32)
pairs = []
for name in ("RNN", "LSTM", "GRU"):
    theirs, ours = getattr(torch.nn, name)(32, 64), getattr(rnn, name)(32, 64)
    ours.load_state_dict(theirs.state_dict())
    pairs.append((theirs, ours))

def check():
    for theirs, ours in pairs:
        compare(theirs, ours, x)

check()
big = torch.randn(400, 64, 32)
refused = served = 0
for _, ours in pairs:
    for more in range(0, 64 * 2**20, 2**21):
        rnn.kernels.cpu.workspace.release()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
        try:
            ours(big)[0].sum().backward()
            served += 1
        except (MemoryError, RuntimeError) as error:
            assert isinstance(error, MemoryError) or "memory" in str(error), error
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        ours.zero_grad()
        check()
assert refused > 10, (refused, served)
print(refused, served, "done")
"""


class TestCubins:
    """CUDA's compiled programs, among CuPy's."""

    @pytest.fixture
    def made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
        """What was compiled."""
        pytest.importorskip("cupy", reason="there is no CuPy, whose NVRTC compiles CUDA C++")
        found: list[bytes] = []

        def build(code: str, capability: int) -> tuple[bytes, str]:
            found.append(f"{code} for {capability}".encode() * 100)
            return found[-1], ""

        monkeypatch.setattr(cuda, "build", build)
        monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cupy"))
        return found

    @pytest.mark.parametrize("fault", ["none", "empty", "half", "foreign", "planted"])
    def test_spoilt(self, fault: str, made: list[bytes]) -> None:
        # Of its own: the process keeps what it compiled where no folder can be trusted
        text = f"text, {fault}"
        path = cuda._cubin(text, 90)
        assert path.read_bytes() == made[0]
        if fault == "planted":
            path.chmod(0o666)
            path.write_bytes(b"worse")
            with pytest.warns(UserWarning, match="can be written to by others"):
                other = cuda._cubin(text, 90)
            assert other != path and path.read_bytes() == b"worse"
            path = other
        elif fault != "none":
            path.write_bytes(
                {"empty": b"", "half": made[0][:300], "foreign": b"\x7fELF" + bytes(1000)}[fault]
            )
        assert cuda._cubin(text, 90) == path and path.read_bytes() == made[0]
        assert len(made) == 1 + (fault != "none")
        assert cuda._cubin(text, 100) != path

    def test_a_folder_that_others_can_write_to(self, made: list[bytes], tmp_path: Path) -> None:
        """CuPy's may be so: ours, in it, is not."""
        (tmp_path / "cupy").mkdir()
        (tmp_path / "cupy").chmod(0o777)
        path = cuda._cubin("another text", 90)
        assert (
            path.parent.parent == tmp_path / "cupy" and path.parent.stat().st_mode & 0o777 == 0o700
        )

    def test_no_home(self, made: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUPY_CACHE_DIR", "~nobody-of-that-name/cache")
        paths = {cuda._cubin("a text of nobody's", 90) for _ in range(2)}
        assert len(paths) == len(made) == 1
