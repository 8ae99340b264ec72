"""What layers have beyond torch.nn's: each option against a loop in plain torch with the same
masks, heads against separate layers of torch.nn; off, nothing changes."""

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnn
from rnn.kernels import notices
from rnn.kernels.cells import Cell, sigmoid, tanh
from rnn.kernels.plan import Plan
from tests.cases import LAYER_NAMES

DOUBLE = torch.float64


def own_step(x: Any, r: Any, s: Any) -> Any:
    f = sigmoid(x[0] + r[0])
    return (f * s[0] + (1 - f) * tanh(x[1] + f * r[1]),)


OWN = Cell("own", own_step, gates=2)


def make(name: str, *args: Any, **options: Any) -> Any:
    options.setdefault("dtype", DOUBLE)
    if name == "Recurrent":
        return rnn.Recurrent(OWN, *args, **options)
    return getattr(rnn, name)(*args, **options)


def formula(name: str, gi: Tensor, gh: Tensor, h: Tensor, c: Tensor, norm_c: Any) -> list[Tensor]:
    """A step by hand, from W_ih x + b_ih and W_hh h + b_hh."""
    if name == "RNN":
        return [torch.tanh(gi + gh)]
    if name == "LSTM":
        i, f, g, o = (gi + gh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        seen = c if norm_c is None else F.layer_norm(c, c.shape[-1:], norm_c)
        return [o.sigmoid() * seen.tanh(), c]
    if name == "GRU":
        (ir, iz, im), (hr, hz, hm) = gi.chunk(3, -1), gh.chunk(3, -1)
        z = (iz + hz).sigmoid()
        return [(1 - z) * (im + (ir + hr).sigmoid() * hm).tanh() + z * h]
    (xf, xn), (rf, rn) = gi.chunk(2, -1), gh.chunk(2, -1)
    f = (xf + rf).sigmoid()
    return [f * h + (1 - f) * (xn + f * rn).tanh()]


def by_hand(name: str, layer: Any, x: Tensor, hx: Any, lengths: Any = None) -> Any:
    """The layer's output and last states for x [T, B, I], by a loop over steps. Draws its masks in
    the order in which the layer draws them."""
    S = layer.layer_cell().carried
    D = 1 + layer.bidirectional
    heads = layer.num_heads
    T, B, _ = x.shape
    H = layer.hidden_size // heads
    N = D * heads
    rates = layer.zoneout if isinstance(layer.zoneout, tuple) else (layer.zoneout,) * S
    zoned = [k for k, rate in enumerate(rates) if rate]
    train = layer.training
    ends: list[list[Tensor]] = [[] for _ in range(S)]
    for k in range(layer.num_layers):
        if k and layer.dropout:
            x = F.dropout(x, layer.dropout, train)
        suffixes = ("", "_reverse")[:D]

        def whole(kind: str, k: int = k, suffixes: Any = suffixes) -> Any:
            if not hasattr(layer, f"{kind}_l{k}"):
                return None
            return torch.cat([getattr(layer, f"{kind}_l{k}{suffix}") for suffix in suffixes])

        kinds = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
        w_ih, w_hh, b_ih, b_hh = map(whole, kinds)
        if train and layer.weight_drop:
            w_hh = F.dropout(w_hh, layer.weight_drop)
        stays = torch.zeros(T, B, N, S, H, dtype=DOUBLE)
        if zoned:
            row = torch.tensor([rates[s] for s in zoned], dtype=DOUBLE)[None, :, None]
            every = row.expand(N, -1, H).reshape(-1).expand(T, B, -1)
            drawn = torch.bernoulli(every) if train else every
            stays[..., zoned, :] = drawn.view(T, B, N, len(zoned), H)
        mask = torch.ones(N, B, H, dtype=DOUBLE)
        if train and layer.recurrent_dropout:
            keep = 1 - layer.recurrent_dropout
            mask = torch.bernoulli(torch.full((N, B, H), keep, dtype=DOUBLE)) / keep
        norms = [whole(kind) for kind in ("norm_ih", "norm_hh", "norm_c")]
        initial = whole("initial_states")
        columns = []
        for n in range(N):
            d, head = divmod(n, heads)
            G = len(w_ih) // (N * H)
            gates = slice(n * G * H, (n + 1) * G * H)
            units = slice(head * H, (head + 1) * H)
            if hx is not None:
                states = [s[k * D + d, :, units] for s in hx]
            elif initial is not None:
                states = [initial[d * S + j, units].expand(B, -1) for j in range(S)]
            else:
                states = [torch.zeros(B, H, dtype=DOUBLE)] * S
            out: list[Any] = [None] * T
            for t in reversed(range(T)) if d else range(T):
                gi = x[t] @ w_ih[gates].T
                gh = (mask[n] * states[0]) @ w_hh[gates].T
                if layer.layer_norm:
                    gi = F.layer_norm(gi, gi.shape[-1:], norms[0][gates])
                    gh = F.layer_norm(gh, gh.shape[-1:], norms[1][gates])
                if b_ih is not None:
                    gi = gi + b_ih[gates]
                    gh = gh + b_hh[gates]
                norm_c = None if norms[2] is None else norms[2][n * H : (n + 1) * H]
                new = formula(name, gi, gh, states[0], states[-1], norm_c)
                clip = layer.clip_recurrent_grad
                if isinstance(clip, tuple):
                    new[0] = hooked(new[0], lambda g, limit=clip[1]: to_norm(g, limit))
                new = [
                    z * old + (1 - z) * v
                    for z, old, v in zip(stays[t, :, n].unbind(1), states, new)
                ]
                if isinstance(clip, float):
                    new[0] = hooked(new[0], lambda g, limit=clip: g.clamp(-limit, limit))
                if lengths is not None:
                    runs = (t < lengths)[:, None]
                    new = [torch.where(runs, v, old) for v, old in zip(new, states)]
                states = new
                out[t] = new[0] if lengths is None else new[0] * (t < lengths)[:, None]
            columns.append((torch.stack(out), states))
        x = torch.cat([y for y, _ in columns], -1)
        for d in range(D):
            of_heads = [states for _, states in columns[d * heads : (d + 1) * heads]]
            for j in range(S):
                ends[j].append(torch.cat([states[j] for states in of_heads], -1))
    return x, [torch.stack(column) for column in ends]


def hooked(t: Tensor, hook: Any) -> Tensor:
    t = t.view_as(t)
    if t.requires_grad:
        t.register_hook(hook)
    return t


def to_norm(g: Tensor, limit: float) -> Tensor:
    return g * (limit / g.norm(dim=-1, keepdim=True).clamp(min=limit))


def randomized(layer: Any) -> Any:
    """Gains and learned states that are neither 1 nor 0."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.startswith(("norm", "initial")):
                weight.uniform_(0.5, 1.5)
    return layer


def compare(name: str, layer: Any, hx: bool = True, lengths: Any = None) -> None:
    """Values and all gradients."""
    T, B, I = 5, 3, layer.input_size
    S = layer.layer_cell().carried
    D = 1 + layer.bidirectional
    x = torch.randn(T, B, I, dtype=DOUBLE, requires_grad=True)
    shape = layer.num_layers * D, B, layer.hidden_size
    states = [torch.randn(shape, dtype=DOUBLE, requires_grad=True) for _ in range(S)]
    found = []
    for ours in (True, False):
        torch.manual_seed(5)
        given = states if hx else None
        if ours:
            hidden = None if not hx else states[0] if S == 1 else tuple(states)
            y, last = layer(x, hidden, lengths=lengths)
            ends = [last] if S == 1 else [*last]
        else:
            y, ends = by_hand(name, layer, x, given, lengths)
        leaves = [x, *(states if hx else []), *layer.parameters()]
        loss = y.sin().sum() + sum((end.cos() * (k + 1)).sum() for k, end in enumerate(ends))
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append(
            [y, *ends, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads))]
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


NAMES = [*LAYER_NAMES, "Recurrent"]
OPTIONS: dict[str, Any] = {
    "recurrent_dropout": dict(recurrent_dropout=0.4),
    "zoneout": dict(zoneout=0.3),
    "weight_drop": dict(weight_drop=0.4),
    "layer_norm": dict(layer_norm=True),
    "learned_state": dict(learned_state=True),
    "clip": dict(clip_recurrent_grad=0.05),
    "clip by norm": dict(clip_recurrent_grad=("norm", 0.1)),
    "heads": dict(num_heads=2),
    "all": dict(
        recurrent_dropout=0.4,
        zoneout=0.3,
        weight_drop=0.4,
        learned_state=True,
        num_heads=2,
        clip_recurrent_grad=0.05,
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """The warning that layer norm is slow has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rnn.* run step by step")
        yield


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_option(name: str, option: str) -> None:
    # The reference, whatever the machine has: the C++ of so many cells would take long to compile.
    layer = randomized(make(name, 4, 6, bidirectional=True, plan=Plan("numpy"), **OPTIONS[option]))
    compare(name, layer)
    layer.eval()
    compare(name, layer, hx=False)


@pytest.mark.parametrize("option", ["all", "layer_norm", "zoneout", "recurrent_dropout"])
@pytest.mark.parametrize("name", ["LSTM", "Recurrent"])
def test_option_with_lengths(name: str, option: str) -> None:
    layer = randomized(make(name, 4, 6, 2, plan=Plan("numpy"), dropout=0.2, **OPTIONS[option]))
    compare(name, layer, hx=False, lengths=torch.tensor([5, 0, 3]))


@pytest.mark.parametrize("name", ["GRU"])
def test_native(name: str) -> None:
    """By the plan that is chosen."""
    layer = make(name, 4, 6, **OPTIONS["all"])
    compare(name, randomized(layer))


@pytest.mark.parametrize("name", LAYER_NAMES)
@pytest.mark.parametrize("form", ["padded", "packed", "lengths", "resets", "unbatched"])
def test_heads_are_separate_layers(name: str, form: str) -> None:
    """Two heads: two layers of torch.nn side by side, their hidden states next to each other."""
    heads, T, B, I, H = 2, 5, 3, 4, 3
    ours = make(name, I, heads * H, num_heads=heads, bidirectional=True, batch_first=True)
    theirs = getattr(nn, name)
    apart = [theirs(I, H, bidirectional=True, batch_first=True).double() for _ in range(heads)]
    with torch.no_grad():
        for key, weight in ours.named_parameters():
            for part, layer in zip(weight.chunk(heads), apart):
                getattr(layer, key).copy_(part)
    S = 2 if name == "LSTM" else 1
    batch = () if form == "unbatched" else (B,)
    x = torch.randn(*batch, T, I, dtype=DOUBLE, requires_grad=True)
    states = [torch.randn(2, *batch, heads * H, dtype=DOUBLE) for _ in range(S)]
    lengths = torch.tensor([5, 4, 2])
    more: dict[str, Any] = {}
    if form == "lengths":
        more = dict(lengths=lengths)
    elif form == "resets":
        more = dict(resets=torch.rand(B, T) < 0.3)

    def run(layer: Any, hx: list[Tensor], more: Any = more) -> list[Tensor]:
        given: Any = x
        if form == "packed":
            given = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        y, last = layer(given, tuple(hx) if S > 1 else hx[0], **more)
        y = y.data if form == "packed" else y
        return [y, *(last if S > 1 else [last])]

    got = run(ours, states)
    parts = []
    for k, layer in enumerate(apart):
        hx = [s[..., k * H : (k + 1) * H] for s in states]
        # With lengths or resets torch.nn has nothing like it: our layer of one head.
        other = rnn.replace(layer, verbose=False) if more else layer
        parts.append(run(other, [s.contiguous() for s in hx]))
    y = torch.cat([part[0].unflatten(-1, (2, H)) for part in parts], -1).flatten(-2)
    want = [y, *(torch.cat(column, -1) for column in zip(*(part[1:] for part in parts)))]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves = [x, *ours.parameters()]
    grads = torch.autograd.grad([t.sin().sum() for t in got], leaves)
    separate = torch.autograd.grad(
        [t.sin().sum() for t in want], [x, *(p for layer in apart for p in layer.parameters())]
    )
    count = len(leaves) - 1
    joined = [torch.cat(pair) for pair in zip(separate[1 : 1 + count], separate[1 + count :])]
    torch.testing.assert_close(grads, (separate[0], *joined), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_off_is_the_plain_layer(name: str) -> None:
    """Bit for bit, and in training as in evaluation where an option is for training alone."""
    torch.manual_seed(0)
    plain = make(name, 4, 6, dtype=torch.float32)
    off = make(
        name,
        4,
        6,
        dtype=torch.float32,
        recurrent_dropout=0.0,
        zoneout=0.0,
        weight_drop=0,
        layer_norm=False,
        learned_state=False,
        num_heads=1,
        clip_recurrent_grad=None,
    )
    assert not off.extended and repr(off) == repr(plain)
    off.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3, 4)
    assert torch.equal(plain(x)[0], off(x)[0])
    dropped = make(name, 4, 6, dtype=torch.float32, recurrent_dropout=0.5, weight_drop=0.5)
    dropped.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x)[0], dropped.eval()(x)[0])


def test_masks_are_reproducible() -> None:
    layer = rnn.GRU(4, 6, **OPTIONS["all"], plan=Plan("numpy"))
    x = torch.randn(5, 3, 4)
    torch.manual_seed(3)
    first = layer(x)[0]
    again = layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(layer(x)[0], first) and not torch.equal(again, first)


def test_an_option_that_is_set_later() -> None:
    layer = make("LSTM", 4, 6, plan=Plan("numpy"))
    layer.zoneout = (0.2, 0.5)
    layer.recurrent_dropout = 0.3
    assert layer.extended and "zoneout=(0.2, 0.5)" in repr(layer)
    compare("LSTM", layer)
    for name in ("num_heads", "layer_norm", "learned_state"):
        with pytest.raises(AttributeError, match=name):
            setattr(layer, name, 2)
    layer.zoneout = layer.recurrent_dropout = 0.0
    assert not layer.extended


@pytest.mark.parametrize("name", NAMES)
def test_pickles_and_copies(name: str) -> None:
    layer = make(name, 4, 6, zoneout=0.2, num_heads=2, learned_state=True, plan=Plan("numpy"))
    x = torch.randn(5, 3, 4, dtype=DOUBLE)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(1)
        y = layer(x)[0]
        torch.manual_seed(1)
        assert torch.equal(other(x)[0], y)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(recurrent_dropout=1.0), ValueError),
        (dict(recurrent_dropout="a"), TypeError),
        (dict(zoneout=-0.1), ValueError),
        (dict(zoneout=(0.1, 0.2, 0.3)), ValueError),
        (dict(zoneout=(0.1, 2)), ValueError),
        (dict(zoneout=None), TypeError),
        (dict(weight_drop=True), TypeError),
        (dict(num_heads=0), ValueError),
        (dict(num_heads=4), ValueError),
        (dict(num_heads=2.0), TypeError),
        (dict(num_heads=2, proj_size=2), ValueError),
        (dict(layer_norm=True, proj_size=2), ValueError),
        (dict(learned_state=True, proj_size=2), ValueError),
        (dict(layer_norm="yes"), TypeError),
        (dict(learned_state=None), TypeError),
        (dict(clip_recurrent_grad=0.0), ValueError),
        (dict(clip_recurrent_grad=("max", 1.0)), ValueError),
        (dict(clip_recurrent_grad=("norm", None)), TypeError),
        (dict(clip_recurrent_grad="1"), TypeError),
        (dict(clip_recurrent_grad=float("inf")), ValueError),
    ],
    ids=str,
)
def test_mistakes(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        rnn.LSTM(4, 6, **options)


@pytest.mark.parametrize(
    "options",
    [dict(recurrent_dropout=0.2), dict(weight_drop=0.2), dict(clip_recurrent_grad=1e9)],
    ids=str,
)
def test_options_with_a_projection(options: dict[str, Any]) -> None:
    """The parameters are torch.nn's, and what is off in eval changes nothing."""
    sizes: dict[str, Any] = dict(proj_size=2, bidirectional=True, dtype=torch.float64)
    theirs, ours = nn.LSTM(4, 6, 2, **sizes), rnn.LSTM(4, 6, 2, **sizes, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    found = []
    for layer in (theirs, ours):
        y, (h, c) = layer(x)
        loss = y.sin().sum() + h.cos().sum() + c.sum()
        found.append([y, h, c, *torch.autograd.grad(loss, [*layer.parameters()])])
    torch.testing.assert_close(*found)


def test_not_a_cell() -> None:
    with pytest.raises(TypeError, match=r"rnn\.Cell, got str"):
        rnn.Recurrent("lstm", 4, 6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="proj_size"):
        rnn.Recurrent(OWN, 4, 6, proj_size=2)


def test_nan_behind_an_end() -> None:
    """What padding holds reaches nothing."""
    for options in OPTIONS.values():
        layer = make("LSTM", 4, 6, plan=Plan("numpy"), **options)
        x = torch.randn(5, 3, 4, dtype=DOUBLE)
        x[3:, 1] = torch.nan
        x.requires_grad_()
        y, _ = layer(x, lengths=[5, 3, 4])
        assert y.isfinite().all()
        grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()], allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


def test_tools_that_know_only_torch_nn() -> None:
    model = nn.Sequential(rnn.LSTM(4, 6, num_heads=2), rnn.Recurrent(OWN, 6, 6))
    assert [type(m) for m in rnn.restore(model, verbose=False)] == [rnn.LSTM, rnn.Recurrent]
    for layer in model:
        with pytest.raises(NotImplementedError, match="no layer like"):
            torch.jit.script(layer)


def test_says_that_layer_norm_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_given", set())
    layer = rnn.GRU(4, 6, layer_norm=True, plan=Plan("cupy"))
    x = torch.randn(5, 3, 4)
    with pytest.warns(UserWarning, match="step by step") as said:
        layer(x)
    assert [warning.filename for warning in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(
    "cell",
    [rnn.cells.peephole_lstm, rnn.cells.cifg, rnn.cells.mgu, rnn.cells.indrnn],
    ids=lambda c: c.name,
)
def test_ready_made(cell: Cell, steps: int) -> None:
    """By their formulas in torch, with resets, which leave constants alone."""
    layer: Any = rnn.Recurrent(cell, 4, 6, dtype=DOUBLE, plan=Plan("numpy"))
    x = torch.randn(steps, 3, 4, dtype=DOUBLE, requires_grad=True)
    resets = torch.rand(steps, 3) < 0.3
    w_ih, w_hh, b_ih, b_hh = layer.parameters() if not cell.constants else [*layer.parameters()][:4]
    states = [torch.zeros(3, 6, dtype=DOUBLE)] * cell.carried
    constants = layer.constants_l0.unbind() if cell.constants else ()
    out = []
    for t in range(steps):
        states = [torch.where(resets[t, :, None], 0, s) for s in states]
        gi = (x[t] @ w_ih.T + b_ih).chunk(cell.gates, -1)
        gh = (states[0] @ w_hh.T + b_hh).chunk(cell.gates, -1)
        states = ready_made(cell.name, gi, gh, states, constants)
        out.append(states[0])
    y, last = layer(x, resets=resets)
    want = torch.stack(out)
    ends = [last] if cell.carried == 1 else [*last]
    got = [y, *ends]
    expected = [want, *(s[None] for s in states)]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *layer.parameters()]
    grads, right = (
        torch.autograd.grad([t.sin().sum() for t in some], leaves, allow_unused=True)
        for some in (got, expected)
    )
    for one, other, leaf in zip(grads, right, leaves):
        other = torch.zeros_like(leaf) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def ready_made(name: str, gi: Any, gh: Any, s: Any, k: Any) -> list[Tensor]:
    if name == "indrnn":
        return [(gi[0] + k[0] * s[0]).relu()]
    if name == "mgu":
        f = (gi[0] + gh[0]).sigmoid()
        return [(1 - f) * s[0] + f * (gi[1] + f * gh[1]).tanh()]
    c = s[1]
    if name == "cifg":
        f, o = (gi[0] + gh[0]).sigmoid(), (gi[2] + gh[2]).sigmoid()
        c = f * c + (1 - f) * (gi[1] + gh[1]).tanh()
        return [o * c.tanh(), c]
    i, f = ((gi[j] + gh[j] + k[j] * c).sigmoid() for j in range(2))
    c = f * c + i * (gi[2] + gh[2]).tanh()
    o = (gi[3] + gh[3] + k[2] * c).sigmoid()
    return [o * c.tanh(), c]


COMPILED = [
    dict(zoneout=0.3, recurrent_dropout=0.2),
    dict(num_heads=2),
    dict(clip_recurrent_grad=0.01),
    dict(clip_recurrent_grad=("norm", 0.01)),
]


@pytest.mark.parametrize("options", COMPILED)
def test_compiled(options: dict[str, Any]) -> None:
    """One graph, the same numbers."""
    layer = rnn.Recurrent(rnn.cells.peephole_lstm, 4, 6, **options, plan=Plan("numpy"))
    x = torch.randn(5, 3, 4)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        torch.manual_seed(2)
        y, _ = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*layer.parameters()])])
    torch.testing.assert_close(*results)


def test_exported() -> None:
    """A registered cell is an operator of the exported program."""
    layer = rnn.Recurrent(rnn.cells.cifg, 4, 6, plan=Plan("numpy"))
    x = torch.randn(5, 3, 4)
    program = torch.export.export(layer, (x,))
    assert "fused_rnn.forward" in str(program.graph)
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


def test_explained() -> None:
    layer = rnn.LSTM(4, 6, 2, zoneout=0.3, num_heads=2, batch_first=True)
    text = rnn.explain(layer, torch.randn(3, 5, 4), return_states=True)
    assert text.count("lstm-zoneout01") == 2 and "N=2" in text


@pytest.mark.parametrize("option", ["layer_norm", "clip by norm"])
def test_explained_step_by_step(option: str) -> None:
    layer = rnn.LSTM(4, 6, 2, plan=Plan("cupy"), **OPTIONS[option])
    lines = rnn.explain(layer, torch.randn(5, 3, 4)).splitlines()
    assert len(lines) == 2
    for k, line in enumerate(lines):
        assert line.startswith(f"layer {k}: lstm") and "torch operations" in line
        assert next(iter(OPTIONS[option])) in line


def test_batch_first_and_return_states() -> None:
    """As the layer with the same weights in the other layout."""
    options = dict(recurrent_dropout=0.3, zoneout=0.2, num_heads=2, plan=Plan("numpy"))
    one = rnn.LSTM(4, 6, **options)
    other = rnn.LSTM(4, 6, batch_first=True, **options)
    other.load_state_dict(one.state_dict())
    for layer in (one, other):
        layer.zoneout = 0.0  # whose masks are drawn in the layout of the input
    x = torch.randn(5, 3, 4)
    found = []
    for layer, given in ((one, x), (other, x.transpose(0, 1))):
        torch.manual_seed(4)
        y, last, (h, c) = layer(given, return_states=True)
        turned = [t if layer is one else t.transpose(-3, -2) for t in (y, h, c)]
        assert torch.equal(h[0], y)
        found.append([*turned, *last])
    for a, b in itertools.zip_longest(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda: rnn.GRU(4, 6, num_heads=2, learned_state=True, dtype=DOUBLE),
        lambda: rnn.Recurrent(rnn.cells.peephole_lstm, 4, 6, dtype=DOUBLE),
        lambda: rnn.LSTM(4, 6, layer_norm=True, dtype=DOUBLE),
        lambda: rnn.RNN(4, 6, clip_recurrent_grad=0.1, dtype=DOUBLE),
        lambda: rnn.RNN(4, 6, clip_recurrent_grad=("norm", 0.1), dtype=DOUBLE),
        lambda: rnn.GRU(4, 6, zoneout=0.2, dtype=DOUBLE),
        lambda: rnn.LSTM(4, 6, proj_size=2, bidirectional=True, dtype=DOUBLE),
    ],
    ids=["heads", "own cell", "norm", "clip", "clip by norm", "zoneout", "projected"],
)
def test_transforms(make_layer: Any) -> None:
    """torch.func: gradients as autograd's, for each sample too."""
    layer = make_layer().eval()
    weights = dict(layer.named_parameters())
    x = torch.randn(2, 5, 3, 4, dtype=DOUBLE)

    def loss(weights: Any, x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, weights, (x,))[0]
        return y.sin().sum()

    want = [torch.autograd.grad(loss(weights, one), [*weights.values()]) for one in x]
    single = torch.func.grad(loss)(weights, x[0])
    torch.testing.assert_close([*single.values()], [*want[0]])
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    torch.testing.assert_close([*each.values()], [torch.stack(pair) for pair in zip(*want)])


FORMS: dict[str, Any] = {
    "heads": dict(num_heads=2),
    "norms": dict(layer_norm=True, clip_recurrent_grad=("norm", 10.0)),
    "rest": dict(zoneout=0.2, learned_state=True, clip_recurrent_grad=10.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["LSTM", "Recurrent"])
def test_transforms_of_functions(name: str, form: str) -> None:
    """grad against a backward pass, vmap against a loop, jvp against differences."""
    layer = make(name, 4, 6, bidirectional=True, plan=Plan("numpy"), **FORMS[form]).eval()
    weights = {key: weight.detach() for key, weight in layer.named_parameters()}
    x = torch.randn(3, 5, 2, 4, dtype=DOUBLE)

    def run(weights: Any, x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, weights, (x,))[0]
        return found

    each = torch.func.vmap(run, in_dims=(None, 0))(weights, x)
    torch.testing.assert_close(each, torch.stack([layer(one)[0] for one in x]))
    found = torch.func.grad(lambda weights: run(weights, x[0]).sin().sum())(weights)
    wanted = torch.autograd.grad(layer(x[0])[0].sin().sum(), [*layer.parameters()])
    torch.testing.assert_close([*found.values()], [*wanted])
    slope = torch.func.jvp(lambda x: run(weights, x), (x[0],), (x[1],))[1]
    ahead, behind = (run(weights, x[0] + step * x[1]) for step in (1e-6, -1e-6))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("option", OPTIONS)
def test_empty(option: str) -> None:
    """Batches of no sequences are computed; sequences of no steps are refused as torch.nn does."""
    layer = make("LSTM", 4, 6, batch_first=True, plan=Plan("numpy"), **OPTIONS[option])
    x = torch.zeros(0, 5, 4, dtype=DOUBLE, requires_grad=True)
    y, (h, c), states = layer(x, return_states=True)
    y.sum().backward()
    assert y.shape == (0, 5, 6) and h.shape == c.shape == (1, 0, 6)
    assert states[1].shape == (1, 0, 5, 6)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        layer(torch.zeros(3, 0, 4, dtype=DOUBLE))


def test_compiled_without_a_name() -> None:
    """A cell that is not registered is recorded step by step."""
    layer = rnn.Recurrent(OWN, 4, 6)
    x = torch.randn(3, 2, 4)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
