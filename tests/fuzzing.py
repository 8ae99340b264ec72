"""What the fuzzers share: tensors in random memory layouts, an oracle made of torch's cells, and
the run of many cases in child processes, so that a crash is a finding like any other."""

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.cases import TORCH_CELLS

HANGS = 120.0  # seconds without a word from a child


class Finding(NamedTuple):
    """What is wrong: `kind` is the same for all that have one cause, as far as one can say."""

    kind: str
    text: str


Check = Callable[[int, int], list[Finding]]


# Memory layouts. Each function takes contiguous data and gives a tensor of the same shape and
# dtype; where a layout cannot hold any values (a stride of 0), it has values of its own. What lies
# between the elements is NaN.


def _blank(size: int, dtype: torch.dtype) -> Tensor:
    fill: Any = float("nan") if dtype.is_floating_point or dtype.is_complex else 1
    return torch.full((size,), fill, dtype=dtype)


def _permuted(rng: random.Random, data: Tensor) -> Tensor:
    order = rng.sample(range(data.dim()), data.dim())
    inverse = [order.index(dim) for dim in range(data.dim())]
    return data.permute(order).contiguous().permute(inverse)


def _expanded(rng: random.Random, data: Tensor) -> Tensor:
    chosen = [rng.random() < 0.5 for _ in data.shape]
    small = data
    for dim, fixed in enumerate(chosen):
        if fixed and data.shape[dim]:
            small = small.narrow(dim, 0, 1)
    return small.contiguous().expand(data.shape)


def _sliced(rng: random.Random, data: Tensor) -> Tensor:
    steps = [rng.choice((1, 1, 2, 3)) for _ in data.shape]
    starts = [rng.randrange(step) for step in steps]
    sizes = [start + size * step for size, step, start in zip(data.shape, steps, starts)]
    count = 1
    for size in sizes:
        count *= size
    view = _blank(count, data.dtype).view(sizes)
    view = view[tuple(slice(start, None, step) for start, step in zip(starts, steps))]
    return view[tuple(slice(size) for size in data.shape)].copy_(data)


def _offset(rng: random.Random, data: Tensor) -> Tensor:
    before = rng.randrange(1, 6)
    after = rng.randrange(3)
    memory = _blank(before + data.numel() + after, data.dtype)
    return memory[before : before + data.numel()].view(data.shape).copy_(data)


def _flipped(rng: random.Random, data: Tensor) -> Tensor:
    dims = [dim for dim in range(data.dim()) if rng.random() < 0.5]
    return _permuted(rng, data).flip(dims)


def _overlapping(rng: random.Random, data: Tensor) -> Tensor:
    """As `unfold` gives windows: strides are smaller than what is below them."""
    strides = [rng.randrange(4) for _ in data.shape]
    reach = 1 + sum(stride * max(0, size - 1) for stride, size in zip(strides, data.shape))
    values = data.flatten()
    memory = values[torch.arange(reach) % len(values)] if len(values) else _blank(reach, data.dtype)
    return memory.as_strided(data.shape, strides)


def _odd_strides(rng: random.Random, data: Tensor) -> Tensor:
    """Contiguous, as a dimension of size 1 can have any stride."""
    strides = [
        rng.randrange(99) if size == 1 else stride
        for size, stride in zip(data.shape, data.stride())
    ]
    return data.as_strided(data.shape, strides)


def _negative(rng: random.Random, data: Tensor) -> Tensor:
    return torch._neg_view(PLAIN[rng.choice(list(PLAIN))](rng, -data))


def _real(rng: random.Random, data: Tensor) -> Tensor:
    return torch.complex(data, torch.full_like(data, float("nan"))).real


def _imaginary(rng: random.Random, data: Tensor) -> Tensor:
    """Of a conjugate: it has the negative bit and a stride of 2."""
    return torch.complex(torch.full_like(data, float("nan")), -data).conj().imag


def _conjugate(rng: random.Random, data: Tensor) -> Tensor:
    return PLAIN[rng.choice(list(PLAIN))](rng, data.conj().resolve_conj()).conj()


def _zero(rng: random.Random, data: Tensor) -> Tensor:
    return torch._efficientzerotensor(data.shape, dtype=data.dtype)


def _array(rng: random.Random, data: Tensor) -> Tensor:
    """NumPy's memory: its storage cannot be resized."""
    return torch.from_numpy(data.numpy().copy())


def _last_first(rng: random.Random, data: Tensor) -> Tensor:
    """As channels are moved: the last dimension is the slowest in memory."""
    return data.movedim(-1, 0).contiguous().movedim(0, -1)


Layout = Callable[[random.Random, Tensor], Tensor]
PLAIN: dict[str, Layout] = {
    "permuted": _permuted,
    "last first": _last_first,
    "expanded": _expanded,
    "sliced": _sliced,
    "offset": _offset,
    "flipped": _flipped,
    "overlapping": _overlapping,
    "odd strides": _odd_strides,
}


def layouts(dtype: torch.dtype, zeros: bool) -> dict[str, Layout]:
    """Those that a dtype can have; zero tensors only where `zeros`."""
    found = dict(PLAIN)
    if dtype != torch.bfloat16:
        found["array"] = _array
    if dtype.is_floating_point:
        found["negative"] = _negative
    if dtype in (torch.float32, torch.float64):
        found["real"] = _real
        found["imaginary"] = _imaginary
    if dtype.is_complex:
        found["conjugate"] = _conjugate
    if zeros:
        found["zero"] = _zero
    return found


def place(rng: random.Random, data: Tensor, zeros: bool = True) -> tuple[Tensor, str]:
    """A tensor like the data in a random layout, and the layout's name."""
    if rng.random() < 0.25:
        return data, "contiguous"
    choices = layouts(data.dtype, zeros)
    name = rng.choice(list(choices))
    with torch.no_grad():
        return choices[name](rng, data).detach(), name


def plain(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same values in memory of their own, contiguous in every respect."""
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=dtype or t.dtype)
    return torch.zeros(t.shape, dtype=dtype or t.dtype).copy_(t.detach())


# The oracle: torch's cells, a step after the other, for what torch.nn's layers do not have.


def _cell(name: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Any]) -> list[Tensor]:
    w_ih, w_hh, b_ih, b_hh, *projection = weights
    if projection:  # torch has no cell for it: torch.nn's formula
        i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(states[0], w_hh, b_hh)).chunk(4, -1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return [F.linear(o.sigmoid() * c.tanh(), projection[0]), c]
    pair = len(states) > 1
    new = TORCH_CELLS[name](x, tuple(states) if pair else states[0], w_ih, w_hh, b_ih, b_hh)
    return list(new) if pair else [new]


def sweep(
    name: str,
    x: Tensor,
    weights: Sequence[Any],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    backwards: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """One recurrence over x [T, B, I] from states [B, H] each: its states [T, B, H], 0 past an end,
    and the last."""
    T, B = x.shape[:2]
    ends = torch.full((B,), T) if lengths is None else lengths
    now = list(states)
    rows: list[Any] = [None] * T
    for t in reversed(range(T)) if backwards else range(T):
        boundary = t + backwards
        if resets is not None and boundary < T:
            cut = (resets[boundary] & (boundary < ends))[:, None]
            now = [torch.where(cut, torch.zeros_like(s), s) for s in now]
        runs = (t < ends)[:, None]
        new = _cell(name, x[t], now, weights)
        now = [torch.where(runs, after, before) for after, before in zip(new, now)]
        rows[t] = [torch.where(runs, after, torch.zeros_like(after)) for after in new]
    return [torch.stack(column) for column in zip(*rows)], now


class ByCells:
    """A layer as ours: torch.nn's module, computed by `sweep`."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def parameters(self) -> Any:
        return self.module.parameters()

    def __call__(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        module = self.module
        pair = module.mode == "LSTM"
        packed = isinstance(input, PackedSequence)
        one = not packed and input.dim() == 2
        first = module.batch_first and not packed
        x = input
        if packed:
            x, lengths = pad_packed_sequence(input)
        if one:
            x = x.unsqueeze(1)
        elif first:
            x = x.transpose(0, 1)
        if resets is not None:
            resets = resets.unsqueeze(1) if one else resets
            resets = resets.T if module.batch_first and not one else resets
        states = self._start(x, hx, one)
        every = []
        last = []
        for layer in range(module.num_layers):
            sweeps = [
                self._sweep(x, states, layer, n, lengths, resets)
                for n in range(1 + module.bidirectional)
            ]
            every.append([torch.cat(parts, -1) for parts in zip(*(rows for rows, _ in sweeps))])
            last += [ends for _, ends in sweeps]
            x = every[-1][0]

        def form(t: Tensor) -> Tensor:
            """[T, B, K] as the input is."""
            if packed:
                assert lengths is not None
                return pack_padded_sequence(
                    t, lengths, enforce_sorted=input.sorted_indices is None
                ).data
            if one:
                return t.squeeze(1)
            return t.transpose(0, 1) if first else t

        y = form(x)
        ends = [torch.stack(column) for column in zip(*last)]
        ends = [end.squeeze(1) for end in ends] if one else ends
        result = (input._replace(data=y) if packed else y), (tuple(ends) if pair else ends[0])
        if not return_states:
            return result
        columns = [torch.stack([form(t) for t in column]) for column in zip(*every)]
        return *result, tuple(columns) if pair else columns[0]

    def _start(self, x: Tensor, hx: Any, one: bool) -> list[Tensor]:
        module = self.module
        count = module.num_layers * (1 + module.bidirectional)
        widths = [module.proj_size or module.hidden_size, module.hidden_size][
            : 2 if module.mode == "LSTM" else 1
        ]
        if hx is None:
            return [x.new_zeros(count, x.shape[1], width) for width in widths]
        states = list(hx) if module.mode == "LSTM" else [hx]
        return [s.unsqueeze(1) for s in states] if one else states

    def _sweep(
        self,
        x: Tensor,
        states: Sequence[Tensor],
        layer: int,
        n: int,
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        module = self.module
        row = layer * (1 + module.bidirectional) + n
        suffix = f"_l{layer}" + "_reverse" * n
        kinds = [
            "weight_ih",
            "weight_hh",
            "bias_ih",
            "bias_hh",
            *(["weight_hr"] if module.proj_size else []),
        ]
        weights = [getattr(module, kind + suffix, None) for kind in kinds]
        return sweep(
            module.mode.lower(), x, weights, [s[row] for s in states], lengths, resets, bool(n)
        )


# Many cases.


def _child(check: Check, seed: int, first: int, step: int, cases: int) -> None:
    """Says which case is next, and what was found in it."""
    torch.set_num_threads(1)
    for index in range(first, cases, step):
        print(f"@{index}", flush=True)
        for finding in check(seed, index):
            print("!" + json.dumps([index, *finding]), flush=True)
    print("=", flush=True)


class _Watch:
    """A child after the other, until all cases of one in `step` from `first` on are done."""

    def __init__(self, module: str, seed: int, first: int, step: int, cases: int) -> None:
        self.module = module
        self.seed = seed
        self.step = step
        self.cases = cases
        self.next = first
        self.done = 0
        self.findings: list[tuple[int, Finding]] = []

    def run(self) -> None:
        while self.next < self.cases:
            self._one_child()

    def _one_child(self) -> None:
        command = [
            sys.executable,
            "-m",
            self.module,
            "--seed",
            str(self.seed),
            "--cases",
            str(self.cases),
            "--child",
            f"{self.next},{self.step}",
        ]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        said: queue.Queue[str] = queue.Queue()
        errors: list[str] = []

        def read(stream: Any, take: Callable[[str], Any]) -> None:
            for line in stream:
                take(line)
            take("")

        readers = [
            threading.Thread(target=read, args=(child.stdout, said.put)),
            threading.Thread(target=read, args=(child.stderr, errors.append)),
        ]
        for reader in readers:
            reader.start()
        at = None
        finished = False
        while True:
            try:
                line = said.get(timeout=HANGS)
            except queue.Empty:
                child.kill()
                self.findings.append((at or 0, Finding("hangs", f"nothing for {HANGS:.0f} s")))
                break
            if not line:
                break
            if line.startswith("@"):
                self.done += at is not None
                at = int(line[1:])
            elif line.startswith("!"):
                index, kind, text = json.loads(line[1:])
                self.findings.append((index, Finding(kind, text)))
            elif line.startswith("="):
                finished = True
        status = child.wait()
        for reader in readers:
            reader.join()
        self.done += at is not None
        if finished:
            self.next = self.cases
            return
        if at is None:
            raise RuntimeError(f"{' '.join(command)}: {''.join(errors[-20:])}")
        words = [line for line in errors if line.startswith("WHERE")]
        why = f"the process ends with {f'signal {-status}' if status < 0 else f'status {status}'}"
        side, what, *_more = (
            [*words[-1].strip().split(" | ", 1)[:2]]
            if words
            else ["", "".join(errors[-3:]).strip()]
        )
        if side != "WHERE torch":  # whose fault it is
            self.findings.append(
                (at, Finding(f"{why}: {what.split(' || ')[0]}" if side else why, what))
            )
        self.next = at + self.step


def run(module: str, seed: int, cases: int, jobs: int) -> list[tuple[int, Finding]]:
    """All that is found in so many cases, by so many children."""
    watches = [_Watch(module, seed, first, jobs, cases) for first in range(jobs)]
    threads = [threading.Thread(target=watch.run) for watch in watches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(watch.done for watch in watches) == cases
    return sorted(found for watch in watches for found in watch.findings)


def report(findings: Sequence[tuple[int, Finding]], module: str, seed: int) -> str:
    """The kinds, the most frequent first, with the first cases of each."""
    kinds: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, finding in findings:
        kinds[finding.kind].append((index, finding.text))
    lines = []
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        indices = sorted({index for index, _ in found})
        lines.append(f"{len(indices):6} {kind} | cases {', '.join(map(str, indices[:4]))}")
        lines.append(f"       {found[0][1][:400]}")
    if lines:
        lines.append(f"To see one: python -m {module} --seed {seed} --only CASE")
    return "\n".join(lines)


def main(check: Check, describe: Callable[[int, int], str], module: str) -> int:
    """The command line of a fuzzer. Returns 1 if anything was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, help="this case alone, in this process")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        first, step = map(int, options.child.split(","))
        _child(check, options.seed, first, step, options.cases)
        return 0
    if options.only is not None:
        torch.set_num_threads(1)
        print(describe(options.seed, options.only), flush=True)
        findings = check(options.seed, options.only)
        for kind, text in findings:
            print(f"{kind} | {text}")
        return int(bool(findings))
    start = time.monotonic()
    found = run(module, options.seed, options.cases, options.jobs)
    print(report(found, module, options.seed))
    wrong = len({index for index, _ in found})
    print(
        f"{options.cases} cases of seed {options.seed} in {time.monotonic() - start:.0f} s: "
        f"{wrong} with findings"
    )
    return int(bool(found))
