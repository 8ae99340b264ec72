"""Norms of dL/dh_t, against autograd over a plain loop of torch's cells in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn
from tests.cases import TORCH_CELLS

T = 6
B = 3
I = 2
H = 4
KINDS = [
    ("rnn_tanh", "RNN", {}),
    ("rnn_relu", "RNN", {"nonlinearity": "relu"}),
    ("lstm", "LSTM", {}),
    ("gru", "GRU", {}),
]


class Model(nn.Module):
    def __init__(self, encoder: nn.Module, directions: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(directions * H, 2)

    def forward(self, x: Any, **options: Any) -> Any:
        y, last = self.encoder(x, **options)
        y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
        return self.head(y), last


def loss_of(output: Any) -> Tensor:
    """Of all outputs and last states."""
    logits, last = output
    ends = last if isinstance(last, tuple) else (last,)
    return logits.sin().sum() + sum(end.pow(2).sum() for end in ends)


def plain_loop(
    cell: str, model: Any, x: Tensor, lengths: list[int], resets: Tensor | None
) -> tuple[Tensor, dict[str, list[Any]]]:
    """The loss, and of each recurrence and step the hidden states of the sequences that have it.
    x: [T, B, I]."""
    layer = model.encoder
    step = TORCH_CELLS[cell]
    D = 2 if layer.bidirectional else 1
    seen: dict[str, list[Any]] = {}
    loss = torch.zeros((), dtype=x.dtype)
    for b, length in enumerate(lengths):
        rows = [*x[:length, b].unbind(0)]
        for k in range(layer.num_layers):
            halves = []
            for d in range(D):
                suffix = f"l{k}_reverse" if d else f"l{k}"
                weights = [
                    getattr(layer, f"{name}_{suffix}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                ]
                zeros = [torch.zeros(1, H, dtype=x.dtype) for _ in range(1 + (cell == "lstm"))]
                s: Any = zeros
                hs: list[Any] = [None] * length
                for t in reversed(range(length)) if d else range(length):
                    if resets is not None and t + d < length and resets[t + d, b]:
                        s = zeros
                    new = step(rows[t][None], tuple(s) if len(s) > 1 else s[0], *weights)
                    s = [*new] if len(zeros) > 1 else [new]
                    s[0].retain_grad()
                    hs[t] = s[0]
                    seen.setdefault(suffix, [[] for _ in range(T)])[t].append(s[0])
                loss = loss + sum(end.pow(2).sum() for end in s)
                halves.append(hs)
            rows = [torch.cat(parts, 1)[0] for parts in zip(*halves)]
        for row in rows:
            loss = loss + model.head(row).sin().sum()
        loss = loss + (T - length) * model.head(torch.zeros(D * H).to(x)).sin().sum()
    return loss, seen


def expected(*given: Any) -> tuple[float, dict[str, Tensor]]:
    loss, seen = plain_loop(*given)
    loss.backward()
    norms = {
        f"encoder.{suffix}": torch.stack(
            [
                torch.stack([h.grad.norm() for h in row] or [loss.new_zeros(())]).norm()
                for row in steps
            ]
        ).detach()
        for suffix, steps in seen.items()
    }
    return loss.item(), norms


def check(found: rnn.GradientFlow, want: tuple[float, dict[str, Tensor]]) -> None:
    assert abs(found.loss - want[0]) < 1e-10
    assert found.norms.keys() == want[1].keys()
    torch.testing.assert_close(found.norms, want[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("library", [rnn, nn], ids=["rnn", "torch.nn"])
@pytest.mark.parametrize(
    "options", [{}, dict(num_layers=2, bidirectional=True, batch_first=True)], ids=["plain", "deep"]
)
@pytest.mark.parametrize(("cell", "name", "chosen"), KINDS, ids=[kind[0] for kind in KINDS])
def test_norms(
    cell: str, name: str, chosen: dict[str, Any], options: dict[str, Any], library: Any
) -> None:
    torch.manual_seed(0)
    layer = getattr(library, name)(I, H, **chosen, **options)
    model = Model(layer, 1 + bool(options)).double()
    x = torch.randn(T, B, I, dtype=torch.float64)
    given = x.transpose(0, 1) if options else x
    want = expected(cell, model, x, [T] * B, None)
    before = [(t, t.grad.clone()) for t in model.parameters() if t.grad is not None]
    check(rnn.gradient_flow(model, given, loss_of), want)
    assert all(t.grad is not None and torch.equal(t.grad, grad) for t, grad in before)
    # and the layer is what it was
    assert not {"forward", "_run", "_single_step"} & {*vars(layer)}


@pytest.mark.parametrize("cell_and_name", [("lstm", "LSTM"), ("gru", "GRU")], ids=str)
def test_masks(cell_and_name: tuple[str, str]) -> None:
    """lengths, resets and packed sequences, under torch.no_grad as well."""
    cell, name = cell_and_name
    torch.manual_seed(0)
    layer = getattr(rnn, name)(I, H, bidirectional=True)
    model = Model(layer, 2).double()
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = [2, T, 3]
    resets = torch.rand(T, B) < 0.3

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model.encoder

        def forward(self, x: Tensor, resets: Tensor) -> Any:
            return model(x, lengths=lengths, resets=resets)

    with torch.no_grad():
        found = rnn.gradient_flow(Masked(), (x, resets), loss_of)
    check(found, expected(cell, model, x, lengths, resets))
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    loss, want = expected(cell, model, x, lengths, None)
    padding = (3 * T - sum(lengths)) * model.head(torch.zeros(2 * H).double()).sin().sum().item()
    check(rnn.gradient_flow(model, packed, loss_of), (loss - padding, want))


def test_frozen() -> None:
    """Neither the input nor the parameters need gradients."""
    model = Model(rnn.GRU(I, H), 1).double()
    x = torch.randn(T, B, I, dtype=torch.float64)
    want = expected("gru", model, x, [T] * B, None)
    check(rnn.gradient_flow(model.requires_grad_(False), x, loss_of), want)


def test_single_step_and_calls() -> None:
    """A layer that is called once a step, as in decoding, has its name for each call."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = rnn.LSTM(I, H)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for t in range(2):
                y, state = self.cell(x[t : t + 1], state)
            return y

    model = Decoder().double()
    x = torch.randn(2, B, I, dtype=torch.float64)
    whole = rnn.gradient_flow(model.cell, x, lambda output: output[0][-1].sum())
    found = rnn.gradient_flow(model, x, lambda y: y.sum())
    assert [*found.norms] == ["cell.l0", "cell.l0 (call 2)"]
    torch.testing.assert_close(torch.cat([*found.norms.values()]), whole.norms["l0"])


def test_vanishing() -> None:
    """What it is for: in a new RNN early steps get next to nothing, in an IRNN all they should."""
    torch.manual_seed(0)
    x = torch.rand(100, 8, I)
    plain: Any = rnn.RNN(I, 32, nonlinearity="relu")
    last_alone = {}
    for name, layer in (
        ("default", plain),
        ("IRNN", rnn.init.identity_(rnn.RNN(I, 32, 1, "relu"))),
    ):
        nn.init.uniform_(layer.get_parameter("weight_ih_l0"), 0, 0.01)
        norms = rnn.gradient_flow(layer, x, lambda output: output[0][-1].sum()).norms["l0"]
        last_alone[name] = norms[0] / norms[-1]
    assert last_alone["default"] < 1e-3 and abs(last_alone["IRNN"] - 1) < 1e-5


def test_half_precision() -> None:
    model = rnn.GRU(I, H, dtype=torch.bfloat16)
    x = torch.randn(T, B, I, dtype=torch.bfloat16)
    norms = rnn.gradient_flow(model, x, lambda output: output[0].sum()).norms["l0"]
    assert norms.dtype == torch.float64 and (norms > 0).all()


def test_plot() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    found = rnn.gradient_flow(
        rnn.LSTM(I, H, num_layers=2), torch.randn(T, B, I), lambda output: output[0].sum()
    )
    axes = found.plot()
    assert [line.get_label() for line in axes.lines] == ["l0", "l1"]
    assert axes.lines[0].get_ydata().tolist() == found.norms["l0"].tolist()
    assert found.plot(axes) is axes and len(axes.lines) == 4
    pyplot.close("all")


def test_errors() -> None:
    flow: Any = rnn.gradient_flow
    x = torch.randn(T, B, I)
    with pytest.raises(TypeError, match="model"):
        flow(lambda x: x, x, loss_of)
    with pytest.raises(TypeError, match="loss_fn"):
        flow(rnn.GRU(I, H), x, None)
    with pytest.raises(ValueError, match="layer of rnn"):
        flow(nn.Linear(I, H), x, loss_of)
    with pytest.raises(ValueError, match="proj_size"):
        flow(rnn.LSTM(I, H, proj_size=2, zoneout=0.1), x, loss_of)
    with pytest.raises(ValueError, match="one number"):
        flow(rnn.GRU(I, H), x, lambda output: output[0])
    with pytest.raises(ValueError, match="depends"):
        flow(rnn.GRU(I, H), x, lambda output: torch.zeros(()))

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnn.GRU(I, H)

        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    with pytest.raises(ValueError, match="calls"):
        flow(Unused(), x, lambda y: y)


def test_time_parallel() -> None:
    """The steps are measured one after another all the same."""
    layer = rnn.GRU(I, H, dtype=torch.float64, time_parallel=True)
    plain = rnn.GRU(I, H, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(300, B, I, dtype=torch.float64)
    found = [rnn.gradient_flow(one, x, lambda out: out[0].sum()).norms for one in (layer, plain)]
    torch.testing.assert_close(*found)
    assert layer.time_parallel is True


def test_heads() -> None:
    """The heads of a layer count as one state: as layers of their own, with a norm of both."""
    torch.manual_seed(0)
    whole = rnn.GRU(I, 2 * H, num_heads=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    squares: dict[str, Any] = {"l0": 0, "l0_reverse": 0}
    for head in range(2):
        part = rnn.GRU(I, H, bidirectional=True, dtype=torch.float64)
        with torch.no_grad():
            for name, weight in part.named_parameters():
                weight.copy_(whole.get_parameter(name).chunk(2)[head])
        norms = rnn.gradient_flow(part, x, lambda output: output[0].sin().sum()).norms
        squares = {name: squares[name] + norms[name].square() for name in squares}
    found = rnn.gradient_flow(whole, x, lambda output: output[0].sin().sum()).norms
    torch.testing.assert_close({k: v.square() for k, v in found.items()}, squares)


@pytest.mark.parametrize(
    "options",
    [dict(layer_norm=True), dict(clip_recurrent_grad=("norm", 1.0)), dict(recurrent_dropout=0.1)],
    ids=str,
)
def test_options_that_hide_the_state(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        rnn.gradient_flow(rnn.GRU(I, H, **options), torch.randn(T, B, I), lambda out: out[0].sum())


def projected_loop(
    layer: Any, x: Tensor, hx: tuple[Tensor, Tensor], lengths: list[int]
) -> tuple[Tensor, dict[str, list[Any]]]:
    """As `plain_loop`, of an LSTM with projections and states before the first step [L*D, B, K]."""
    D = 2 if layer.bidirectional else 1
    seen: dict[str, list[Any]] = {}
    loss = torch.zeros((), dtype=x.dtype)
    for b, length in enumerate(lengths):
        rows = [*x[:length, b].unbind(0)]
        for k in range(layer.num_layers):
            halves = []
            for d in range(D):
                suffix = f"l{k}_reverse" if d else f"l{k}"
                kinds = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"
                w_ih, w_hh, b_ih, b_hh, w_hr = (getattr(layer, f"{n}_{suffix}") for n in kinds)
                h, c = (s[k * D + d, b] for s in hx)
                hs: list[Any] = [None] * length
                for t in reversed(range(length)) if d else range(length):
                    i, f, g, o = (w_ih @ rows[t] + b_ih + w_hh @ h + b_hh).chunk(4)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = w_hr @ (o.sigmoid() * c.tanh())
                    h.retain_grad()
                    hs[t] = h
                    seen.setdefault(suffix, [[] for _ in range(T)])[t].append(h)
                loss = loss + h.pow(2).sum() + c.pow(2).sum()
                halves.append(hs)
            rows = [torch.cat(parts) for parts in zip(*halves)]
        loss = loss + sum(row.sin().sum() for row in rows)
    return loss, seen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("library", [rnn, nn], ids=["rnn", "torch.nn"])
def test_projection(library: Any, masked: bool) -> None:
    """The norms are those of the projected state; the layer is what it was."""
    torch.manual_seed(0)
    P = 2
    options = dict(num_layers=2, bidirectional=True, batch_first=True, proj_size=P)
    layer = library.LSTM(I, H, **options, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    hx = torch.randn(4, B, P).double(), torch.randn(4, B, H).double()
    lengths = [2, T, 3] if masked else [T] * B
    loss, seen = projected_loop(layer, x, hx, lengths)
    loss.backward()
    want = {
        name: torch.stack(
            [torch.stack([h.grad.norm() for h in row] or [loss.new_zeros(())]).norm() for row in s]
        ).detach()
        for name, s in seen.items()
    }

    def summed(output: Any) -> Tensor:
        y, last = output
        y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
        return y.sin().sum() + sum(end.pow(2).sum() for end in last)

    given: Any = x.transpose(0, 1)
    if masked:
        given = pack_padded_sequence(given, torch.tensor(lengths), True, enforce_sorted=False)
    found = rnn.gradient_flow(layer, (given, hx), summed)
    check(found, (loss.item(), want))
    assert not {"forward", "_run", "_layer"} & {*vars(layer)}
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    assert [line.get_label() for line in found.plot().lines] == [*want]
    pyplot.close("all")


def test_projection_with_states_of_every_step() -> None:
    """lengths as well: the loss may depend on what return_states gives."""
    layer = rnn.LSTM(I, H, proj_size=2, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            _, _, (hs, cs) = self.layer(x, lengths=[2, T, 0], return_states=True)
            return hs.sin().sum() + cs.sin().sum()

    found = rnn.gradient_flow(Model(), x, lambda loss: loss)
    assert abs(found.loss - Model()(x).item()) < 1e-12
    assert (found.norms["layer.l0"] > 0).all()


def test_inference_mode() -> None:
    """What it is called in does not matter."""
    layer = rnn.GRU(I, H)
    x = torch.randn(T, B, I)
    want = rnn.gradient_flow(layer, x, lambda out: out[0].sum()).norms
    with torch.inference_mode():
        found = rnn.gradient_flow(layer, x.clone(), lambda out: out[0].sum()).norms
    torch.testing.assert_close(found, want)
