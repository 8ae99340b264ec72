"""The case list, the oracle (torch.nn.RNN in float64) and the tolerance: torch's own error in the same dtype."""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn
from rnn.kernels.plan import Plan

FORMS = ("padded", "unbatched", "packed", "unsorted", "lengths")


class Case(NamedTuple):
    T: int
    B: int
    I: int
    H: int
    form: str = "padded"
    layers: int = 1
    bidirectional: bool = False
    nonlinearity: str = "tanh"
    bias: bool = True
    batch_first: bool = False
    hx: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        default = self._field_defaults
        changed = [f"{k}={v}" for k, v in self._asdict().items() if k in default and v != default[k]]
        return "-".join([f"T{self.T}B{self.B}I{self.I}H{self.H}", *changed])


CASES = [
    Case(1, 1, 1, 1),
    Case(5, 3, 4, 7),
    Case(7, 1, 3, 63, hx=False),
    Case(4, 33, 5, 100),
    Case(3, 5, 40, 500),
    Case(6, 4, 3, 8, bias=False),
    Case(6, 4, 3, 8, nonlinearity="relu"),
    Case(6, 4, 3, 8, batch_first=True),
    Case(6, 4, 3, 8, bidirectional=True),
    Case(6, 4, 3, 8, bidirectional=True, batch_first=True, hx=False),
    Case(5, 3, 4, 6, layers=2),
    Case(5, 3, 4, 6, layers=3, bidirectional=True, nonlinearity="relu"),
    Case(5, 0, 4, 6, bidirectional=True),
    Case(6, 1, 3, 8, form="unbatched"),
    Case(6, 1, 3, 8, form="unbatched", batch_first=True, bidirectional=True, hx=False),
    Case(7, 5, 3, 8, form="packed"),
    Case(7, 5, 3, 8, form="packed", bidirectional=True, layers=2),
    Case(9, 17, 3, 20, form="unsorted", bidirectional=True, hx=False),
    Case(7, 5, 3, 8, form="unsorted", nonlinearity="relu", batch_first=True),
    Case(7, 5, 3, 8, form="lengths"),
    Case(7, 5, 3, 8, form="lengths", bidirectional=True, layers=2, batch_first=True),
    Case(9, 17, 3, 20, form="lengths", bidirectional=True, hx=False, bias=False),
    Case(1, 4, 3, 5, form="lengths", bidirectional=True),
    Case(6, 4, 3, 8, dtype=torch.float64, bidirectional=True, layers=2),
    Case(6, 4, 3, 8, dtype=torch.float16, bidirectional=True),
    Case(6, 4, 3, 8, dtype=torch.bfloat16, layers=2),
    Case(6, 4, 3, 8, dtype=torch.bfloat16, form="unsorted", bidirectional=True),
]


def random_case(seed: int, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> Case:
    pick = random.Random(seed)
    form = pick.choice(FORMS)
    sizes = pick.choice((1, 2, 3, 6, 12)), 1 if form == "unbatched" else pick.choice((0, 1, 2, 7, 17)), pick.randint(1, 9)
    T, B, I = sizes if form not in ("packed", "unsorted") else (sizes[0], max(1, sizes[1]), sizes[2])
    return Case(T, B, I, pick.choice((1, 2, 5, 16, 33)), form, pick.randint(1, 3), pick.random() < 0.5,
                pick.choice(("tanh", "relu")), pick.random() < 0.8, pick.random() < 0.5, pick.random() < 0.7,
                pick.choice(dtypes))


def lengths_of(case: Case) -> Tensor:
    """[B], with zeros where they are allowed, all the same only by chance."""
    least = 0 if case.form == "lengths" else 1
    lengths = torch.randint(least, case.T + 1, (case.B,), generator=torch.Generator().manual_seed(case.T + case.B))
    if case.B and case.form != "lengths":
        lengths[0] = case.T
    return lengths.sort(descending=True).values if case.form == "packed" else lengths


def one_by_one(module: nn.RNN, x: Tensor, hx: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What `lengths` means, by torch.nn.RNN on each sequence [T, b, I] alone."""
    outputs, states = [], []
    for b, length in enumerate(lengths.tolist()):
        y = x[:0, b : b + 1, :1].expand(0, 1, module.hidden_size * (1 + module.bidirectional))
        h = hx[:, b : b + 1]
        if length:
            y, h = nn.RNN.forward(module, x[:length, b : b + 1].transpose(0, 1) if module.batch_first
                                  else x[:length, b : b + 1], h)
            y = y.transpose(0, 1) if module.batch_first else y
        outputs.append(nn.functional.pad(y, (0, 0, 0, 0, 0, len(x) - length)))
        states.append(h)
    if not outputs:
        return x[:, :, :1].expand(-1, -1, module.hidden_size * (1 + module.bidirectional)), hx
    return torch.cat(outputs, 1), torch.cat(states, 1)


def results(module: Any, case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """Output, last state, and the gradients of the input, the initial state and every weight. The data are the same for
    every module: rounded to the dtype of the case, then taken to that of the module."""
    generator = torch.Generator().manual_seed(1)
    D, dtype = 1 + case.bidirectional, next(module.parameters()).dtype

    def random_like(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device, dtype)

    lengths = lengths_of(case)
    x = random_like(case.T, case.B, case.I).requires_grad_()
    states = random_like(case.layers * D, case.B, case.H).requires_grad_()
    hx = states if case.hx else None
    given: Any = x.transpose(0, 1) if case.batch_first else x
    ours = isinstance(module, rnn.RNN)
    if case.form == "unbatched":
        y, h = module(x[:, 0], None if hx is None else hx[:, 0])
    elif case.form in ("packed", "unsorted"):
        packed = pack_padded_sequence(given, lengths, case.batch_first, enforce_sorted=case.form == "packed")
        y, h = module(packed, hx)
        assert isinstance(y, PackedSequence)
        y = y.data
    elif case.form == "lengths" and ours:
        y, h = module(given, hx, lengths=lengths.to(device))
    elif case.form == "lengths":
        y, h = one_by_one(module, x, torch.zeros_like(states).requires_grad_() if hx is None else hx, lengths)
        y = y.transpose(0, 1) if case.batch_first else y
    else:
        y, h = module(given, hx)
    # In the order of y [T, B, D*H], whatever its layout.
    batched = case.batch_first and case.form in ("padded", "lengths")
    dy = random_like(*(y.transpose(0, 1) if batched else y).shape)
    torch.autograd.backward([y, h], [dy.transpose(0, 1) if batched else dy, random_like(*h.shape)])
    leaves = {"input": x, **({} if hx is None else {"hx": states}), **dict(module.named_parameters())}
    grads = {f"d_{name}": torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return {"output": y.detach(), "h_n": h.detach(), **grads}


def check(case: Case, plan: Plan | None = None, device: str = "cpu", factor: float = 4) -> None:
    """rnn.RNN against float64; its error may be `factor` times that of torch.nn.RNN on the CPU in the same dtype."""
    options: dict[str, Any] = dict(num_layers=case.layers, nonlinearity=case.nonlinearity, bias=case.bias,
                                   batch_first=case.batch_first, bidirectional=case.bidirectional)
    # float64 is the oracle's own dtype: there torch's error is that in float32, scaled.
    dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    exact = nn.RNN(case.I, case.H, **options, dtype=case.dtype).double()
    theirs = nn.RNN(case.I, case.H, **options, dtype=dtype)
    ours = rnn.RNN(case.I, case.H, **options, dtype=case.dtype, device=device, plan=plan)
    theirs.load_state_dict(exact.state_dict())
    ours.load_state_dict(exact.state_dict())
    want, allowed, got = results(exact, case), results(theirs, case), results(ours, case, device)
    assert all(value.dtype == case.dtype for value in got.values())
    close(got, allowed, want, factor)


def relative(got: Tensor, want: Tensor) -> float:
    """The error of `got`, relative to `want`, in units of the rounding of its dtype."""
    error, norm = (got.detach().cpu().double() - want).norm().item(), want.norm().item()
    return 0.0 if error == 0 else error / max(norm, 1e-300) / torch.finfo(got.dtype).eps


def close(got: dict[str, Tensor], allowed: dict[str, Tensor], want: dict[str, Tensor], factor: float = 4) -> None:
    """Every tensor's error is `factor` times that of `allowed`, and two roundings, at the most. Those of a few numbers
    are judged as one: what cancels to nearly 0 in a single number, and what rounding makes of that, is luck."""
    assert got.keys() == want.keys() == allowed.keys()
    few = [name for name in want if want[name].numel() < 32]
    for names in [few, *([name] for name in want if name not in few)]:
        assert all(got[name].shape == want[name].shape for name in names)
        ours, theirs, right = (torch.cat([t[name].detach().cpu().flatten() for name in names] or [torch.empty(0)])
                               for t in (got, allowed, want))
        error, other = relative(ours, right), relative(theirs, right)
        assert error <= factor * other + 2, f"{names}: error of {error:.1f} roundings, torch's {other:.1f}"
