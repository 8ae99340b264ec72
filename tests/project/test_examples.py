"""The examples and the benchmark, as their users start them."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import rnn

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "training")
# Those that make their data themselves.
MADE = {"long_memory", "maze"}
each_example = pytest.mark.parametrize("name", EXAMPLES)
each_reader = pytest.mark.parametrize("name", sorted({*EXAMPLES} - MADE))


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        text=True,
        capture_output=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )


@cache
def index_is_reached() -> bool:
    code = (
        "import sys, tempfile; sys.path.insert(0, 'examples'); import training; "
        "training.download('tqdm==4.67.1', tempfile.mkdtemp(), '--only-binary')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def assert_refused(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not done.stdout


@pytest.mark.examples
@each_example
@pytest.mark.parametrize("option", ["--compare", "--cell=rnn"])
def test_quick(name: str, option: str, tmp_path: Path) -> None:
    done = run(f"examples/{name}.py", "--quick", option, "--out", tmp_path)
    if "cannot download" in done.stderr and not index_is_reached():
        pytest.skip(f"the package index is not reached: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "Data: " in done.stdout and "Licence: " in done.stdout
    assert ("torch.nn." in done.stdout) == (option == "--compare")
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    picture = tmp_path / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in done.stdout
    # Training's losses are numbers.
    assert "nan" not in done.stdout


@each_reader
@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe\x00" * 999], ids=["none", "empty", "bytes"]
)
def test_data_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content)
    done = run(f"examples/{name}.py", "--data", path, "--out", tmp_path)
    assert_refused(done)
    assert str(path) in done.stderr


def test_language_model(tmp_path: Path) -> None:
    plot = tmp_path / "curves.png"
    done = run(
        "examples/language_model.py",
        "--hidden",
        64,
        "--batch",
        16,
        "--length",
        32,
        "--steps",
        60,
        "--rate",
        0.01,
        "--compare",
        "--out",
        tmp_path,
        "--plot",
        plot,
    )
    assert done.returncode == 0, done.stderr
    difference = re.search(r"largest difference in 50 steps +(\S+)", done.stdout)
    first, later = (
        re.search(rf"loss at {when} +(\S+) +(\S+)", done.stdout)
        for when in ("the start", "step 50")
    )
    assert difference
    assert first
    assert later
    assert float(first[1]) - float(later[1]) > 0.5
    assert float(difference[1]) < 1e-3
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "It writes:" in done.stdout
    assert "characters/s" in done.stdout
    assert "60/60" in done.stderr


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot read"),
        (b"", "is empty"),
        (b"too short", "has 9 characters"),
        (b"\xff\xfe" * 9999, "UTF-8"),
    ],
)
def test_bad_text(content: bytes | None, text: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    done = run("examples/language_model.py", "--text", path, "--out", tmp_path)
    assert text in done.stderr
    assert_refused(done)


def test_cell_of_the_documentation() -> None:
    """It runs, and its adjoint is right: against the formula's gradients, which autograd finds."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/kernels.md").read_text(), re.S)[0]
    scope: dict[str, Any] = {}
    exec(code, scope)
    given: Any = [
        torch.randn(n, dtype=torch.float64, requires_grad=True)
        for n in ((5, 2, 3), (8, 3), (8, 4), (8,), (8,), (1, 2, 4))
    ]
    found = [
        rnn.functional.recurrence(scope["mgu"], *given)[0],
        rnn.composite.composite(scope["mgu"], given, (None, None, None), (False,), 0)[0],
    ]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), given) for y in found))


def test_help() -> None:
    shared = "--cell --compare --data --steps --rate --quick --seed --device --out"
    for script, words in (
        *((f"examples/{name}.py", shared) for name in EXAMPLES),
        ("examples/language_model.py", "--text --hidden --dtype --temperature --prompt"),
        ("bench/run.py", "--device --suite --cell --dtype"),
    ):
        done = run(script, "--help")
        assert done.returncode == 0
        assert all(word in done.stdout for word in words.split())
