"""What is imported by what, what is in the wheel, and that nothing else is needed."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.project import trace_call
from tests.project.matrix import ENVIRONMENTS, index_alone

ROOT = Path(__file__).parents[2]
# Each file imports only those to its left; in one floor none imports another.
FLOORS = [
    ["kernels.tracing", "kernels.notices"],
    ["kernels.adjoint"],
    ["kernels.cell_checks"],
    [
        "kernels.cells",
        "kernels.forks",
        "kernels.build_cache",
        "kernels.gpu.products",
        "kernels.gpu.tensors",
        "kernels.types",
        "kernels.cpu.structs",
        "kernels.costs",
        "kernels.cpu.targets",
    ],
    [
        "kernels.plan",
        "kernels.codegen",
        "kernels.gpu.triton_kernels.cuda_graph",
        "kernels.gpu.triton_kernels.tiles",
    ],
    ["kernels.gpu.faults", "kernels.gpu.cuda.compiler"],
    [
        "kernels.cpu.workspace",
        "kernels.reference",
        "kernels.states",
        "kernels.cpu.build",
        "kernels.gpu.triton_kernels.kernels",
        "kernels.gpu.triton_kernels.library",
        "kernels.prediction",
        "layer_types",
    ],
    ["kernels.cpu", "kernels.planner"],
    ["kernels.cpu.shipping", "kernels.cpu.calls"],
    ["kernels.cpu.native", "kernels.gpu.triton_kernels.launch", "kernels.gpu.cuda.launch"],
    ["kernels.gpu.cuda.occupancy"],
    ["kernels.gpu.device"],
    ["kernels.gpu.fallback"],
    ["kernels.gpu"],
    ["transforms"],
    ["boundary", "docstrings", "gates", "time_options"],
    ["device_copies"],
    ["resets"],
    ["checks", "composite", "dispatch"],
    ["layer_call"],
    ["segments"],
    ["onnx_export", "flops"],
    ["autograd", "custom_ops"],
    ["checkpoint", "projection", "torch_operators"],
    ["batch", "functional"],
    ["interop", "single_step", "cells", "regularisers", "gate_products"],
    ["time_parallel"],
    ["stepwise", "normalized"],
    ["extensions"],
    ["stack"],
    ["modules"],
    ["layers", "convert", "explain", "init", "streaming", "tbptt"],
    ["gradient_flow"],
    ["command_line.arguments", "command_line.machine", "command_line.timing"],
    ["command_line.backends", "command_line.cache"],
    [
        "command_line.bench",
        "command_line.build",
        "command_line.doctor",
        "command_line.explain",
        "command_line.info",
    ],
    ["command_line.main"],
    ["__main__"],
]


def python(code: str, *options: str, path: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def source(module: str) -> Path:
    """The file of a module of rnn."""
    name = module.replace(".", "/")
    path = ROOT / (name if module.startswith("kernels") else f"rnn/{name}")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules() -> list[Path]:
    """Those beside the kernels."""
    return [*(ROOT / "rnn").glob("*.py"), *(ROOT / "rnn" / "command_line").glob("*.py")]


def imported(module: str) -> set[str]:
    """The modules of rnn that this one imports, as they are called within it."""
    found = set()
    path = source(module)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                found |= {".".join(filter(None, base)), ".".join(filter(None, [*base, alias.name]))}
    return found


def test_floors() -> None:
    below: set[str] = set()
    every = {module for floor in FLOORS for module in floor}
    for floor in FLOORS:
        for module in floor:
            uses = imported(module) & every - {module}
            assert uses <= below, f"{module} imports {uses - below}"
        below |= {*floor}
    paths = [*(ROOT / "kernels").rglob("*.py"), *modules()]
    empty = {
        ROOT / "kernels/__init__.py",
        ROOT / "rnn/__init__.py",
        *(p for p in paths if not p.read_text()),
    }
    assert {*paths} - empty == {source(module) for module in every}


def test_nobody_imports_kernels() -> None:
    """That name belongs to another distribution: ours is rnn.kernels."""
    folders = [ROOT / name for name in ("kernels", "rnn", "tests", "bench", "examples")]
    for path in [path for folder in folders for path in folder.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "kernels" for name in names), path


def test_import_is_light() -> None:
    loaded = python(
        "import sys, torch, numpy; before = {*sys.modules}; import rnn; print(*({*sys.modules} - "
        "before))"
    )
    roots = {name.split(".")[0] for name in loaded.split()}
    assert not roots & {"triton", "cupy", "matplotlib", "tqdm", "pytest"}
    assert {name for name in loaded.split() if name.startswith("rnn")} == {
        "rnn",
        "rnn.autograd",
        "rnn.batch",
        "rnn.boundary",
        "rnn.checks",
        "rnn.composite",
        "rnn.convert",
        "rnn.custom_ops",
        "rnn.device_copies",
        "rnn.dispatch",
        "rnn.docstrings",
        "rnn.explain",
        "rnn.flops",
        "rnn.functional",
        "rnn.gates",
        "rnn.init",
        "rnn.gradient_flow",
        "rnn.interop",
        "rnn.layer_call",
        "rnn.layer_types",
        "rnn.modules",
        "rnn.onnx_export",
        "rnn.projection",
        "rnn.resets",
        "rnn.single_step",
        "rnn.streaming",
        "rnn.tbptt",
        "rnn.torch_operators",
        "rnn.transforms",
        "rnn.kernels",
        "rnn.kernels.build_cache",
        "rnn.kernels.cell_checks",
        "rnn.kernels.cells",
        "rnn.kernels.codegen",
        "rnn.kernels.costs",
        "rnn.checkpoint",
        "rnn.segments",
        "rnn.time_options",
        "rnn.gate_products",
        "rnn.cells",
        "rnn.extensions",
        "rnn.regularisers",
        "rnn.stepwise",
        "rnn.normalized",
        "rnn.kernels.adjoint",
        "rnn.kernels.tracing",
        "rnn.stack",
        "rnn.time_parallel",
        "rnn.kernels.cpu",
        "rnn.kernels.cpu.build",
        "rnn.kernels.cpu.calls",
        "rnn.kernels.cpu.structs",
        "rnn.kernels.cpu.native",
        "rnn.kernels.cpu.shipping",
        "rnn.kernels.cpu.targets",
        "rnn.kernels.cpu.workspace",
        "rnn.kernels.forks",
        "rnn.kernels.notices",
        "rnn.kernels.plan",
        "rnn.kernels.planner",
        "rnn.kernels.prediction",
        "rnn.kernels.states",
        "rnn.kernels.types",
    }


def test_without_triton() -> None:
    python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, rnn; rnn.RNN(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()"
    )


CONSTRAINTS = [ROOT / "constraints.txt", *sorted((ROOT / "constraints").glob("*.txt"))]


def pins(path: Path) -> dict[str, str]:
    """The version of each distribution."""
    lines = path.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and line[0] != "#")


def test_every_environment_has_constraints() -> None:
    assert {path.stem for path in CONSTRAINTS[1:]} == {*ENVIRONMENTS}


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_pins_are_allowed(path: Path) -> None:
    """The constraints fit what the package asks for."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {r.name: r for group in texts for r in map(Requirement, group)}
    assert pins(path)
    for name, version in pins(path).items():
        assert name not in asked or version in asked[name].specifier
        if path.stem == "oldest" and name in asked and asked[name].specifier:
            (least,) = asked[name].specifier
            assert f"{version}.".startswith(f"{least.version}."), "the oldest that is allowed"


def copy_source(folder: Path) -> Path:
    """What the wheel is made of, where building leaves nothing behind in the work tree."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "rnn", "kernels"):
        subprocess.run(["cp", "-R", ROOT / name, source], check=True)
    return source


def test_citation_and_release() -> None:
    """They have the package's version, and name files and targets that there are."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    workflow = (ROOT / ".github/workflows/release.yml").read_text()
    scripts = re.findall(r"tests/project/\w+\.py", workflow)
    assert scripts and all((ROOT / script).exists() for script in scripts)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{name}:" in makefile for name in re.findall(r"make (\w+)", workflow))


@pytest.mark.slow
@pytest.mark.index
def test_pins_resolve(tmp_path: Path) -> None:
    """With this Python, from the package index alone: no wheels on disk, no other pins.

    What `make test` installs includes what `make demo` does."""
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--report",
        str(report),
        "--constraint",
        str(ROOT / "constraints.txt"),
        f"{copy_source(tmp_path)}[test,docs,dist]",
    ]
    done = subprocess.run(command, text=True, capture_output=True, env=index_alone())
    assert done.returncode == 0, done.stderr
    found = {}
    for item in json.loads(report.read_text())["install"]:
        name = item["metadata"]["name"].lower().replace("_", "-")
        found[name] = item["metadata"]["version"]
        url = item["download_info"]["url"]
        assert name == "fused-rnn" or url.startswith("http"), url
    assert pins(ROOT / "constraints.txt").items() <= found.items()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_source(folder)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    ]
    done = subprocess.run([*pip, "--wheel-dir", folder, source], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = (
        {str(p.relative_to(ROOT)) for p in modules()}
        | {
            f"rnn/{p.relative_to(ROOT)}"
            for p in (ROOT / "kernels").rglob("*.*")
            if p.is_file() and p.suffix != ".pyc"
        }
        | {"rnn/py.typed"}
    )
    assert names == sources
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", tmp_path, wheel], check=True)
    assert python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport torch, rnn, rnn.kernels.cells\n"
        "rnn.RNN(3, 4)(torch.randn(5, 2, 3)); print(rnn.__file__)",
        "-I",
        path=tmp_path,
    ).startswith(str(tmp_path))


@pytest.mark.parametrize("grad", [False, True])
def test_the_way_in(grad: bool) -> None:
    """A call goes through few files, and comes back to none that it has left."""
    way = trace_call.lstm_call(grad).way_in
    assert not way or (len(way) <= 7 and len({*way}) == len(way)), way
