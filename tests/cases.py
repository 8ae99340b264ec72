"""The case list, the oracle (torch.nn in float64) and the tolerance: torch's own error in the same
dtype."""

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn
from rnn.kernels import cells
from rnn.kernels.cells import Cell
from rnn.kernels.plan import Plan

recurrence: Any = rnn.functional.recurrence
# All cells that there are; and without rnn_relu, whose sizes are those of rnn_tanh
NAMES = [name for name, value in vars(cells).items() if isinstance(value, Cell)]
OF_EACH_SIZE = [name for name in NAMES if name != "rnn_relu"]
CELLS: list[Cell] = [getattr(cells, name) for name in NAMES]
# A step of each: f(x_t [B, I], h or (h, c), w_ih, w_hh, b_ih, b_hh). Where torch has none, write it
# with torch's functions.
TORCH_CELLS: dict[str, Any] = {
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
    "lstm": torch.lstm_cell,
    "gru": torch.gru_cell,
}
LAYER_NAMES = ["RNN", "LSTM", "GRU"]
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
    mode: str = "RNN"
    proj: int = 0

    def __str__(self) -> str:
        default = self._field_defaults
        changed = [
            f"{k}={v}" for k, v in self._asdict().items() if k in default and v != default[k]
        ]
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
    Case(4, 17, 3, 20, form="unsorted", bidirectional=True, hx=False),
    Case(7, 5, 3, 8, form="unsorted", nonlinearity="relu", batch_first=True),
    Case(7, 5, 3, 8, form="lengths"),
    Case(7, 5, 3, 8, form="lengths", bidirectional=True, layers=2, batch_first=True),
    Case(4, 17, 3, 20, form="lengths", bidirectional=True, hx=False, bias=False),
    Case(1, 4, 3, 5, form="lengths", bidirectional=True),
    Case(6, 4, 3, 8, dtype=torch.float64, bidirectional=True, layers=2),
    Case(6, 4, 3, 8, dtype=torch.float16, bidirectional=True),
    Case(6, 4, 3, 8, dtype=torch.bfloat16, layers=2),
    Case(6, 4, 3, 8, dtype=torch.bfloat16, form="unsorted", bidirectional=True),
    Case(5, 3, 4, 6, mode="LSTM", layers=2),
    Case(4, 17, 3, 20, mode="LSTM", form="unsorted", bidirectional=True),
    Case(6, 4, 3, 8, mode="LSTM", form="lengths", bidirectional=True, bias=False),
    Case(6, 4, 3, 8, mode="LSTM", proj=3, layers=2, bidirectional=True, batch_first=True),
    Case(6, 4, 3, 8, mode="LSTM", proj=3, form="lengths", bidirectional=True),
    Case(6, 4, 3, 8, mode="LSTM", proj=7, form="packed", hx=False),
    Case(6, 1, 3, 8, mode="LSTM", form="unbatched"),
    Case(6, 4, 3, 8, mode="LSTM", dtype=torch.float16, bidirectional=True),
    Case(5, 3, 4, 6, mode="GRU", layers=2),
    Case(4, 17, 3, 20, mode="GRU", form="unsorted", bidirectional=True),
    Case(6, 4, 3, 8, mode="GRU", form="lengths", bidirectional=True, batch_first=True, bias=False),
    Case(6, 1, 3, 8, mode="GRU", form="unbatched", hx=False),
    Case(6, 4, 3, 8, mode="GRU", dtype=torch.bfloat16, bidirectional=True),
]


def cell_of(layer: str, nonlinearity: str = "tanh") -> Cell:
    """The cell of the layer of that name."""
    cell: Cell = getattr(cells, f"rnn_{nonlinearity}" if layer == "RNN" else layer.lower())
    return cell


def build(library: Any, case: Case, **options: Any) -> Any:
    """The layer of the case, from torch.nn or rnn."""
    if case.mode == "RNN":
        options["nonlinearity"] = case.nonlinearity
    if case.proj:
        options["proj_size"] = case.proj
    return getattr(library, case.mode)(
        case.I,
        case.H,
        num_layers=case.layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.bidirectional,
        **options,
    )


def lengths_of(case: Case) -> Tensor:
    """[B], with zeros where they are allowed, all the same only by chance."""
    least = 0 if case.form == "lengths" else 1
    lengths = torch.randint(
        least, case.T + 1, (case.B,), generator=torch.Generator().manual_seed(case.T + case.B)
    )
    if case.B and case.form != "lengths":
        lengths[0] = case.T
    return lengths.sort(descending=True).values if case.form == "packed" else lengths


def one_by_one(
    module: Any, x: Tensor, states: list[Tensor], lengths: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """What `lengths` means, by torch.nn's layer on each sequence [T, b, I] alone."""
    outputs = []
    ends = []
    width = (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
    for b, length in enumerate(lengths.tolist()):
        y = x[:0, b : b + 1, :1].expand(0, 1, width)
        h = [s[:, b : b + 1] for s in states]
        if length:
            alone = x[:length, b : b + 1]
            y, last = module(
                alone.transpose(0, 1) if module.batch_first else alone,
                tuple(h) if len(h) > 1 else h[0],
            )
            y = y.transpose(0, 1) if module.batch_first else y
            h = list(last) if len(h) > 1 else [last]
        outputs.append(nn.functional.pad(y, (0, 0, 0, 0, 0, len(x) - length)))
        ends.append(h)
    if not outputs:
        return x[:, :, :1].expand(-1, -1, width), states
    return torch.cat(outputs, 1), [torch.cat(column, 1) for column in zip(*ends)]


def results(module: Any, case: Case, device: str = "cpu", seed: int = 1) -> dict[str, Tensor]:
    """Output, last state, and the gradients of the input, the initial state and every weight. The
    data are the same for every module: rounded to the dtype of the case, then taken to that of the
    module."""
    generator = torch.Generator().manual_seed(seed)
    D = 1 + case.bidirectional
    dtype = next(module.parameters()).dtype

    def random_like(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(device, dtype)

    lengths = lengths_of(case)
    x = random_like(case.T, case.B, case.I).requires_grad_()
    widths = [case.proj or case.H, *[case.H] * (cell_of(case.mode).states - 1)]
    states = [random_like(case.layers * D, case.B, width).requires_grad_() for width in widths]
    starts = states if case.hx else [torch.zeros_like(s) for s in states]
    given: Any = x.transpose(0, 1) if case.batch_first else x
    ours = isinstance(module, rnn.stack.Stack)

    def hx(states: list[Tensor]) -> Any:
        return None if not case.hx else tuple(states) if len(states) > 1 else states[0]

    if case.form == "unbatched":
        y, h = module(x[:, 0], hx([s[:, 0] for s in states]))
    elif case.form in ("packed", "unsorted"):
        packed = pack_padded_sequence(
            given, lengths, case.batch_first, enforce_sorted=case.form == "packed"
        )
        y, h = module(packed, hx(states))
        assert isinstance(y, PackedSequence)
        y = y.data
    elif case.form == "lengths" and ours:
        y, h = module(given, hx(states), lengths=lengths.to(device))
    elif case.form == "lengths":
        y, h = one_by_one(module, x, starts, lengths)
        y = y.transpose(0, 1) if case.batch_first else y
    else:
        y, h = module(given, hx(states))
    ends = list(h) if isinstance(h, (tuple, list)) else [h]
    # In the order of y [T, B, D*H], whatever its layout.
    batched = case.batch_first and case.form in ("padded", "lengths")
    dy = random_like(*(y.transpose(0, 1) if batched else y).shape)
    seeds = [dy.transpose(0, 1) if batched else dy, *(random_like(*end.shape) for end in ends)]
    used = [(out, seed) for out, seed in zip([y, *ends], seeds) if out.requires_grad]
    torch.autograd.backward([out for out, _ in used], [seed for _, seed in used])
    leaves = {
        "input": x,
        **({f"hx_{k}": s for k, s in enumerate(states)} if case.hx else {}),
        **dict(module.named_parameters()),
    }
    grads = {
        f"d_{name}": torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()
    }
    return {
        "output": y.detach(),
        **{f"end_{k}": end.detach() for k, end in enumerate(ends)},
        **grads,
    }


def check(
    case: Case,
    plan: Plan | None = None,
    device: str = "cpu",
    seed: int = 1,
    tf32: bool = False,
    oracle: str = "cpu",
) -> None:
    """Our layer against float64; its error may be 4 times that of torch.nn in the same dtype on the
    same device. TF32 has as many digits of a product's operands as float16 has of everything: there
    that is the other's dtype, since torch.nn does not say where it uses TF32."""
    # float64 is the oracle's own dtype: there torch's error is that in float32, scaled.
    dtype = torch.float16 if tf32 else torch.float32 if case.dtype == torch.float64 else case.dtype
    exact = build(nn, case, dtype=case.dtype).double()
    theirs = build(nn, case, dtype=dtype)
    ours = build(rnn, case, dtype=case.dtype, device=device, plan=plan)
    theirs.load_state_dict(exact.state_dict())
    ours.load_state_dict(exact.state_dict())
    want = results(exact.to(oracle), case, oracle, seed)
    allowed = results(theirs.to(device), case, device, seed)
    got = results(ours, case, device, seed)
    assert all(value.dtype == case.dtype for value in got.values())
    close(
        got,
        {name: value.to(case.dtype) if tf32 else value for name, value in allowed.items()},
        want,
    )


def thrice(compare: Callable[[int], None]) -> None:
    """What is wrong is so for any data. Torch's error in a few numbers can be small by luck: but
    not three times."""
    for seed in range(3):
        torch.manual_seed(seed)
        try:
            return compare(seed)
        except AssertionError:
            if seed == 2:
                raise


def relative(got: Tensor, want: Tensor) -> float:
    """The error of `got`, relative to `want`, in units of the rounding of its dtype."""
    error = (got.double() - want).norm().item()
    norm = want.norm().item()
    return 0.0 if error == 0 else error / max(norm, 1e-300) / torch.finfo(got.dtype).eps


def close(
    got: dict[str, Tensor], allowed: dict[str, Tensor], want: dict[str, Tensor], factor: float = 4
) -> None:
    """Every tensor's error is `factor` times that of `allowed`, and two roundings, at the most.
    Those of a few numbers are judged as one, with the next larger: what cancels to nearly 0 in one
    number, and what rounding makes of that, is luck."""
    assert got.keys() == want.keys() == allowed.keys()
    names_by_size = sorted(want, key=lambda name: want[name].numel())
    few = [name for name in names_by_size if want[name].numel() < 32]
    few += names_by_size[len(few) :][: bool(few)]
    for names in [few, *([name] for name in want if name not in few)]:
        assert all(got[name].shape == want[name].shape for name in names)
        ours, theirs, right = (
            torch.cat([t[name].detach().cpu().flatten() for name in names] or [torch.empty(0)])
            for t in (got, allowed, want)
        )
        error = relative(ours, right)
        other = relative(theirs, right)
        assert error <= factor * other + 2, (
            f"{names}: error of {error:.1f} roundings, torch's {other:.1f}"
        )


def kept_bytes(layer: Any, x: Tensor) -> int:
    """What a forward pass keeps for backward."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x.requires_grad_())
    return sum(kept.values())


def step_by_step(
    name: str, given: list[Any], masks: tuple[Any, Any], reverse: tuple[bool, ...]
) -> list[Tensor]:
    """What `rnn.functional.recurrence` means on padded rows, by torch's own cells, a sequence and a
    step at a time."""
    (x, w_ih, w_hh, b_ih, b_hh, s0) = given
    (lengths, resets) = masks
    (T, B, _) = given[0].shape
    N = len(reverse)
    S = getattr(cells, name).states
    cell = TORCH_CELLS[name]
    weights = [[None] * N if w is None else w.chunk(N) for w in (w_ih, w_hh, b_ih, b_hh)]
    rows = [[[torch.zeros_like(s0[0, 0])] * S for _ in range(T * B)] for _ in range(N)]
    last = [[torch.empty(0)] * B for _ in range(N * S)]
    for n, b in itertools.product(range(N), range(B)):
        s = s0[n * S : (n + 1) * S, b : b + 1]
        length = T if lengths is None else int(lengths[b])
        for t in reversed(range(length)) if reverse[n] else range(length):
            boundary = t + reverse[n]
            if resets is not None and boundary < length and resets[boundary, b]:
                s = torch.zeros_like(s)
            new = cell(x[t, b : b + 1], tuple(s) if S > 1 else s[0], *(w[n] for w in weights))
            s = torch.stack(new) if S > 1 else new[None]
            rows[n][t * B + b] = list(s[:, 0])
        for k in range(S):
            last[n * S + k][b] = s[k, 0]
    states = torch.stack(
        [
            torch.cat([torch.stack([row[k] for row in rows[n]]) for n in range(N)], 1)
            for k in range(S)
        ]
    )
    return [
        states[0].view(T, B, -1),
        *([states[1:]] if S > 1 else []),
        torch.stack([torch.stack(v) for v in last]),
    ]


class Operands(NamedTuple):
    """What `rnn.functional.recurrence` is given, x [T, B, I] on padded rows whatever the form, and
    the gradients of what it returns: of y and the other states [S-1, T, B, N*H], both 0 past an
    end, and of the last states."""

    name: str
    form: str
    reverse: tuple[bool, ...]
    given: list[Tensor]
    d: list[Tensor]
    lengths: Tensor | None
    resets: Tensor | None
    bias: bool = True


def operands(
    name: str,
    sizes: tuple[int, int, int, int],
    reverse: tuple[bool, ...] = (False, True),
    form: str = "padded",
    resets: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 2,
) -> Operands:
    """Random ones for sizes T, B, I, H."""
    (T, B, I, H) = sizes
    N = len(reverse)
    cell = getattr(rnn.kernels.cells, name)
    generator = torch.Generator().manual_seed(seed)
    G = cell.gates
    S = cell.states
    lengths = None
    shapes = ((T, B, I), (N * G * H, I), (N * G * H, H), (N * G * H,), (N * G * H,), (N * S, B, H))
    given = [
        torch.randn(shape, generator=generator) / (H**0.5 if k == 2 else 1)
        for k, shape in enumerate(shapes)
    ]
    if form != "padded":
        lengths = torch.randint(0 if form == "lengths" else 1, T + 1, (B,), generator=generator)
    if form == "packed":
        assert lengths is not None
        lengths = lengths.sort(descending=True).values
        lengths[0] = T
    cuts = torch.rand(T, B, generator=generator) < 0.3 if resets else None
    ends = (T, B, N * H), *([(S - 1, T, B, N * H)] if S > 1 else []), (N * S, B, H)
    d = [torch.randn(shape, generator=generator) for shape in ends]
    return Operands(
        name,
        form,
        reverse,
        [t.to(dtype) for t in given],
        [t.to(dtype) for t in d],
        lengths,
        cuts,
        bias,
    )


def evaluate(
    o: Operands,
    plan: Plan | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    oracle: bool = False,
    place: Callable[[Any], Any] = lambda t: t,
) -> dict[str, Tensor]:
    """All outputs, as in `Operands`, and all gradients, of ours or of torch's own cells. `place`
    gives a tensor a place in memory, on its way into ours."""
    dtype = dtype or o.given[0].dtype
    S = getattr(rnn.kernels.cells, o.name).states
    leaves: list[Any] = [t.to(device, dtype, copy=True).requires_grad_() for t in o.given]
    inputs = [place(t) if o.bias or k not in (3, 4) else None for k, t in enumerate(leaves)]
    wanted = [leaf for leaf, t in zip(leaves, inputs) if t is not None]
    (T, B) = leaves[0].shape[:2]
    lengths = o.lengths
    resets = o.resets
    sizes = None
    if oracle:
        outputs = step_by_step(o.name, inputs, (lengths, resets), o.reverse)
    else:
        lengths, resets = (t if t is None else place(t.to(device)) for t in (lengths, resets))
        if o.form == "packed":
            assert o.lengths is not None
            running = torch.arange(T)[:, None] < o.lengths
            lengths = None
            sizes = running.sum(1)
            rows = running.flatten().nonzero()[:, 0].to(device)
            inputs[0] = place(leaves[0].flatten(0, 1)[rows])
        y, states, last = recurrence(
            getattr(rnn.kernels.cells, o.name), *inputs, lengths, sizes, resets, o.reverse, 1, plan
        )
        outputs = [y, *([] if states is None else [states]), last]
        if sizes is not None:
            outputs[:-1] = [
                t.new_zeros(*t.shape[:-2], T * B, t.shape[-1]).index_copy(-2, rows, t)
                for t in outputs[:-1]
            ]
    outputs = [t.reshape(end.shape) for t, end in zip(outputs, o.d)]
    pairs = [(t, place(end.to(device, dtype))) for t, end in zip(outputs, o.d) if t.requires_grad]
    grads = torch.autograd.grad(
        [t for t, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True
    )
    names = (
        "y",
        "states",
        "last",
        "d_x",
        "d_w_ih",
        "d_w_hh",
        *(["d_b_ih", "d_b_hh"] if o.bias else []),
        "d_s0",
    )
    found = [
        *(t.detach() for t in outputs),
        *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads)),
    ]
    return dict(zip((name for name in names if name != "states" or S > 1), found))


@lru_cache(maxsize=8)  # for one plan after another
def right(*given: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What torch's cells make of `operands(*given)`, in the other dtype of `check` and in
    float64."""
    o = operands(*given)
    dtype = o.given[0].dtype
    return (
        evaluate(o, dtype=torch.float32 if dtype == torch.float64 else dtype, oracle=True),
        evaluate(o, dtype=torch.float64, oracle=True),
    )


def check_recurrence(
    name: str,
    plan: Plan | None,
    sizes: tuple[int, int, int, int],
    reverse: tuple[bool, ...] = (False,),
    form: str = "padded",
    resets: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 2,
) -> None:
    """rnn.functional.recurrence of a layer of sizes T, B, I, H, all states and all gradients,
    against torch's cells."""
    given = name, sizes, reverse, form, resets, bias, dtype, seed
    close(evaluate(operands(*given), plan, device), *right(*given))
