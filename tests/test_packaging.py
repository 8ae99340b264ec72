"""What is imported by what, what is in the wheel, and that nothing else is needed."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each file imports only those to its left; in one floor none imports another.
FLOORS = [["kernels.cells", "kernels.forks", "kernels.build_cache"],
          ["kernels.plan", "kernels.replay", "kernels.trace"],
          ["kernels.memory", "kernels.program", "kernels.native_build"], ["kernels.host"],
          ["kernels.cpu", "kernels.native", "kernels.onednn", "kernels.gpu", "kernels.cuda"],
          ["kernels.device"], ["compute"], ["onnx"], ["ops"], ["layers"], ["replace", "explain"]]


def python(code: str, *options: str, path: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], cwd=path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(path: Path, package: str) -> set[str]:
    """The modules of rnn that a file imports, as they are called within it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package.split("."), *(node.module or "").split(".")] if package else (node.module or "").split(".")
            for alias in node.names:
                found |= {".".join(filter(None, base)), ".".join(filter(None, [*base, alias.name]))}
    return found


def test_floors() -> None:
    below: set[str] = set()
    every = {module for floor in FLOORS for module in floor}
    for floor in FLOORS:
        for module in floor:
            path = ROOT / (module.replace(".", "/") if "." in module else f"rnn/{module}")
            uses = imported(path.with_suffix(".py"), module.rpartition(".")[0]) & every
            assert uses <= below, f"{module} imports {uses - below}"
        below |= {*floor}
    files = {f"{prefix}{p.stem}" for prefix, folder in (("kernels.", "kernels"), ("", "rnn"))
             for p in (ROOT / folder).glob("*.py")}
    assert files - every == {"kernels.__init__", "__init__"}


def test_nobody_imports_kernels() -> None:
    """That name belongs to another distribution: ours is rnn.kernels."""
    folders = [ROOT / name for name in ("kernels", "rnn", "tests", "bench", "examples")]
    for path in [path for folder in folders for path in folder.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "kernels" for name in names), path


def test_import_is_light() -> None:
    loaded = python("import sys, torch, numpy; before = {*sys.modules}; import rnn; print(*({*sys.modules} - before))")
    roots = {name.split(".")[0] for name in loaded.split()}
    assert not roots & {"triton", "cupy", "matplotlib", "tqdm", "pytest"}
    assert {name for name in loaded.split() if name.startswith("rnn")} == {
        "rnn", "rnn.compute", "rnn.onnx", "rnn.ops", "rnn.layers", "rnn.replace", "rnn.explain", "rnn.kernels",
        "rnn.kernels.cells", "rnn.kernels.forks", "rnn.kernels.plan"}


def test_without_triton() -> None:
    python("import sys; sys.modules['triton'] = None\n"
           "import torch, rnn; rnn.RNN(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()")


def test_size() -> None:
    """Small enough to be read in an afternoon: 2,600 lines, and what the CPU has of its own: C++, memory, products."""
    lines = {p: p.read_text().splitlines() for folder in ("kernels", "rnn") for kind in ("py", "cu", "cuh", "cpp", "h")
             for p in (ROOT / folder).glob(f"*.{kind}")}
    assert sum(map(len, lines.values())) < 3890
    assert max(map(len, lines.values())) <= 400
    assert all(len(line) <= 120 for text in lines.values() for line in text)


def test_pins_are_allowed() -> None:
    """The constraints fit what the package asks for."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {r.name: r for group in texts for r in map(Requirement, group)}
    pinned = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()
              if line and line[0] != "#"]
    assert pinned
    for pin in pinned:
        (specifier,) = pin.specifier
        assert pin.name not in asked or specifier.version in asked[pin.name].specifier


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "rnn", "kernels"):
        subprocess.run(["cp", "-R", ROOT / name, source], check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*pip, "--wheel-dir", folder, source], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path)
    sources = {f"rnn/{p.name}" for p in (ROOT / "rnn").glob("*.py")} | {
        f"rnn/kernels/{p.name}" for p in (ROOT / "kernels").iterdir() if p.is_file()} | {"rnn/py.typed"}
    assert names == sources
    assert python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport torch, rnn, rnn.kernels.cells\n"
                  "rnn.RNN(3, 4)(torch.randn(5, 2, 3)); print(rnn.__file__)", "-I", path=tmp_path
                  ).startswith(str(tmp_path))
