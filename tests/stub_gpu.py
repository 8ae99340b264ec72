"""A plugin of pytest: tests are collected as on a machine with a GPU, whose driver and torch.cuda
this stands in for. None can be run.

    python -m pytest -p tests.stub_gpu --collect-only --every FILE

FILE gets all that was collected: for each test its file, its function and its marks."""

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

_load = ctypes.CDLL


def _count(to: Any) -> int:
    to._obj.value = 1
    return 0


def _library(name: Any, *args: Any, **kwargs: Any) -> Any:
    if name == "libcuda.so.1":
        return SimpleNamespace(cuInit=lambda _: 0, cuDeviceGetCount=_count)
    return _load(name, *args, **kwargs)


ctypes.CDLL = _library  # type: ignore[assignment, misc]
torch.cuda.get_device_capability = lambda device=None: (9, 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=Path, required=True)


# First, before any is deselected.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = {
        item.nodeid: [
            item.path.name,
            getattr(item, "originalname", item.name),
            sorted({mark.name for mark in item.iter_markers()}),
        ]
        for item in items
    }
    config.getoption("every").write_text(json.dumps(every))
