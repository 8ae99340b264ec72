"""How many kernels a call launches beside ours and beside the large products: counted by a mode
that sees torch's operations, on tensors of the CPU."""

import itertools
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rnn import layer_call
from rnn.checks import check_masks
from rnn.kernels import cells
from rnn.kernels.gpu import products
from rnn.kernels.gpu.cuda import launch as cuda
from rnn.kernels.gpu.triton_kernels import cuda_graph
from rnn.kernels.gpu.triton_kernels import launch as triton_launch
from rnn.kernels.plan import Plan
from rnn.kernels.types import Gradients, OutputGrads, Outputs, Save, Weights
from rnn.layer_call import LayerCall
from rnn.layer_types import Masks
from tests.cases import OF_EACH_SIZE

T = 6
B = 5
I = 3
H = 8
PRODUCTS = {"mm", "addmm"}
# What allocates, or is another view of the same memory.
FREE = {
    "empty", "new_empty", "empty_strided", "empty_like", "new_empty_strided", "view",
    "_unsafe_view", "expand", "slice", "select", "t", "transpose", "detach", "alias", "as_strided",
    "unbind",
    "split", "unsqueeze", "squeeze", "resize_", "transpose_", "reshape", "permute", "chunk",
    "split_with_sizes", "is_same_size", "lift_fresh",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    def beside(self) -> int:
        return sum(count for name, count in self.found.items() if name not in PRODUCTS)

    def products(self) -> int:
        return sum(count for name, count in self.found.items() if name in PRODUCTS)


class Functions(TorchFunctionMode):
    """The functions of torch that are called, by name. (Where a mode sees operations, they are
    recorded, and checked in another way.)"""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Cublas:
    """Counts products, and computes none."""

    def __init__(self) -> None:
        self.products = 0

    def cublasGemmEx_64(self, *_: Any) -> int:
        self.products += 1
        return 0


class Stream:
    cuda_stream = 0


@pytest.fixture(autouse=True)
def cublas(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cublas]:
    """A GPU on which neither kernels nor graphs do anything; with as many multiprocessors as a grid
    can want."""
    # no poison, which fills what is allocated
    monkeypatch.undo()
    library = Cublas()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "load", lambda *_: lambda *_: None)
        patch.setattr(triton_launch, "_launch_once", lambda *_: None)
        patch.setattr(layer_call, "_interpreted", lambda: True)
        patch.setattr(triton_launch.triton.knobs.runtime, "interpret", False)
        patch.setattr(products, "_library", lambda: library)
        replay = SimpleNamespace(replay=lambda stream: None)
        patch.setattr(cuda_graph, "Graph", lambda launch, products: replay)
        patch.setattr(cuda_graph.StepGraph, "lasting", lambda self, make: make())
        patch.setattr(cuda_graph, "STEPS_PER_GRAPH", 2)
        properties = SimpleNamespace(multi_processor_count=10**6)
        for name, value in (
            ("get_device_properties", lambda _: properties),
            ("current_stream", Stream),
            ("current_device", lambda: -1),
            ("current_blas_handle", lambda: 5),
            ("is_current_stream_capturing", lambda: False),
            ("get_allocator_backend", lambda: "native"),
        ):
            patch.setattr(torch.cuda, name, value)
        patch.setattr(Tensor, "is_cuda", True)
        cuda_graph.step_graph.cache_clear()
        yield library
    cuda_graph.step_graph.cache_clear()


def masks_of(form: str, resets: bool) -> Masks:
    lengths = torch.tensor([6, 2, 3, 0, 1]) if form == "lengths" else None
    batch_sizes = torch.tensor([5, 5, 4, 2, 1, 1]) if form == "packed" else None
    return Masks(lengths, batch_sizes, torch.rand(T, B) < 0.3 if resets else None)


# The switch of large products is at its default, which is not that of a plan in TF32.
PLANS = {
    "cluster": Plan("cuda", "cluster", 16, 8, 0, 1, precision="tf32"),
    "cuda grid": Plan("cuda", "grid", 16, 8, 0, 1, precision="tf32", slice_tiles=1),
    "block": Plan("triton", "block", 16, 8, 16, 1, precision="tf32"),
    "fused": Plan("triton", "block", 16, 8, 16, 1, True, precision="tf32"),
    "grid": Plan("triton", "grid", 16, 8, 16, 1, precision="tf32"),
    "launch": Plan("triton", "launch", 16, 8, 16, 1, precision="tf32"),
    "library": Plan("triton", "library", 16, 8, 16, 1, precision="tf32"),
}


class Count(NamedTuple):
    """Launches beside our kernels: of the forward pass, of the backward pass beside its products,
    and these."""

    forward: int
    backward: int
    products: int


def counted(
    cublas: Cublas,
    cell: cells.Cell,
    dtype: torch.dtype,
    form: str,
    hx: bool,
    plan: Plan = PLANS["cluster"],
    reverse: tuple[int, ...] = (0,),
    without: str = "",
    resets: bool = False,
) -> Count:
    """`without` is the gradient that does not come: "dy", "dlast" or none."""
    masks = masks_of(form, resets)
    N = len(reverse)
    R = 18 if form == "packed" else T * B
    x = torch.randn((R, I) if form == "packed" else (T, B, I), dtype=dtype)
    w_ih, w_hh, b_ih, b_hh = (
        torch.randn(N * cell.gates * H, *more, dtype=dtype) for more in ((I,), (H,), (), ())
    )
    weights = Weights(w_ih, w_hh, b_ih, b_hh)
    states = [torch.randn(N, B, H, dtype=dtype) for _ in range(cell.states)] if hx else None
    call = LayerCall(cell, plan, x, masks, reverse)

    def forward() -> Outputs:
        return layer_call.forward(call, x, weights, states, Save.ACTIVATIONS)

    y, others, last, saved = forward()
    dlast = [torch.randn_like(s) if hx and without != "dlast" else None for s in last]
    grads = OutputGrads(None if without == "dy" else torch.randn_like(y), None, dlast)
    needs: Gradients[bool] = Gradients(True, True, True, True, True, hx)
    outputs = Outputs(y, others, None, saved)

    def backward() -> None:
        layer_call.backward(call, x, weights, states, outputs, grads, needs)

    backward()
    # not those of the first call, which captures
    before = cublas.products
    with Launches() as going:
        forward()
    of_forward = going.beside() + going.products() + cublas.products - before
    before = cublas.products
    with Launches() as back:
        backward()
    return Count(of_forward, back.beside(), back.products() + cublas.products - before)


@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_EACH_SIZE)
def test_launches(name: str, dtype: torch.dtype, form: str, hx: bool, cublas: Cublas) -> None:
    """Forward three with the product of the input, backward six beside its products."""
    found = counted(cublas, getattr(cells, name), dtype, form, hx)
    assert 1 <= found.forward <= 3 and found.backward <= 6
    assert 3 <= found.products <= 4


@pytest.mark.parametrize("without", ["", "dy", "dlast"])
@pytest.mark.parametrize("reverse", [(0,), (0, 1)], ids=["one way", "both ways"])
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("scope", PLANS)
def test_launches_of_every_plan(
    scope: str, form: str, reverse: tuple[int, ...], without: str, cublas: Cublas
) -> None:
    """Likewise, with the words of a grid, h as programs exchange it, a graph's table and what its
    products read."""
    for name, dtype, hx in itertools.product(
        OF_EACH_SIZE, (torch.float32, torch.bfloat16), (False, True)
    ):
        cell = getattr(cells, name)
        found = counted(cublas, cell, dtype, form, hx, PLANS[scope], reverse, without)
        case = name, dtype, hx, found
        assert found.forward <= 3, case
        assert found.backward <= 6, case
        assert found.products <= 2 + 2 * len(reverse), case


@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("scope", PLANS)
def test_launches_with_resets(scope: str, form: str, cublas: Cublas) -> None:
    """In backward with marks, and x and h where there are none."""
    for name, dtype, reverse, without in itertools.product(
        OF_EACH_SIZE, (torch.float32, torch.bfloat16), ((0,), (0, 1)), ("", "dy", "dlast")
    ):
        cell = getattr(cells, name)
        found = counted(cublas, cell, dtype, form, True, PLANS[scope], reverse, without, True)
        case = name, dtype, reverse, without, found
        assert found.forward <= 3, case
        assert found.backward <= 6, case
        assert found.products <= 2 + 2 * len(reverse), case


@pytest.mark.parametrize("scope", PLANS)
def test_kernels_find_words_at_zero(scope: str, cublas: Cublas) -> None:
    """Marks where there are resets, and what blocks of a grid exchange."""
    made = list[Tensor]()
    found = list[int]()

    def full(make: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            t: Tensor = make(*args, **kwargs)
            if not t.is_floating_point():
                made.append(t.fill_(-1))
            return t

        return filled

    def launch(*_: Any) -> None:
        assert not any(t.any() for t in made)
        found.append(len(made))
        made.clear()

    for dtype in (torch.float32, torch.bfloat16):
        found.clear()
        # undone before the fixture's
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((torch, "empty"), (Tensor, "new_empty")):
                patch.setattr(owner, name, full(getattr(owner, name)))
            patch.setattr(cuda, "load", lambda *_: launch)
            patch.setattr(triton_launch, "_launch_once", launch)
            counted(cublas, cells.gru, dtype, "lengths", False, PLANS[scope], resets=True)
        exchanged = "grid" in scope
        assert {exchanged, 1 + exchanged} <= {*found}


def test_slices_of_the_batch_share_a_compiled_kernel(
    cublas: Cublas, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = set[Any]()

    def load(*kind: Any) -> Any:
        loaded.add(kind)
        return lambda *_: None

    monkeypatch.setattr(cuda, "load", load)
    for tiles in (0, 1, 2):
        plan = PLANS["cuda grid"]._replace(slice_tiles=tiles)
        counted(cublas, cells.gru, torch.bfloat16, "padded", False, plan)
    assert len(loaded) == 2, "one forward, one backward"


def test_lengths_on_the_gpu_are_checked_in_one() -> None:
    """Which an assertion on the device ends, as an index that is out of range."""
    x = torch.randn(T, B, I)
    lengths = torch.tensor([6, 2, 3, 0, 1])
    wrong = [torch.tensor([6, 2, 3, 0, 7]), torch.tensor([6, 2, 3, -1, 1])]
    for each in (lengths, lengths.int()):
        with Functions() as seen:
            check_masks(x, Masks(each), T, B)
        launching = {"index_select", "_assert_async", "all", "ge", "le", "ne", "any"}
        launching |= {"assert_async", "and", "lt", "gt"}
        assert [name for name in seen.names if name.strip("_") in launching] == ["index_select"]
    for each in wrong:
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
            check_masks(x, Masks(each), T, B)
    check_masks(x[:, :0], Masks(lengths[:0]), T, 0)
