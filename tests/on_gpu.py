"""A plugin of pytest: the tests for a machine with a GPU, as `make gpu` runs them.

    python -m pytest -p tests.on_gpu --told FILE

Every test of test_gpu*.py, whatever its marks, and every other test that is marked "gpu". Numbers
come before tools and limits, and small sizes before large ones. FILE gets, line by line as JSON,
which tests were chosen, which of them are skipped by a mark, and the outcome of each at once: it
tells what was left out, however the run ends."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

# Others come last.
ORDER = ("test_gpu.py", "test_gpu_norm.py", "test_gpu_tools.py", "test_gpu_sizes.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--told", type=Path, required=True, help="file of what was done")


def is_chosen(item: pytest.Item) -> bool:
    return item.path.match("test_gpu*.py") or item.get_closest_marker("gpu") is not None


def size_of(item: pytest.Item) -> int:
    """Of its largest parameter: steps, sequences and units, multiplied."""
    sizes = [0]
    for value in getattr(getattr(item, "callspec", None), "params", {}).values():
        numbers = [value] if type(value) is int else []
        if isinstance(value, tuple):
            # T, B, I and H, of a case too
            numbers = [part for part in value if type(part) is int][:4]
        sizes.append(math.prod(numbers) if numbers else 0)
    return max(sizes)


def place(item: pytest.Item) -> tuple[int, int]:
    name = item.path.name
    return ORDER.index(name) if name in ORDER else len(ORDER), size_of(item)


def skipping_mark(item: pytest.Item) -> str:
    """Why a mark has the test skipped, or ""."""
    for mark in item.iter_markers("skip"):
        return str(mark.kwargs.get("reason", "skip"))
    for mark in item.iter_markers("skipif"):
        if mark.args and mark.args[0]:
            return str(mark.kwargs.get("reason", "skipif"))
    return ""


class Told:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def note(self, **entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.note(test=report.nodeid, outcome=report.outcome, why=why)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Told(config.getoption("told")), "told")


# Last, so that the marks of conftest.py are there.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = sorted(filter(is_chosen, items), key=place)
    config.hook.pytest_deselected(items=[item for item in items if not is_chosen(item)])
    items[:] = chosen
    told: Any = config.pluginmanager.get_plugin("told")
    told.note(chosen=[item.nodeid for item in chosen])
    told.note(marked={item.nodeid: why for item in chosen if (why := skipping_mark(item))})
