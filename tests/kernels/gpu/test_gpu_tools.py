"""PyTorch's toolbox on a GPU: streams, devices, CUDA graphs, autocast, derivatives, the compiler.
What needs no GPU runs in Triton's interpreter without one."""

import copy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn
from tests.kernels.gpu import sanitize
from tests.kernels.gpu.test_gpu import DEVICE, SCOPES, in_mode, plan_for
from tests.small import LAYERS, check_scaled_step, gradients, pair

ROOT = Path(__file__).parents[3]
T = 20
B = 9
I = 5
H = 18
gpu_only = pytest.mark.gpu
IN_SCOPES = pytest.mark.parametrize("scope", SCOPES)


@pytest.fixture(autouse=True)
def ieee() -> None:
    in_mode("ieee")


def build(name: str, scope: str, **options: Any) -> Any:
    return getattr(rnn, name)(
        I, H, bidirectional=True, device=DEVICE, plan=plan_for(scope, H), **options
    )


def randn(*shape: int) -> Tensor:
    return torch.randn(shape or (T, B, I), device=DEVICE, requires_grad=True)


def late(x: Tensor) -> Tensor:
    """x, on the current stream, in memory that holds something else for the next tenth of a
    second."""
    copied = torch.zeros_like(x)
    torch.cuda._sleep(200_000_000)
    return copied.copy_(x.detach()).requires_grad_()


@gpu_only
@IN_SCOPES
@LAYERS
def test_current_stream(name: str, scope: str) -> None:
    """A kernel on another stream would not wait for its input."""
    layer = build(name, scope)
    x = randn()
    stream = torch.cuda.Stream()
    want = gradients(layer, x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        got = gradients(layer, late(x))
    stream.synchronize()
    torch.testing.assert_close(got, want)


@gpu_only
@IN_SCOPES
def test_streams_of_several_threads(scope: str) -> None:
    layer = build("GRU", scope)
    inputs = [randn() for _ in range(16)]
    want = [gradients(layer, x) for x in inputs]
    torch.cuda.synchronize()

    def work(x: Tensor) -> list[Tensor]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = gradients(layer, late(x))
        stream.synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(work, inputs)), want)


@gpu_only
@IN_SCOPES
@LAYERS
def test_other_device(name: str, scope: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    layer = build(name, scope)
    x = randn()
    want = gradients(layer, x)
    there = copy.deepcopy(layer).to("cuda:1")
    got = gradients(there, x.detach().to("cuda:1").requires_grad_())
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    torch.testing.assert_close([t.cpu() for t in got], [t.cpu() for t in want])


def warmed_up(run: Callable[[], Any]) -> None:
    """As torch asks for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)


@gpu_only
@IN_SCOPES
@pytest.mark.parametrize("masks", [False, True], ids=["padded", "masks"])
@LAYERS
def test_graph_of_inference(name: str, masks: bool, scope: str) -> None:
    """Captured once, with lengths and resets that change like the input."""
    layer = build(name, scope)
    graph = torch.cuda.CUDAGraph()

    def drawn() -> list[Tensor]:
        lengths = torch.randint(0, T + 1, (B,), device=DEVICE)
        resets = torch.rand(T, B, device=DEVICE) < 0.2
        return [randn().detach(), *([lengths, resets] if masks else [])]

    def run(given: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            y, h = layer(given[0], **dict(zip(("lengths", "resets"), given[1:])))
        return [y, *(h if isinstance(h, tuple) else [h])]

    held = drawn()
    warmed_up(lambda: run(held))
    with torch.cuda.graph(graph):
        found = run(held)
    for _ in range(3):
        new = drawn()
        for old, t in zip(held, new):
            old.copy_(t)
        graph.replay()
        torch.testing.assert_close(found, run(new))


@gpu_only
@IN_SCOPES
@LAYERS
def test_graph_of_training(name: str, scope: str) -> None:
    """A whole step, optimizer and all, replayed on new data, against the same steps without a
    graph."""
    layer = build(name, scope)
    other = copy.deepcopy(layer)
    x = randn().detach()
    target = randn(T, B, 2 * H).detach()
    graph = torch.cuda.CUDAGraph()

    def step(layer: Any, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(layer(x)[0], target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    optimizers = [torch.optim.SGD(which.parameters(), lr=0.1) for which in (layer, other)]
    start = copy.deepcopy(layer.state_dict())
    warmed_up(lambda: step(layer, optimizers[0], x, target))
    optimizers[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step(layer, optimizers[0], x, target)
    layer.load_state_dict(start)
    for _ in range(3):
        new = randn().detach(), randn(T, B, 2 * H).detach()
        x.copy_(new[0])
        target.copy_(new[1])
        graph.replay()
        torch.testing.assert_close(loss, step(other, optimizers[1], *new))
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


@gpu_only
@IN_SCOPES
@LAYERS
def test_graphed_callable(name: str, scope: str) -> None:
    layer = build(name, scope)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (randn(),))
    for _ in range(2):
        x = randn()
        torch.testing.assert_close(gradients(graphed, x), gradients(layer, x))


@gpu_only
@LAYERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    layer = getattr(rnn, name)(I, H, device=DEVICE)
    x = randn()
    want = gradients(layer, x)
    with torch.autocast("cuda", dtype):
        got = gradients(layer, x)
    assert [g.dtype for g in got] == [dtype, *[torch.float32] * (len(got) - 1)]
    largest = [g.abs().max().item() for g in want]
    for g, t, scale in zip(got, want, largest):
        torch.testing.assert_close(g.float(), t, rtol=0, atol=0.05 * scale)
    check_scaled_step(layer, x, "cuda", dtype)


def on_device(name: str, scope: str) -> tuple[Any, Any]:
    """Torch's layer on the CPU in float64, and ours."""
    theirs, ours = pair(name, I, H)
    ours.plan = plan_for(scope, H)
    return theirs, ours.to(DEVICE, torch.float32)


@pytest.mark.parametrize("scope", SCOPES if DEVICE == "cuda" else ["fused"])
@LAYERS
def test_second_derivatives(name: str, scope: str) -> None:
    found = []
    x = torch.randn(4, B, I, dtype=torch.float64)
    for layer in on_device(name, scope):
        leaf = x.to(layer.weight_hh_l0).requires_grad_()
        grads = torch.autograd.grad(
            layer(leaf)[0].sin().sum(), [leaf, layer.weight_hh_l0], create_graph=True
        )
        more = torch.autograd.grad(
            grads[0].pow(2).sum() + grads[1].pow(2).sum(), [leaf, *layer.parameters()]
        )
        found.append([t.detach().cpu().double() for t in (*grads, *more)])
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@gpu_only
@LAYERS
def test_transforms(name: str) -> None:
    """Tangents, and gradients of each sample, in the formula and in kernels one after another."""
    theirs, ours = on_device(name, "fused")
    x, v = torch.randn(2, 4, B, I, dtype=torch.float64)
    # A gradient, twice, is a tangent
    u = torch.zeros(4, B, H, dtype=torch.float64, requires_grad=True)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(theirs(leaf)[0], leaf, u, create_graph=True)
    (want,) = torch.autograd.grad(g, u, v)
    slope = torch.func.jvp(
        lambda x: ours(x)[0], (x.to(DEVICE, torch.float32),), (v.to(DEVICE, torch.float32),)
    )[1]
    torch.testing.assert_close(slope.cpu().double(), want, rtol=1e-4, atol=1e-5)
    samples = torch.randn(3, 4, B, I, device=DEVICE)
    weights = dict(ours.named_parameters())
    each = torch.vmap(ours)(samples)[0]
    torch.testing.assert_close(each, torch.stack([ours(one)[0] for one in samples]))

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, weights, (x,))[0].sin().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, samples)
    for k, one in enumerate(samples):
        alone = torch.autograd.grad(ours(one)[0].sin().sum(), list(ours.parameters()))
        torch.testing.assert_close(
            [found[n][k] for n in weights], list(alone), rtol=1e-4, atol=1e-4
        )


@gpu_only
@pytest.mark.parametrize(
    "options", [dict(), dict(dynamic=True), dict(mode="reduce-overhead")], ids=str
)
@LAYERS
def test_compile(name: str, options: dict[str, Any]) -> None:
    """By the compiler that a user has, with its CUDA graphs too."""
    torch.compiler.reset()
    layer = getattr(rnn, name)(I, H, 2, bidirectional=True, batch_first=True, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, **options)
    for sizes in ((B, T), (B, T), (4, 33)):
        x = randn(*sizes, I)
        torch.compiler.cudagraph_mark_step_begin()
        got = [t.clone() for t in gradients(compiled, x)]
        torch.testing.assert_close(got, gradients(layer, x), rtol=1e-4, atol=1e-4)


WRONG_LENGTHS = """
import sys, torch, rnn
device = sys.argv[1]
layer = rnn.LSTM(3, 6, device=device)
y, _ = layer(torch.randn(5, 2, 3, device=device), lengths=torch.tensor([2, 6], device=device))
y.sum().item()
"""


def test_wrong_lengths() -> None:
    """On a GPU an assertion there, and it cannot be used again in that process; on the CPU at
    once."""
    done = subprocess.run(
        [sys.executable, "-c", WRONG_LENGTHS, DEVICE], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode != 0
    assert (
        "device-side assert" if DEVICE == "cuda" else "Expected lengths between 0"
    ) in done.stderr


def test_sanitized_cases() -> None:
    assert sanitize.cases(every=7) == -(-4 * len(SCOPES) * 3 // 7)


@pytest.mark.parametrize(
    ("output", "code", "status"),
    [
        (sanitize.DONE, 0, 0),
        (sanitize.DONE, 1, 1),
        ("", 0, 1),
        ("Error: Device not supported", 1, 2),
    ],
)
def test_what_a_sanitizer_says(
    output: str,
    code: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of a program that stands in for it: it says something, and exits with something."""
    program = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize, "GPU", True)
    assert sanitize.main(["memcheck"]) == 2
    assert "no compute-sanitizer" in capfd.readouterr().out
    program.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    # So that the cases alone are done at once
    monkeypatch.setattr(sanitize, "MODULE", sanitize.DONE)
    assert sanitize.main(["memcheck", "racecheck"]) == status
    shown = capfd.readouterr().out
    assert shown.count("== memcheck") == shown.count("== racecheck") == 2
    assert sanitize.main(["hammer"]) == 2
