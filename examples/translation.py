"""Translates short messages from English to German: an encoder, a decoder and attention.

A bidirectional GRU reads the message, of any length (`lengths=`), in pieces of words that byte pair
encoding finds. A second GRU writes the translation: in training it sees the whole right text in one
call, and afterwards its own, one piece a call, greedily or as a beam of the likeliest texts.

As in a translation memory, the encoder also reads the translations of the most similar messages,
and the decoder can copy from all that the encoder reads. Both know which pieces of the translation
occur with those of the message, by Dice's coefficient. All of this comes from the training pairs,
in training from those other than the pair itself.

The baselines are the English text itself, and the translation of the most similar message.

--data is a gettext catalogue (.po) of your own in any language, or a text file with a source, a tab
and its translation in each line."""

import argparse
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import training
from texts import BEGIN, END, PADDING, WORD, Pair, Pieces, catalogue, chrf, ngrams, words_at_place

PACKAGES = ("wagtail==8.0.1", "django==5.2.19", "django-oscar==4.2.1")
LONGEST = 12  # words of a message


class Batch(NamedTuple):
    source: Tensor  # [S, B], the message and the translations of similar ones
    similar: Tensor  # [S, B], 1 in these translations
    wanted: Tensor  # [B, pieces], how much the message asks for each piece, 0 to 1
    lengths: Tensor  # [B]
    target: Tensor  # [T, B], from BEGIN to END


class Memory(NamedTuple):
    """What the decoder looks at."""

    keys: Tensor  # [B, S, hidden]
    padding: Tensor  # [B, S]
    source: Tensor  # [B, S]
    wanted: Tensor  # [B, pieces]
    favoured: Tensor  # [B, S], wanted, of the translations of similar messages


class Known:
    """The training pairs, as pieces: what is looked up in them."""

    def __init__(self, pieces: Pieces, pairs: Sequence[Pair], similar: int) -> None:
        self.pieces = pieces
        self.pairs = pairs
        self.similar = similar
        sources = self.presence([pair.source for pair in pairs])
        targets = self.presence([pair.target for pair in pairs])
        both = sources.t() @ targets
        either = sources.sum(0)[:, None] + targets.sum(0)
        self.dice = 2 * both / either.clamp(min=1)
        # As if the pair itself were not there: a piece that occurs once would give it away.
        self.dice_of_others = 2 * (both - 1).clamp(min=0) / (either - 2).clamp(min=1)

    def presence(self, texts: Sequence[str]) -> Tensor:
        """[texts, pieces], 1 where the piece occurs"""
        made = torch.zeros(len(texts), len(self.pieces.names))
        for row, text in zip(made, texts):
            row[self.pieces.encode(text)[1:-1]] = 1
        made[:, : END + 1] = 0
        return made


class Translator(nn.Module):
    """The attention of Luong, Pham and Manning (2015), "general", with one layer in each part, and
    the copying of See, Liu and Manning (2017)."""

    def __init__(self, layer: Callable[..., Any], pieces: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(pieces, hidden)
        self.marks = nn.Parameter(torch.randn(2, hidden))
        self.dropout = nn.Dropout(0.3)
        self.encoder = layer(hidden, hidden // 2, bidirectional=True)
        self.decoder = layer(hidden, hidden)
        self.attention = nn.Linear(hidden, hidden, bias=False)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.output = nn.Linear(hidden, pieces)
        self.copies = nn.Linear(hidden, 1)
        # How much more a place is looked at behind the piece written last, and if it is wanted.
        self.follow = nn.Parameter(torch.tensor(3.0))
        self.look = nn.Parameter(torch.tensor(1.0))
        self.ask = nn.Parameter(torch.tensor(4.0))
        # One matrix for both: what a piece means is what it scores.
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=hidden**-0.5)

    def embed(self, text: Tensor) -> Tensor:
        return self.embedding(text) * self.embedding.embedding_dim**0.5

    def encode(self, batch: Batch) -> tuple[Memory, Any]:
        """-> what to attend to, and the decoder's first state [1, B, hidden]"""
        source = batch.source.t()
        favoured = batch.wanted.gather(1, source) * batch.similar.t()
        marks = torch.stack([batch.similar, favoured.t()], -1) @ self.marks
        x = self.embed(batch.source) + marks
        y, state = self.encoder(self.dropout(x), lengths=batch.lengths)
        memory = Memory(y.transpose(0, 1), source == PADDING, source, batch.wanted, favoured)
        # Of each state both directions, one after the other.
        return memory, map_state(lambda s: torch.cat([*s], -1)[None], state)

    def decode(self, memory: Memory, text: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """text [T, B] -> log-probabilities of what follows [B, T, pieces], weights [B, T, S],
        state."""
        h, state = self.decoder(self.dropout(self.embed(text)), state)
        h = self.dropout(h.transpose(0, 1))
        before = nn.functional.pad(memory.source[:, :-1], (1, 0))
        follows = before[:, None] == text.t()[..., None]
        scores = self.attention(h) @ memory.keys.transpose(1, 2)
        scores = scores + self.follow * follows + self.look * memory.favoured[:, None]
        weights = scores.masked_fill(memory.padding[:, None], -torch.inf).softmax(-1)
        mixed = self.dropout(self.mix(torch.cat([h, weights @ memory.keys], -1)).tanh())
        written = (self.output(mixed) + self.ask * memory.wanted[:, None]).log_softmax(-1)
        places = memory.source[:, None].expand_as(weights)
        copied = torch.zeros_like(written).scatter_add(2, places, weights)
        share = self.copies(mixed)
        return (
            torch.logaddexp(
                written + nn.functional.logsigmoid(-share),
                (copied + 1e-9).log() + nn.functional.logsigmoid(share),
            ),
            weights,
            state,
        )

    def forward(self, batch: Batch) -> Tensor:
        """-> log-probabilities of each next piece [B, T - 1, pieces]"""
        memory, state = self.encode(batch)
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
    model: Any, known: Known, texts: Sequence[str], width: int, limit: int = 60
) -> list[str]:
    """The likeliest translations that a beam of `width` finds; greedy with a width of 1."""
    device = model.embedding.weight.device
    pairs = [Pair(text, "") for text in texts]
    batch = make_batch(known, pairs, nearest(known.pairs, texts, known.similar), device)
    B = len(texts)
    memory, state = model.encode(batch)
    rows = torch.arange(B, device=device).repeat_interleave(width)
    memory = Memory(*(part[rows] for part in memory))
    state = map_state(partial(torch.index_select, dim=1, index=rows), state)
    written = torch.full([B * width, 1], BEGIN, device=device)
    # At first all texts of a beam are the same: one of them may go on.
    total = torch.full([B, width], -torch.inf, device=device)
    total[:, 0] = 0
    lengths = torch.zeros_like(total)
    for _ in range(limit):
        step, _, state = model.decode(memory, written[:, -1][None], state)
        step = step.view(B, width, -1)
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
    return [known.pieces.decode(row) for row in written[chosen].tolist()]


@torch.no_grad()
def attention_weights(model: Any, known: Known, pair: Pair) -> Tensor:
    """[pieces of the target and END, pieces of the source and of the similar ones' translations]"""
    similar = nearest(known.pairs, [pair.source], known.similar)
    batch = make_batch(known, [pair], similar, model.embedding.weight.device)
    memory, state = model.encode(batch)
    return model.decode(memory, batch.target[:-1], state)[1][0].cpu()


def make_batch(
    known: Known, pairs: Sequence[Pair], similar: Sequence[Sequence[int]], device: Any
) -> Batch:
    """`similar`: of each pair the numbers of the known ones whose translations are read too."""
    encode = known.pieces.encode
    messages = [encode(pair.source) for pair in pairs]
    others = [[encode(known.pairs[i].target) for i in numbers] for numbers in similar]
    sources = [torch.cat([a, *b]) for a, b in zip(messages, others)]
    marks = [(torch.arange(len(s)) >= len(a)).float() for a, s in zip(messages, sources)]
    itself = any(pair.target for pair in pairs)
    dice = known.dice_of_others if itself else known.dice
    wanted = torch.stack([dice[message].amax(0) for message in messages])
    pad = nn.utils.rnn.pad_sequence
    lengths = torch.tensor([*map(len, sources)])
    targets = [encode(pair.target) for pair in pairs]
    made = Batch(pad(sources), pad(marks), wanted, lengths, pad(targets))
    return Batch(*(tensor.to(device) for tensor in made))


def train_batches(known: Known, options: argparse.Namespace) -> Iterator[Batch]:
    """Forever: batches of pairs of about the same length, which have little padding."""
    pairs = known.pairs
    similar = nearest(pairs, [pair.source for pair in pairs], known.similar, others=True)
    size = min(options.batch, len(pairs))
    for indices in training.minibatches(len(pairs), 16 * size, options.seed):
        chosen = sorted(indices.tolist(), key=lambda i: len(pairs[i].target))
        for start in torch.randperm(len(chosen) // size).tolist():
            part = chosen[start * size : (start + 1) * size]
            yield make_batch(
                known, [pairs[i] for i in part], [similar[i] for i in part], options.device
            )


def nearest(
    known: Sequence[Pair], texts: Sequence[str], count: int, others: bool = False
) -> list[list[int]]:
    """Of each text the `count` known ones with the most trigrams in common (cosine), the best
    first. With `others`, the texts are the known ones, and none is similar to itself."""
    grams = [ngrams(f" {pair.source} ".lower(), 3) for pair in known]
    index = {gram: i for i, gram in enumerate(sorted({g for counts in grams for g in counts}))}

    def vectors(counts: Sequence[Counter[str]]) -> Tensor:
        made = torch.zeros(len(counts), len(index))
        for row, count in zip(made, counts):
            for gram in count.keys() & index.keys():
                row[index[gram]] = count[gram]
        return nn.functional.normalize(made, dim=1)

    asked = vectors([ngrams(f" {text} ".lower(), 3) for text in texts])
    cosines = asked @ vectors(grams).t()
    if others:
        cosines.fill_diagonal_(-1)
    return cosines.topk(min(count, len(known) - 1), 1).indices.tolist()


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
    parser = training.parser(__doc__, cell="gru", steps=700, rate=3e-3)
    option = parser.add_argument
    positive = training.positive
    option("--hidden", type=positive, default=192, help="hidden units (default: %(default)s)")
    option("--batch", type=positive, default=64, help="pairs in a step (default: %(default)s)")
    option("--merges", type=positive, default=1000, help="of pieces (default: %(default)s)")
    option("--similar", type=positive, default=3, help="messages (default: %(default)s)")
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
    rest = [pairs[i] for i in order[held:]]
    pieces = Pieces([text for pair in rest for text in pair], options.merges)
    known = Known(pieces, rest, options.similar)
    model = Translator(training.layer(options.cell), len(pieces.names), options.hidden)
    print(f"{len(rest):,} pairs of up to {LONGEST} words; {len(pieces.names):,} pieces of words")

    runs = training.train(model, loss, train_batches(known, options), options)
    if options.compare:
        training.print_comparison(runs)
    sources = [pair.source for pair in test]
    translations = {
        "the English text": sources,
        "the most similar message's": [rest[i].target for i, *_ in nearest(rest, sources, 1)],
    }
    for run in runs:
        translations[f"{run.name}, greedy"] = translate(run.model, known, sources, 1)
        translations[f"{run.name}, beam of {options.beam}"] = translate(
            run.model, known, sources, options.beam
        )
    report(translations, test)
    translated = translate(model, known, [options.text], options.beam)[0]
    print(f"\n{options.text} -> {translated}")
    path = options.out / "translation.png"
    pair = Pair(options.text, translated)
    plot(path, runs, known, (pair, attention_weights(model, known, pair)))
    print(f"Picture: {path}")


def report(translations: dict[str, list[str]], test: Sequence[Pair]) -> None:
    targets = [pair.target for pair in test]
    rows = []
    for name, texts in translations.items():
        exact = sum(a == b for a, b in zip(texts, targets)) / len(test)
        at_place = words_at_place(texts, targets)
        rows.append((name, f"{chrf(texts, targets):.1f}", f"{at_place:.1%}", f"{exact:.1%}"))
    columns = ["chrF", "words at their place", "exactly right"]
    training.print_table(f"{len(test)} held-out messages", columns, rows)
    best = [*translations.values()][-1]
    print()
    for pair, text in [*zip(test, best)][:5]:
        print(f"{pair.source} -> {text}   (in the catalogue: {pair.target})")


def plot(
    path: Path, runs: Sequence[training.Run], known: Known, attended: tuple[Pair, Tensor]
) -> None:
    figure, (curves, axes) = training.pyplot().subplots(1, 2, figsize=(9, 4), layout="constrained")
    training.plot_losses(curves, runs, "nats per piece")
    pair, weights = attended
    batch = make_batch(known, [pair], nearest(known.pairs, [pair.source], known.similar), "cpu")
    source, target = (
        [known.pieces.names[i] or "|" for i in numbers[:, 0].tolist()]
        for numbers in (batch.source, batch.target[1:])
    )
    shown = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=90)
    axes.set_yticks(range(len(target)), target)
    axes.set(xlabel="message | translations of similar ones", ylabel="written")
    figure.colorbar(shown, ax=axes, label="attention")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
