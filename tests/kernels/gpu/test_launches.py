"""How many kernels a call launches beside ours and beside the large products: counted by a mode
that sees torch's operations, on tensors of the CPU."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rnn import layer_call
from rnn.checks import check_masks
from rnn.kernels import cells
from rnn.kernels import gpu as device
from rnn.kernels.plan import Plan
from rnn.kernels.types import Gradients, OutputGrads, Outputs, Save, Weights
from rnn.layer_call import LayerCall
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
    "split_with_sizes", "is_same_size",
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


class Functions(TorchFunctionMode):
    """The functions of torch that are called, by name. (Where a mode sees operations, they are
    recorded, and checked in another way.)"""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # no poison, which fills what is allocated
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_launcher", lambda plan: lambda *_: None)
        yield


def masks_of(form: str) -> tuple[Any, Any, Any]:
    if form == "packed":
        return None, torch.tensor([5, 5, 4, 2, 1, 1]), None
    return (torch.tensor([6, 2, 3, 0, 1]) if form == "lengths" else None), None, None


def counted(cell: cells.Cell, dtype: torch.dtype, form: str, hx: bool) -> tuple[int, int]:
    """Forward and backward, of one direction."""
    masks = masks_of(form)
    R = 18 if form == "packed" else T * B
    x = torch.randn((R, I) if form == "packed" else (T, B, I), dtype=dtype)
    w_ih, w_hh, b_ih, b_hh = (
        torch.randn(cell.gates * H, *more, dtype=dtype) for more in ((I,), (H,), (), ())
    )
    weights = Weights(w_ih, w_hh, b_ih, b_hh)
    states = [torch.randn(1, B, H, dtype=dtype) for _ in range(cell.states)] if hx else None
    plan = Plan("cuda", "cluster", 16, 8, 0, 1, precision="tf32")
    call = LayerCall(cell, plan, x, masks, [0])
    with Launches() as forward:
        y, others, last, saved = layer_call.forward(call, x, weights, states, Save.ACTIVATIONS)
    dlast = [torch.randn_like(s) for s in last] if hx else [None] * cell.states
    grads = OutputGrads(torch.randn_like(y), None, dlast)
    needs: Gradients[bool] = Gradients(True, True, True, True, True, hx)
    outputs = Outputs(y, others, None, saved)
    with Launches() as backward:
        layer_call.backward(call, x, weights, states, outputs, grads, needs)
    assert forward.found["addmm"] == 1 and 3 <= sum(backward.found[p] for p in PRODUCTS) <= 4
    return forward.beside() + 1, backward.beside()


@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_EACH_SIZE)
def test_launches(name: str, dtype: torch.dtype, form: str, hx: bool) -> None:
    """Forward three with the product of the input, backward six beside its products. With lengths
    each has one more, which sets the rows past an end to 0, and backward three that leave those of
    x out."""
    forward, backward = counted(getattr(cells, name), dtype, form, hx)
    more = form == "lengths"
    assert forward <= 3 + more
    assert backward <= 6 + 4 * more


def test_lengths_on_the_gpu_are_checked_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which an assertion on the device ends, as an index that is out of range."""
    x = torch.randn(T, B, I)
    lengths = torch.tensor([6, 2, 3, 0, 1])
    wrong = [torch.tensor([6, 2, 3, 0, 7]), torch.tensor([6, 2, 3, -1, 1])]
    monkeypatch.setattr(Tensor, "is_cuda", True)
    for each in (lengths, lengths.int()):
        with Functions() as seen:
            check_masks(x, (each, None, None), T, B)
        launching = {"index_select", "_assert_async", "all", "ge", "le", "ne", "any"}
        launching |= {"assert_async", "and", "lt", "gt"}
        assert [name for name in seen.names if name.strip("_") in launching] == ["index_select"]
    for each in wrong:
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
            check_masks(x, (each, None, None), T, B)
    check_masks(x[:, :0], (lengths[:0], None, None), T, 0)
