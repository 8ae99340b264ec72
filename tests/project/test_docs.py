"""The documentation: its links lead somewhere, its code runs, the files that it names exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rnn

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
GENERATED = re.compile(r"<!-- These figures.*?<!-- Here they end. -->", re.S)
CODE = re.compile(r"```.*?```", re.S)
NAME = re.compile(r"`([\w./]+\.(?:py|cpp|h|cu|cuh|md|toml|txt|svg))`")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def exists(name: str) -> bool:
    """A path from the root, or the end of one."""
    if "/" in name and (ROOT / name).exists():
        return True
    folders = ("kernels", "rnn", "tests", "bench", "examples", "docs")
    paths = [ROOT / name]
    for folder in folders:
        paths += (ROOT / folder).rglob(Path(name).name)
    return any(path.exists() and path.as_posix().endswith(f"/{name}") for path in paths)


@every_page
def test_links(page: Path) -> None:
    text = CODE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@every_page
def test_names_of_files(page: Path) -> None:
    for name in NAME.findall(CODE.sub("", page.read_text())):
        assert exists(name), name


def test_where_things_are() -> None:
    """What CONTRIBUTING.md says to be in a file is there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"((?:`\w+`(?: and |, )?)+) in `([\w/.]+)`", text)
    assert len(found) > 8
    for names, path in found:
        text = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", text), f"{name} in {path}"


@every_page
def test_lines(page: Path) -> None:
    """Prose has 100 columns; tables and what is generated may be wider."""
    lines = GENERATED.sub("", page.read_text()).splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@every_page
def test_code(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page, one after the other."""
    scope: dict[str, Any] = {"__name__": "documentation"}
    switches: list[Any] = [torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    before = [switch.fp32_precision for switch in switches]
    try:
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            exec(compile(code, page.name, "exec"), scope)
    finally:
        while rnn.convert._depth:
            rnn.unpatch()
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision
