"""Translates short messages from English to German: an encoder, a decoder and attention.

A bidirectional GRU reads the message, of any length (`lengths=`), in pieces of words that byte pair
encoding finds. A second GRU writes the translation: in training it sees the whole right text in one
call, and afterwards its own, one piece a call, greedily or as a beam of the likeliest texts.

The baselines are the English text itself, and the translation of the most similar message.

--data is a gettext catalogue (.po) of your own in any language, or a text file with a source, a tab
and its translation in each line."""

import argparse
import ast
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import training

PADDING, UNKNOWN, BEGIN, END = range(4)
PACKAGES = ("wagtail==8.0.1", "django==5.2.19", "django-oscar==4.2.1")
WORD = re.compile(r" ?(?:%\(\w+\)\w|\{\w*\}|\w+|[^\w ])")
LONGEST = 12  # words of a message


class Pair(NamedTuple):
    source: str
    target: str


class Batch(NamedTuple):
    source: Tensor  # [S, B]
    lengths: Tensor  # [B]
    target: Tensor  # [T, B], from BEGIN to END


class Memory(NamedTuple):
    """What the decoder looks at."""

    keys: Tensor  # [B, S, hidden]
    padding: Tensor  # [B, S]


class Pieces:
    """Byte pair encoding (Sennrich, Haddow and Birch 2016): the pair of pieces that occurs most
    often becomes a piece, `merges` times, from single characters on."""

    def __init__(self, texts: Sequence[str], merges: int) -> None:
        counts = Counter(word for text in texts for word in WORD.findall(text))
        words = [([*word], count) for word, count in counts.items()]
        self.rank: dict[tuple[str, str], int] = {}
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, count in words:
            for pair in pairwise(pieces):
                pairs[pair] += count
        for _ in range(merges):
            best = max(pairs, key=pairs.__getitem__, default=None)
            if best is None or pairs[best] < 2:
                break
            self.rank[best] = len(self.rank)
            for pieces, count in words:
                if best[0] in pieces and best[1] in pieces:
                    pairs.subtract({p: n * count for p, n in Counter(pairwise(pieces)).items()})
                    merge(pieces, best)
                    pairs.update({p: n * count for p, n in Counter(pairwise(pieces)).items()})
        names = sorted({*"".join(texts)} | {a + b for a, b in self.rank})
        self.names = ["", "?", "", "", *names]
        self.index = {name: i for i, name in enumerate(self.names) if i > END}
        self.split = cache(self._split)

    def _split(self, word: str) -> list[str]:
        pieces = [*word]
        while True:
            known = [pair for pair in pairwise(pieces) if pair in self.rank]
            if not known:
                return pieces
            merge(pieces, min(known, key=self.rank.__getitem__))

    def encode(self, text: str) -> Tensor:
        pieces = [piece for word in WORD.findall(text) for piece in self.split(word)]
        return torch.tensor([BEGIN, *(self.index.get(p, UNKNOWN) for p in pieces), END])

    def decode(self, numbers: Sequence[int]) -> str:
        return "".join(self.names[number] for number in numbers)


def merge(pieces: list[str], pair: tuple[str, str]) -> None:
    """Joins the pair wherever it is in pieces, in place."""
    i = 0
    while i < len(pieces) - 1:
        if pieces[i] == pair[0] and pieces[i + 1] == pair[1]:
            pieces[i : i + 2] = [pair[0] + pair[1]]
        i += 1


class Translator(nn.Module):
    """The attention of Luong, Pham and Manning (2015), "general", with one layer in each part."""

    def __init__(self, layer: Callable[..., Any], pieces: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(pieces, hidden)
        self.dropout = nn.Dropout(0.2)
        self.encoder = layer(hidden, hidden // 2, bidirectional=True)
        self.decoder = layer(hidden, hidden)
        self.attention = nn.Linear(hidden, hidden, bias=False)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.output = nn.Linear(hidden, pieces)
        # One matrix for both: what a piece means is what it scores.
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=hidden**-0.5)

    def embed(self, text: Tensor) -> Tensor:
        scale = self.embedding.embedding_dim**0.5
        return self.dropout(self.embedding(text) * scale)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Memory, Any]:
        """source [S, B] -> what to attend to, and the decoder's first state [1, B, hidden]."""
        y, state = self.encoder(self.embed(source), lengths=lengths)
        memory = Memory(y.transpose(0, 1), (source == PADDING).t())
        # Of each state both directions, one after the other.
        return memory, map_state(lambda s: torch.cat([*s], -1)[None], state)

    def decode(self, memory: Memory, text: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """text [T, B] -> scores of what follows [B, T, pieces], weights [B, T, S], state."""
        h, state = self.decoder(self.embed(text), state)
        h = h.transpose(0, 1)
        scores = self.attention(h) @ memory.keys.transpose(1, 2)
        weights = scores.masked_fill(memory.padding[:, None], -torch.inf).softmax(-1)
        mixed = self.mix(torch.cat([h, weights @ memory.keys], -1)).tanh()
        return self.output(self.dropout(mixed)), weights, state

    def forward(self, batch: Batch) -> Tensor:
        """-> scores of each next piece [B, T - 1, pieces]"""
        memory, state = self.encode(batch.source, batch.lengths)
        return self.decode(memory, batch.target[:-1], state)[0]


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Of an LSTM's state, function of both tensors."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(batch).flatten(0, 1)
    wanted = batch.target[1:].t().flatten()
    return nn.functional.cross_entropy(scores, wanted, ignore_index=PADDING, label_smoothing=0.1)


@torch.no_grad()
def translate(
    model: Any, pieces: Pieces, texts: Sequence[str], width: int, limit: int = 60
) -> list[str]:
    """The likeliest translations that a beam of `width` finds; greedy with a width of 1."""
    device = model.embedding.weight.device
    batch = make_batch(pieces, [Pair(text, "") for text in texts], device)
    B = len(texts)
    memory, state = model.encode(batch.source, batch.lengths)
    rows = torch.arange(B, device=device).repeat_interleave(width)
    memory = Memory(*(part[rows] for part in memory))
    state = map_state(partial(torch.index_select, dim=1, index=rows), state)
    written = torch.full([B * width, 1], BEGIN, device=device)
    # At first all texts of a beam are the same: one of them may go on.
    total = torch.full([B, width], -torch.inf, device=device)
    total[:, 0] = 0
    lengths = torch.zeros_like(total)
    for _ in range(limit):
        scores, _, state = model.decode(memory, written[:, -1][None], state)
        step = scores[:, -1].log_softmax(-1).view(B, width, -1)
        ended = (written[:, -1] == END).view(B, width)
        if ended.all():
            break
        # A text that has ended stays as it is: END follows for nothing.
        step = step.masked_fill(ended[..., None], -torch.inf)
        step[..., END].masked_fill_(ended, 0.0)
        total, best = (total[..., None] + step).flatten(1).topk(width)
        parent = best // step.shape[-1]
        rows = (torch.arange(B, device=device)[:, None] * width + parent).flatten()
        state = map_state(partial(torch.index_select, dim=1, index=rows), state)
        lengths = (lengths + ~ended).gather(1, parent)
        piece = (best % step.shape[-1]).view(-1, 1)
        written = torch.cat([written[rows], piece], 1)
    # The mean over pieces: a sum would favour short texts.
    chosen = (total / lengths).argmax(1) + torch.arange(B, device=device) * width
    return [pieces.decode(row) for row in written[chosen].tolist()]


@torch.no_grad()
def attention_weights(model: Any, pieces: Pieces, pair: Pair) -> Tensor:
    """[pieces of the target and END, pieces of the source and both ends]"""
    batch = make_batch(pieces, [pair], model.embedding.weight.device)
    memory, state = model.encode(batch.source, batch.lengths)
    return model.decode(memory, batch.target[:-1], state)[1][0].cpu()


def make_batch(pieces: Pieces, pairs: Sequence[Pair], device: Any) -> Batch:
    sources = [pieces.encode(pair.source) for pair in pairs]
    targets = [pieces.encode(pair.target) for pair in pairs]
    pad = nn.utils.rnn.pad_sequence
    made = Batch(pad(sources), torch.tensor([*map(len, sources)]), pad(targets))
    return Batch(*(tensor.to(device) for tensor in made))


def train_batches(
    pieces: Pieces, known: Sequence[Pair], options: argparse.Namespace
) -> Iterator[Batch]:
    """Forever: batches of pairs of about the same length, which have little padding."""
    size = min(options.batch, len(known))
    for indices in training.minibatches(len(known), 16 * size, options.seed):
        chosen = sorted((known[i] for i in indices.tolist()), key=lambda pair: len(pair.target))
        for start in torch.randperm(len(chosen) // size).tolist():
            part = chosen[start * size : (start + 1) * size]
            yield make_batch(pieces, part, options.device)


def chrf(translations: Sequence[str], references: Sequence[str]) -> float:
    """The chrF2 of a corpus, 0 to 100 (Popovic 2015): precision and recall of characters' n-grams
    for n of 1 to 6, without spaces; recall counts twice."""
    precision = 0.0
    recall = 0.0
    for n in range(1, 7):
        shared = given = wanted = 0
        for translation, reference in zip(translations, references):
            found = ngrams(translation.replace(" ", ""), n)
            right = ngrams(reference.replace(" ", ""), n)
            shared += (found & right).total()
            given += found.total()
            wanted += right.total()
        precision += shared / max(given, 1) / 6
        recall += shared / max(wanted, 1) / 6
    return 100 * 5 * precision * recall / max(4 * precision + recall, 1e-9)


def ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def nearest(known: Sequence[Pair], texts: Sequence[str]) -> list[str]:
    """The translation of the known text with the most trigrams in common (cosine)."""
    grams = [ngrams(f" {pair.source} ".lower(), 3) for pair in known]
    index = {gram: i for i, gram in enumerate(sorted({g for counts in grams for g in counts}))}

    def vectors(counts: Sequence[Counter[str]]) -> Tensor:
        made = torch.zeros(len(counts), len(index))
        for row, count in zip(made, counts):
            for gram in count.keys() & index.keys():
                row[index[gram]] = count[gram]
        return nn.functional.normalize(made, dim=1)

    asked = vectors([ngrams(f" {text} ".lower(), 3) for text in texts])
    return [known[i].target for i in (asked @ vectors(grams).t()).argmax(1).tolist()]


def catalogue(text: str) -> Iterator[Pair]:
    """The translated messages of a gettext catalogue, without those that are marked as fuzzy."""
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            start = re.match(r'(msg\S+)\s+(?=")', line)
            if start:
                name = start[1]
                line = line[start.end() :]
            if name and line.startswith('"'):
                fields[name] = fields.get(name, "") + ast.literal_eval(line)
        fuzzy = re.search(r"^#,.*\bfuzzy\b", block, re.M)
        if fields.get("msgid") and fields.get("msgstr") and not fuzzy:
            yield Pair(" ".join(fields["msgid"].split()), " ".join(fields["msgstr"].split()))


def read_catalogues() -> list[Pair]:
    """Those of the packages; the first translation of a message that has more."""
    pairs: dict[str, Pair] = {}
    for package in PACKAGES:
        with zipfile.ZipFile(training.fetch(package)) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".po") and "/locale/de/LC_MESSAGES/" in name:
                    for pair in catalogue(archive.read(name).decode()):
                        pairs.setdefault(pair.source, pair)
    return [*pairs.values()]


def read_pairs(path: Path | None) -> list[Pair]:
    if path is None:
        return read_catalogues()
    text = training.read_text(path)
    if path.suffix == ".po":
        try:
            pairs = [*catalogue(text)]
        except (SyntaxError, ValueError):
            training.fail(f"{path} is not a gettext catalogue")
    else:
        rows = [line.split("\t") for line in text.splitlines()]
        for number, row in enumerate(rows, start=1):
            if len(row) != 2 or not row[0].strip() or not row[1].strip():
                training.fail(f"{path}, line {number}: a source, a tab, a translation are expected")
        pairs = [Pair(" ".join(a.split()), " ".join(b.split())) for a, b in rows]
    if len(pairs) < 50:
        training.fail(f"{path} has {len(pairs)} translations; at least 50 are needed")
    return pairs


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__, cell="gru", steps=1800, rate=3e-3)
    option = parser.add_argument
    positive = training.positive
    option("--hidden", type=positive, default=192, help="hidden units (default: %(default)s)")
    option("--batch", type=positive, default=64, help="pairs in a step (default: %(default)s)")
    option("--merges", type=positive, default=1000, help="of pieces (default: %(default)s)")
    option("--beam", type=positive, default=5, help="texts in a beam (default: %(default)s)")
    option("--text", default="Delete this page", help="to be translated (default: %(default)s)")
    options = training.parse(parser, arguments, steps=30, hidden=32, merges=100)
    if options.hidden % 2:
        training.fail(f"--hidden {options.hidden}: an even number is needed")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    pairs = read_pairs(options.data)
    if options.data is None:
        training.print_source(
            f"{len(pairs):,} messages of {', '.join(PACKAGES)}", "BSD-3-Clause (all three)"
        )
    pairs = [pair for pair in pairs if max(len(WORD.findall(text)) for text in pair) <= LONGEST]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    if options.quick:
        order = order[:500]
    held = len(order) // 10
    test = [pairs[i] for i in order[:held]]
    known = [pairs[i] for i in order[held:]]
    pieces = Pieces([text for pair in known for text in pair], options.merges)
    model = Translator(training.layer(options.cell), len(pieces.names), options.hidden)
    print(f"{len(known):,} pairs of up to {LONGEST} words; {len(pieces.names):,} pieces of words")

    runs = training.train(model, loss, train_batches(pieces, known, options), options)
    if options.compare:
        training.print_comparison(runs)
    sources = [pair.source for pair in test]
    translations = {
        "the English text": sources,
        "the most similar message's": nearest(known, sources),
    }
    for run in runs:
        translations[f"{run.name}, greedy"] = translate(run.model, pieces, sources, 1)
        translations[f"{run.name}, beam of {options.beam}"] = translate(
            run.model, pieces, sources, options.beam
        )
    report(translations, test)
    translated = translate(model, pieces, [options.text], options.beam)[0]
    print(f"\n{options.text} -> {translated}")
    path = options.out / "translation.png"
    pair = Pair(options.text, translated)
    plot(path, runs, pieces, (pair, attention_weights(model, pieces, pair)))
    print(f"Picture: {path}")


def report(translations: dict[str, list[str]], test: Sequence[Pair]) -> None:
    targets = [pair.target for pair in test]
    rows = []
    for name, texts in translations.items():
        exact = sum(a == b for a, b in zip(texts, targets)) / len(test)
        rows.append((name, f"{chrf(texts, targets):.1f}", f"{exact:.1%}"))
    training.print_table(f"{len(test)} held-out messages", ["chrF", "exactly right"], rows)
    best = [*translations.values()][-1]
    print()
    for pair, text in [*zip(test, best)][:5]:
        print(f"{pair.source} -> {text}   (in the catalogue: {pair.target})")


def plot(
    path: Path, runs: Sequence[training.Run], pieces: Pieces, attended: tuple[Pair, Tensor]
) -> None:
    figure, (curves, axes) = training.pyplot().subplots(1, 2, figsize=(9, 4), layout="constrained")
    training.plot_losses(curves, runs, "nats per piece")
    pair, weights = attended
    shown = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    source, target = (
        [pieces.names[i] or "(end)" for i in pieces.encode(text).tolist()[1:]] for text in pair
    )
    axes.set_xticks(range(len(source) + 1), ["(begin)", *source], rotation=60)
    axes.set_yticks(range(len(target)), target)
    axes.set(xlabel="source", ylabel="written")
    figure.colorbar(shown, ax=axes, label="attention")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
