"""Without a GPU, Triton's kernels run in its interpreter, which must be chosen before Triton is
imported."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def _devices() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return (
        count.value
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        else 0
    )


GPU = _devices() > 0
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes side by side: threads of all of them would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from triton.runtime import interpreter

from rnn import dispatch, layer_call
from rnn.kernels.cpu import native

RNN_SWITCH: Any = torch.backends.cudnn.rnn
# torch 2.10 and 2.11 leave the precision of their RNNs as it is when that of cuDNN or of everything
# is set.
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
INHERITS_PRECISION = TORCH >= (2, 12)


def _repair_interpreter() -> None:
    """Mend two faults of Triton's interpreter.

    It multiplies the bit patterns of bfloat16 operands: here it gets them as float32. That of
    Triton 3.9 makes int32 of comparisons, which it then refuses as masks: here they are bool."""
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot
    load = builder.create_masked_load
    store = builder.create_masked_store

    def upcast(handle: Any) -> Any:
        if handle.dtype.scalar.is_bf16():
            bits = handle.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)
        return handle

    def mask(handle: Any) -> Any:
        return interpreter.TensorHandle(handle.data.astype(bool), interpreter.tl.int1)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, upcast(a), upcast(b), *rest)

    def create_masked_load(self: Any, ptrs: Any, m: Any, *rest: Any, **named: Any) -> Any:
        return load(self, ptrs, mask(m), *rest, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, m: Any, *rest: Any) -> Any:
        return store(self, ptrs, value, mask(m), *rest)

    builder.create_dot = create_dot
    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store


if not GPU:
    _repair_interpreter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=200, help="number of random cases")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
        if item.get_closest_marker("interpreted") and GPU:
            item.add_marker(pytest.mark.skip(reason="runs in test_interpreted.py"))


@pytest.fixture
def set_threads() -> Iterator[Any]:
    """torch.set_num_threads, until the test ends."""
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def precision_set_back() -> Iterator[None]:
    """The switch for TF32 is as it was before each test.

    (pytest's monkeypatch cannot undo it: torch 2.10 serves it by __getattr__.)"""
    before = RNN_SWITCH.fp32_precision
    yield
    RNN_SWITCH.fp32_precision = before


@pytest.fixture(autouse=True)
def interpreted_by_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that launches Triton's kernels on tensors of the CPU is marked as "interpreted".

    On a machine with a GPU kernels are compiled, and refuse such tensors. The tests of test_gpu*.py
    have theirs on the GPU there."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        pytest.fail('launches a kernel of Triton\'s on the CPU without the mark "interpreted"')

    if not request.node.get_closest_marker("interpreted") and not request.path.match(
        "test_gpu*.py"
    ):
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", refuse)


@pytest.fixture
def fresh() -> Iterator[None]:
    """No decision, program or library is remembered, before or after."""
    caches: list[Any] = [dispatch._served, dispatch._plan, dispatch.native_available, native.load]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element that a kernel leaves unwritten is found."""

    def poison(make: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Any:
            array = make(*args, **kwargs)
            if isinstance(array, torch.Tensor):
                if array.is_floating_point() and type(array) is torch.Tensor:
                    # A leaf that requires gradients cannot be filled itself
                    array.detach().fill_(float("nan"))
                return array
            if array.dtype.kind == "f":
                array.fill(np.nan)
            return array

        return filled

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
        (np, "empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    """Those in arguments, also in sequences of them."""
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, (tuple, list)):
        for part in given:
            yield from _tensors(part)


def check_ready(given: Any) -> None:
    """Tensors as a kernel reads them, by address, are contiguous, in memory as large as their shape
    says, with no bit that says that their numbers are others; on one device, and of one dtype where
    they are floating-point numbers."""
    found = list(_tensors(given))
    numbers = [t for t in found if t.is_floating_point()]
    for t in found:
        what = f"a backend was given {list(t.shape)} {t.dtype}, strides {t.stride()}"
        assert t.is_contiguous(), what
        assert not (t.is_neg() or t.is_conj() or t._is_zerotensor()), what
        bytes_ = (t.storage_offset() + t.numel()) * t.element_size() if t.numel() else 0
        assert t.untyped_storage().nbytes() >= bytes_, (
            f"{what}, in {t.untyped_storage().nbytes()} bytes"
        )
        assert t.device == found[0].device or not t.is_floating_point(), f"{what}, on {t.device}"
        assert t.is_floating_point() or t.dtype in (
            torch.int64,
            torch.int32,
            torch.bool,
            torch.uint8,
        ), what
        assert not t.is_floating_point() or t.dtype == numbers[0].dtype, (
            f"{what}, with {numbers[0].dtype}"
        )


class Watched:
    """A backend's module whose functions look at what they are given."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if name not in ("forward", "backward", "step"):
            return function

        def checked(*given: Any) -> Any:
            check_ready(given)
            return function(*given)

        return checked


@pytest.fixture(autouse=True)
def boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `layer_call` gives a backend is ready for it, in every test."""
    find: Callable[[str], Any] = dispatch.module
    backends = ("host", "device", "native")
    monkeypatch.setattr(
        layer_call, "module", lambda name: Watched(find(name)) if name in backends else find(name)
    )


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """Dynamo compiles a function for only so many kinds of arguments, over all tests."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
