"""examples/tour.ipynb: its cells run one after the other, and say what they should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples/tour.ipynb"
CELLS: list[dict[str, Any]] = json.loads(TOUR.read_text())["cells"]


def code() -> list[str]:
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_tour_is_kept_without_outputs() -> None:
    assert len(code()) > 5
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)
    assert not any(line[:1] in ("%", "!") for part in code() for line in part.splitlines())


@pytest.mark.examples
def test_tour() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code())],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    difference = re.search(r"largest difference: (\S+)", done.stdout)
    assert difference
    assert float(difference[1]) < 1e-5
    assert "steps with an output: [100, 3, 57, 0, 12, 99, 1, 40]" in done.stdout
    assert "its step 56: True" in done.stdout
    assert "as if alone: True" in done.stdout
    assert "as in one call: True" in done.stdout
    assert "output: (8, 100, 64) gradient of W_hh: (64, 32)" in done.stdout
    assert len(re.findall(r"ratio \d", done.stdout)) == 3
    left = {k: float(v) for k, v in re.findall(r"'([^']+)': '(\S+)'", done.stdout)}
    assert left["RNN"] < left["LSTM"] < left["LSTM, chrono_"]
