"""What layers have beyond torch.nn's: heads, regularisers of the recurrence, learned initial
states, and cells with constants. Each turns a layer's call into another one, of the same operator.

Regularisers are changes of a cell's step, so that every backend has them: zoneout takes its masks
as further gates, whose part of W_ih is the identity; recurrent dropout takes its mask as a constant
of the cell, and its state 0 is the h that W_hh multiplies, after the mask. What is no change of a
step, layer norm and clipping by a norm, runs step by step in torch's operations."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import own_gradient
from .composite import composite, composite_layer
from .kernels import cells
from .kernels.cells import Cell
from .layer_call import batch_size

OPTIONS = (
    "num_heads",
    "recurrent_dropout",
    "zoneout",
    "weight_drop",
    "layer_norm",
    "learned_state",
    "clip_recurrent_grad",
)
# Those that parameters depend on
_STRUCTURE = ("num_heads", "layer_norm", "learned_state")
# x, r, s and constants to the new states
StepFunction = Callable[[Any, Any, Any, Any], Any]


class Arguments(NamedTuple):
    """Of the operator, for the N recurrences of all directions and heads: joined weights, S states
    [N, B, H] and the constants after them."""

    cell: Cell
    x: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    states: list[Tensor]


def check_option(layer: Any, name: str, value: Any) -> None:
    """Raises TypeError, ValueError, and AttributeError for what is set at construction."""
    if name in _STRUCTURE and not layer.__dict__.get("under_construction"):
        raise AttributeError(f"{name} is set when a layer is made: it has parameters for it")
    if name in ("layer_norm", "learned_state"):
        if not isinstance(value, (bool, int)):
            raise TypeError(f"Expected {name} to be a bool, got {type(value).__name__}")
    elif name == "num_heads":
        _check_heads(layer, value)
    elif name == "zoneout":
        states = layer.layer_cell().carried
        rates = value if isinstance(value, (tuple, list)) else (value,)
        if isinstance(value, (tuple, list)) and len(value) != states:
            raise ValueError(
                f"Expected zoneout to be a number, or one for each of {states} states, got {value}"
            )
        for rate in rates:
            _check_rate(name, rate, 1.0)
    elif name == "clip_recurrent_grad":
        _check_clip(value)
    else:
        _check_rate(name, value, 1.0)


def _check_heads(layer: Any, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Expected num_heads to be an integer, got {type(value).__name__}")
    if value < 1 or layer.hidden_size % value:
        raise ValueError(
            f"Expected num_heads to divide hidden_size, {layer.hidden_size}, got {value}"
        )
    if value > 1 and layer.proj_size:
        raise ValueError("num_heads and proj_size cannot be combined")


def _check_rate(name: str, value: Any, end: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected {name} to be a number, got {type(value).__name__}")
    if not 0 <= value < end:
        raise ValueError(f"Expected {name} to be a probability in [0, 1), got {value}")


def _check_clip(value: Any) -> None:
    limit = value
    if isinstance(value, (tuple, list)):
        if len(value) != 2 or value[0] != "norm":
            raise ValueError(
                f'Expected clip_recurrent_grad to be a number or ("norm", number), got {value!r}'
            )
        limit = value[1]
    if limit is None and limit is value:
        return
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(
            "Expected clip_recurrent_grad to be None, a number or a pair, got "
            f"{type(limit).__name__}"
        )
    if not 0 < limit < float("inf"):
        raise ValueError(f"Expected clip_recurrent_grad to be positive and finite, got {limit}")


def prepare(layer: Any) -> bool:
    """Makes the cells of the layer's options. Returns whether any option is on."""
    clip = layer.clip_recurrent_grad
    limit = float(clip) if isinstance(clip, (int, float)) else None
    zoned = _zoned_states(layer)
    for dropped in {False, bool(layer.recurrent_dropout)}:
        extended_cell(layer.layer_cell(), limit, zoned, dropped)
    return bool(
        layer.num_heads > 1
        or layer.recurrent_dropout
        or zoned
        or layer.weight_drop
        or layer.layer_norm
        or layer.learned_state
        or layer.clip_recurrent_grad is not None
        or layer.layer_cell().constants
    )


def _zoneout_rates(layer: Any) -> tuple[float, ...]:
    """Of each state."""
    rates = layer.zoneout
    if isinstance(rates, (tuple, list)):
        return tuple(map(float, rates))
    states: int = layer.layer_cell().carried
    return (float(rates),) * states


def described(layer: Any) -> str:
    """The options that are on, for a layer's repr."""
    off = type(layer)
    parts = [(name, getattr(layer, name)) for name in OPTIONS]
    return "".join(f", {name}={value}" for name, value in parts if value != getattr(off, name))


def _zoned_states(layer: Any) -> tuple[int, ...]:
    return tuple(k for k, rate in enumerate(_zoneout_rates(layer)) if rate)


def make_parameters(layer: Any) -> None:
    """From nn.RNNBase's, which may be of another number of gates, to those of the layer's cell and
    heads, and its further ones."""
    cell = layer.layer_cell()
    H = layer.hidden_size
    gate_rows = cell.gates * H
    like = layer.weight_ih_l0
    for name, old in [*layer.named_parameters()]:
        shape = (gate_rows, *old.shape[1:])
        if name.startswith("weight_hh"):
            shape = (gate_rows, H // layer.num_heads)
        setattr(layer, name, nn.Parameter(old.new_empty(shape)))
    D = 2 if layer.bidirectional else 1
    further: dict[str, tuple[int, ...]] = {}
    if cell.constants:
        further["constants"] = (cell.constants, H)
    if layer.learned_state:
        further["initial_states"] = (cell.carried, H)
    if layer.layer_norm:
        further |= dict(norm_ih=(gate_rows,), norm_hh=(gate_rows,))
        if cell is cells.lstm:
            further["norm_c"] = (H,)
    for k in range(layer.num_layers):
        for suffix in ("", "_reverse")[:D]:
            for name, shape in further.items():
                layer.register_parameter(
                    f"{name}_l{k}{suffix}", nn.Parameter(like.new_empty(shape))
                )


def extended_layer(  # noqa: PLR0913  as run_layer
    layer: Any,
    index: int,
    operator: Callable[..., Any],
    cell: Cell,
    x: Tensor,
    weights: Sequence[Any],
    states: Sequence[Tensor] | None,
    masks: Sequence[Any],
    reverse: Sequence[int],
    keep: int,
    plan: Any,
    recompute: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """As `operator`, which is like `functional.run_layer`, for the layer of that index with all its
    options. Its states are those of all heads together, [D, B, heads * H]."""
    heads = layer.num_heads
    directions = tuple(back for back in reverse for _ in range(heads))
    B = batch_size(x, masks[1], batch_first)
    given = _states(layer, index, x, B, states, len(reverse))
    given = [_split_heads(s, heads) for s in given]
    w_ih, w_hh, b_ih, b_hh = _joined(weights)
    call = Arguments(cell, x, w_ih, w_hh, b_ih, b_hh, given)
    clip = layer.clip_recurrent_grad
    by_norm = isinstance(clip, (tuple, list))
    if layer.training and layer.weight_drop:
        call = call._replace(w_hh=F.dropout(own_gradient(call.w_hh), layer.weight_drop))
    rates = _zoneout_rates(layer)
    zoned = _zoned_states(layer)
    if zoned:
        masks_of_steps = _zoneout_masks(call, [rates[k] for k in zoned], layer.training)
        call = _with_step_masks(call, masks_of_steps, len(zoned))
    dropped = bool(layer.training and layer.recurrent_dropout)
    if dropped:
        call = _with_sequence_mask(call, layer.recurrent_dropout)
    stepwise = layer.layer_norm or by_norm
    limit = None if by_norm or clip is None else float(clip)
    if stepwise:
        _say_stepwise(layer)
        step = _stepwise(layer, index, limit, zoned, dropped)
        call = call._replace(cell=extended_cell(cell, limit, zoned, dropped))
        y, others, last = composite_layer(
            call.cell,
            call.x,
            call[2:6],
            call.states,
            masks,
            directions,
            1,
            batch_first,
            partial(composite, step=step),
        )
    else:
        keep_states = 1 if dropped else keep
        y, others, last = operator(
            extended_cell(cell, limit, zoned, dropped),
            call.x,
            call[2:6],
            call.states,
            masks,
            directions,
            keep_states,
            plan,
            recompute,
            batch_first,
        )
    first = 0
    if dropped and others is not None:
        # State 0 is the h that was multiplied: h itself is the next one.
        first = 1
        y = _like_output(others[0], y, batch_first)
    S = cell.carried
    own = None if others is None or not keep or S == 1 else others[first : first + S - 1]
    ends = [_join_heads(s, heads) for s in last[first : first + S]]
    return y, own, ends


def _joined(weights: Sequence[Any]) -> tuple[Any, ...]:
    """w_ih, w_hh, b_ih, b_hh of all recurrences."""
    if len(weights) == 4:
        return tuple(weights)
    return tuple(
        None if weights[k] is None else torch.cat([own_gradient(w) for w in weights[k::4]])
        for k in range(4)
    )


def _states(
    layer: Any, index: int, x: Tensor, B: int, states: Sequence[Tensor] | None, D: int
) -> list[Tensor]:
    """The states before the first step, and the constants after them: [D, B, heads * H] each."""
    suffixes = ("", "_reverse")[:D]

    def rows(name: str) -> list[Tensor]:
        every = torch.stack([getattr(layer, f"{name}_l{index}{suffix}") for suffix in suffixes])
        return [row[:, None].expand(-1, B, -1) for row in every.unbind(1)]

    cell = layer.layer_cell()
    if states is not None:
        found = [*states]
    elif layer.learned_state:
        found = rows("initial_states")
    else:
        zeros = x.new_zeros(D, B, layer.hidden_size)
        found = [zeros] * cell.carried
    return [*found, *(rows("constants") if cell.constants else ())]


def _split_heads(s: Tensor, heads: int) -> Tensor:
    """[D, B, heads * H] to [D * heads, B, H]."""
    if heads == 1:
        return s.contiguous()
    D, B, _ = s.shape
    return s.view(D, B, heads, -1).transpose(1, 2).reshape(D * heads, B, -1)


def _join_heads(s: Tensor, heads: int) -> Tensor:
    """The inverse."""
    if heads == 1:
        return s
    N, B, _ = s.shape
    return s.view(N // heads, heads, B, -1).transpose(1, 2).reshape(N // heads, B, -1)


def _like_output(rows: Tensor, y: Tensor, batch_first: bool) -> Tensor:
    """[R, K] in the layout of y."""
    if y.dim() == 2:
        return rows
    if batch_first:
        B, T, _ = y.shape
        return rows.view(T, B, -1).transpose(0, 1)
    return rows.view(y.shape)


def _zoneout_masks(call: Arguments, rates: Sequence[float], training: bool) -> Tensor:
    """Like x, of width N * K * H: 1 where one of K states stays what it was; in evaluation, how
    often it does."""
    N, _, H = call.states[0].shape
    row = torch.tensor(rates, dtype=call.x.dtype, device=call.x.device)
    row = row[None, :, None].expand(N, -1, H).reshape(-1)
    every = row.expand(*call.x.shape[:-1], -1)
    return torch.bernoulli(every) if training else every


def _with_step_masks(call: Arguments, masks: Tensor, K: int) -> Arguments:
    """With K more gates, whose pre-activations are the masks."""
    N, _, H = call.states[0].shape
    G = call.cell.gates
    identity = torch.cat((call.x.new_zeros(G * H, K * H), torch.eye(K * H).to(call.x)))

    def taller(w: Tensor | None) -> Tensor | None:
        """[N*G*H, ...] to [N*(G+K)*H, ...], with 0 for the further gates."""
        if w is None:
            return None
        parts = own_gradient(w).reshape(N, G * H, *w.shape[1:])
        zeros = w.new_zeros(N, K * H, *w.shape[1:])
        return torch.cat((parts, zeros), 1).flatten(0, 1)

    w_ih: Any = taller(call.w_ih)
    w_hh: Any = taller(call.w_hh)
    return call._replace(
        x=torch.cat((own_gradient(call.x), masks), -1),
        w_ih=torch.cat((w_ih, torch.block_diag(*[identity] * N)), 1),
        w_hh=w_hh,
        b_ih=taller(call.b_ih),
        b_hh=taller(call.b_hh),
    )


def _with_sequence_mask(call: Arguments, rate: float) -> Arguments:
    """With the h that is multiplied as the first state, and its mask as the last constant."""
    h = call.states[0]
    mask = torch.bernoulli(torch.full_like(h, 1 - rate)) / (1 - rate)
    return call._replace(states=[mask * h, *call.states, mask])


def _clipped(step: StepFunction, limit: float) -> StepFunction:
    """The gradient of h is cut to [-limit, limit]."""

    def clipped(x: Any, r: Any, s: Any, k: Any) -> Any:
        h, *others = step(x, r, s, k)
        return (cells.clip_grad(h, limit), *others)

    return clipped


def _zoned(step: StepFunction, gates: int, zoned: Sequence[int]) -> StepFunction:
    """Zoneout (Krueger et al., 2016, https://arxiv.org/abs/1606.01305): where the mask, a further
    gate, is 1, a state stays what it was."""

    def stays(x: Any, r: Any, s: Any, k: Any) -> Any:
        new = [*step(x[:gates], r[:gates], s, k)]
        for place, mask in zip(zoned, x[gates:]):
            new[place] = new[place] + mask * (s[place] - new[place])
        return tuple(new)

    return stays


def _dropped(step: StepFunction) -> StepFunction:
    """Recurrent dropout (Gal and Ghahramani, 2016, https://arxiv.org/abs/1512.05287): W_hh
    multiplies h after a mask, the last constant, which is the same at all steps."""

    def masked(x: Any, r: Any, s: Any, k: Any) -> Any:
        new = step(x, r, s[1:], k[:-1])
        return (k[-1] * new[0], *new)

    return masked


def _extended_step(
    step: StepFunction, cell: Cell, limit: float | None, zoned: Sequence[int], dropped: bool
) -> StepFunction:
    """The options of a cell, from the innermost to the outermost."""
    if zoned:
        step = _zoned(step, cell.gates, zoned)
    if limit is not None:
        step = _clipped(step, limit)
    return _dropped(step) if dropped else step


def extended_cell(cell: Cell, limit: float | None, zoned: tuple[int, ...], dropped: bool) -> Cell:
    """The cell with these options; registered if it is."""
    if limit is None and not zoned and not dropped:
        return cell
    # torch.compile finds it there, and never has to make it.
    found = cell.variants.get((limit, zoned, dropped))
    if found is None:
        found = _make_cell(cell, limit, zoned, dropped)
        cell.variants[limit, zoned, dropped] = found
    return found


def _make_cell(cell: Cell, limit: float | None, zoned: tuple[int, ...], dropped: bool) -> Cell:
    step = _extended_step(cell.step, cell, limit, zoned, dropped)
    words = [cell.name]
    words += [] if limit is None else [f"clip{limit!r}"]
    words += [f"zoneout{''.join(map(str, zoned))}"] if zoned else []
    words += ["dropout"] if dropped else []

    def with_constants(x: Any, r: Any, s: Any, k: Any = ()) -> Any:
        return step(x, r, s, k)

    found = Cell(
        "-".join(words),
        with_constants,
        gates=cell.gates + len(zoned),
        states=cell.states + 2 * dropped,
        constants=cell.constants + dropped,
    )
    return cells.register(found) if cells.is_registered(cell) else found


def _stepwise(
    layer: Any, index: int, limit: float | None, zoned: Sequence[int], dropped: bool
) -> Callable[..., Any]:
    """The step of recurrence n, for `composite`: with layer norm (Ba, Kiros and Hinton, 2016,
    https://arxiv.org/abs/1607.06450) of W_ih x, W_hh h and of an LSTM's c, and with the gradient of
    h cut to a norm."""
    cell = layer.layer_cell()
    heads = layer.num_heads
    H = layer.hidden_size // heads
    G = cell.gates
    clip = layer.clip_recurrent_grad
    norm_limit = clip[1] if isinstance(clip, (tuple, list)) else None

    def part(name: str, n: int, width: int) -> Tensor:
        """That recurrence's slice of a layer's parameter."""
        direction, head = divmod(n, heads)
        suffix = "_reverse" if direction else ""
        whole: Tensor = getattr(layer, f"{name}_l{index}{suffix}")
        return whole[head * width : (head + 1) * width]

    def normalized(v: Tensor, name: str, n: int) -> Tensor:
        width = G * H
        gain = part(name, n, width)
        normal = F.layer_norm(v[..., :width], (width,), gain)
        return torch.cat((normal, v[..., width:]), -1)

    def run(n: int, x: Tensor, r: Tensor, s: Any, biases: Sequence[Any]) -> Any:
        def base(x: Any, r: Any, s: Any, k: Any) -> Any:
            new = cell.step(x, r, s, k)
            if layer.layer_norm and cell is cells.lstm:
                o = cells.sigmoid(x[3] + r[3])
                c = new[1]
                new = (o * cells.tanh(F.layer_norm(c, (H,), part("norm_c", n, H))), c)
            if norm_limit is None:
                return new
            h, *others = new
            return (_clip_norm(h, float(norm_limit)), *others)

        if layer.layer_norm:
            x = normalized(x, "norm_ih", n)
            r = normalized(r, "norm_hh", n)
        b_ih, b_hh = biases
        x = x if b_ih is None else x + b_ih
        r = r if b_hh is None else r + b_hh
        step = _extended_step(base, cell, limit, zoned, dropped)
        gates = G + len(zoned)
        constants = cell.constants + dropped
        carried = len(s) - constants
        new = step(x.chunk(gates, -1), r.chunk(gates, -1), s[:carried], s[carried:])
        return (*new, *s[carried:])

    return run


class _ClipNorm(torch.autograd.Function):
    """h, the norm of whose gradient is cut, for each sequence."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Any, limit: Any) -> Any:
        return h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, d: Any) -> Any:
        norm = d.norm(dim=-1, keepdim=True)
        return d * (ctx.limit / norm.clamp(min=ctx.limit)), None


_clip_norm: Any = _ClipNorm.apply
_said: set[type] = set()


def _say_stepwise(layer: Any) -> None:
    """Once for a class of layers."""
    if type(layer) in _said or torch.compiler.is_compiling():
        return
    _said.add(type(layer))
    warnings.warn(
        f"rnn.{type(layer).__name__}: layer_norm and clip_recurrent_grad by a norm run step by "
        "step in torch's operations, slower than the kernels",
        stacklevel=5,
    )
