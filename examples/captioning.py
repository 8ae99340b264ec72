"""Captions pictures: a small convolutional network looks, a recurrent decoder with attention names.

The pictures are glyphs of a font and the captions their Unicode names, such as LATIN SMALL LETTER A
WITH ACUTE: glyph naming, not photographs, but the same model (Xu et al., Show, Attend and Tell,
2015). For each word the decoder's state asks the picture's 64 places by attention (Luong et al.,
2015)."""

import argparse
import collections
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import training

SIZE = 32
PLACES = 8  # a side
PAD, START, END, UNKNOWN = range(4)
SPECIAL = ["", "<start>", "<end>", "<unknown>"]
RARE = 3  # a word that is in fewer names of training is unknown


class Glyphs(NamedTuple):
    """images: float32 [N, 1, SIZE, SIZE]. names: their words."""

    images: Tensor
    names: list[list[str]]

    def select(self, rows: Tensor) -> "Glyphs":
        return Glyphs(self.images[rows], [self.names[i] for i in rows.tolist()])


class Captioner(nn.Module):
    """The features of each place of the picture; a decoder whose state after each word asks them,
    and scores the next word."""

    def __init__(self, layer: Callable[..., Any], words: int, hidden: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.place = nn.Parameter(0.02 * torch.randn(PLACES**2, 64))
        self.summary = nn.Sequential(nn.Linear(64 * PLACES**2, hidden), nn.LayerNorm(hidden))
        self.embedding = nn.Embedding(words, hidden)
        self.rnn = layer(2 * hidden, hidden)
        self.query = nn.Linear(hidden, 64)
        self.mix = nn.Linear(hidden + 64, hidden)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(hidden, words)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 1, SIZE, SIZE] -> features [B, places, 64], and a summary [B, hidden]."""
        features = self.look(images).flatten(2).transpose(1, 2)
        summary = self.summary(features.flatten(1))
        return features + self.place, summary

    def decode(
        self, words: Tensor, features: Tensor, summary: Tensor, state: Any = None
    ) -> tuple[Tensor, Any, Tensor]:
        """words [T, B] -> scores of the next word [T, B, words], the last state, and the attention
        [T, B, places]."""
        seen = summary.expand(len(words), -1, -1)
        h, state = self.rnn(torch.cat([self.embedding(words), seen], 2), state)
        match = torch.einsum("tbh,bph->tbp", self.query(h), features) / math.sqrt(features.shape[2])
        attention = match.softmax(2)
        found = torch.einsum("tbp,bph->tbh", attention, features)
        mixed = self.mix(torch.cat([h, found], 2)).tanh()
        return self.output(self.dropout(mixed)), state, attention

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        return self.decode(words, *self.encode(images))[0]


def render(font: Any, character: str) -> Tensor:
    """A glyph in the middle, [1, SIZE, SIZE]."""
    image = Image.new("L", (SIZE, SIZE))
    left, _top, right, _bottom = font.getbbox(character)
    corner = ((SIZE - left - right) / 2, (SIZE - font.size * 1.2) / 2)
    ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
    return torch.from_numpy(np.array(image)).float()[None] / 255


def read_glyphs(path: Path) -> Glyphs:
    """All glyphs of a font whose characters have a name."""
    try:
        characters = [chr(code) for code in sorted(FT2Font(str(path)).get_charmap())]
        font = ImageFont.truetype(path, 22)
        named = [c for c in characters if unicodedata.name(c, "") and c.isprintable()]
        images = torch.stack([render(font, c) for c in named])
    except OSError as error:
        training.fail(f"cannot read {path}: {error.strerror or 'it is no font'}")
    except RuntimeError:
        training.fail(f"cannot learn from {path}: it is no font with glyphs that have a name")
    if len(named) < 40:
        training.fail(f"cannot learn from {path}: it has {len(named)} glyphs, 40 are needed")
    return Glyphs(images, [unicodedata.name(c).split() for c in named])


def encode_names(names: Sequence[Sequence[str]], vocabulary: Sequence[str]) -> Tensor:
    """int64 [N, words]: START, the words, END, PAD."""
    index = {word: i for i, word in enumerate(vocabulary)}
    rows = [[START, *(index.get(w, UNKNOWN) for w in name), END] for name in names]
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)


def shift(images: Tensor) -> Tensor:
    """The whole batch moved by up to a pixel each way."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return images.roll((down, right), (2, 3))


def batches_of(
    glyphs: Glyphs, names: Tensor, options: argparse.Namespace
) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in training.minibatches(len(names), 32, options.seed):
        chosen = names[rows]
        longest = int((chosen != PAD).sum(1).max())
        images = shift(glyphs.images[rows])
        yield images.to(options.device), chosen[:, :longest].T.to(options.device)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, words = batch
    scores = model(images, words[:-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), words[1:].flatten(), ignore_index=PAD)


@torch.no_grad()
def caption(
    model: Captioner, images: Tensor, vocabulary: Sequence[str], longest: int = 16
) -> tuple[list[list[str]], Tensor]:
    """The best known word, one after the other, until END: names, and the attention [T, B,
    places]."""
    features, summary = model.encode(images)
    words = torch.full((1, len(images)), START, device=images.device)
    state = None
    said = []
    attention = []
    for _ in range(longest):
        scores, state, looked = model.decode(words, features, summary, state)
        scores[..., UNKNOWN] = -math.inf
        words = scores.argmax(2)
        said.append(words[0])
        attention.append(looked[0])
    names = []
    for row in torch.stack(said, 1).tolist():
        end = row.index(END) if END in row else longest
        names.append([vocabulary[i] for i in row[:end]])
    return names, torch.stack(attention)


def bleu(guesses: Sequence[Sequence[str]], truths: Sequence[Sequence[str]]) -> float:
    """Of the whole corpus, up to four words (Papineni et al., 2002)."""
    logs = 0.0
    for n in range(1, 5):
        right = 0
        total = 0
        for guess, truth in zip(guesses, truths):
            grams, true = (
                collections.Counter(zip(*(words[i:] for i in range(n)))) for words in (guess, truth)
            )
            right += (grams & true).total()
            total += grams.total()
        if not right:
            return 0.0
        logs += math.log(right / total) / 4
    longer = sum(map(len, truths)) / sum(map(len, guesses))
    return math.exp(logs + min(0.0, 1 - longer))


def words_right(guesses: Sequence[Sequence[str]], truths: Sequence[Sequence[str]]) -> float:
    """The part of the words that are right and in their place."""
    right = sum(g == t for guess, truth in zip(guesses, truths) for g, t in zip(guess, truth))
    return right / sum(max(len(guess), len(truth)) for guess, truth in zip(guesses, truths))


def scores_of(
    name: str, guesses: Sequence[Sequence[str]], truths: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    exact = sum(g == t for g, t in zip(guesses, truths)) / len(truths)
    found = (words_right(guesses, truths), exact, bleu(guesses, truths))
    return name, *(f"{value:.1%}" for value in found)


def commonest_name(names: Sequence[Sequence[str]]) -> list[str]:
    """The commonest first word, then the commonest after these, as long as most go on."""
    found: list[str] = []
    while True:
        following = collections.Counter(
            tuple(name[len(found) : len(found) + 1])
            for name in names
            if name[: len(found)] == found
        )
        (word,) = following.most_common(1)[0][0] or (None,)
        if word is None:
            return found
        found.append(word)


def nearest_names(train: Glyphs, test: Glyphs) -> list[list[str]]:
    """The names of the pictures of training that differ least."""
    differences = torch.cdist(test.images.flatten(1), train.images.flatten(1))
    return [train.names[i] for i in differences.argmin(1).tolist()]


def draw(
    path: Path,
    runs: list[training.Run],
    glyphs: Glyphs,
    guesses: Sequence[Sequence[str]],
    attention: Tensor,
) -> None:
    """Loss curves; glyphs of the test with what they were called; where the last of them is looked
    at for each word."""
    pyplot = training.pyplot()
    figure = pyplot.figure(figsize=(9, 8), layout="constrained")
    grid = figure.add_gridspec(4, 6)
    training.plot_losses(figure.add_subplot(grid[0, :]), runs, "nats per word")
    for n in range(min(12, len(guesses))):
        axes = figure.add_subplot(grid[1 + n // 6, n % 6])
        axes.imshow(glyphs.images[n, 0], cmap="gray_r")
        right = guesses[n] == glyphs.names[n]
        title = "\n".join(" ".join(guesses[n][i : i + 2]) for i in range(0, len(guesses[n]), 2))
        axes.set_title(title, fontsize=7, color="black" if right else "firebrick")
        axes.axis("off")
    shown = max(range(min(12, len(guesses))), key=lambda n: min(len(guesses[n]), 6))
    for n, word in enumerate(guesses[shown][:6]):
        axes = figure.add_subplot(grid[3, n])
        axes.imshow(glyphs.images[shown, 0], cmap="gray_r")
        where = attention[n, shown].view(PLACES, PLACES)
        axes.imshow(where, cmap="Reds", alpha=0.6, extent=(0, SIZE, SIZE, 0))
        axes.set_title(word, fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=100)
    print(f"Loss curves, captions (wrong ones in red) and attention: {path}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__, cell="gru", steps=2500, rate=2e-3)
    hidden = "hidden units (default: %(default)s)"
    parser.add_argument("--hidden", type=training.positive, default=128, help=hidden)
    return training.parse(parser, arguments, steps=20, hidden=32)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    own = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    glyphs = read_glyphs(options.data or own)
    if options.data is None:
        training.print_source(
            "the glyphs of DejaVu Sans, in matplotlib; names: Python's unicodedata",
            "Bitstream Vera and DejaVu licence; Unicode-3.0",
        )
    order = torch.randperm(len(glyphs.names))
    held_out = len(order) // 10
    train = glyphs.select(order[held_out:])
    test = glyphs.select(order[:held_out])
    counts = collections.Counter(word for name in train.names for word in name)
    vocabulary = [*SPECIAL, *sorted(word for word in counts if counts[word] >= RARE)]
    print(f"{len(train.names)} glyphs to learn, {held_out} to test; ", end="")
    print(f"{len(counts)} words, {len(vocabulary)} of them in {RARE} names or more")

    model = Captioner(training.layer(options.cell), len(vocabulary), options.hidden)
    names = encode_names(train.names, vocabulary)
    runs = training.train(model, loss, batches_of(train, names, options), options)
    guesses, attention = caption(model, test.images.to(options.device), vocabulary)
    training.print_comparison(runs)
    rows = [
        scores_of("commonest name", [commonest_name(train.names)] * held_out, test.names),
        scores_of("nearest picture's name", nearest_names(train, test), test.names),
        scores_of(runs[0].name, guesses, test.names),
    ]
    training.print_table("glyphs of the test", ["words right", "names right", "BLEU"], rows)
    draw(options.out / "captioning.png", runs, test, guesses, attention.cpu())


if __name__ == "__main__":
    main()
