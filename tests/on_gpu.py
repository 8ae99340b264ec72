"""A plugin of pytest: the tests for a machine with a GPU, as `make gpu` runs them.

    python -m pytest -p tests.on_gpu --told FILE [-n COUNT]

Every test of test_gpu*.py, whatever its marks, and every other test that is marked "gpu". Numbers
come before tools and limits, and small sizes before large ones. FILE gets, line by line as JSON,
which tests were chosen, which of them are skipped by a mark, and the outcome of each at once: it
tells what was left out, however the run ends.

A fault of a kernel leaves CUDA broken for the rest of its process, and all that comes after would
fail: the process ends there. With pytest-xdist (-n) another one goes on in its place."""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Others come last.
ORDER = ("test_gpu.py", "test_gpu_norm.py", "test_gpu_tools.py", "test_gpu_sizes.py")

# One after another, where tests run side by side: these want much of the memory.
LARGE = ("test_rows_far_apart", "test_more_than_2_31_elements", "test_out_of_memory")


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


def note(config: pytest.Config, **entry: Any) -> None:
    with config.getoption("told").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def worker(config: pytest.Config) -> str:
    """Which of pytest-xdist's processes this is; "" where it is none, or gives them their work."""
    name: str = getattr(config, "workerinput", {}).get("workerid", "")
    return name


class Told:
    """Outcomes, of all processes."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        config.getoption("told").write_text("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else ""
            note(self.config, test=report.nodeid, outcome=report.outcome, why=why)


class Guard:
    """Has large tests wait for those of other processes, and ends the process after a test that
    failed and left CUDA broken."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if getattr(item, "originalname", item.name) not in LARGE:
            return (yield)
        with self.config.getoption("told").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                return (yield)
            finally:
                if torch.cuda.is_initialized() and not is_broken():
                    torch.cuda.empty_cache()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.outcome == "failed"

    def pytest_runtest_logfinish(self) -> None:
        if self.failed and is_broken():
            if worker(self.config):
                os._exit(1)
            pytest.exit("CUDA is broken, by the test before", 1)
        self.failed = False


def is_broken() -> bool:
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


def pytest_configure(config: pytest.Config) -> None:
    if not worker(config):
        config.pluginmanager.register(Told(config), "told")
    if worker(config) or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Guard(config), "guard")


# Last, so that the marks of conftest.py are there.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = sorted(filter(is_chosen, items), key=place)
    config.hook.pytest_deselected(items=[item for item in items if not is_chosen(item)])
    items[:] = chosen
    # all of them have the same
    if worker(config) in ("", "gw0"):
        note(config, chosen=[item.nodeid for item in chosen])
        marked = {item.nodeid: why for item in chosen if (why := skipping_mark(item))}
        note(config, marked=marked)
