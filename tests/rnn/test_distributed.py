"""Two processes on this machine, started by torchrun."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torchrun(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            ROOT / script,
            *map(str, arguments),
        ],
        text=True,
        capture_output=True,
        timeout=300,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_as_one(kind: str) -> None:
    torchrun("tests/rnn/distributed.py", kind)


@pytest.mark.slow
def test_language_model(tmp_path: Path) -> None:
    said = torchrun(
        "examples/language_model.py",
        "--hidden",
        32,
        "--batch",
        8,
        "--length",
        16,
        "--steps",
        60,
        "--rate",
        0.01,
        "--plot",
        tmp_path / "curves.png",
        "--compare",
        "--out",
        tmp_path,
    )
    assert said.count("final loss") == 1
    difference = re.search(r"largest difference in 50 steps +(\S+)", said)
    assert difference and float(difference[1]) < 1e-3
