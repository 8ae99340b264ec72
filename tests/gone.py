"""Tensors whose memory is not there, in every place that takes one: a freed storage (as FSDP and
the offloading of activations leave it), one that is too small, and torch's zero tensors, which have
none.

python -m tests.gone --cases N --jobs J      N as large as `len(CASES)`
python -m tests.gone --only K                one of them

What was freed is refused with RuntimeError, as torch's own operations do; a zero tensor is as good
as zeros."""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn
from rnn.kernels.plan import Plan
from tests.fuzzing import Finding, main

T = 3
B = 2
I = 4
H = 5
PLANS = (None, Plan("numpy"), Plan("native"))


class Case(NamedTuple):
    """`how` is "freed", "shrunk" or "zero"; `place` is of a call: a weight, "input", "h_0", "c_0",
    or after it "saved", which are all that is kept for backward, and "d_output", "d_h_n",
    "d_c_n"."""

    name: str
    plan: Plan | None
    form: str
    bidirectional: bool
    place: str
    how: str

    def __str__(self) -> str:
        plan = self.plan.backend if self.plan else None
        directions = " bidirectional" if self.bidirectional else ""
        return f"rnn.{self.name}{directions} {self.form} plan={plan}: {self.place} {self.how}"


def _places(name: str, form: str, bidirectional: bool) -> Iterator[str]:
    yield from ("input", "h_0", *(["c_0"] if name == "LSTM" else []))
    yield from (
        key for key, _ in getattr(nn, name)(1, 1, bidirectional=bidirectional).named_parameters()
    )
    if form not in ("step", "no gradients"):
        yield from ("saved", "d_output", "d_h_n", *(["d_c_n"] if name == "LSTM" else []))


def _cases() -> Iterator[Case]:
    for name in ("RNN", "LSTM", "GRU"):
        for form in ("padded", "lengths", "packed", "step", "no gradients"):
            for plan in PLANS:
                if plan and form == "step":  # has no plan
                    continue
                for bidirectional in (False, True):
                    if bidirectional and (form == "step" or plan):
                        continue
                    for place in _places(name, form, bidirectional):
                        for how in ("freed", "shrunk", "zero"):
                            yield Case(name, plan, form, bidirectional, place, how)


CASES = list(_cases())


def without(t: Tensor, how: str) -> Tensor:
    """A tensor like it whose memory is gone, in whole or in part, or a zero tensor."""
    if how == "zero":
        return torch._efficientzerotensor(t.shape, dtype=t.dtype)
    t = t.detach().clone(memory_format=torch.contiguous_format)
    _free(t, how)
    return t


def _free(t: Tensor, how: str) -> None:
    storage = t.untyped_storage()
    storage.resize_(0 if how == "freed" else max(0, storage.nbytes() - t.element_size()))


def call(module: Any, case: Case, zeros: bool) -> list[Tensor]:
    """All outputs and gradients. `zeros` puts zeros in the place of what is gone."""
    generator = torch.Generator().manual_seed(0)

    def data(place: str, *shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator)
        if place != case.place:
            return t
        return torch.zeros_like(t) if zeros else without(t, case.how)

    steps = 1 if case.form == "step" else T
    x = data("input", steps, B, I)
    D = 1 + case.bidirectional
    states = [data(place, D, B, H) for place in ("h_0", "c_0")][: 2 if case.name == "LSTM" else 1]
    for key, p in list(module.named_parameters()):
        if key == case.place:
            setattr(
                module, key, nn.Parameter(torch.zeros_like(p) if zeros else without(p, case.how))
            )
    trains = case.form not in ("step", "no gradients")
    places = zip(("input", "h_0", "c_0"), (x, *states))
    # A zero tensor cannot be a leaf, and what stands in its place is none either.
    leaves = [
        t.requires_grad_()
        for place, t in places
        if trains and (case.how, case.place) != ("zero", place)
    ]
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    def unpack(t: Tensor) -> Tensor:
        if case.place != "saved" or not t.is_floating_point():
            return t
        if case.how == "zero":
            return torch.zeros_like(t) if zeros else without(t, "zero")
        return without(t, case.how)

    given: Any = x
    keywords: dict[str, Any] = {}
    if case.form == "packed":
        given = pack_padded_sequence(x, torch.tensor([3, 2])) if not _gone(x) else _packed(x)
    if case.form == "lengths" and isinstance(module, rnn.stack.Stack):
        keywords["lengths"] = torch.tensor([T, T])
    with torch.set_grad_enabled(trains), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y, last = module(given, tuple(states) if case.name == "LSTM" else states[0], **keywords)
    y = y.data if case.form == "packed" else y
    ends = list(last) if case.name == "LSTM" else [last]
    if not trains:
        return [y, *ends]
    grads = [data(place, *t.shape) for place, t in zip(("d_output", "d_h_n", "d_c_n"), (y, *ends))]
    return [
        y,
        *ends,
        *torch.autograd.grad([y, *ends], [*leaves, *module.parameters()], grads, allow_unused=True),
    ]


def _gone(t: Tensor) -> bool:
    return t._is_zerotensor() or t.untyped_storage().nbytes() < t.numel() * t.element_size()


def _packed(x: Tensor) -> Any:
    """A packed sequence whose rows are gone as those of x are."""
    rows = torch.randn(5, I)
    how = "zero" if x._is_zerotensor() else "shrunk" if x.untyped_storage().nbytes() else "freed"
    return nn.utils.rnn.PackedSequence(without(rows, how), torch.tensor([2, 2, 1]))


def check(seed: int, index: int) -> list[Finding]:
    warnings.simplefilter("ignore")
    case = CASES[index]
    print(f"WHERE ours | {case}", file=sys.stderr, flush=True)
    torch.manual_seed(0)
    ours = getattr(rnn, case.name)(I, H, bidirectional=case.bidirectional, plan=case.plan)
    theirs = getattr(nn, case.name)(I, H, bidirectional=case.bidirectional)
    theirs.load_state_dict(ours.state_dict())
    run: Callable[[], list[Tensor]] = lambda: call(ours, case, zeros=False)  # noqa: E731
    if case.how != "zero":
        try:
            run()
        except RuntimeError:
            return []
        except Exception as error:
            return [
                Finding(f"{case.how} {case.place}: {type(error).__name__}", f"{error} | {case}")
            ]
        return [Finding(f"{case.how} {case.place} is read", str(case))]
    try:
        found = run()
    except Exception as error:
        return [
            Finding(f"zero tensor as {case.place}: {type(error).__name__}", f"{error} | {case}")
        ]
    # Of ours others are saved than of torch.nn: it has to do without a crash
    if case.place == "saved":
        return []
    for got, want in zip(found, call(theirs, case, zeros=True)):
        if got is None or got.shape != want.shape:
            continue
        if not torch.allclose(got, want, 1e-4, 1e-5):
            return [Finding(f"zero tensor as {case.place}: other numbers", str(case))]
    return []


def describe(seed: int, index: int) -> str:
    return str(CASES[index])


if __name__ == "__main__":
    sys.exit(main(check, describe, "tests.gone"))
