"""`python -m rnn`: its commands, the faults that `doctor` finds, and libraries compiled ahead."""

import contextlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rnn
from rnn import dispatch
from rnn.command_line import backends, doctor, main, timing
from rnn.command_line import machine as this_machine
from rnn.kernels import build_cache, cells, notices, reference
from rnn.kernels.cpu import build, native, shipping, targets
from rnn.kernels.plan import Gpu, Plan

ROOT = Path(__file__).parents[2]
MARCH = "x86-64-v2" if platform.machine() == "x86_64" else "native"
COMPILER = native.compiler()
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
# It compiles once, without optimisation, and gives out the same library from then on.
ONCE = """#!/bin/sh
for last; do :; done
case $* in *-shared*);; *) exec {compiler} "$@";; esac
test -f {store} || {compiler} "$@" -O0 -o {store}
exec cp {store} "$last"
"""


class Machine:
    """A machine with a home of its own, and a compiler that is quick."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Path) -> None:
        self.home = path / "home"
        self.cache = self.home / "fused_rnn"
        self.kernel_cache = path / "cupy" / "fused_rnn"
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.home))
        monkeypatch.setenv("CUPY_CACHE_DIR", str(path / "cupy"))
        monkeypatch.setenv("CXX", shlex.quote(str(compiler)))
        monkeypatch.setattr(shipping, "IN_PACKAGE", path / "prebuilt")
        monkeypatch.setattr(doctor, "LAYERS", {cells.rnn_tanh: doctor.LAYERS[cells.rnn_tanh]})
        monkeypatch.setattr(doctor, "TIMED_SECONDS", 1e-3)

    def again(self) -> None:
        """As a process that starts now."""
        native.load.cache_clear()
        dispatch.native_available.cache_clear()
        dispatch._plan.cache_clear()
        self.monkeypatch.setattr(notices, "_given", set())


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiler")
    script = folder / "once"
    text = ONCE.replace("{compiler}", shlex.join(COMPILER)).replace("{store}", f"{folder}/stored")
    script.write_text(text)
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def built(compiler: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder for other machines, and what `build` says; the first that the compiler makes."""
    folder = tmp_path_factory.mktemp("built") / "prebuilt"
    if not COMPILER:
        return folder, ""
    said = io.StringIO()
    which = ["--march", MARCH, "--cell", "rnn", "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("CXX", shlex.quote(str(compiler)))
        assert main.main(["build", *which, "--output", str(folder)]) == 0
    return folder, said.getvalue()


@pytest.fixture
def machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh: None,
    compiler: Path,
    built: tuple[Path, str],
) -> Iterator[Machine]:
    found = Machine(tmp_path, monkeypatch, compiler)
    found.again()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)
    monkeypatch.undo()


def check(words: str) -> None:
    """A layer is right, forward and back, and is computed by what `explain` says in these words."""
    theirs = nn.RNN(3, 8, dtype=torch.float64)
    layer = rnn.RNN(3, 8)
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3)
    assert words in rnn.explain(layer, x)
    torch.testing.assert_close(layer(x)[0], theirs(x.double())[0].float())
    found, exact = (
        torch.autograd.grad(one(t)[0].square().sum(), [*one.parameters()])
        for one, t in ((layer, x), (theirs, x.double()))
    )
    torch.testing.assert_close(found, tuple(g.float() for g in exact))


def lines(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "word"),
        [
            ([], "COMMAND"),
            (["other"], "other"),
            (["explain"], "cell"),
            (["explain", "lstm", "--batch", "0"], "--batch"),
            (["explain", "lstm", "--hidden", "1.5"], "--hidden"),
            (["explain", "lstm", "--device", "nowhere"], "nowhere"),
            (["explain", "lstm", "--device", "meta"], "meta"),
            (["bench", "--cell", "elman"], "elman"),
            (["bench", "--dtype", "int8"], "int8"),
            (["bench", "--seconds", "nan"], "--seconds"),
            (["build", "--cell", "elman"], "elman"),
            (["cache", "--clean"], "--clean"),
        ],
    )
    def test_wrong(
        self, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as raised:
            main.main(arguments)
        said = capsys.readouterr()
        assert raised.value.code == 2 and not said.out
        assert said.err.count("\n") == 1 and word in said.err

    def test_what_fails_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main.main(["explain", "gru", "--hidden", "1000000000"]) == 1
        said = capsys.readouterr()
        assert said.err.startswith("fused-rnn explain: RuntimeError: ") and not said.out
        assert said.err.count("\n") == 1

    def test_help_is_light(self) -> None:
        """Nothing is imported for it but what `import rnn` takes."""
        code = (
            "import runpy, sys; sys.argv = ['rnn', '--help']\n"
            "try: runpy.run_module('rnn', run_name='__main__')\n"
            "except SystemExit as end: print(end.code, *{'triton', 'cupy'} & {*sys.modules})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True
        )
        *said, last = done.stdout.splitlines()
        assert last == "0" and "usage: python -m rnn" in said[0], done.stderr
        for command in ("info", "doctor", "bench", "explain", "build", "cache"):
            assert any(line.split()[:1] == [command] for line in said)


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--batch", "3", "--time", "5", "--input", "4", "--hidden", "6", "--layers", "2"]
    assert main.main(["explain", "rnn_relu", *shape, "--bidirectional"]) == 0
    layer = rnn.RNN(4, 6, 2, nonlinearity="relu", bidirectional=True)
    said = capsys.readouterr().out
    assert said == rnn.explain(layer, torch.randn(5, 3, 4)) + "\n"
    assert "layer 1: rnn_relu B=3 I=12 H=6 N=2" in said


class TestBench:
    @needs_compiler
    def test_output(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        shape = ["--batch", "2", "--time", "4", "--hidden", "8", "--seconds", "0.01"]
        assert main.main(["bench", "--cell", "rnn", *shape]) == 0
        said = capsys.readouterr().out
        assert said.startswith("rnn B=2 T=4 I=8 H=8, 1 layer, one direction, float32\n")
        assert f"torch {torch.__version__}" in said
        units = dict(s=1.0, ms=1e-3, us=1e-6)
        for name in ("forward", "training"):
            (line,) = [line for line in said.splitlines() if line.startswith(name)]
            theirs, unit, ours, other, ratio = line.split()[1:6]
            want = float(theirs) * units[unit] / (float(ours) * units[other])
            assert float(ratio) == pytest.approx(want, rel=0.02, abs=0.01)

    def test_in_turns(self) -> None:
        """Neither is always the first, and the medians are of whose they are said to be."""
        calls = []

        def call(layer: str, x: torch.Tensor) -> None:
            calls.append(layer)
            time.sleep({"theirs": 4e-3, "ours": 1e-3}[layer])

        found = timing.compare(call, "theirs", "ours", torch.randn(1), 1e-3)
        assert found.rounds == timing.LEAST_ROUNDS
        assert found.theirs > 4e-3 > found.ours > 1e-3
        warm, rounds = calls[:4], calls[4:]
        assert warm == ["theirs", "ours"] * 2
        pairs = [*zip(rounds[::2], rounds[1::2])]
        assert all({*pair} == {"theirs", "ours"} for pair in pairs) and len({*pairs}) == 2


class TestInfo:
    def test_json(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        machine.cache.mkdir(parents=True)
        (machine.cache / "a.b.so").write_bytes(b"12345")
        assert main.main(["info", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["versions"]["torch"] == torch.__version__
        assert found["versions"]["python"] == platform.python_version()
        assert found["devices"][0]["threads"] == torch.get_num_threads()
        cpu, gpu = found["caches"]
        assert (cpu["folder"], cpu["programs"], cpu["bytes"]) == (str(machine.cache), 1, 5)
        assert (gpu["folder"], gpu["programs"]) == (str(machine.kernel_cache), 0)
        names = [backend["name"] for backend in found["backends"]]
        assert {*names} == {"native", "torch", "numpy", "cuda", "triton", "cupy"}

    def test_why_not(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        machine.monkeypatch.setenv("CXX", "/nonexistent")
        machine.monkeypatch.setitem(sys.modules, "triton", None)
        assert main.main(["info"]) == 0
        said = capsys.readouterr().out
        assert lines(said, "compiler", "'/nonexistent', which is no program")
        assert lines(said, "backend", "native", "broken", "no compiler")
        assert lines(said, "backend", "torch", "ready")
        assert lines(said, "backend", "triton", "absent", "not installed")


def test_cache(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """What was compiled goes; what was compiled ahead stays, and so do files of others."""
    programs = [machine.cache / "a.b.so", machine.kernel_cache / "c.d.cubin"]
    others = [machine.cache / "prebuilt" / "e.f.so", machine.kernel_cache.parent / "g.cubin"]
    for path in (*programs, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"123")
    assert main.main(["cache"]) == 0
    said = capsys.readouterr().out
    assert lines(said, str(machine.cache), "1 program, 3 bytes")
    assert all(path.exists() for path in programs)
    assert main.main(["cache", "--clear"]) == 0
    assert [path.exists() for path in (*programs, *others)] == [False, False, True, True]
    assert len(lines(capsys.readouterr().out, "deleted 1 program")) == 2


class TestPrebuilt:
    """Libraries compiled ahead."""

    @needs_compiler
    def test_what_build_says(self, built: tuple[Path, str]) -> None:
        folder, said = built
        (library,) = folder.iterdir()
        assert library.name in said and str(folder) in said and f"-march={MARCH}" in said
        assert lines(said, f"  {shipping.IN_PACKAGE}")
        target = targets.target_of_library(library.read_bytes())
        assert target is not None and not targets.refusal(target)

    @needs_compiler
    @pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
    def test_levels(self) -> None:
        """As the ABI of x86-64 defines them, but for what is not for arithmetic: cmpxchg16b, lahf,
        osxsave. (https://gitlab.com/x86-psABIs/x86-64-ABI)"""
        v2 = {"popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
        v3 = v2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
        v4 = v3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
        levels: dict[str, set[str]] = {"": set(), "-v2": v2, "-v3": v3, "-v4": v4}
        for level, want in levels.items():
            macros = build.macros(COMPILER, f"x86-64{level}")
            assert {*targets.target_of_macros(macros).features} == want
        here = targets.target_of_macros(build.macros(COMPILER, "native"))
        assert not targets.refusal(here)
        # AMD's alone, of 2015
        other = targets.target_of_macros(build.macros(COMPILER, "bdver4"))
        assert "xop" in targets.cpu_features() or "xop" in targets.refusal(other)

    @needs_compiler
    def test_a_machine_without_a_compiler(self, built: tuple[Path, str], tmp_path: Path) -> None:
        """A process that starts with an empty cache runs C++ from within the installed package."""
        site = tmp_path / "site"
        skip = shutil.ignore_patterns("__pycache__", "prebuilt")
        shutil.copytree(ROOT / "rnn", site / "rnn", ignore=skip)
        shutil.copytree(built[0], site / "rnn" / "kernels" / "cpu" / "prebuilt")
        code = (
            "import torch, rnn\n"
            "from rnn.kernels.plan import Plan\n"
            "print(rnn.__file__)\n"
            "theirs = torch.nn.RNN(3, 8)\n"
            "x = torch.randn(5, 2, 3)\n"
            "for plan in (None, Plan('native')):\n"
            "    layer = rnn.RNN(3, 8, plan=plan)\n"
            "    layer.load_state_dict(theirs.state_dict())\n"
            "    torch.testing.assert_close(layer(x), theirs(x))\n"
            "    found, want = (torch.autograd.grad(m(x)[0].square().sum(), [*m.parameters()])\n"
            "                   for m in (layer, theirs))\n"
            "    torch.testing.assert_close(found, want)\n"
            "    print(rnn.explain(layer, x))\n"
        )
        cache = tmp_path / "cache"
        environment = {
            **os.environ,
            "PYTHONPATH": str(site),
            "CXX": "/nonexistent",
            "XDG_CACHE_HOME": str(cache),
        }
        done = subprocess.run(
            [sys.executable, "-W", "error:rnn does", "-c", code],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        where, chosen, planned = done.stdout.splitlines()
        assert where.startswith(str(site))
        assert "C++" in chosen and "there is a prebuilt library" in chosen and "C++" in planned
        assert not cache.exists()

    @needs_compiler
    def test_in_the_cache(self, machine: Machine, built: tuple[Path, str]) -> None:
        machine.monkeypatch.setenv("CXX", "/nonexistent")
        shutil.copytree(built[0], machine.cache / "prebuilt")
        check("there is a prebuilt library")
        assert [path.name for path in machine.cache.iterdir()] == ["prebuilt"]

    @needs_compiler
    def test_the_best_that_can_be_used(
        self, machine: Machine, built: tuple[Path, str], tmp_path: Path
    ) -> None:
        """Of several CPUs' libraries of one name."""
        shutil.copytree(built[0], shipping.IN_PACKAGE)
        (library,) = shipping.IN_PACKAGE.iterdir()
        features = sorted(targets.cpu_features())
        key = library.name.partition(".")[0]
        for some in ([], features[:1], [*features[:3], "no_such_feature"], features[:2]):
            mark = " ".join(["fused_rnn is for", platform.machine(), "with", *some])
            content = mark.encode() + b"\0"
            build_cache.write(shipping.IN_PACKAGE, key, ".so", content)
        library.unlink()
        opened = []

        def note(path: Path, names: Any) -> Any:
            target = targets.target_of_library(path.read_bytes())
            assert target is not None
            opened.append(list(target.features))
            raise OSError("no library")

        machine.monkeypatch.setattr(build, "open_library", note)
        with pytest.warns(UserWarning, match="no library"):
            found = shipping.find(
                native.program(cells.rnn_tanh, torch.float32), native._FLAGS_OF_ANY_CPU, []
            )
        assert found.library is None and len(found.refused) == 4
        assert opened == [features[:2], features[:1], []]

    @needs_compiler
    @pytest.mark.parametrize("fault", ["another CPU", "spoilt", "others may write", "unmarked"])
    def test_refused(self, fault: str, machine: Machine, built: tuple[Path, str]) -> None:
        """With a warning that says why, before it is loaded; layers are right without it."""
        machine.monkeypatch.setenv("CXX", "/nonexistent")
        shutil.copytree(built[0], shipping.IN_PACKAGE)
        (library,) = shipping.IN_PACKAGE.iterdir()
        words = fault
        if fault == "another CPU":
            if not targets.cpu_features() or MARCH == "native":
                pytest.skip("it has no features to lack")
            machine.monkeypatch.setattr(targets, "cpu_features", lambda: {"popcnt", "pni"})
            words = r"is for a CPU with .*ssse3.*, which this one lacks"
        elif fault == "spoilt":
            library.write_bytes(library.read_bytes() + b"\0")
        elif fault == "others may write":
            library.chmod(0o666)
            words = "can be written to by others"
        else:
            content = targets.MARK.sub(b"", library.read_bytes())
            key = library.name.partition(".")[0]
            library.unlink()
            build_cache.write(shipping.IN_PACKAGE, key, ".so", content)
            words = "does not say which CPU it is for"
        machine.monkeypatch.setattr(build, "open_library", lambda *_: pytest.fail("it was loaded"))
        with pytest.warns(UserWarning, match=f"without prebuilt libraries: .*{words}"):
            check("torch's own operator")
        layer = rnn.RNN(3, 8, plan=Plan("native"))
        with pytest.raises(RuntimeError, match=words):
            layer(torch.randn(5, 2, 3))

    def test_another_kind_of_machine(self) -> None:
        assert "is for other, and this machine is" in targets.refusal(targets.Target("other", ()))

    @needs_compiler
    def test_of_another_version(self, machine: Machine, built: tuple[Path, str]) -> None:
        """The sources have changed since."""
        machine.monkeypatch.setenv("CXX", "/nonexistent")
        shutil.copytree(built[0], shipping.IN_PACKAGE)
        machine.monkeypatch.setattr(native, "_fingerprint", lambda: "other")
        with pytest.warns(UserWarning, match="has no library of this cell, dtype and version"):
            check("torch's own operator")
        assert [*this_machine.prebuilt().values()] == ["is of another version of rnn"]
        assert backends.backends()[0].state == "broken"

    @needs_compiler
    def test_march_that_there_is_not(
        self, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "output"
        assert main.main(["build", "--march", "z80", "--output", str(output)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "z80" in said and not output.exists()

    def test_build_without_a_compiler(
        self, machine: Machine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine.monkeypatch.setenv("CXX", "/nonexistent")
        assert main.main(["build"]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "needs a C++ compiler" in said


@pytest.mark.parametrize("backend", ["triton", "cuda", "cupy", "numpy", "native"])
def test_plans_of_the_doctor(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backend is asked for by its own plan, to float32's precision; float64 of a GPU's has
    none."""
    gpu = Gpu(90, 132, 227 * 1024, cuda=True)
    monkeypatch.setattr(dispatch, "gpu", lambda device: gpu)
    for cell in doctor.LAYERS:
        plan = doctor.plan_of(backend, cell, torch.float32, torch.device("cuda"))
        assert plan is not None and plan.backend == backend
        assert plan.precision == ("tf32x3" if backend in ("triton", "cuda") else "ieee")
    plan = doctor.plan_of(backend, cells.gru, torch.float64, torch.device("cuda"))
    assert (plan is None) == (backend in ("triton", "cuda"))


@needs_compiler
class TestDoctor:
    """Faults are planted, one at a time."""

    def run(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
        machine.again()
        status = main.main(["doctor"])
        return status, capsys.readouterr().out

    def test_well(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        status, said = self.run(machine, capsys)
        assert status == 0 and said.endswith("verdict: works\n")
        for name in ("native", "numpy"):
            (line,) = lines(said, "ok ", f" {name} ", "rnn_tanh")
            found = re.search(r"error (\S+) \(torch.nn (\S+)\)", line)
            assert found and 0 < float(found[1]) < 1e-6 and 0 < float(found[2]) < 1e-6
        assert lines(said, "ok ", "cache", str(machine.cache))

    def test_float64(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        machine.monkeypatch.setenv("CXX", "/nonexistent")
        assert main.main(["doctor", "--dtype", "float64"]) == 1
        (line,) = lines(capsys.readouterr().out, "ok ", " numpy ")
        found = re.search(r"error (\S+) \(torch.nn (\S+)\)", line)
        assert found and 0 < float(found[1]) < 1e-14 and 0 < float(found[2]) < 1e-14

    def test_spoilt_library(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        self.run(machine, capsys)
        (library,) = machine.cache.glob("*.so")
        content = library.read_bytes()
        # Not in place: this process has it loaded
        other = library.with_name("other")
        other.write_bytes(content[: len(content) // 2])
        other.replace(library)
        status, said = self.run(machine, capsys)
        (line,) = lines(said, "was spoilt")
        assert line.startswith("repaired") and str(library) in line and "compiled anew" in line
        assert status == 0 and said.endswith("verdict: works, with 1 repaired\n")
        assert library.read_bytes() == content

    def test_no_compiler(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        machine.monkeypatch.setenv("CXX", "/nonexistent")
        status, said = self.run(machine, capsys)
        (line,) = lines(said, "no compiler")
        assert line.startswith("broken") and "'/nonexistent', which is no program" in line
        assert lines(said, "ok ", " torch ", "rnn_tanh")
        assert status == 1 and said.endswith("verdict: broken: native\n")

    def test_compiler_that_fails(
        self, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        script = tmp_path / "failing"
        script.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
        script.chmod(0o755)
        machine.monkeypatch.setenv("CXX", str(script))
        status, said = self.run(machine, capsys)
        (line,) = lines(said, "out of order")
        assert line.startswith("broken") and " native " in line
        assert lines(said, "ok ", " torch ", "rnn_tanh")
        assert status == 1 and said.endswith("verdict: broken: native\n")

    def test_cache_that_cannot_be_written(
        self, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        machine.monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        status, said = self.run(machine, capsys)
        (line,) = lines(said, "cannot be written to")
        assert line.startswith("warning") and "every process compiles for itself" in line
        assert status == 0 and said.endswith("verdict: works, with 1 warning\n")

    @pytest.mark.parametrize("gpu", [False, True])
    @pytest.mark.parametrize("when", ["import", "use"])
    def test_broken_cupy(
        self,
        when: str,
        gpu: bool,
        machine: Machine,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """That is installed and has no driver is no fault where there is no GPU."""
        fault = "raise OSError('libother.so.1: no such file')"
        body = f"class cuda:\n  class nvrtc:\n    def getVersion():\n      {fault}\n"
        (tmp_path / "cupy.py").write_text(fault if when == "import" else body)
        machine.monkeypatch.delitem(sys.modules, "cupy", raising=False)
        machine.monkeypatch.syspath_prepend(tmp_path)
        trouble = "" if gpu else backends.NO_GPU
        machine.monkeypatch.setattr(backends, "_gpu_trouble", lambda: trouble)
        machine.monkeypatch.setitem(sys.modules, "triton", None)
        status, said = self.run(machine, capsys)
        (line,) = lines(said, "OSError: libother.so.1")
        broken = gpu or when == "import"
        assert line.split()[:2] == ["broken" if broken else "unused", "cuda"]
        assert status == int(broken)
        assert said.endswith("verdict: broken: cuda\n" if broken else "verdict: works\n")

    @pytest.mark.parametrize("value", [1e-3, float("nan")])
    def test_wrong_results(
        self, value: float, machine: Machine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = reference.forward

        def wrong(*arguments: Any) -> None:
            right(*arguments)
            arguments[-1].y[0] += value

        machine.monkeypatch.setattr(reference, "forward", wrong)
        status, said = self.run(machine, capsys)
        (line,) = lines(said, "wrong results")
        assert line.split()[:2] == ["broken", "numpy"]
        assert status == 1 and said.endswith("verdict: broken: numpy\n")

    def test_prebuilt_for_another_cpu(
        self, machine: Machine, built: tuple[Path, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(built[0], shipping.IN_PACKAGE)
        (library,) = shipping.IN_PACKAGE.iterdir()
        machine.monkeypatch.setattr(targets, "refusal", lambda target: "is for another CPU")
        status, said = self.run(machine, capsys)
        (line,) = lines(said, "is for another CPU")
        assert line.split()[:2] == ["warning", "prebuilt"] and str(library) in line
        assert status == 0 and said.endswith("verdict: works, with 1 warning\n")
