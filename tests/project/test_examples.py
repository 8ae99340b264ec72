"""The example and the benchmark, as their users start them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rnn

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        text=True,
        capture_output=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )


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
    assert "characters/s" in done.stderr


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot read"),
        (b"", "has 0 characters"),
        (b"too short", "has 9 characters"),
        (b"\xff\xfe" * 9999, "UTF-8"),
    ],
)
def test_bad_text(content: bytes | None, text: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    done = run("examples/language_model.py", "--text", path)
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


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
    for script, words in (
        ("examples/language_model.py", "--text --hidden --steps --device --dtype --seed"),
        ("bench/run.py", "--device --suite --cell --dtype"),
    ):
        done = run(script, "--help")
        assert done.returncode == 0
        assert all(word in done.stdout for word in words.split())
