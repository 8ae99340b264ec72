"""Wrong arguments of every kind: to the layers' constructors and calls, the operator, the cells,
replace, restore and explain; and tensors whose memory is gone, before a call or between forward and
backward.

python -m tests.fuzz_arguments --cases N --seed S --jobs J      so many cases in J processes
python -m tests.fuzz_arguments --seed S --only K                one of them

They are refused with TypeError, ValueError or RuntimeError, in the type that torch.nn has for the
same (where that is one of these), and by name; or what comes out is right: as torch.nn's, or as
float64's for what the argument means."""

import copy
import random
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn
from rnn.kernels import cells
from rnn.kernels.plan import Plan
from tests.cases import LAYER_NAMES
from tests.fuzzing import ByCells, Finding, main, sweep

REFUSED = object()  # what an argument means that means nothing
RIGHT = (TypeError, ValueError, RuntimeError)


class Wrong(NamedTuple):
    """An argument in another's place: what it is, and what it means, if anything. `sort` is that of
    a whole group."""

    what: str
    value: Any
    meaning: Any
    sort: str = ""

    @property
    def kind(self) -> str:
        return self.sort or re.sub("^[hc]_0 ", "", self.what)


class Own(Tensor):
    """A subclass that does nothing of its own."""


# Values. Each function takes what would be right.


def _sizes(rng: random.Random, t: Tensor) -> Tensor:
    """One size is another."""
    shape = list(t.shape)
    dim = rng.randrange(len(shape))
    shape[dim] = rng.choice(
        [
            size
            for size in (0, 1, shape[dim] + 1, max(0, shape[dim] - 1), 2 * shape[dim])
            if size != shape[dim]
        ]
    )
    return torch.zeros(shape, dtype=t.dtype)


def _dims(rng: random.Random, t: Tensor) -> Tensor:
    choices = [t.detach()[None], t.detach()[..., None], t.detach().flatten()]
    choices += [t.detach().sum(0)] if t.dim() > 1 else []
    return rng.choice([c for c in choices if c.dim() != t.dim()] or choices[:1])


def _freed(rng: random.Random, t: Tensor) -> Tensor:
    t = t.detach().clone()
    t.untyped_storage().resize_(0)
    return t


def _shrunk(rng: random.Random, t: Tensor) -> Tensor:
    t = t.detach().clone()
    t.untyped_storage().resize_(max(0, t.untyped_storage().nbytes() - t.element_size()))
    return t


def _quantized(rng: random.Random, t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.qint8)


def _nested(rng: random.Random, t: Tensor) -> Tensor:
    parts = list(t.detach().unbind(0)) if t.dim() > 1 and len(t) else [t.detach(), t.detach()]
    return torch.nested.nested_tensor(parts, layout=rng.choice((torch.strided, torch.jagged)))


TENSORS: dict[str, Callable[[random.Random, Tensor], Any]] = {
    "float64": lambda rng, t: t.detach().to(
        torch.float64 if t.dtype != torch.float64 else torch.float32
    ),
    "bfloat16": lambda rng, t: t.detach().bfloat16(),
    "float16": lambda rng, t: t.detach().half(),
    "float8": lambda rng, t: (
        t.detach().float().to(rng.choice((torch.float8_e4m3fn, torch.float8_e5m2)))
    ),
    "integers": lambda rng, t: t.detach().to(rng.choice((torch.int64, torch.int32, torch.uint8))),
    "booleans": lambda rng, t: t.detach().bool(),
    "complex": lambda rng, t: t.detach().to(rng.choice((torch.complex64, torch.complex128))),
    "other sizes": _sizes,
    "other dimensions": _dims,
    "no dimension": lambda rng, t: torch.tensor(1.0, dtype=t.dtype),
    "nothing in it": lambda rng, t: torch.zeros(0, dtype=t.dtype),
    "meta": lambda rng, t: t.detach().to("meta"),
    "freed": _freed,
    "shrunk": _shrunk,
    "sparse": lambda rng, t: t.detach().to_sparse(),
    "csr": lambda rng, t: t.detach().reshape(-1, t.shape[-1]).to_sparse_csr(),
    "quantized": _quantized,
    "nested": _nested,
    "mkldnn": lambda rng, t: t.detach().float().to_mkldnn(),
}
# Those that are what they seem to be.
GOOD: dict[str, Callable[[random.Random, Tensor], Any]] = {
    "a parameter": lambda rng, t: nn.Parameter(t.detach()),
    "a subclass": lambda rng, t: t.detach().as_subclass(Own),
    "zero tensor": lambda rng, t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "not a number": lambda rng, t: torch.full_like(t.detach(), float("nan")),
}
OBJECTS: dict[str, Callable[[], Any]] = {
    "0": lambda: 0,
    "3": lambda: 3,
    "-1": lambda: -1,
    "2.5": lambda: 2.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "2**70": lambda: 2**70,
    "True": lambda: True,
    "1j": lambda: 1j,
    "text": lambda: "text",
    "''": lambda: "",
    "bytes": lambda: b"x",
    "None": lambda: None,
    "[]": list,
    "[1, 2]": lambda: [1, 2],
    "()": lambda: (),
    "(None, None)": lambda: (None, None),
    "{}": dict,
    "a dict": lambda: {"h": 1, "c": 2},
    "a set": lambda: {1, 2},
    "object()": object,
    "a type": lambda: int,
    "a function": lambda: len,
    "an array": lambda: np.zeros((2, 3)),
    "an array of one": lambda: np.array(4),
    "np.int64": lambda: np.int64(4),
    "np.float32": lambda: np.float32(2.5),
    "np.nan": lambda: np.nan,
    "an array of objects": lambda: np.array([None, {}]),
    "a tensor of one": lambda: torch.tensor(4),
    "a tensor of two": lambda: torch.tensor([1.0, 2.0]),
    "torch.float32": lambda: torch.float32,
    "a device": lambda: torch.device("cpu"),
    "a range": lambda: range(3),
    "a generator": lambda: iter([1, 2]),
    "Ellipsis": lambda: ...,
    "a module": lambda: nn.Linear(2, 2),
    "nested lists": lambda: [[1.0, [2.0]], []],
    "a list of tensors": lambda: [torch.zeros(2), torch.zeros(3)],
    "a packed sequence": lambda: pack_padded_sequence(torch.zeros(3, 2, 4), torch.tensor([3, 1])),
}
PLANS: dict[str, Callable[[], Any]] = {
    **OBJECTS,
    "'native'": lambda: "native",
    "Plan('nativ')": lambda: Plan("nativ"),
    "Plan('')": lambda: Plan(""),
    "Plan('cuda')": lambda: Plan("cuda"),
    "Plan('triton')": lambda: Plan("triton", "block", 16, 8, 16, 1),
    "Plan('cupy')": lambda: Plan("cupy"),
    "Plan(None)": lambda: Plan(None),  # type: ignore[arg-type]
    "Plan(3)": lambda: Plan(3),  # type: ignore[arg-type]
    "Plan('native', 'block')": lambda: Plan("native", "block"),
    "Plan('numpy', 'grid')": lambda: Plan("numpy", "grid"),
    "a tuple": lambda: ("native", "host"),
    "a dict of a plan": lambda: Plan("native")._asdict(),
    "a list of plans": lambda: [Plan("native")],
    "the type": lambda: Plan,
}


def from_table(
    rng: random.Random, table: dict[str, Callable[[], Any]], but: Sequence[str] = ()
) -> Wrong:
    name = rng.choice([key for key in table if key not in but])
    return Wrong(name, table[name](), REFUSED, "another object" if name in OBJECTS else "")


def wrong_tensor(rng: random.Random, t: Tensor) -> Wrong:
    """In place of a tensor of floating-point numbers."""
    chance = rng.random()
    if chance < 0.25:
        return from_table(rng, OBJECTS, ("None",))
    if chance < 0.35:
        name = rng.choice(list(GOOD))
        value = GOOD[name](rng, t)
        return Wrong(name, value, torch.zeros_like(t) if name == "zero tensor" else value.detach())
    if chance < 0.4:
        return Wrong("a NumPy array of it", t.detach().float().numpy(), t.detach())
    if chance < 0.45:
        return Wrong("a list of it", t.detach().tolist(), t.detach())
    while True:
        name = rng.choice(list(TENSORS))
        try:
            value = TENSORS[name](rng, t)
        except (*RIGHT, NotImplementedError):  # torch has no such tensor
            continue
        dense = (isinstance(value, Tensor) and name in ("sparse",)) or (
            name == "mkldnn" and t.dtype == torch.float32
        )
        same = name in ("other dimensions", "other sizes") and value.shape == t.shape
        other = name in ("other dimensions", "other sizes")  # which may be right: the oracle knows
        same = (
            same
            or other
            or (
                value.layout is torch.strided
                and not value.is_nested
                and value.dtype == t.dtype
                and value.shape == t.shape
                and name not in ("meta", "freed", "shrunk")
            )
        )
        return Wrong(name, value, value if other else t.detach() if dense or same else REFUSED)


def wrong_lengths(rng: random.Random, T: int, B: int) -> Wrong:
    right = [rng.randint(0, T) for _ in range(B)]
    huge = [*right[:-1], rng.choice((-1, T + 1, 2**40, -(2**40)))]
    choices: list[tuple[str, Any, Any]] = [
        ("a list", list(right), right),
        ("a tuple", tuple(right), right),
        ("an array", np.array(right), right),
        ("an array of int32", np.array(right, np.int32), right),
        ("a list of tensors", [torch.tensor(n) for n in right], right),
        ("int16", torch.tensor(right, dtype=torch.int16), right),
        ("uint8", torch.tensor(right).to(torch.uint8), right),
        ("floats", torch.tensor(right).float(), right),
        ("a list of floats", [float(n) for n in right], right),
        ("[B, 1]", torch.tensor(right)[:, None], REFUSED),
        ("[1, B]", torch.tensor(right)[None], REFUSED),
        ("too many", torch.tensor([*right, 1]), REFUSED),
        ("too many in a list", [*right, 1], REFUSED),
        ("too few", torch.tensor(right[:-1], dtype=torch.int64), REFUSED),
        ("too few in a list", right[:-1], REFUSED),
        ("beyond", torch.tensor(huge), REFUSED),
        ("beyond, in a list", huge, REFUSED),
        ("beyond, in an array", np.array(huge), REFUSED),
        ("nan", torch.full((B,), float("nan")), REFUSED),
        ("a list of nan", [float("nan")] * B, REFUSED),
        ("halves", [n + 0.5 for n in right], REFUSED),
        ("halves in a tensor", torch.tensor(right) + 0.5, REFUSED),
        ("booleans", torch.ones(B, dtype=torch.bool), REFUSED),
        ("a list of text", ["1"] * B, REFUSED),
        ("a list of None", [None] * B, REFUSED),
        ("a list of lists", [[n] for n in right], REFUSED),
        ("meta", torch.tensor(right, device="meta"), REFUSED),
        ("complex", torch.tensor(right) + 0j, REFUSED),
        ("freed", _freed(rng, torch.tensor(right)), REFUSED),
        ("shrunk", _shrunk(rng, torch.tensor(right)), REFUSED),
        ("sparse", torch.tensor(right).to_sparse(), right),
        ("2**70 in a list", [2**70] * B, REFUSED),
        ("int32", torch.tensor(right, dtype=torch.int32), right),
    ]
    if rng.random() < 0.2:
        return from_table(rng, OBJECTS, ("None", "[1, 2]", "0", "3"))
    what, value, meaning = rng.choice(choices)
    return Wrong(what, value, torch.tensor(meaning) if meaning is right else REFUSED)


def wrong_resets(rng: random.Random, shape: Sequence[int]) -> Wrong:
    """`shape` is what is asked for: [T, B], [B, T] or [T]."""
    right = torch.rand(list(shape), generator=torch.Generator().manual_seed(rng.randrange(9))) < 0.4
    halves = right.float() * 0.5
    choices: list[tuple[str, Any, Any]] = [
        ("a list", right.tolist(), right),
        ("an array", right.numpy(), right),
        ("integers", right.long(), right),
        ("uint8", right.to(torch.uint8), right),
        ("floats", right.float(), right),
        ("float64", right.double(), right),
        ("a list of integers", right.int().tolist(), right),
        ("an array of floats", right.float().numpy(), right),
        ("[..., 1]", right[..., None], right),
        ("[..., 1] of floats", right.float()[..., None], right),
        ("[1, ...]", right[None], REFUSED),
        ("halves", halves, REFUSED if halves.any() else right),
        ("nan", torch.full(right.shape, float("nan")), REFUSED),
        ("twos", right.int() * 2, right),
        ("other sizes", _sizes(rng, right), REFUSED),
        ("other dimensions", _dims(rng, right), REFUSED),
        ("meta", right.to("meta"), REFUSED),
        ("freed", _freed(rng, right), REFUSED),
        ("shrunk", _shrunk(rng, right), REFUSED),
        ("sparse", right.to_sparse(), right),
        ("complex", right + 0j, REFUSED),
        ("a list of text", ["yes"] * len(right), REFUSED),
        (
            "transposed",
            right.T.contiguous() if right.dim() == 2 else right,
            right if right.dim() == 1 else REFUSED,
        ),
        ("a scalar", torch.tensor(True), REFUSED),
        ("ragged lists", [[True], []], REFUSED),
    ]
    if rng.random() < 0.2:
        return from_table(rng, OBJECTS, ("None",))
    what, value, meaning = rng.choice(choices)
    if what == "transposed" and value.shape == right.shape:
        return Wrong(what, value, value)
    if what == "other dimensions" and value.shape == right.shape:
        return Wrong(what, value, value.bool())
    return Wrong(what, value, meaning)


def wrong_reverse(rng: random.Random, N: int) -> Wrong:
    bits = [rng.random() < 0.5 for _ in range(N)]
    choices: list[tuple[str, Any, Any]] = [
        ("[2]", [2 * bit for bit in bits], bits),
        ("[-1]", [-int(bit) for bit in bits], bits),
        ("floats", [0.5 * bit for bit in bits], bits),
        ("a tensor", torch.tensor(bits), bits),
        ("a tensor of integers", torch.tensor(bits).long(), bits),
        ("an array", np.array(bits), bits),
        ("a list of tensors", [torch.tensor(bit) for bit in bits], bits),
        ("tuple", tuple(bits), bits),
        ("empty", [], REFUSED),
        ("an empty tensor", torch.zeros(0), REFUSED),
        ("'ab'", "ab"[:N], REFUSED),
        ("one more", [*bits, True], REFUSED),
        ("nan", [float("nan")] * N, REFUSED),
        ("None in it", [None] * N, REFUSED),
        ("text in it", ["yes"] * N, REFUSED),
        ("lists in it", [[bit] for bit in bits], REFUSED),
        ("2 dimensions", torch.tensor([bits]), REFUSED if N != 1 else bits),
        ("a bool", True, REFUSED),
        ("a dict", {0: True}, REFUSED),
        ("a set", {True}, REFUSED),
        ("2**70", [2**70] * N, REFUSED),
    ]
    if rng.random() < 0.2:
        return from_table(rng, OBJECTS)
    what, value, meaning = rng.choice(choices)
    return Wrong(what, value, tuple(meaning) if meaning is bits else REFUSED)


# What a call does.


class Outcome(NamedTuple):
    """What was raised, or what came out."""

    error: BaseException | None
    values: Any = None


def attempt(call: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(None, call())
    except Exception as error:
        return Outcome(error)


def tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, PackedSequence):
        return [values.data]
    if isinstance(values, (tuple, list)):
        return [t for value in values for t in tensors(value)]
    return []


def same(ours: Any, theirs: Any) -> str:
    """What differs, but for rounding."""
    found = tensors(ours)
    wanted = tensors(theirs)
    if len(found) != len(wanted):
        return f"{len(found)} tensors for {len(wanted)}"
    for k, (a, b) in enumerate(zip(found, wanted)):
        if a.shape != b.shape:
            return f"tensor {k} of shape {list(a.shape)} for {list(b.shape)}"
        if a.device.type == "meta" and b.device.type == "meta":
            continue
        a, b = (
            t.detach().to_dense() if t.layout != torch.strided else t.detach().clone()
            for t in (a, b)
        )
        half = a.dtype in (torch.float16, torch.bfloat16) or b.dtype in (
            torch.float16,
            torch.bfloat16,
        )
        tolerance = 0.05 if half else 1e-3
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        if not torch.allclose(a.to(wide), b.to(wide), tolerance, tolerance, equal_nan=True):
            return (
                f"tensor {k} has other values: {(a.to(wide) - b.to(wide)).abs().max().item():.2g} "
                "away"
            )
    return ""


NAMES = {
    "input": ("input", "x", "batch_sizes"),
    "x": ("input", "x"),
    "hx": ("hx", "hidden", "state", "states", "cx", "h_0", "c_0"),
    "s0": ("s0", "hidden", "hx", "state", "states"),
    "w_ih": ("w_ih", "weight_ih", "weight"),
    "w_hh": ("w_hh", "weight_hh", "weight"),
    "b_ih": ("b_ih", "bias_ih", "bias", "biases"),
    "b_hh": ("b_hh", "bias_hh", "bias", "biases"),
    "weight": ("w_ih", "w_hh", "weight_ih", "weight_hh", "weight", "weights", "weight_hr", "w_hr"),
    "bias": ("b_ih", "b_hh", "bias_ih", "bias_hh", "bias", "biases"),
}


# Of tensors that do not fit each other any can be meant.
SIZES = (
    "other sizes",
    "other dimensions",
    "cell: another",
    "sorted_indices too",
    "batch_sizes",
    "input: meta",
    "input: another",
)
OTHERS = ("meta", "float64", "bfloat16", "float16", "float8", "integers", "booleans", "complex")


# What ours refuses by name and torch.nn takes at times: what it reads past an end of, broadcasts,
# promotes or ignores.
STRICT = (
    "hx: ",
    "bias: another",
    "weight: another",
    "nested",
    "sparse",
    "csr",
    "mkldnn",
    "quantized",
    "freed",
    "shrunk",
    "packed, ",
    *(
        f"{kind}: {sort}"
        for kind in ("weight", "bias")
        for sort in ("no dimension", "other dimensions", "other sizes", *OTHERS)
    ),
)


# What ours refuses with another of the three errors than torch.nn.
UNUSUAL = (
    "nested",
    "sparse",
    "csr",
    "mkldnn",
    "quantized",
    "another object",
    "one tensor",
    "stacked",
    "packed, ",
    "call, weight",
)


def named(error: BaseException, names: Sequence[str]) -> bool:
    words = set(re.findall(r"[a-z0-9_]+", str(error).lower()))
    parts = {re.sub(r"_l\d+(_reverse)?$", "", word) for word in words}
    return any(word in parts for name in names for word in NAMES.get(name, (name,)))


def judge(
    what: str, names: Sequence[str], ours: Outcome, theirs: Outcome | None, right: Outcome | None
) -> list[Finding]:
    """Findings, where `theirs` is torch.nn's and `right` what the arguments mean, if they mean
    anything. `names` are those of the arguments that are wrong."""
    error = ours.error
    other = theirs.error if theirs else None
    if error is None:
        if theirs is not None and other is not None:
            if right is not None and right.error is None:
                differs = same(ours.values, right.values)
                return [Finding(f"{what}: other numbers", differs)] if differs else []
            return [
                Finding(f"{what}: taken, torch.nn raises {type(other).__name__}", str(other)[:200])
            ]
        wanted = [o for o in (theirs, right) if o is not None and o.error is None]
        if not wanted and ("indices zeros" in what or what.endswith("input: another object")):
            return []  # an order, if a strange one; another packed sequence
        if not wanted:
            return [
                Finding(
                    f"{what}: taken without a word", f"gave {str(tensors(ours.values)[:1])[:100]}"
                )
            ]
        # Torch.nn reads past the end of a storage
        differences = [same(ours.values, o.values) for o in wanted]
        return [Finding(f"{what}: other numbers", differences[0])] if all(differences) else []
    text = f"{type(error).__name__}: {str(error)[:200]}"
    if not isinstance(error, RIGHT):
        return [Finding(f"{what}: {type(error).__name__}", text)]
    named_ones = [
        *names,
        *(["weight", "bias"] if any(word in what for word in OTHERS) else []),
        *([*NAMES, "lengths", "resets", "reverse"] if any(word in what for word in SIZES) else []),
    ]
    says = named(error, named_ones) or any(word in what for word in ("freed", "shrunk"))
    says = says or str(error) == "Expected sequence length to be larger than 0 in RNN"  # torch.nn's
    says = says or (
        "sorted_indices" in what and "out of" in str(error) and "bounds" in str(error).lower()
    )
    unusual = any(word in what for word in UNUSUAL)
    if theirs is not None and other is None:
        by_name = says and any(word in what for word in STRICT)
        return [] if by_name else [Finding(f"{what}: refused, torch.nn takes it", text)]
    found = []
    if (
        isinstance(other, RIGHT)
        and not isinstance(error, _family(other))
        and not (says and unusual)
    ):
        found.append(
            Finding(
                f"{what}: {type(error).__name__}, torch.nn raises {type(other).__name__}",
                f"{text} | torch.nn: {str(other)[:200]}",
            )
        )
    if not says and not (other is not None and str(other) == str(error)):
        found.append(Finding(f"{what}: its name is missing", text))
    return found


def _family(error: BaseException) -> type[BaseException]:
    """The type that ours has to be of: for errors of torch's own kinds the one that is Python's."""
    if isinstance(error, NotImplementedError):
        return RuntimeError
    return (
        type(error)
        if type(error) in RIGHT
        else next(kind for kind in RIGHT if isinstance(error, kind))
    )


def where(side: str, what: str) -> None:
    """For the parent, should this process end here."""
    print(f"WHERE {side} | {what}", file=sys.stderr, flush=True)


# Cases: each returns what was tried, in words, and the findings.

Result = tuple[str, list[Finding]]


def constructor(rng: random.Random) -> Result:
    name = rng.choice(
        ("RNN", "LSTM", "GRU", "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
    )
    options: dict[str, Any] = dict(input_size=4, hidden_size=5)
    own = {"plan": PLANS, "recompute": OBJECTS}
    tables = {
        "input_size": OBJECTS,
        "hidden_size": OBJECTS,
        "bias": OBJECTS,
        "device": OBJECTS,
        "dtype": OBJECTS,
    }
    if name[-4:] != "Cell":
        others = (
            "num_layers",
            "batch_first",
            "dropout",
            "bidirectional",
            "proj_size",
            "nonlinearity",
            "unknown",
        )
        tables |= dict.fromkeys(others, OBJECTS)
        tables |= {"plan": PLANS, "recompute": OBJECTS}
    elif name == "RNNCell":
        tables["nonlinearity"] = OBJECTS
    chosen = rng.sample(list(tables), rng.choice((1, 1, 2)))
    words = []
    for key in chosen:
        wrong = from_table(
            rng,
            tables[key],
            ("2**70", "None") if key in ("plan", "device", "dtype") else ("2**70",),
        )
        options[key] = wrong.value
        words.append(f"{key}={wrong.what}")
    positional = rng.random() < 0.1
    what = f"rnn.{name}({', '.join(words)}{', and too many' if positional else ''})"

    def make(library: Any) -> Any:
        given = {
            key: copy.copy(value)
            for key, value in options.items()
            if library is rnn or key not in own
        }
        more = [4, 5, 1, True, False, 0.0, False, 0, None, None, 3, 4] if positional else []
        if positional:
            given = {
                key: value
                for key, value in given.items()
                if key not in ("input_size", "hidden_size")
            }
        torch.manual_seed(0)
        layer = getattr(library, name)(*more, **given)
        x = torch.ones(
            3,
            2,
            layer.input_size,
            dtype=layer.weight_ih.dtype if name[-4:] == "Cell" else layer.weight_ih_l0.dtype,
        )
        x = x[0] if name[-4:] == "Cell" else x
        return layer, layer(x)

    where("ours", what)
    ours = attempt(lambda: make(rnn))
    where("torch", what)
    theirs = attempt(lambda: make(nn))
    bad_plan = {*chosen} & {*own}
    names = [key for key in chosen if key != "unknown"] + (
        ["argument", "arguments"] if "unknown" in chosen else []
    )
    names += ["arguments", "argument", "nonlinearity"] if positional else []
    kind = f"{'cell' if name[-4:] == 'Cell' else 'layer'}({', '.join(sorted(chosen))})"
    # Flags are taken by their truth, where torch.nn refuses some objects at the first call.
    flags = (
        {"recompute"}
        if theirs.error is None
        else {"batch_first", "bias", "bidirectional", "num_layers"}
    )
    truth = (
        ours.error is None
        and isinstance(theirs.error, (TypeError, type(None)))
        and {*chosen} & flags
    )
    # Of two wrong ones either can be named first.
    both = (
        len(chosen) + positional > 1 and isinstance(ours.error, RIGHT) and theirs.error is not None
    )
    if truth or both:
        return what, []
    return what, judge(
        kind, names, ours, None if bad_plan and theirs.error is None else theirs, None
    )


def _layer_arguments(
    rng: random.Random, name: str, options: dict[str, Any], form: str
) -> dict[str, Any]:
    """Right arguments of a call of a layer, of T = 3 and B = 2."""
    T = 3
    B = 2
    D = 1 + options["bidirectional"]
    dtype = options["dtype"]
    x = torch.randn(T, B, 4).to(dtype)
    count = options["num_layers"] * D
    widths = [options.get("proj_size") or 5, *([5] if name == "LSTM" else [])]
    states = [torch.randn(count, B, width).to(dtype) for width in widths]
    resets = torch.rand(T, B) < 0.4
    lengths = torch.tensor([3, 2])
    if form == "unbatched":
        x = x[:, 0]
        states = [s[:, 0] for s in states]
        resets = resets[:, 0]
        lengths = lengths[:1]
    elif options["batch_first"]:
        x = x.transpose(0, 1)
        resets = resets.T
    given: dict[str, Any] = dict(input=x.clone(), hx=tuple(states) if name == "LSTM" else states[0])
    if form == "packed":
        given["input"] = pack_padded_sequence(
            given["input"], torch.tensor([2, 3]), options["batch_first"], False
        )
    if form == "lengths":
        given["lengths"] = lengths
    if rng.random() < 0.2:
        given["resets"] = resets.clone()
    if rng.random() < 0.3:
        del given["hx"]
    return given


def _spoil(
    rng: random.Random, name: str, options: dict[str, Any], given: dict[str, Any], form: str
) -> tuple[str, Wrong]:
    """A wrong argument, and its name."""
    T = 3
    B = 2
    key = rng.choice(("input", "input", "hx", "hx", "lengths", "resets"))
    if key == "hx" and "hx" not in given:
        key = "input"
    shape = [T] if form == "unbatched" else [B, T] if options["batch_first"] else [T, B]
    if key == "lengths":
        wrong = wrong_lengths(rng, T, 1 if form == "unbatched" else B)
        if form == "unbatched" and rng.random() < 0.3:
            wrong = Wrong("a number", 2, torch.tensor([2]))
        return key, wrong
    if key == "resets":
        return key, wrong_resets(rng, shape)
    value = given[key]
    if key == "hx" and name == "LSTM":
        k = rng.randrange(2)
        chance = rng.random()
        if chance < 0.6:
            one = wrong_tensor(rng, value[k])
            meaning = one.meaning
            if meaning is not REFUSED:
                meaning = tuple(meaning if i == k else value[i] for i in range(2))
            both = tuple(one.value if i == k else value[i] for i in range(2))
            return key, Wrong(f"{'hc'[k]}_0 {one.what}", both, meaning, one.sort)
        stacked = value[0] if "proj_size" in options else torch.stack(value)
        choices = [
            ("a list", list(value), value),
            ("one", value[:1], REFUSED),
            ("three", value * 2, REFUSED),
            ("one tensor", value[0], REFUSED),
            ("stacked", stacked, REFUSED),
            ("None in it", (value[0], None), REFUSED),
            ("a dict", dict(h=value[0], c=value[1]), REFUSED),
            ("nested", (value, value), REFUSED),
            ("both wrong", (value[0].double(), value[1].int()), REFUSED),
        ]
        what, found, meaning = rng.choice(choices)
        if meaning is REFUSED and rng.random() < 0.3:
            return key, from_table(rng, OBJECTS, ("None",))
        return key, Wrong(what, found, meaning)
    if key == "hx" and rng.random() < 0.2:
        what, found, _ = rng.choice(
            [("a tuple", (value, value), 0), ("a list", [value], 0), ("of one", (value,), 0)]
        )
        return key, Wrong(what, found, REFUSED)
    if isinstance(value, PackedSequence):
        fields = list(value)
        k = rng.randrange(4)
        part = fields[k]
        assert isinstance(part, Tensor)
        one = wrong_tensor(rng, part) if k == 0 else _wrong_indices(rng, part)
        fields[k] = one.value
        try:
            found = PackedSequence(*fields)  # type: ignore[arg-type]
        except Exception:  # torch refuses it
            return key, Wrong("text", "text", REFUSED)
        meaning = value if one.meaning is part else REFUSED
        if k == 0 and isinstance(one.meaning, Tensor):
            meaning = value._replace(data=one.meaning)
        sort = f"packed, {value._fields[k]} {one.sort}" if one.sort else ""
        return key, Wrong(f"packed, {value._fields[k]} {one.what}", found, meaning, sort)
    return key, wrong_tensor(rng, value)


def _wrong_indices(rng: random.Random, t: Tensor) -> Wrong:
    """Of a packed sequence."""
    values = t.tolist()
    choices: list[tuple[str, Any, Any]] = [
        ("a list", values, t),
        ("an array", np.array(values), t),
        ("int32", t.int(), t),
        ("floats", t.float(), REFUSED),
        ("negative", -t - 1, REFUSED),
        ("huge", t + 2**40, REFUSED),
        ("too many", torch.cat((t, t)), REFUSED),
        ("too few", t[:-1], REFUSED),
        ("two dimensions", t[None], REFUSED),
        ("freed", _freed(rng, t), REFUSED),
        ("shrunk", _shrunk(rng, t), REFUSED),
        ("meta", t.to("meta"), REFUSED),
        ("booleans", t.bool(), REFUSED),
        ("zeros", torch.zeros_like(t), REFUSED),
    ]
    if rng.random() < 0.2:
        return from_table(rng, OBJECTS, ("None",))
    return Wrong(*rng.choice(choices))


def _with_gradients(module: Any, given: dict[str, Any]) -> Any:
    """What comes out, and the gradients of the weights."""
    out = module(**given)
    loss = sum(t.sin().sum() for t in tensors(out) if t.requires_grad)
    if not isinstance(loss, Tensor):
        return out
    return out, torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)


def _options(rng: random.Random, name: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(
        num_layers=rng.choice((1, 1, 2)),
        bidirectional=rng.random() < 0.4,
        batch_first=rng.random() < 0.4,
        bias=rng.random() < 0.8,
        dtype=rng.choice((torch.float32,) * 4 + (torch.float64, torch.bfloat16)),
    )
    if name == "LSTM" and rng.random() < 0.2:
        options["proj_size"] = 3
    return options


def _layers(name: str, options: dict[str, Any], plan: Plan | None) -> tuple[Any, Any]:
    """Ours and torch.nn's, with the same weights."""
    ours = getattr(rnn, name)(4, 5, plan=plan, **options)
    theirs = getattr(nn, name)(4, 5, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _as_plan(rng: random.Random, dtype: torch.dtype) -> Plan | None:
    return rng.choice(
        [None, None, Plan("numpy"), Plan("native")] if dtype == torch.float32 else [None]
    )


def layer_call(rng: random.Random) -> Result:
    name = rng.choice(LAYER_NAMES)
    options = _options(rng, name)
    form = rng.choice(("padded", "padded", "unbatched", "packed", "lengths", "step"))
    plan = _as_plan(rng, options["dtype"])
    ours, theirs = _layers(name, options, plan)
    given = _layer_arguments(rng, name, options, form)
    grad = rng.random() < 0.6
    if form == "step":  # without gradients
        grad = False
        given = {key: given[key] for key in ("input", "hx") if key in given}
        given["input"] = (
            given["input"].narrow(1 if options["batch_first"] else 0, 0, 1).contiguous()
        )
    key, wrong = _spoil(rng, name, options, given, form)
    if form == "step" and key in ("lengths", "resets"):
        key = "input"
        wrong = wrong_tensor(rng, given["input"])
    arguments = {**given, key: wrong.value}
    what = (
        f"rnn.{name}(4, 5, {options}, plan={plan and plan.backend}) {form} grad={grad} {key}: "
        f"{wrong.what}"
    )
    kind = f"layer call, {key}: {wrong.kind}"
    with torch.set_grad_enabled(grad):
        where("ours", f"{kind} || {what}")
        our = attempt(lambda: _with_gradients(ours, arguments))
        explained = None
        if wrong.what.split()[-1] not in ("freed", "shrunk"):
            explained = attempt(lambda: rnn.explain(ours, **arguments))
        where("torch", what)
        their = right = None
        if not {"lengths", "resets"} & {*arguments}:
            their = attempt(lambda: _with_gradients(theirs, arguments))
        elif wrong.meaning is not REFUSED:
            exact = copy.deepcopy(theirs).double()
            right = attempt(lambda: _exactly(exact, {**given, key: wrong.meaning}, grad))
        if (
            their is not None
            and (their.error or wrong.what[-11:] == "zero tensor")
            and wrong.meaning is not REFUSED
        ):
            right = attempt(lambda: _with_gradients(theirs, {**given, key: wrong.meaning}))
    found = judge(kind, [key], our, their, right)
    if explained is not None and (our.error is None) != (explained.error is None):
        said = f"call: {our.error!r}"[:150] + f" | explain: {explained.error!r}"[:150]
        found.append(
            Finding(f"explain {'takes' if explained.error is None else 'refuses'}, {kind}", said)
        )
    return what, found


def _exactly(module: Any, given: dict[str, Any], grad: bool) -> Any:
    def double(value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, PackedSequence):
            return tuple(double(v) for v in value)
        if isinstance(value, PackedSequence):
            return value._replace(data=value.data.double())
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    out = ByCells(module)(**{key: double(value) for key, value in given.items()})
    if not grad:
        return out
    loss: Any = sum(t.sin().sum() for t in tensors(out))
    return out, torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)


def weights(rng: random.Random) -> Result:
    """A parameter of another kind."""
    name = rng.choice(LAYER_NAMES)
    options = _options(rng, name)
    ours, theirs = _layers(name, options, _as_plan(rng, options["dtype"]))
    form = rng.choice(("padded", "step"))
    x = torch.randn(1 if form == "step" else 3, 2, 4).to(options["dtype"])
    x = x.transpose(0, 1) if options["batch_first"] else x
    key = rng.choice([key for key, _ in ours.named_parameters()])
    wrong = wrong_tensor(rng, ours.get_parameter(key))
    while not isinstance(wrong.value, Tensor):
        wrong = wrong_tensor(rng, ours.get_parameter(key))
    what = f"rnn.{name}(4, 5, {options}) {form} {key}: {wrong.what}"
    kind = f"layer call, {key.split('_')[0]}: {wrong.kind}"

    def call(module: Any, value: Any) -> Any:
        setattr(module, key, nn.Parameter(value.detach(), requires_grad=False))
        with torch.set_grad_enabled(form != "step"):
            return _with_gradients(module, dict(input=x))

    where("ours", f"{kind} || {what}")
    our = attempt(lambda: call(ours, wrong.value))
    where("torch", what)
    their = attempt(lambda: call(theirs, wrong.value))
    right = None
    if wrong.what == "not a number" and key.startswith("weight_hr"):
        return what, []  # a projection is multiplied into weight_hh, where it meets all gates
    if their.error is not None and wrong.meaning is not REFUSED:
        right = attempt(lambda: call(theirs, wrong.meaning))
    return what, judge(kind, [key.split("_")[0]], our, their, right)


def attribute_plan(rng: random.Random) -> Result:
    """A plan that is set later."""
    name = rng.choice(LAYER_NAMES)
    layer = getattr(rnn, name)(4, 5)
    wrong = from_table(rng, PLANS, ("None",))
    what = f"rnn.{name}(4, 5).plan = {wrong.what}"
    rows = rng.choice((1, 3))

    def call() -> Any:
        layer.plan = wrong.value
        with torch.set_grad_enabled(rows > 1):
            return layer(torch.randn(rows, 2, 4))

    where("ours", what)
    return what, judge(f"layer.plan = {wrong.kind}", ["plan"], attempt(call), None, None)


def operator(rng: random.Random) -> Result:
    name = rng.choice(("rnn_tanh", "rnn_relu", "lstm", "gru"))
    cell = getattr(cells, name)
    T = 3
    B = 2
    I = 4
    H = 5
    N = rng.choice((1, 2))
    G = cell.gates
    S = cell.states
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    form = rng.choice(("padded", "padded", "packed"))
    shapes = dict(
        x=(T, B, I),
        w_ih=(N * G * H, I),
        w_hh=(N * G * H, H),
        b_ih=(N * G * H,),
        b_hh=(N * G * H,),
        s0=(N * S, B, H),
    )
    given: dict[str, Any] = {
        key: torch.randn(shape).to(dtype) / (2 if len(shape) < 3 else 1)
        for key, shape in shapes.items()
    }
    sizes = torch.tensor([2, 2, 1])
    if form == "packed":
        given["x"] = torch.randn(5, I).to(dtype)
    options: dict[str, Any] = dict(
        lengths=None,
        batch_sizes=sizes if form == "packed" else None,
        resets=None,
        reverse=(False, True)[:N],
        keep=1,
        plan=_as_plan(rng, dtype),
        recompute=False,
    )
    keys = [
        "cell",
        *shapes,
        *shapes,
        "lengths",
        "lengths",
        "resets",
        "reverse",
        "reverse",
        "keep",
        "plan",
        "plan",
    ]
    key = rng.choice([*keys, *(["batch_sizes"] * 2 if form == "packed" else [])])
    if key == "lengths" and form == "packed":
        key = "x"
    if key == "cell":
        table = {
            **OBJECTS,
            "a name": lambda: name,
            "a module": lambda: nn.LSTMCell(4, 5),
            "the type": lambda: type(cell),
            "another": lambda: cells.gru if name != "gru" else cells.lstm,
        }
        wrong = from_table(rng, table)
    elif key in shapes:
        wrong = (
            Wrong("None", None, REFUSED) if rng.random() < 0.1 else wrong_tensor(rng, given[key])
        )
    elif key == "lengths":
        wrong = wrong_lengths(rng, T, B)
    elif key == "resets":
        wrong = wrong_resets(rng, (T, B))
    elif key == "reverse":
        wrong = wrong_reverse(rng, N)
    elif key == "keep":
        wrong = from_table(rng, {**OBJECTS, "2": lambda: 2, "'1'": lambda: "1"})
        if wrong.what in ("True", "0", "1", "2"):
            wrong = wrong._replace(meaning=int(bool(wrong.value)))
    elif key == "plan":
        wrong = from_table(rng, PLANS, ("None",))
    else:
        wrong = (
            Wrong("rising", sizes.flip(0), REFUSED)
            if rng.random() < 0.1
            else _wrong_indices(rng, sizes)
        )
    arguments = {"cell": cell, **given, **options, key: wrong.value}
    grad = rng.random() < 0.6
    what = (
        f"recurrence({name}, {dtype}, N={N}, {form}, "
        f"plan={options['plan'] and options['plan'].backend}) "
        f"grad={grad} {key}: {wrong.what}"
    )
    kind = f"operator, {key}: {wrong.kind}"

    def call() -> Any:
        leaves = [
            t
            for t in arguments.values()
            if isinstance(t, Tensor) and t.is_leaf and t.is_floating_point()
        ]
        wanted = [
            t.requires_grad_()
            for t in leaves
            if grad and t.layout == torch.strided and t is not wrong.value
        ]
        function: Any = rnn.functional.recurrence
        out = function(**arguments)
        if grad and wanted:
            loss: Any = sum(t.sin().sum() for t in tensors(out))
            torch.autograd.grad(loss, wanted, allow_unused=True)
        return out

    where("ours", f"{kind} || {what}")
    our = attempt(call)
    right = None
    if wrong.meaning is not REFUSED:
        right = attempt(lambda: _meant(name, {**given, **options, key: wrong.meaning}, form))
    return what, judge(kind, [key], our, None, right)


def _meant(name: str, given: dict[str, Any], form: str) -> Any:
    """The operator in float64, by torch's cells."""
    given = {
        key: t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for key, t in given.items()
    }
    x = given["x"]
    lengths = given["lengths"]
    N = len(given["reverse"])
    S = 2 if name == "lstm" else 1
    if form == "packed":
        x = torch.cat((x, x.new_zeros(1, x.shape[1]))).view(3, 2, -1)
        lengths = torch.tensor([3, 2])
    parts = zip(*(given[key].chunk(N) for key in ("w_ih", "w_hh", "b_ih", "b_hh")))
    sweeps = [
        sweep(
            name,
            x,
            part,
            list(given["s0"][n * S : (n + 1) * S]),
            lengths,
            given["resets"],
            bool(given["reverse"][n]),
        )
        for n, part in enumerate(parts)
    ]
    columns = [torch.cat(column, -1) for column in zip(*(rows for rows, _ in sweeps))]
    if form == "packed":
        columns = [column.flatten(0, 1)[:5] for column in columns]
    others = (
        torch.stack([c.reshape(-1, c.shape[-1]) for c in columns[1:]])
        if S > 1 and given["keep"]
        else None
    )
    return columns[0], others, torch.stack([s for _, last in sweeps for s in last])


def between(rng: random.Random) -> Result:
    """What happens to a tensor between forward and backward, or to an incoming gradient."""
    name = rng.choice(LAYER_NAMES)
    options = _options(rng, name)
    plan = _as_plan(rng, options["dtype"])
    ours, theirs = _layers(name, options, plan)
    form = rng.choice(("padded", "lengths", "packed"))
    batch_first = options["batch_first"]
    data = (
        torch.randn(2, 3, 4).to(options["dtype"])
        if batch_first
        else torch.randn(3, 2, 4).to(options["dtype"])
    )
    count = options["num_layers"] * (1 + options["bidirectional"])
    widths = [options.get("proj_size") or 5, *([5] if name == "LSTM" else [])]
    start = [torch.randn(count, 2, width).to(options["dtype"]) for width in widths]
    subject = rng.choice(
        [
            "input",
            "hx",
            "output",
            "end",
            "gradient",
            "gradient",
            *(key for key, _ in ours.named_parameters()),
        ]
    )
    deed = rng.choice(("freed", "shrunk", "edited", "edited"))
    gradient = rng.choice(
        ("zero tensor", "freed", "shrunk", "meta", "sparse", "expanded", "a subclass", "float64")
    )
    seed = rng.randrange(99)

    def call(module: Any, spoiled: bool = True) -> Any:
        x = data.clone()
        states = [s.clone() for s in start]
        hx: Any = tuple(states) if name == "LSTM" else states[0]
        keywords: dict[str, Any] = {}
        given: Any = x
        if form == "packed":
            given = pack_padded_sequence(x, torch.tensor([2, 3]), batch_first, False)
            x = given.data
        if form == "lengths" and module is ours:
            keywords["lengths"] = torch.tensor([3, 3])
        out = module(given, hx, **keywords)
        y, *ends = tensors(out)
        targets = {
            "input": x,
            "hx": states[0],
            "output": y,
            "end": ends[0],
            **dict(module.named_parameters()),
        }
        generator = torch.Generator().manual_seed(seed)
        dy = torch.randn(y.shape, generator=generator).to(y.dtype)
        if subject == "gradient":
            if gradient == "expanded":
                dy = dy[..., :1].expand(y.shape)
            elif spoiled or gradient == "zero tensor":
                dy = {**TENSORS, **GOOD}[gradient](rng, dy)
        elif spoiled:
            t = targets[subject]
            with torch.no_grad():
                if deed == "edited":
                    t.add_(1)
                else:
                    bytes_ = t.untyped_storage().nbytes()
                    t.untyped_storage().resize_(
                        0 if deed == "freed" else max(0, bytes_ - t.element_size())
                    )
        grads = torch.autograd.grad(
            [y, ends[-1].sum()] if subject != "end" else [y],
            list(module.parameters()),
            [dy, torch.ones((), dtype=y.dtype)] if subject != "end" else [dy],
            allow_unused=True,
        )
        return [g.to_dense() if g is not None and g.layout != torch.strided else g for g in grads]

    deeds = gradient if subject == "gradient" else deed
    kind = f"between forward and backward, {re.sub(r'_l[0-9].*', '', subject)}: {deeds}"
    what = f"rnn.{name}(4, 5, {options}, plan={plan and plan.backend}) {form} {subject}: {deeds}"
    where("ours", f"{kind} || {what}")
    our = attempt(lambda: call(ours))
    where("torch", what)
    untouched = copy.deepcopy(theirs)
    their = attempt(lambda: call(theirs))
    if (
        isinstance(our.error, RuntimeError)
        and deed == "edited"
        and subject[:4] != "bias"
        and subject != "gradient"
    ):
        # Torch.nn may do without that tensor on the CPU; on a GPU it keeps its output as well
        return what, []
    copied = (
        deeds == "sparse"
        or options["bidirectional"]
        or "proj_size" in options
        or options["dtype"] == torch.bfloat16
        or subject in ("input", "hx")
        or (subject[:4] == "bias")
    )
    right = attempt(lambda: call(untouched, spoiled=False)) if copied else None  # a copy is as good
    if deeds == "shrunk" and subject == "gradient" and options["dtype"] == torch.bfloat16:
        return what, []  # torch's own conversion to float32 reads past the end
    own = "proj_size" in options or options["dtype"] == torch.bfloat16
    if isinstance(our.error, RuntimeError) and deeds == "sparse" and own:
        return what, []  # torch's own operations do not take it in what a projection adds
    found = judge(kind, ["input"], our, their, right)
    return what, [f for f in found if "name is missing" not in f.kind]


def cell_call(rng: random.Random) -> Result:
    name = rng.choice(("RNNCell", "LSTMCell", "GRUCell"))
    ours = getattr(rnn, name)(4, 5)
    theirs = getattr(nn, name)(4, 5)
    theirs.load_state_dict(ours.state_dict())
    h = torch.randn(2, 5)
    given: dict[str, Any] = dict(
        input=torch.randn(2, 4), hx=(h, h.clone()) if name == "LSTMCell" else h
    )
    key = rng.choice(("input", "hx"))
    if isinstance(given[key], tuple):
        one = wrong_tensor(rng, h)
        wrong = (
            Wrong(one.what, (h, one.value), REFUSED)
            if rng.random() < 0.6
            else from_table(rng, OBJECTS, ("None",))
        )
    else:
        wrong = wrong_tensor(rng, given[key])
    what = f"rnn.{name}(4, 5) {key}: {wrong.what}"
    kind = f"cell call, {key}: {wrong.kind}"
    arguments = {**given, key: wrong.value}
    where("ours", f"{kind} || {what}")
    our = attempt(lambda: ours(**arguments))
    where("torch", what)
    return what, judge(kind, [key], our, attempt(lambda: theirs(**arguments)), None)


def whole_models(rng: random.Random) -> Result:
    """replace, restore and explain of what is no model, or none of ours."""
    name = rng.choice(("replace", "restore", "explain", "explain"))
    table = {
        **OBJECTS,
        "a list of modules": lambda: [nn.LSTM(2, 2)],
        "the type": lambda: nn.LSTM,
        "our type": lambda: rnn.LSTM,
        "a cell": lambda: rnn.GRUCell(2, 2),
        "torch.nn's": lambda: nn.GRU(2, 2),
        "a state": lambda: nn.GRU(2, 2).state_dict(),
    }
    if name != "explain":
        table = {
            key: make
            for key, make in table.items()
            if key not in ("a module", "a cell", "torch.nn's")
        }
    wrong = from_table(rng, table)
    what = f"rnn.{name}({wrong.what})"
    where("ours", what)
    more = [torch.zeros(3, 2, 2)] if name == "explain" else [False]
    our = attempt(lambda: getattr(rnn, name)(wrong.value, *more))
    return what, judge(
        f"{name}, model: {wrong.kind}", ["model", "layer", "module"], our, None, None
    )


CASES: list[tuple[int, Callable[[random.Random], Result]]] = [
    (12, constructor),
    (34, layer_call),
    (8, weights),
    (3, attribute_plan),
    (26, operator),
    (10, between),
    (3, cell_call),
    (2, whole_models),
]


def _case(seed: int, index: int) -> Result:
    warnings.simplefilter("ignore")
    rng = random.Random(f"{seed} {index}")
    torch.manual_seed(index)
    np.random.seed(index % 2**32)
    one = rng.choices([case for _, case in CASES], [weight for weight, _ in CASES])[0]
    return one(rng)


def check(seed: int, index: int) -> list[Finding]:
    what, found = _case(seed, index)
    return [Finding(kind, f"{text} | {what}") for kind, text in found]


def describe(seed: int, index: int) -> str:
    """Only by doing it can one say what it is: the process says so before (`where`)."""
    return f"case {index} of seed {seed}"


if __name__ == "__main__":
    sys.exit(main(check, describe, "tests.fuzz_arguments"))
