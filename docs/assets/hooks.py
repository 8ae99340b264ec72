"""What mkdocs does beside its plugins: pages from outside docs/, and formulas as MathML."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
OUTSIDE = {"CONTRIBUTING.md": "Contributing", "CHANGELOG.md": "Changelog"}
FORMULA = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.S | re.M)
CODE = re.compile(r"(```.*?```)", re.S)


def title(page: Path) -> str:
    return page.read_text().partition("\n")[0].removeprefix("# ")


def on_config(config: Any) -> None:
    """The navigation has a page for each example that there is, and those from outside."""
    sections = {name: pages for section in config.nav for name, pages in section.items()}
    docs = Path(config.docs_dir)
    examples = sorted((docs / "examples").glob("*.md"))
    sections["Examples"] += [{title(page): f"examples/{page.name}"} for page in examples]
    if (docs / "cli.md").exists():
        sections["Reference"].insert(1, {"Command line": "cli.md"})
    sections["Inside"] += [{name: path.lower()} for path, name in OUTSIDE.items()]
    config.nav = [section for section in config.nav if all(section.values())]


def on_files(files: Any, config: Any) -> None:
    for name in OUTSIDE:
        text = (ROOT / name).read_text()
        text = text.replace("](docs/", "](").replace("](README.md", "](index.md")
        files.append(File.generated(config, name.lower(), content=text))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Formulas between lines of `$$`, which GitHub shows as such too."""
    parts = CODE.split(markdown)
    parts[::2] = [
        FORMULA.sub(lambda found: convert(found[1], display="block"), part) for part in parts[::2]
    ]
    return "".join(parts)
