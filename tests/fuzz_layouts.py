"""Random layers and operators, all of whose tensors, the incoming gradients too, come in random
memory layouts.

python -m tests.fuzz_layouts --cases N --seed S --jobs J      so many cases in J processes
python -m tests.fuzz_layouts --seed S --only K                one of them

Values are judged against float64, by torch's own error in the same dtype; the form of what is
returned (strides, views, storages, versions) against torch.nn's for the same call."""

import itertools
import random
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn
from rnn.kernels import cells
from rnn.kernels.plan import Plan
from tests.cases import LAYER_NAMES, NAMES, Case, build, cell_of, close
from tests.fuzzing import ByCells, Finding, main, place, plain, sweep

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32,) * 4 + (torch.float64,) * 2 + HALF
FORMS = ("padded", "padded", "unbatched", "packed", "unsorted", "lengths", "lengths", "stream")
ASKS = ("grad", "grad", "grad", "backward", "backward", "graph", "none", "inference")
WITHOUT = ("none", "inference")


class Layer(NamedTuple):
    """A call of a layer. `asks` is how gradients are asked for, `frozen` the chance of a tensor to
    need none, `used` the outputs whose gradients come in."""

    case: Case
    asks: str
    resets: bool
    return_states: bool
    recompute: bool
    plan: Plan | None
    dropout: float
    frozen: float
    used: float
    threads: int
    zeros: bool

    def __str__(self) -> str:
        return f"{self.case} {_words(self[1:], self._fields[1:])}"


class Call(NamedTuple):
    """A call of `rnn.functional.recurrence`: of T, B, I, H as `sizes`."""

    name: str
    sizes: tuple[int, int, int, int]
    reverse: tuple[bool, ...]
    form: str
    resets: bool
    bias: bool
    keep: int
    recompute: bool
    plan: Plan | None
    dtype: torch.dtype
    asks: str
    frozen: float
    used: float
    threads: int
    zeros: bool

    def __str__(self) -> str:
        return _words(self, self._fields)


def _words(values: Sequence[Any], names: Sequence[str]) -> str:
    """In one short line, without what is not there."""
    words = []
    for name, value in zip(names, values):
        if value is not None and value is not False and value != 0:
            words.append(f"{name}={value.backend if isinstance(value, Plan) else value}")
    return " ".join(words)


def _plan(rng: random.Random, dtype: torch.dtype) -> Plan | None:
    choices: list[Plan | None] = [None, None, None]
    if dtype in (torch.float32, torch.float64):
        choices.append(Plan("numpy"))
    if dtype == torch.float32:
        choices += [None, Plan("native"), Plan("native")]
    return rng.choice(choices)


def draw(seed: int, index: int) -> tuple[random.Random, Layer | Call]:
    """A case, and where the rest of it comes from."""
    rng = random.Random(f"{seed} {index}")
    dtype = rng.choice(DTYPES)
    T = rng.choice((1, 2, 3, 5, 7))
    I = rng.choice((1, 2, 3, 5, 9, 17))
    H = rng.choice((1, 2, 3, 4, 7, 8, 16, 20, 33))
    B = rng.choice((1, 2, 3, 4, 8, 13))
    asks = rng.choice(ASKS)
    shared: dict[str, Any] = dict(
        plan=_plan(rng, dtype),
        recompute=rng.random() < 0.2,
        asks=asks,
        frozen=rng.choice((0.0, 0.0, 0.4)),
        used=rng.choice((1.0, 0.6)),
        threads=rng.choice((1, 1, 1, 2)),
        zeros=rng.random() < 0.3,
    )
    if rng.random() < 0.35:
        name = rng.choice(NAMES)
        form = rng.choice(("padded", "lengths", "packed"))
        if form != "packed" and rng.random() < 0.05:
            B = 0
        reverse = tuple(rng.random() < 0.5 for _ in range(rng.choice((1, 1, 2, 3))))
        return rng, Call(
            name,
            (T, B, I, H),
            reverse,
            form,
            rng.random() < 0.3,
            rng.random() < 0.8,
            rng.randrange(2),
            dtype=dtype,
            **shared,
        )
    mode = rng.choice(LAYER_NAMES)
    form = rng.choice(FORMS)
    if form == "unbatched":
        B = 1
    elif form in ("padded", "lengths") and rng.random() < 0.05:
        B = 0
    if form == "stream":
        asks = shared["asks"] = rng.choice(WITHOUT)
    proj = rng.randrange(1, H) if mode == "LSTM" and H > 1 and rng.random() < 0.2 else 0
    layers = rng.choice((1, 1, 2, 3))
    case = Case(
        T,
        B,
        I,
        H,
        form=form,
        layers=layers,
        bidirectional=form != "stream" and rng.random() < 0.4,
        nonlinearity=rng.choice(("tanh", "relu")) if mode == "RNN" else "tanh",
        bias=rng.random() < 0.8,
        batch_first=rng.random() < 0.4,
        hx=rng.random() < 0.7,
        dtype=dtype,
        mode=mode,
        proj=proj,
    )
    plain_call = form == "stream"
    return rng, Layer(
        case,
        resets=not plain_call and rng.random() < 0.2,
        return_states=not plain_call and rng.random() < 0.15,
        dropout=0.5 if layers > 1 and rng.random() < 0.2 else 0.0,
        **shared,
    )


def describe(seed: int, index: int) -> str:
    return str(draw(seed, index)[1])


class Data:
    """Random tensors in random layouts; their names and layouts for the report. Layouts are of the
    case, values of the attempt."""

    def __init__(self, rng: random.Random, attempt: int, zeros: bool) -> None:
        self.rng = rng
        self.zeros = zeros
        self.generator = torch.Generator().manual_seed(attempt)
        self.layouts: dict[str, str] = {}

    def tensor(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0
    ) -> Tensor:
        data = (torch.randn(shape, generator=self.generator) * scale).to(dtype)
        return self.put(name, data)

    def put(self, name: str, data: Tensor, zeros: bool = True) -> Tensor:
        found, self.layouts[name] = place(self.rng, data, zeros and self.zeros)
        return found


def flat(out: Any) -> dict[str, Tensor]:
    """What a layer returns, by name."""
    y, last, *states = out
    found = {"output": y.data if isinstance(y, PackedSequence) else y}
    for name, value in (("end", last), *(("states", value) for value in states)):
        for k, t in enumerate(value if isinstance(value, tuple) else [value]):
            found[f"{name}_{k}"] = t
    return found


class Found(NamedTuple):
    """Outputs, the leaves by name, and the gradients that came back."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def gradients(
    asks: str, outputs: dict[str, Tensor], seeds: dict[str, Tensor], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of the leaves that need any, from the gradients of the outputs."""
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    used = [name for name in seeds if name in outputs and outputs[name].requires_grad]
    if asks in WITHOUT or not used or not wanted:
        return {}
    outs = [outputs[name] for name in used]
    dys = [seeds[name] for name in used]
    if asks == "backward":
        for t in wanted.values():
            t.grad = None
        torch.autograd.backward(outs, dys, inputs=list(wanted.values()))
        found: Any = [t.grad for t in wanted.values()]
        for t in wanted.values():
            t.grad = None
    else:
        found = torch.autograd.grad(
            outs, list(wanted.values()), dys, allow_unused=True, create_graph=asks == "graph"
        )
    return {f"d_{name}": g for name, g in zip(wanted, found) if g is not None}


def state(t: Tensor) -> tuple[Any, ...]:
    """What a call has to leave as it is in what it is given: the values, version and form."""
    resizable = t._is_zerotensor() or t.untyped_storage().resizable()
    return (
        plain(t),
        t._version if not t.is_inference() else 0,
        t.shape,
        t.stride(),
        t.requires_grad,
        resizable,
    )


def changed(inputs: dict[str, Tensor], before: dict[str, tuple[Any, ...]]) -> list[str]:
    """Which of the inputs are no more what they were, and in what."""
    wrong = []
    for name, (values, *rest) in before.items():
        now, *others = state(inputs[name])
        if not torch.equal(now, values):
            wrong.append(f"{name} has been changed")
        for what, old, new in zip(
            ("version", "shape", "strides", "requires_grad", "resizable storage"), rest, others
        ):
            if old != new:
                wrong.append(f"{what} of {name}, which came, has been changed: {old} to {new}")
    return wrong


def contexts(asks: str) -> Any:
    return torch.inference_mode() if asks == "inference" else torch.set_grad_enabled(asks != "none")


# What a tensor that is returned has to be.


def _strides(t: Tensor) -> tuple[int, ...]:
    """Those that matter."""
    return (
        tuple(stride for size, stride in zip(t.shape, t.stride()) if size > 1) if t.numel() else ()
    )


def _natural(t: Tensor) -> tuple[int, ...]:
    """The strides of a contiguous tensor of that shape."""
    return _strides(torch.empty(t.shape, device="meta"))


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def returns(found: Found, asks: str) -> dict[str, Tensor]:
    """What has to have a form of its own: of gradients that can be differentiated once more nothing
    is asked."""
    return {**found.outputs, **({} if asks == "graph" else found.gradients)}


def forms(
    found: dict[str, Tensor], theirs: dict[str, Tensor], allowed: dict[str, list[tuple[int, ...]]]
) -> list[str]:
    """What is wrong with the form of tensors. `theirs` are those that torch.nn returns, as far as
    it does; `allowed` are strides that are right as well."""
    wrong = []
    for name, t in found.items():
        other = theirs.get(name)
        usual = [_natural(t)]
        # Steps first, as [B, T, ...] is computed
        if t.dim() == 3 and (other is not None or name == "d_input"):
            usual.append(
                _strides(torch.empty(t.transpose(0, 1).shape, device="meta").transpose(0, 1))
            )
        own = [] if other is None else [_strides(other)]
        strides = [*own, *allowed.get(name, []), *([] if {*own} & {*usual} else usual)]
        if _strides(t) not in strides:
            wrong.append(
                f"strides of {name}: {t.stride()}, torch.nn's "
                f"{None if other is None else other.stride()}"
            )
        if (other is None or not other._is_view()) and (t._base is not None or t._is_view()):
            wrong.append(f"{name} is a view")
        if (other is None or other.storage_offset() == 0) and t.storage_offset() != 0:
            wrong.append(f"{name} has an offset")
        exact = (
            other is None
            or other.untyped_storage().nbytes() == other.numel() * other.element_size()
        )
        if exact and t.untyped_storage().nbytes() != t.numel() * t.element_size():
            wrong.append(f"storage of {name} has another size than it")
        if not t.untyped_storage().resizable():
            wrong.append(f"storage of {name} cannot be resized")
        if t.is_neg() or t.is_conj() or t._is_zerotensor():
            wrong.append(f"{name} has a bit of its own")
        if other is not None:
            for what in ("dtype", "device", "requires_grad", "is_leaf", "layout"):
                if getattr(t, what) != getattr(other, what):
                    wrong.append(
                        f"{what} of {name}: {getattr(t, what)}, torch.nn's {getattr(other, what)}"
                    )
            if t.is_inference() != other.is_inference():
                wrong.append(f"is_inference of {name}: {t.is_inference()}")
    return wrong


def shared(
    found: dict[str, Tensor], theirs: dict[str, Tensor], inputs: dict[str, Tensor]
) -> list[str]:
    """Whose memory is another's, and is not so with torch.nn."""
    wrong = []
    everything = {**inputs, **found}
    for one, two in itertools.combinations(everything, 2):
        if one in inputs and two in inputs:
            continue
        a = everything[one]
        b = everything[two]
        if a._is_zerotensor() or b._is_zerotensor():
            continue
        if a.numel() and b.numel() and _memory(a) == _memory(b):
            pair = [{**inputs, **theirs}.get(name) for name in (one, two)]
            same = (
                pair[0] is not None and pair[1] is not None and _memory(pair[0]) == _memory(pair[1])
            )
            if not same:
                wrong.append(f"{one} and {two} share their memory")
    return wrong


def edits(found: dict[str, Tensor]) -> list[str]:
    """What a change in place does that is not told by `forms` and `shared` already: to be called
    last."""
    wrong = []
    for name, t in found.items():
        own = not any(
            t.numel() and _memory(t) == _memory(other)
            for key, other in found.items()
            if key != name
        )
        before = (
            {other: found[other]._version for other in found}
            if own and not t.is_inference()
            else {}
        )
        with torch.inference_mode(t.is_inference()), torch.no_grad():
            t.add_(1)
        changed = [
            other for other in before if other != name and found[other]._version != before[other]
        ]
        if changed:
            wrong.append(f"an edit of {name} counts for {', '.join(changed)}")
        if t._is_view() or not t.untyped_storage().resizable():
            continue
        for what, do in (
            ("detach_()", torch.detach_),
            ("resize_", lambda t: t.detach().resize_(2 * t.numel())),
        ):
            try:
                do(t)
            except RuntimeError as error:
                wrong.append(f"{what} of {name}: {error}")
    return wrong


_NAMES = (
    (r"d_(weight|bias|w|b)_[a-z]+(_l\d)?(_reverse)?", "d_weight"),
    (r"(hx|end|states)_\d", r"\1"),
)


def kinds(words: Sequence[str], of: str) -> list[Finding]:
    """Findings whose kind is the words without the numbers, of all tensors of a sort."""
    found = []
    for word in words:
        kind = word.split(":")[0]
        for pattern, name in _NAMES:
            kind = re.sub(pattern, name, kind)
        found.append(Finding(f"{of}: {kind}", word))
    return found


def judge(found: Found, allowed: Found, exact: Found) -> list[str]:
    """The numbers that are wrong."""
    wrong = []
    tables = [{**f.outputs, **f.gradients} for f in (found, allowed, exact)]
    names = list(tables[2])
    lost = [name for name in names if name not in tables[0] and tables[2][name].count_nonzero()]
    if lost:
        wrong.append(f"gradients are missing: {', '.join(lost)}")
    names = [name for name in names if name in tables[0] and name in tables[1]]
    ours, others, right = ({name: plain(table[name]) for name in names} for table in tables)
    try:
        close(ours, others, right)
    except AssertionError as error:
        wrong.append(f"numbers: {error or 'of another shape'}")
    return wrong


# Layers.


class Given(NamedTuple):
    """All that a layer is given, but for its weights."""

    x: Tensor
    states: list[Tensor] | None
    lengths: Tensor | None
    resets: Tensor | None
    seeds: dict[str, Tensor]

    def exactly(self, dtype: torch.dtype) -> "Given":
        """The same, in that dtype and as plain as can be."""
        states = (
            None
            if self.states is None
            else [plain(s, dtype).requires_grad_(s.requires_grad) for s in self.states]
        )
        return Given(
            plain(self.x, dtype).requires_grad_(self.x.requires_grad),
            states,
            self.lengths if self.lengths is None else plain(self.lengths),
            self.resets if self.resets is None else plain(self.resets),
            {name: plain(t, dtype) for name, t in self.seeds.items()},
        )


def call_layer(module: Any, layer: Layer, given: Given, ours: bool) -> Found:
    """Outputs and gradients, of a module of ours, of torch.nn, or of `ByCells`."""
    case = layer.case
    leaves = {"input": given.x, **{f"hx_{k}": s for k, s in enumerate(given.states or [])}}
    leaves |= dict((module.module if isinstance(module, ByCells) else module).named_parameters())
    hx: Any = None
    if given.states is not None:
        hx = tuple(given.states) if len(given.states) > 1 else given.states[0]
    keywords: dict[str, Any] = {}
    if ours:
        if case.form == "lengths":
            keywords["lengths"] = given.lengths
        if given.resets is not None:
            keywords["resets"] = given.resets
        if layer.return_states:
            keywords["return_states"] = True
    with contexts(layer.asks):
        if case.form == "stream":
            out = _stream(module, case, given.x, hx)
        elif case.form in ("packed", "unsorted"):
            assert given.lengths is not None
            packed = pack_padded_sequence(
                given.x, given.lengths, case.batch_first, case.form == "packed"
            )
            out = module(packed, hx, **keywords)
        else:
            out = module(given.x, hx, **keywords)
    outputs = flat(out)
    return Found(outputs, gradients(layer.asks, outputs, given.seeds, leaves))


def _stream(module: Any, case: Case, x: Tensor, hx: Any) -> Any:
    """A step a call."""
    dim = 1 if case.batch_first else 0
    rows = []
    kept = []
    for t in range(case.T):
        y, hx = module(x.narrow(dim, t, 1), hx)
        rows.append(y)
        kept.append(y.clone())
    assert all(torch.allclose(y, was, 0, 0, equal_nan=True) for y, was in zip(rows, kept)), (
        "a step has changed another"
    )
    return torch.cat(rows, dim), hx


def draw_layer(layer: Layer, data: Data) -> tuple[dict[str, Tensor], Given]:
    """Weights by name, and the rest."""
    case = layer.case
    rng = data.rng
    exact = build(nn, case)
    weights = {
        name: data.tensor(name, p.shape, case.dtype, case.H**-0.5)
        for name, p in exact.named_parameters()
    }
    batched = case.form != "unbatched"

    def shape(*sizes: int) -> list[int]:
        """Of a layer's [..., T, B, K], as the input is."""
        *leading, T, B, K = sizes
        rows = [B, T] if case.batch_first else [T, B]
        return [*leading, *(rows if batched else [T]), K]

    D = 1 + case.bidirectional
    width = case.proj or case.H
    x = data.tensor("input", shape(case.T, case.B, case.I), case.dtype)
    widths = [width, *[case.H] * (cell_of(case.mode).states - 1)]
    ends = [[case.layers * D, *([case.B] if batched else []), K] for K in widths]
    states = (
        [data.tensor(f"hx_{k}", end, case.dtype) for k, end in enumerate(ends)] if case.hx else None
    )
    lengths = resets = None
    rows = shape(case.T, case.B, D * width)
    every = [shape(case.layers, case.T, case.B, D * K) for K in widths]
    if case.form in ("packed", "unsorted", "lengths"):
        least = 0 if case.form == "lengths" else 1
        lengths = torch.tensor(
            [rng.randint(least, case.T) for _ in range(case.B)], dtype=torch.int64
        )
    if case.form in ("packed", "unsorted"):
        assert lengths is not None
        lengths[0] = case.T
        lengths = lengths.sort(descending=True).values if case.form == "packed" else lengths
        rows = [int(lengths.sum()), D * width]
        every = [[case.layers, rows[0], D * K] for K in widths]
    elif lengths is not None:
        lengths = data.put("lengths", lengths.to(rng.choice((torch.int64, torch.int32))))
    if layer.resets:
        cuts = torch.rand(shape(case.T, case.B, 1), generator=data.generator)[..., 0] < 0.3
        resets = data.put("resets", cuts)
    shapes = {"output": rows, **{f"end_{k}": end for k, end in enumerate(ends)}}
    if layer.return_states:
        shapes |= {f"states_{k}": sizes for k, sizes in enumerate(every)}
    chosen = [name for name in shapes if rng.random() < layer.used] or ["output"]
    seeds = {name: data.tensor(f"d_{name}", shapes[name], case.dtype) for name in chosen}
    for t in (x, *(states or [])):
        t.requires_grad_(layer.asks not in WITHOUT and rng.random() >= layer.frozen)
    return weights, Given(x, states, lengths, resets, seeds)


def fill(module: Any, weights: dict[str, Tensor], frozen: set[str]) -> Any:
    for name, t in weights.items():
        setattr(module, name, nn.Parameter(t, requires_grad=name not in frozen))
    return module


def check_layer(layer: Layer, rng: random.Random, attempt: int) -> tuple[list[Finding], str]:
    """What is wrong with a layer, and the layouts of its tensors."""
    case = layer.case
    data = Data(rng, attempt, layer.zeros)
    weights, given = draw_layer(layer, data)
    frozen = {name for name in weights if rng.random() < layer.frozen}
    options = dict(dropout=layer.dropout)
    other = torch.float32 if case.dtype == torch.float64 else case.dtype
    built = build(
        rnn, case, dtype=case.dtype, plan=layer.plan, recompute=layer.recompute, **options
    )
    ours = fill(built, weights, frozen)
    theirs = fill(build(nn, case, dtype=case.dtype, **options), weights, frozen)
    others = fill(
        build(nn, case, dtype=other, **options),
        {n: plain(t, other) for n, t in weights.items()},
        frozen,
    )
    exact = fill(
        build(nn, case, **options), {n: plain(t, torch.float64) for n, t in weights.items()}, frozen
    )
    for module in (ours, theirs, others, exact):
        module.train(not layer.dropout)
    extended = case.form == "lengths" or layer.resets or layer.return_states
    right: Any = ByCells(exact) if extended else exact
    allowed: Any = ByCells(others) if extended else others
    inputs = {
        "input": given.x,
        **{f"hx_{k}": s for k, s in enumerate(given.states or [])},
        **weights,
        **{f"d_{name}": t for name, t in given.seeds.items()},
    }
    before = {name: state(t) for name, t in inputs.items()}
    found = call_layer(ours, layer, given, ours=True)
    findings = kinds(changed(inputs, before), "layer")
    was = {name: plain(t) for name, t in found.outputs.items()}
    try:
        reference = call_layer(theirs, layer, given, ours=False)
    except RuntimeError:  # torch.nn refuses some zero tensors
        reference = found
    findings += kinds(
        judge(
            found,
            call_layer(allowed, layer, given.exactly(other), ours=extended),
            call_layer(right, layer, given.exactly(torch.float64), ours=extended),
        ),
        "layer",
    )
    parameters = {name: [_strides(inputs[name])] for name in inputs}
    strides = {f"d_{name}": [*value, _natural(inputs[name])] for name, value in parameters.items()}
    returned = returns(found, layer.asks)
    if case.form == "packed" and "d_input" not in reference.gradients:
        returned.pop("d_input", None)  # as torch's packing left it
    by_torch = {**reference.outputs, **reference.gradients}
    if case.form != "stream":  # put together by `_stream`
        findings += kinds(forms(returned, by_torch, strides), "layer")
    came = {f"{name} that came": t for name, t in inputs.items()}
    findings += kinds(shared(returned, by_torch, came), "layer")
    with torch.no_grad():
        ours(torch.ones_like(plain(given.x)))
    if not all(
        torch.equal(plain(found.outputs[name]), value) or value.isnan().any()
        for name, value in was.items()
    ):
        findings += kinds(["a later call has changed an output"], "layer")
    if case.form != "stream":
        findings += kinds(edits(returned), "layer")
    return findings, str(data.layouts)


# Operators.


def exact_recurrence(
    call: Call, given: Sequence[Any], lengths: Tensor | None, resets: Tensor | None
) -> list[Any]:
    """As `rnn.functional.recurrence` on padded rows: y [T, B, N*H], the other states [S-1, T, B,
    N*H], the last."""
    x, *weights, s0 = given
    N = len(call.reverse)
    S = 2 if call.name == "lstm" else 1
    parts = zip(*([None] * N if w is None else w.chunk(N) for w in weights))
    sweeps = [
        sweep(call.name, x, part, list(s0[n * S : (n + 1) * S]), lengths, resets, call.reverse[n])
        for n, part in enumerate(parts)
    ]
    columns = [torch.cat(column, -1) for column in zip(*(rows for rows, _ in sweeps))]
    others = torch.stack(columns[1:]) if S > 1 and call.keep else None
    return [columns[0], others, torch.stack([s for _, last in sweeps for s in last])]


def check_call(call: Call, rng: random.Random, attempt: int) -> tuple[list[Finding], str]:
    """What is wrong with a call of the operator, and the layouts of its tensors."""
    data = Data(rng, attempt, call.zeros)
    (T, B, I, H) = call.sizes
    N = len(call.reverse)
    cell = getattr(cells, call.name)
    G = cell.gates
    S = cell.states
    lengths = resets = sizes = rows = None
    x_shape: list[int] = [T, B, I]
    if call.form != "padded":
        least = 0 if call.form == "lengths" else 1
        lengths = torch.tensor([rng.randint(least, T) for _ in range(B)], dtype=torch.int64)
    if call.form == "packed":
        assert lengths is not None
        lengths[0] = T
        lengths = lengths.sort(descending=True).values
        runs = torch.arange(T)[:, None] < lengths
        rows = runs.flatten().nonzero()[:, 0]
        sizes = data.put("batch_sizes", runs.sum(1), zeros=False)
        if not torch.equal(sizes, runs.sum(1)):  # an expanded one
            sizes = runs.sum(1)
        x_shape = [len(rows), I]
    elif lengths is not None:
        lengths = data.put("lengths", lengths.to(rng.choice((torch.int64, torch.int32))))
    if call.resets:
        resets = data.put("resets", torch.rand(T, B, generator=data.generator) < 0.3)
    shapes = {
        "x": x_shape,
        "w_ih": [N * G * H, I],
        "w_hh": [N * G * H, H],
        "b_ih": [N * G * H],
        "b_hh": [N * G * H],
        "s0": [N * S, B, H],
    }
    given = {
        name: data.tensor(name, shape, call.dtype, 1.0 if name in ("x", "s0") else H**-0.5)
        for name, shape in shapes.items()
        if call.bias or name[:2] != "b_"
    }
    for t in given.values():
        t.requires_grad_(call.asks not in WITHOUT and rng.random() >= call.frozen)
    ends = {
        "y": [*x_shape[:-1], N * H],
        "states": [S - 1, len(rows) if rows is not None else T * B, N * H],
        "last": [N * S, B, H],
    }
    if S == 1 or not call.keep:
        del ends["states"]
    chosen = [name for name in ends if rng.random() < call.used] or ["y"]
    seeds = {name: data.tensor(f"d_{name}", ends[name], call.dtype) for name in chosen}

    def ours() -> Found:
        arguments: Any = [given.get(name) for name in shapes]
        recurrence: Any = rnn.functional.recurrence
        with contexts(call.asks):
            out: Any = recurrence(
                cell,
                *arguments,
                lengths if sizes is None else None,
                sizes,
                resets,
                call.reverse,
                call.keep,
                call.plan,
                call.recompute,
            )
        outputs = {name: t for name, t in zip(("y", "states", "last"), out) if t is not None}
        return Found(outputs, gradients(call.asks, outputs, seeds, given))

    def torchs(dtype: torch.dtype) -> Found:
        leaves = {
            name: plain(t, dtype).requires_grad_(t.requires_grad) for name, t in given.items()
        }
        x = leaves["x"]
        if rows is not None:
            x = x.new_zeros(T * B, I).index_copy(0, rows, x).view(T, B, I)
        arguments = [x, *(leaves.get(name) for name in list(shapes)[1:])]
        with contexts(call.asks):
            out = exact_recurrence(
                call,
                arguments,
                lengths if lengths is None else plain(lengths),
                resets if resets is None else plain(resets),
            )
            if rows is not None:
                out[0] = out[0].flatten(0, 1)[rows]
            if out[1] is not None:
                out[1] = out[1].flatten(1, 2)
                out[1] = out[1] if rows is None else out[1][:, rows]
        outputs = {name: t for name, t in zip(("y", "states", "last"), out) if t is not None}
        plain_seeds = {name: plain(t, dtype) for name, t in seeds.items()}
        return Found(outputs, gradients(call.asks, outputs, plain_seeds, leaves))

    inputs = {**given, **{f"d_{name}": t for name, t in seeds.items()}}
    before = {name: state(t) for name, t in inputs.items()}
    found = ours()
    findings = kinds(changed(inputs, before), "operator")
    other = torch.float32 if call.dtype == torch.float64 else call.dtype
    findings += kinds(judge(found, torchs(other), torchs(torch.float64)), "operator")
    returned = returns(found, call.asks)
    strides = {f"d_{name}": [_strides(t)] for name, t in given.items()}
    findings += kinds(forms(returned, {}, strides), "operator")
    findings += kinds(
        shared(returned, {}, {f"{name} that came": t for name, t in inputs.items()}), "operator"
    )
    findings += kinds(edits(returned), "operator")
    return findings, str(data.layouts)


def check(seed: int, index: int) -> list[Finding]:
    """All that is wrong with a case. Wrong numbers are wrong three times, with other data."""
    warnings.simplefilter("ignore")
    found: list[Finding] = []
    for attempt in range(3):
        rng, case = draw(seed, index)
        threads = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        try:
            one = check_layer if isinstance(case, Layer) else check_call
            found, layouts = one(case, rng, 1000 * index + attempt)  # type: ignore[arg-type]
        except Exception as error:
            found = [Finding(f"raises {type(error).__name__}: {str(error)[:60]}", str(error)[:400])]
            layouts = ""
        finally:
            torch.set_num_threads(threads)
        found = [Finding(kind, f"{text} | {case} | {layouts}") for kind, text in found]
        if not any("numbers" in kind for kind, _ in found):
            break
    return found


if __name__ == "__main__":
    sys.exit(main(check, describe, "tests.fuzz_layouts"))
