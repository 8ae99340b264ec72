"""The GPU kernels at the ends of what they are for: long, wide, large and small layers, memory that
is short, and the first call. On a GPU; in Triton's interpreter what it is quick enough for."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn
from rnn.kernels import cells
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.gpu.tensors import BackwardTensors, ForwardTensors
from rnn.kernels.gpu.triton_kernels import launch as gpu
from rnn.kernels.types import Layout
from tests.cases import Case, build, check, check_recurrence, close, thrice
from tests.conftest import GPU
from tests.kernels.gpu.test_gpu import CUDA, DEVICE, MODES, SCOPES, chosen, in_mode, plan_for
from tests.small import gradients

ROOT = Path(__file__).parents[3]
gpu_only = pytest.mark.gpu
HIDDEN = [
    1,
    2,
    3,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
    511,
    512,
    513,
    1000,
    1023,
    1024,
    1025,
    2047,
    2048,
    2049,
    3000,
    4096,
]
KINDS = [
    ("RNN", "ieee"),
    ("LSTM", "bfloat16"),
    ("GRU", "tf32"),
    ("RNN", "bfloat16"),
    ("LSTM", "ieee"),
    ("GRU", "float16"),
    ("RNN", "tf32"),
]


@pytest.fixture(autouse=True)
def ieee() -> None:
    in_mode("ieee")


def check_mode(case: Case, mode: str) -> None:
    """The chosen plan, against float64 on the same device."""
    case = case._replace(dtype=in_mode(mode))
    thrice(
        lambda seed: check(case, chosen(case, mode), DEVICE, seed, mode == "tf32", oracle=DEVICE)
    )


@pytest.mark.parametrize(
    ("hidden", "kind", "mode"),
    [
        pytest.param(H, *kind, marks=[] if GPU or H == 17 else gpu_only)
        for k, H in enumerate(HIDDEN)
        for j, kind in enumerate(KINDS)
        if (k + j) % 3 == 0
    ],
)
def test_hidden_sizes(hidden: int, kind: str, mode: str) -> None:
    sizes = (4, 37) if GPU else (2, 2)
    check_mode(Case(*sizes, 5, hidden, mode=kind, bidirectional=hidden < 1000), mode)


@pytest.mark.parametrize("mode", ["ieee", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(100_000, 1, 1, 16),
        Case(100_000, 3, 8, 64, mode="LSTM"),
        Case(100_000, 2, 5, 300),
        Case(100_000, 1, 4, 200, mode="GRU"),
        Case(20_000, 5, 40, 1030),
    ]
    if GPU
    else [Case(20, 1, 1, 16)],
    ids=str,
)
def test_long(case: Case, mode: str) -> None:
    check_mode(case, mode)


@pytest.mark.parametrize("mode", ["tf32", "float16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(5, 4096, 3, 1),
        Case(20, 4096, 16, 64, mode="LSTM"),
        Case(5, 4096, 33, 257),
        Case(3, 4096, 64, 1024),
        Case(7, 4096, 8, 100, "packed", bidirectional=True, mode="GRU"),
    ]
    if GPU
    else [Case(2, 70, 3, 1)],
    ids=str,
)
def test_wide(case: Case, mode: str) -> None:
    check_mode(case, mode)


@pytest.mark.parametrize("scope", SCOPES if GPU else ["fused"])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33] if GPU else [1, 2])
def test_steps(T: int, scope: str) -> None:
    """What a graph of several steps has to get right, in layers of one size after another."""
    for form in ("padded", "packed"):
        check_recurrence(
            "gru",
            plan_for(scope, 18),
            (T, 5, 3, 18),
            (False, True),
            form,
            form == "packed",
            device=DEVICE,
        )


def watch_compilers(monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None]) -> None:
    """Has the name of each kernel told that Triton compiles, or that CuPy loads."""
    from triton.runtime.jit import JITFunction

    compiler = JITFunction._do_compile
    load = cuda.load.__wrapped__

    def compile_noted(kernel: Any, *arguments: Any) -> Any:
        tell(kernel.fn.__name__)
        return compiler(kernel, *arguments)

    @cache
    def load_noted(*arguments: Any) -> Any:
        tell("backward.cu" if arguments[3] else "forward.cu")
        return load(*arguments)

    monkeypatch.setattr(JITFunction, "_do_compile", compile_noted)
    monkeypatch.setattr(cuda, "load", load_noted)


def kernels_of(scope: str) -> list[str]:
    """What a layer's calls of any length compile."""
    if scope in CUDA:
        return ["backward.cu", "forward.cu"]
    # alone, and in a graph of steps
    kinds = 2 if scope in ("launch", "library") else 1
    return sorted(kinds * ["backward_kernel", "forward_kernel"])


@gpu_only
@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_is_compiled_for_a_batch_or_a_length(
    scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = list[str]()
    watch_compilers(monkeypatch, compiled.append)
    layer = rnn.LSTM(11, 27, device=DEVICE, plan=plan_for(scope, 27))
    for T in (5, 40):
        gradients(layer, torch.randn(T, 9, 11, device=DEVICE, requires_grad=True))
    assert sorted(compiled) == kernels_of(scope)
    for T, B in ((1, 1), (16, 16), (40, 300), (33, 500)):
        gradients(layer, torch.randn(T, B, 11, device=DEVICE, requires_grad=True))
    assert sorted(compiled) == kernels_of(scope)


def far_apart(scope: str, reverse: int, starts: list[int], R: int) -> list[Tensor]:
    """Three steps of four sequences, in rows that start where it is said of R: what both kernels
    write there."""
    cell = cells.lstm
    H = 16
    sizes = [4, 3, 2]
    rows = Layout(
        3,
        [reverse],
        sizes,
        torch.tensor([3, 3, 2, 1], device=DEVICE),
        torch.tensor(starts, device=DEVICE),
    )
    generator = torch.Generator().manual_seed(0)
    at = torch.cat([torch.arange(start, start + size) for start, size in zip(starts, sizes)]).to(
        DEVICE
    )

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, torch.float16)

    def spread(width: int) -> Tensor:
        t = torch.empty(R, width, dtype=torch.float16, device=DEVICE)
        t[at] = randn(len(at), width)
        return t

    x = spread(4 * H)
    w_hh = randn(4 * H, H) / 4
    s0 = randn(2, 4, H)
    plan = plan_for(scope, H, torch.float16)
    dy, y, states, saved, dr, came = (
        spread(H),
        *(s0.new_empty(shape) for shape in ((R, H), (1, R, H), (4, R, H), (R, 4 * H), (R, H))),
    )
    given = tuple(s0[:, None])
    last = tuple(torch.empty_like(s) for s in given)
    dfirst = tuple(torch.empty_like(s) for s in given)
    # The kernels alone: products with the input would touch all rows.
    masks = rows.lengths, rows.offsets, None
    B = len(s0[0])
    outputs = y, states, saved
    forward = ForwardTensors(x, None, w_hh, None, None, *outputs, *masks, given, last)
    gpu.launch(cell, plan, rows, forward, B)
    grads = dy, None, None, dr, came, None
    ends = given, (None, None), dfirst
    backward = BackwardTensors(w_hh, *outputs, *grads, *masks, *ends)
    gpu.launch(cell, plan, rows, backward, B)
    return [y[at], states[:, at], *last, saved[:, at], dr[at], *dfirst, came[at]]


@pytest.mark.parametrize(("scope", "reverse"), [("block", 0), ("grid", 1), ("launch", 0)])
def test_rows_far_apart(scope: str, reverse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tensors of more than 2^31 elements. Memory that nobody writes to takes no room, on the
    CPU."""
    monkeypatch.undo()  # no poison
    R = 45_000_000  # 64 R and 3 planes of 16 R are more
    if GPU and torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    try:
        torch.empty(R, 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("needs 6 GB of memory that can be asked for")
    found = [
        far_apart(scope, reverse, *where) for where in (([0, 4, 7], 9), ([0, R // 2, R - 2], R))
    ]
    assert all(t.isfinite().all() for t in found[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "hidden"), [("RNN", 64), ("LSTM", 32)])
@pytest.mark.parametrize("scope", ["block", "grid", "launch"] if GPU else ["block"])
def test_more_than_2_31_elements(kind: str, hidden: int, scope: str) -> None:
    """Three sequences of many, alone, against float64: the gradients that come into the others are
    0."""
    if GPU and torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    case = Case(0, 0, 40, hidden, mode=kind, dtype=torch.bfloat16)
    B = 4096 if scope == "launch" else 512
    B, T = (B, 2**31 // (hidden * B * (4 if kind == "LSTM" else 1)) + 3) if GPU else (4, 5)
    exact = build(nn, case, dtype=torch.bfloat16).double()
    theirs = build(nn, case, dtype=torch.bfloat16)
    ours = build(rnn, case, dtype=torch.bfloat16, plan=plan_for(scope, hidden, torch.bfloat16))
    for layer in (exact, theirs, ours):
        layer.load_state_dict(exact.state_dict())
        layer.to(DEVICE)
    picked = [0, B // 2, B - 1]
    x = torch.randn(T, B, 40, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    d = torch.randn(T, len(picked), hidden, device=DEVICE, dtype=torch.bfloat16)
    y, _ = ours(x)
    dy = torch.zeros_like(y)
    dy[:, picked] = d
    dx, *grads = torch.autograd.grad(y, [x, *ours.parameters()], dy)
    names = ["y", "dx", *dict(ours.named_parameters())]
    got = dict(zip(names, [y[:, picked], dx[:, picked], *grads]))
    dx[:, picked] = 0
    assert not dx.any()
    del y, dy, dx
    few = x.detach()[:, picked]
    found = []
    for layer in (theirs, exact):
        leaf = few.to(layer.weight_hh_l0.dtype).requires_grad_()
        y = layer(leaf)[0]
        found.append(
            [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], d.to(y.dtype))]
        )
    allowed, want = (dict(zip(names, values)) for values in found)
    close(got, allowed, want)


@pytest.mark.parametrize("scope", SCOPES if GPU else ["fused"])
def test_any_allocation_may_fail(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own error, and the layer is as before."""
    layer = rnn.LSTM(3, 6, device=DEVICE, plan=plan_for(scope, 6))
    x = torch.randn(1, 4, 3, device=DEVICE)
    x.requires_grad_()
    want = gradients(layer, x)
    failures = 0
    while True:
        left = [failures]

        def scarce(make: Any, left: list[int] = left) -> Any:
            def made(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return make(*args, **kwargs)

            return made

        with monkeypatch.context() as patch:
            for owner, name in (
                (torch.Tensor, "new_empty"),
                (torch.Tensor, "new_zeros"),
                (torch, "zeros"),
            ):
                patch.setattr(owner, name, scarce(getattr(owner, name)))
            try:
                gradients(layer, x)
                break
            except torch.OutOfMemoryError:
                failures += 1
    torch.testing.assert_close(gradients(layer, x), want, rtol=0, atol=0)
    assert failures > 5


@gpu_only
@pytest.mark.parametrize("scope", SCOPES)
def test_out_of_memory(scope: str) -> None:
    """In the forward and in the backward pass."""
    layer = rnn.LSTM(64, 27, device=DEVICE, plan=plan_for(scope, 27))
    x = torch.randn(9, 16, 64, device=DEVICE)
    x.requires_grad_()
    want = gradients(layer, x)
    large = torch.randn(500, 512, 64, device=DEVICE, requires_grad=True)
    loss = layer(large)[0].sum()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            layer(large)
        torch.testing.assert_close(gradients(layer, x), want, rtol=0, atol=0)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            loss.backward()
        torch.testing.assert_close(gradients(layer, x), want, rtol=0, atol=0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(p.grad is None for p in layer.parameters())
    assert all(g.isfinite().all() for g in gradients(layer, large))


FIRST_CALL = """
import sys, time, torch
device, kind, hidden = sys.argv[1], sys.argv[2], int(sys.argv[3])
dtype = getattr(torch, sys.argv[4])
torch.ones(2, 2, device=device).mm(torch.ones(2, 2, device=device)).sum().item()
import rnn
layer = getattr(rnn, kind)(hidden, hidden, device=device, dtype=dtype)
start = time.perf_counter()
layer(torch.randn(50, 16, hidden, device=device, dtype=dtype))[0].sum().backward()
layer.weight_hh_l0.grad.sum().item()
print(time.perf_counter() - start)
"""


@gpu_only
@pytest.mark.parametrize(
    ("kind", "hidden", "mode"),
    [("RNN", 256, "bfloat16"), ("LSTM", 128, "ieee"), ("GRU", 512, "float16")],
)
def test_first_call(
    kind: str, hidden: int, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forward and backward in less than 5 s, in the next process less than in the first."""
    dtype = str(MODES[mode]).removeprefix("torch.")
    seconds = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL, DEVICE, kind, str(hidden), dtype],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env={
                **os.environ,
                "TRITON_CACHE_DIR": str(tmp_path / "triton"),
                "CUPY_CACHE_DIR": str(tmp_path / "cupy"),
            },
        )
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    with capsys.disabled():
        print(
            f"\n{kind} {hidden} {dtype}: first call {seconds[0]:.2f} s, in the next process "
            f"{seconds[1]:.2f} s"
        )
    assert seconds[0] < 5
    assert seconds[1] < seconds[0]
