"""The C++ of the CPU: how exact its functions are, how it is compiled and kept, and what happens
where it cannot be."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rnn
from rnn import dispatch, single_step
from rnn.kernels import cells
from rnn.kernels.cpu import native
from rnn.kernels.plan import Plan
from tests.cases import LAYER_NAMES, NAMES, OF_EACH_SIZE, check_recurrence
from tests.small import pair

ROOT = Path(__file__).parents[3]
NATIVE = Plan("native")
needs_compiler = pytest.mark.skipif(not native.compiler(), reason="there is no C++ compiler")
# Of tanh and sigmoid: everywhere, close to 0, and all signs.
GRID = torch.cat(
    [torch.linspace(-90, 90, 2**19), *(s * torch.logspace(-44, 1, 2**17) for s in (1, -1))]
)
LAYER = """
import torch, rnn
torch.manual_seed(0)
layer = rnn.RNN(3, 40, plan=rnn.kernels.plan.Plan("native"))
layer(torch.randn(5, 2, 3))[0].sum().backward()
print(float(layer.weight_hh_l0.grad.sum()))
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Path:
    """One that is quick, in $CXX, and no library on disk. Returns a file with a line for each that
    it makes."""
    made = tmp_path / "made"
    script = tmp_path / "quick"
    made.touch()
    script.write_text(
        f"#!/bin/sh\ncase $* in *-shared*) echo made >> {made};; esac\n"
        f"exec {' '.join(native.compiler())} $* -O0\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


def ulps(got: Tensor, want: Tensor) -> Tensor:
    """The error in units of the last place of float32."""
    near = want.abs().float()
    return (got - want).abs() / (
        torch.nextafter(near, torch.tensor(torch.inf)).double() - near.double()
    )


def check(layer: Any, theirs: Any) -> None:
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(layer(x)[0], theirs(x)[0])


@needs_compiler
def test_tanh() -> None:
    layer: Any = rnn.RNN(64, 64, bias=False, plan=NATIVE)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(64))
        y = layer(GRID.view(1, -1, 64))[0].flatten()
    error = ulps(y.double(), GRID.double().tanh())
    assert error.max() <= 4, f"{error.max():.2f} at {GRID[error.argmax()]}"


@needs_compiler
def test_sigmoid() -> None:
    """Of a GRU's z: with h = 1 before and n = 0, it is h after."""
    layer: Any = rnn.GRU(64, 64, bias=False, plan=NATIVE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.weight_ih_l0[64:128] = torch.eye(64)
        x = GRID.view(1, -1, 64)
        y = layer(x, torch.ones(1, x.shape[1], 64))[0].flatten()
    want = GRID.double().sigmoid()
    error = torch.where(GRID < -87, 0.0, ulps(y.double(), want))
    assert error.max() <= 4, f"{error.max():.2f} at {GRID[error.argmax()]}"
    # There it is next to the least normal number, below which digits are lost anyhow.
    assert (y[GRID < -87] >= 0).all() and (y[GRID < -87] <= 1.7e-38).all()


def test_no_compiler(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not native.compiler() and not dispatch.native_available(cells.gru, torch.float32)
    theirs, layer = pair("GRU", 4, 8, dtype=torch.float32)
    x = torch.randn(5, 3, 4)
    said = rnn.explain(layer, x)
    assert "torch's own operator, gru" in said and "there is no C++ compiler" in said, said
    check(layer, theirs)
    with pytest.raises(RuntimeError, match=r'"native" needs a C\+\+ compiler'):
        rnn.GRU(4, 8, plan=NATIVE)(x)


def test_compiler_that_fails(tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    theirs, layer = pair("GRU", 4, 8, dtype=torch.float32)
    with pytest.warns(
        UserWarning, match="without .*broken, which is installed and fails: .*out of order"
    ):
        check(layer, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(5, 7, 4))
        layer(torch.randn(5, 9, 4))
    assert "torch's own operator" in rnn.explain(layer, torch.randn(5, 3, 4))


@needs_compiler
def test_libraries_are_kept(compiler: Path, tmp_path: Path) -> None:
    """On disk, for each cell; and another compiler does not get them."""
    theirs, layer = pair("RNN", 4, 40, dtype=torch.float32)
    check(layer, theirs)
    assert rnn.explain(layer, torch.randn(5, 3, 4)).endswith("(there is a C++ compiler)")
    native.load.cache_clear()
    check(layer, theirs)
    assert len(compiler.read_text().splitlines()) == 1
    native.load(cells.gru, torch.float32)
    assert len(compiler.read_text().splitlines()) == 2
    assert sorted(p.suffix for p in (tmp_path / "cache" / "fused_rnn").iterdir()) == [".so", ".so"]


@needs_compiler
def test_a_disk_that_cannot_be_written_to(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiler))  # a file
    theirs, layer = pair("RNN", 4, 40, dtype=torch.float32)
    check(layer, theirs)
    assert (
        dispatch.native_available(cells.rnn_tanh, torch.float32)
        and len(compiler.read_text().splitlines()) == 1
    )


@needs_compiler
def test_a_library_that_is_spoilt(compiler: Path, tmp_path: Path) -> None:
    """Half a file, as a full disk leaves it: compiled again."""
    native.load(cells.rnn_tanh, torch.float32)
    (library,) = (tmp_path / "cache" / "fused_rnn").iterdir()
    library.unlink()  # not written over: it is in use
    library.write_bytes(b"\x7fELF")
    native.load.cache_clear()
    theirs, layer = pair("RNN", 4, 40, dtype=torch.float32)
    check(layer, theirs)


@needs_compiler
def test_two_processes_compile_at_once(compiler: Path, tmp_path: Path) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-c", LAYER],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and said[0] == said[1] != ""
    assert [p.suffix for p in (tmp_path / "cache" / "fused_rnn").iterdir()] == [".so"]


@needs_compiler
@pytest.mark.parametrize(
    ("cell", "dtype"),
    [
        *((cell, torch.float32) for cell in NAMES),
        ("gru", torch.float64),
    ],
    ids=str,
)
def test_nothing_to_warn_of(cell: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # Not every cell uses all that it is given.
    flags = ["-O0", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-fopenmp"]
    flags += ["-I", str(native.SOURCES), "-x", "c++", "-"]
    done = subprocess.run(
        [*native.compiler(), *native._FLAGS, *flags, "-o", str(tmp_path / "cell.so")],
        text=True,
        input=native.program(getattr(cells, cell), dtype),
        capture_output=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


@needs_compiler
@pytest.mark.parametrize("window", [1, 2**18])
@pytest.mark.parametrize("name", LAYER_NAMES)
@pytest.mark.parametrize("H", [1, 31, 32, 65])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory(
    dtype: torch.dtype,
    bidirectional: bool,
    H: int,
    name: str,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It keeps to the memory that it asks for, and reads nothing there that it has not written."""
    pieces: list[Tensor] = []

    def scratch(like: Tensor, size: int) -> Tensor:
        pieces.append(torch.full((size + 4096,), torch.nan, dtype=like.dtype))
        pieces.append(pieces[-1][size:])
        return pieces[-2]

    monkeypatch.setattr(native, "scratch", scratch)
    monkeypatch.setattr("rnn.kernels.plan.WINDOW", window)
    monkeypatch.setattr("rnn.kernels.plan.WINDOW_ROWS", 1)
    layer = getattr(rnn, name)(5, H, bidirectional=bidirectional, plan=NATIVE, dtype=dtype)
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    for lengths in (None, torch.tensor([2, 4, 1])):
        y = layer(x, lengths=lengths)[0]
        found = y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        assert not any(t.isnan().any() for t in found)
    assert len(pieces) == 8 and all(piece.isnan().all() for piece in pieces[1::2])


@needs_compiler
@pytest.mark.parametrize("window", [1, 2**18])
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("I", [16, 32, 33])
@pytest.mark.parametrize("H", [16, 32])
@pytest.mark.parametrize("cell", OF_EACH_SIZE)
def test_rows_of_a_panel(
    cell: str, H: int, I: int, form: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of x or h of a panel's width are multiplied with as they are, where windows begin and in
    both directions."""
    monkeypatch.setattr("rnn.kernels.plan.WINDOW", window)
    monkeypatch.setattr("rnn.kernels.plan.WINDOW_ROWS", 10)
    check_recurrence(cell, NATIVE, (7, 3, I, H), (False, True), form, True)


def test_example_for_editors() -> None:
    text = (native.SOURCES / "example_cell.h").read_text()
    assert text.partition("#pragma once\n")[2] == native.definitions(cells.rnn_tanh, torch.float32)


@needs_compiler
def test_structs_that_differ(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """A library whose structs are not those of Python is not used."""
    text = native.definitions(cells.rnn_tanh, torch.float32).replace("window[2]", "window[3]")
    monkeypatch.setattr(native, "definitions", lambda *given: text)
    with pytest.raises(RuntimeError, match=r"structs have .* bytes"):
        native.load(cells.rnn_tanh, torch.float32)


def test_pointers_that_are_missing() -> None:
    with pytest.raises(RuntimeError, match="Step begins with 5 pointers, got 4"):
        single_step._pack(native.Step, 1, 4, 0)
