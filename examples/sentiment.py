"""Learns how positive a sentence is, from film reviews that people have rated.

A bidirectional LSTM reads sentences of all lengths at once: `lengths=` tells it where each ends, so
that nothing is packed or sorted, and padding has no say. The baselines are the more frequent side,
and ridge regression on the words that a sentence has, in whatever order.

--data is a text file of your own: a line for each sentence, a number (above 0: positive), a tab,
the sentence."""

import argparse
import io
import math
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import training

PADDING = 0
UNKNOWN = 1


class Sentence(NamedTuple):
    words: list[str]
    rating: float


class Batch(NamedTuple):
    words: Tensor  # [B, T]
    stems: Tensor  # [B, T]
    lengths: Tensor  # [B]
    ratings: Tensor  # [B]


class Score(NamedTuple):
    accuracy: float  # of the sign
    correlation: float


def split_words(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)?|[^\w\s]", text.lower())


def stem(word: str) -> str:
    """What "directs", "directed" and "director" share, nearly always."""
    return word[:5]


class Vocabulary:
    """Numbers for the words that occur at least twice, and one for all others."""

    def __init__(self, words: Sequence[str]) -> None:
        known = [word for word, count in Counter(words).items() if count > 1]
        self.index = {word: i for i, word in enumerate(known, start=UNKNOWN + 1)}

    def __len__(self) -> int:
        return len(self.index) + UNKNOWN + 1

    def encode(self, words: Sequence[str]) -> Tensor:
        return torch.tensor([self.index.get(word, UNKNOWN) for word in words])


class Encoder:
    """Makes batches of sentences."""

    def __init__(self, sentences: Sequence[Sentence], device: str) -> None:
        words = [word for sentence in sentences for word in sentence.words]
        self.words = Vocabulary(words)
        self.stems = Vocabulary([stem(word) for word in words])
        self.device = device

    def batch(self, sentences: Sequence[Sentence]) -> Batch:
        pad = nn.utils.rnn.pad_sequence
        words = [self.words.encode(s.words) for s in sentences]
        stems = [self.stems.encode([stem(word) for word in s.words]) for s in sentences]
        made = Batch(
            pad(words, batch_first=True, padding_value=PADDING),
            pad(stems, batch_first=True, padding_value=PADDING),
            torch.tensor([len(s.words) for s in sentences]),
            torch.tensor([s.rating for s in sentences]),
        )
        return Batch(*(tensor.to(self.device) for tensor in made))


class SentimentModel(nn.Module):
    """Embeddings of a word and its stem -> bidirectional layer -> the mean of its output over the
    sentence, and its last one in each direction -> rating."""

    def __init__(self, layer: Callable[..., Any], words: int, stems: int, hidden: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, hidden)
        self.stems = nn.Embedding(stems, hidden)
        self.dropout = nn.Dropout(0.5)
        self.rnn = layer(hidden, hidden, batch_first=True, bidirectional=True)
        self.output = nn.Linear(4 * hidden, 1)
        for embedding in (self.words, self.stems):
            nn.init.normal_(embedding.weight, std=0.3)

    def forget(self, words: Tensor) -> Tensor:
        """In training a fifth of the words is unknown, for the model is to know such too."""
        if not self.training:
            return words
        return words.masked_fill(torch.rand(words.shape, device=words.device) < 0.2, UNKNOWN)

    def forward(self, batch: Batch) -> Tensor:
        """-> ratings [B]"""
        x = self.words(self.forget(batch.words)) + self.stems(self.forget(batch.stems))
        y, state = self.rnn(self.dropout(x), lengths=batch.lengths)  # y: [B, T, 2 hidden]
        last = state[0] if isinstance(state, tuple) else state  # [2, B, hidden]
        # The output is zero beyond a sentence's end.
        mean = y.sum(1) / batch.lengths[:, None]
        return self.output(self.dropout(torch.cat([mean, *last], 1)))[:, 0]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch), batch.ratings)


@torch.no_grad()
def predict(model: nn.Module, encoder: Encoder, sentences: Sequence[Sentence]) -> Tensor:
    """Ratings [sentences], without gradients."""
    parts = [sentences[i : i + 256] for i in range(0, len(sentences), 256)]
    return torch.cat([model(encoder.batch(part)).cpu() for part in parts])


def rate_prefixes(model: nn.Module, encoder: Encoder, text: str) -> list[tuple[str, float]]:
    """The rating after each word: of the first word, of the first two ..."""
    words = split_words(text)
    prefixes = [Sentence(words[:n], 0.0) for n in range(1, len(words) + 1)]
    return [*zip(words, predict(model, encoder, prefixes).tolist())]


def bag_of_words(known: Sequence[Sentence], asked: Sequence[Sentence], ridge: float) -> Tensor:
    """Ridge regression on which words a sentence has, scaled to length 1."""
    vocabulary = Vocabulary([word for sentence in known for word in sentence.words])
    x = word_features(vocabulary, known)
    target = torch.tensor([sentence.rating for sentence in known])
    weights = torch.zeros(len(vocabulary))
    # (x'x + ridge) weights = x' target, by conjugate gradients.
    residual = x.t() @ target
    direction = residual
    enough = 1e-6 * residual.norm()
    while residual.norm() > enough:
        image = x.t() @ (x @ direction) + ridge * direction
        square = residual.dot(residual)
        step = square / direction.dot(image)
        weights = weights + step * direction
        residual = residual - step * image
        direction = residual + residual.dot(residual) / square * direction
    return word_features(vocabulary, asked) @ weights


def word_features(vocabulary: Vocabulary, sentences: Sequence[Sentence]) -> Tensor:
    """Sparse [sentences, vocabulary]; the number of padding is the intercept."""
    words = [sorted({PADDING, *vocabulary.encode(s.words).tolist()}) for s in sentences]
    rows = [row for row, numbers in enumerate(words) for _ in numbers]
    values = [len(numbers) ** -0.5 for numbers in words for _ in numbers]
    indices = torch.tensor([rows, [number for numbers in words for number in numbers]])
    size = (len(sentences), len(vocabulary))
    return torch.sparse_coo_tensor(indices, torch.tensor(values), size, check_invariants=True)


def score(predicted: Tensor, sentences: Sequence[Sentence]) -> Score:
    rating = torch.tensor([sentence.rating for sentence in sentences])
    sided = rating != 0
    accuracy = ((predicted > 0) == (rating > 0))[sided].float().mean().item()
    return Score(accuracy, torch.corrcoef(torch.stack([predicted, rating]))[0, 1].item())


def read_reviews() -> str:
    """The file of ratings in the source archive: number, tab, rating, tab, sentence."""
    folder = "additional_resources/hutto_ICWSM_2014"
    name = "vaderSentiment-0.5"
    with zipfile.ZipFile(training.fetch("vaderSentiment==0.5", source=True)) as archive:
        inner = archive.read(f"{name}/{folder}.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert file is not None
        text = file.read().decode()
    return "\n".join(line.split("\t", 1)[1] for line in text.splitlines())


def read_sentences(path: Path | None) -> list[Sentence]:
    text = read_reviews() if path is None else training.read_text(path)
    sentences = []
    for number, line in enumerate(text.splitlines(), start=1):
        rating, tab, sentence = line.partition("\t")
        words = split_words(sentence)
        try:
            value = float(rating)
        except ValueError:
            value = math.nan
        if not tab or not words or not math.isfinite(value):
            training.fail(f"{path}, line {number}: a number, a tab and a sentence are expected")
        sentences.append(Sentence(words, value))
    if len(sentences) < 50:
        training.fail(f"{path} has {len(sentences)} sentences; at least 50 are needed")
    return sentences


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__, cell="lstm", steps=1000, rate=3e-3)
    option = parser.add_argument
    positive = training.positive
    option("--hidden", type=positive, default=96, help="hidden units (default: %(default)s)")
    option("--batch", type=positive, default=64, help="sentences in a step (default: %(default)s)")
    option("--sentence", default="I love coding", help="to be rated (default: %(default)s)")
    return training.parse(parser, arguments, steps=30, hidden=16)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    sentences = read_sentences(options.data)
    if options.data is None:
        training.print_source(
            "10,605 sentences of film reviews from rottentomatoes.com (Pang and Lee 2004), each\n"
            "      rated by 20 people (Hutto and Gilbert, ICWSM 2014), in vaderSentiment 0.5",
            "MIT (of the package)",
        )
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    if options.quick:
        order = order[:1000]
    held = len(order) // 5
    test = [sentences[i] for i in order[:held]]
    known = [sentences[i] for i in order[held:]]
    encoder = Encoder(known, options.device)
    layer = training.layer(options.cell)
    model = SentimentModel(layer, len(encoder.words), len(encoder.stems), options.hidden)

    def batches() -> Iterator[Batch]:
        for indices in training.minibatches(len(known), options.batch, options.seed):
            yield encoder.batch([known[i] for i in indices.tolist()])

    runs = training.train(model, loss, batches(), options)
    if options.compare:
        training.print_comparison(runs)
    predictions = {
        "the more frequent side": torch.full(
            [held], sum(s.rating > 0 for s in known) - len(known) / 2
        ),
        "bag of words": bag_of_words(known, test, ridge=0.5),
        **{run.name: predict(run.model, encoder, test) for run in runs},
    }
    rows = []
    for name, predicted in predictions.items():
        found = score(predicted, test)
        varies = not math.isnan(found.correlation)
        rows.append((name, f"{found.accuracy:.1%}", f"{found.correlation:.3f}" if varies else "-"))
    training.print_table(f"{held} held-out sentences", ["right side", "correlation"], rows)
    rated = rate_prefixes(model, encoder, options.sentence)
    training.print_table(
        "after the word", ["rating, -4 to 4"], [(w, f"{r:+.2f}") for w, r in rated]
    )
    path = options.out / "sentiment.png"
    plot(path, runs, rated, (predictions[runs[0].name], test))
    print(f"\nPicture: {path}")


def plot(
    path: Path,
    runs: Sequence[training.Run],
    rated: Sequence[tuple[str, float]],
    tested: tuple[Tensor, Sequence[Sentence]],
) -> None:
    figure, (curves, points, words) = training.pyplot().subplots(
        1, 3, figsize=(10, 3.4), layout="constrained"
    )
    training.plot_losses(curves, runs, "squared error")
    predicted, sentences = tested
    points.plot([s.rating for s in sentences], predicted.tolist(), ".", markersize=2, alpha=0.5)
    points.set(xlabel="mean rating of 20 people", ylabel="predicted rating")
    words.bar(range(len(rated)), [rating for _, rating in rated])
    words.set_xticks(range(len(rated)), [f"... {word}" for word, _ in rated], rotation=30)
    words.axhline(0, color="black", linewidth=0.5)
    words.set(ylabel="predicted rating so far", ylim=(-4, 4))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
