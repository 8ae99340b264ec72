"""Which tests a machine with a GPU runs, counted without one."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests").rglob("test_gpu*.py"))


class Collected(NamedTuple):
    """By name, in order, what is chosen, and why a mark skips it; and of all that pytest found the
    file, the function and the marks."""

    chosen: list[str]
    marked: dict[str, str]
    every: dict[str, tuple[str, str, list[str]]]


def collect(folder: Path, *options: str) -> Collected:
    plugins = ["-p", "tests.stub_gpu", "-p", "tests.on_gpu", "-p", "no:cacheprovider"]
    files = ["--every", str(folder / "every.json"), "--told", str(folder / "told.jsonl")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *plugins, *files, *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    chosen, marked = map(json.loads, (folder / "told.jsonl").read_text().splitlines())
    every = json.loads((folder / "every.json").read_text())
    return Collected(chosen["chosen"], marked["marked"], every)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    return collect(tmp_path_factory.mktemp("collected"))


def test_every_test_is_chosen(collected: Collected) -> None:
    """Of the files of GPU tests, and of all files those with the mark; none is skipped."""
    names = {path.name for path in FILES}
    assert len(FILES) >= 3
    wanted = {
        test
        for test, (file, _, marks) in collected.every.items()
        if file in names or "gpu" in marks
    }
    assert {*collected.chosen} == wanted and len(collected.chosen) == len(wanted)
    assert not collected.marked
    unmarked = [test for test in wanted if "gpu" not in collected.every[test][2]]
    assert len(wanted) > 1200 and len(unmarked) > 900, "a filter by mark would lose these"


def test_every_function_is_there(collected: Collected) -> None:
    """As the files have them, also those whose parameters depend on the machine."""
    chosen = {tuple(collected.every[test][:2]) for test in collected.chosen}
    for path in FILES:
        tree = ast.parse(path.read_text())
        functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for name in functions:
            if name.startswith("test_"):
                assert (path.name, name) in chosen


def test_order(collected: Collected) -> None:
    """Numbers first, and of these small sizes; limits last."""
    files = [collected.every[test][0] for test in collected.chosen]
    first = {name: files.index(name) for name in files}
    assert first["test_gpu.py"] == 0
    assert first["test_gpu.py"] < first["test_gpu_tools.py"] < first["test_gpu_sizes.py"]
    assert files == sorted(files, key=first.__getitem__), "file by file"
    cases = [test for test in collected.chosen if "test_cases[" in test]
    smallest = [test for test in cases if "T5B0I4H6" in test or "T1B1I1H1" in test]
    assert cases[: len(smallest)] == smallest and "H500" in cases[-1]


def test_what_is_skipped_is_told(tmp_path: Path) -> None:
    """A mark that skips one of them is seen, as `make gpu` reports it."""
    file = tmp_path / "test_gpu_marked.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.skip(reason='not today')\n"
        "def test_skipped(): ...\n"
        "@pytest.mark.skipif(True, reason='not here')\n"
        "def test_skipped_too(): ...\n"
        "def test_run(): ...\n"
        "def test_fails(): assert 0\n"
        "def test_skips_itself(): pytest.skip('for want of memory')\n"
    )
    (tmp_path / "test_other.py").write_text("def test_needs_none(): ...\n")
    found = collect(tmp_path, str(tmp_path), "-c", "/dev/null", "--rootdir", str(tmp_path))
    assert [*found.marked.values()] == ["not today", "not here"]
    assert len(found.chosen) == 5 and len(found.every) == 6


def outcomes(file: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """Of a run of its tests that fails: what the script puts together."""
    told = file.with_name("told.jsonl")
    plugins = ["-p", "tests.on_gpu", "-p", "no:cacheprovider", "-c", "/dev/null"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--told", str(told), str(file)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1, done.stdout
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("prove").tested(told)


def test_outcomes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, whatever becomes of the process; and put together by the script."""
    file = tmp_path / "test_gpu_ends.py"
    file.write_text(
        "import os, pytest\n"
        "def test_runs(): ...\n"
        "def test_fails(): assert 0\n"
        "def test_skips_itself(): pytest.skip('for want of memory')\n"
        "def test_ends_the_process(): os._exit(1)\n"
        "def test_is_left(): ...\n"
    )
    counts = outcomes(file, monkeypatch)
    assert counts["chosen"] == 5 and counts["passed"] == 1
    assert [name.split("::")[1] for name in counts["failed"]] == ["test_fails"]
    assert [name.split("::")[1] for name in counts["left_out"]] == [
        "test_ends_the_process",
        "test_is_left",
    ]
    assert [*counts["skipped"].values()] == ["Skipped: for want of memory"]


@pytest.mark.parametrize("beside", [False, True], ids=["one process", "side by side"])
def test_a_fault_of_a_kernel(beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves CUDA broken in its process: what comes after has another one, or no turn."""
    file = tmp_path / "test_gpu_breaks.py"
    file.write_text(
        "import pytest, torch\n"
        "def synchronize(): raise RuntimeError('CUDA error: an illegal memory access')\n"
        "def test_fails(): assert 0\n"
        "def test_out_of_memory(): ...\n"
        "def test_breaks():\n"
        "    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize\n"
        "    assert 0\n"
        "def test_after(): assert torch.cuda.synchronize is not synchronize\n"
        "def test_skips_itself(): pytest.skip('for want of memory')\n"
    )
    counts = outcomes(file, monkeypatch, *(["--numprocesses", "1"] if beside else []))
    failed = [name.split("::")[1] for name in counts["failed"]]
    left_out = [name.split("::")[1] for name in counts["left_out"]]
    assert counts["chosen"] == 5 and failed == ["test_fails", "test_breaks"]
    assert counts["passed"] == (2 if beside else 1)
    assert left_out == ([] if beside else ["test_after", "test_skips_itself"])
    assert len(counts["skipped"]) == beside


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (2, 1), (16, 8), (64, 8)])
def test_processes_of_tests(cores: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    prove: Any = importlib.import_module("prove")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    steps = {step.name: step.command for step in prove.plan("cuda", ["smoke"], Path("out"))}
    tests = steps["tests"]
    assert tests[tests.index("--numprocesses") + 1] == str(count)
    assert (
        "--numprocesses"
        not in {s.name: s.command for s in prove.plan("cpu", ["smoke"], ROOT)}["tests"]
    )
