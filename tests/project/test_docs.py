"""The documentation: its links lead somewhere, its code runs, what it names exists, and what it
says of support is so."""

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rnn
from rnn import dispatch
from rnn.kernels import cells
from rnn.kernels.cpu.build import compiler
from rnn.kernels.plan import Plan
from tests.project import support

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# Those of examples name the files of their data, which are not here.
OTHERS = [page for page in PAGES if page.parent.name != "examples"]
every_other_page = pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
GENERATED = re.compile(r"<!-- (These figures|Written by).*?<!-- Here (they end|it ends). -->", re.S)
NATIVE_AVAILABLE = dispatch.native_available
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


@every_other_page
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


@every_other_page
def test_lines(page: Path) -> None:
    """Prose has 100 columns; tables and what is generated may be wider."""
    lines = GENERATED.sub("", page.read_text()).splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def compiled_for_torch_cells(cell: cells.Cell, dtype: torch.dtype) -> bool:
    """To compile the C++ of each cell of the documentation would take most of the time."""
    return cell in dispatch.OPERATORS and NATIVE_AVAILABLE(cell, dtype)


@every_page
def test_code(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page, one after the other."""
    monkeypatch.setattr(dispatch, "native_available", compiled_for_torch_cells)
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


def test_support_tables() -> None:
    """Each use is run here, and each device's backends are asked of what decides them."""
    text = support.PAGE.read_text()
    if not compiler():
        pytest.skip("the table of uses is that of a CPU with a C++ compiler")
    assert support.render(text) == text, "run python -m tests.project.support"


def test_support_tables_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A use that the kernels stop serving changes its line."""
    use = support.USES["training"]
    assert support.served_by(rnn.GRU, use) == "C++" or not compiler()
    monkeypatch.setattr(rnn.functional, "active_transform", lambda: "vmap of a test")
    assert support.served_by(rnn.GRU, use) == "torch operations"
    with pytest.raises(ValueError, match="too many values"):
        support.same(["C++", "Triton"])


def navigation() -> list[str]:
    """The pages that mkdocs.yml names; its hook adds the examples and the command line."""
    pages = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    docs = ROOT / "docs"
    added = [path for path in (*(docs / "examples").glob("*.md"), docs / "cli.md") if path.exists()]
    return [*pages, *(path.relative_to(docs).as_posix() for path in added)]


def test_every_page_is_in_the_navigation() -> None:
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(navigation()) == sorted(pages)


def named_object(name: str) -> Any:
    """As mkdocstrings finds it, which reads files: `rnn.explain` is a module to it."""
    module, _, rest = name.rpartition(".")
    names = [rest]
    while module not in sys.modules:
        module, _, rest = module.rpartition(".")
        names.insert(0, rest)
    value: Any = sys.modules[module]
    for part in names:
        value = getattr(value, part)
    return value


def test_reference_is_complete() -> None:
    """It has every public name, and none that does not exist."""
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M)
    found = [named_object(name) for name in names]
    public: list[Any] = [cells.Cell, Plan]
    for name in rnn.__all__:
        value = getattr(rnn, name)
        names = value.__all__ if inspect.ismodule(value) else []
        public += [getattr(value, inner) for inner in names] or [value]
    for value in public:
        assert value in found, value


def sources() -> tuple[str, list[str]]:
    """All strings of the sources; and those with something filled in, as patterns."""
    plain = []
    patterns = []
    for path in [*(ROOT / "rnn").glob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else None for p in node.values]
                pattern = [".+" if part is None else re.escape(str(part)) for part in parts]
                patterns.append("".join(pattern))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                plain.append(node.value)
    return "\n".join(plain), [p for p in patterns if len(p.replace(".+", "")) > 15]


THEIRS = {"Could not find schema for fused_rnn::forward."}  # torch's own, for our operator


def test_texts_of_errors() -> None:
    """What symptoms.md quotes is what the sources say."""
    page = (ROOT / "docs/symptoms.md").read_text()
    quoted = re.findall(r"```text\n(.*?)\n```", page, re.S)
    plain, patterns = sources()
    assert len(quoted) > 15
    assert not any(re.fullmatch(pattern, "Expected a text of nobody") for pattern in patterns)
    for text in {" ".join(text.split()) for text in quoted} - THEIRS:
        parts = [part.strip(" .:,") for part in text.split("...")]
        as_pattern = any(re.fullmatch(pattern, text, re.S) for pattern in patterns)
        assert as_pattern or all(part in plain for part in parts), text
