"""Recognises speech twice: who says a vowel, and which words are spoken.

The speaker, from real recordings: a bidirectional layer reads utterances of different lengths in
one batch, padded, with `lengths=`, and is held against the nearest mean.

The words, from speech that eSpeak NG synthesises: the layer scores letters in every frame, and CTC
finds which frame belongs to which letter (Graves et al., Connectionist Temporal Classification,
2006). The voices of the test are not those of training."""

import argparse
import ctypes
import ctypes.util
import math
import random
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import training

VOWELS = "sktime==1.2.0"
ESPEAK = "espeakng-loader==0.2.4"
WORDS = "zero one two three four five six seven eight nine yes no stop go left right"
LETTERS = "".join(sorted({*WORDS}))  # with the space; class 0 is CTC's blank
# eSpeak NG's voices, and its variants of them
TRAINING_VOICES = """en-us+m1 en-us+m2 en-us+m3 en-us+m4 en-us+m6 en-us+m8 en-us+f1 en-us+f2
    en-us+f3 en-us+f4 en-us+Andy en-us+Annie en-gb-scotland+m2 en-gb-scotland+m4 en-gb-scotland+m6
    en-gb-scotland+f2 en-gb-scotland+f4 en-gb-x-rp+m3 en-gb-x-rp+f1"""
TEST_VOICES = "en-us+m7 en-us+f5 en-gb-scotland+m5"
RATE = 16000
WINDOW = 400
HOP = 160
BANDS = 24


class Utterances(NamedTuple):
    """x: frames [T, B, I], zeros past the ends. lengths [B]. targets: a label or letters each."""

    x: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor

    def select(self, rows: Tensor) -> "Utterances":
        steps = int(self.lengths[rows].max())
        return Utterances(self.x[:steps, rows], *(t[rows] for t in self[1:]))


class Recognizer(nn.Module):
    """A bidirectional layer; scores of its outputs' mean, or of each frame."""

    def __init__(
        self, layer: Callable[..., Any], inputs: int, hidden: int, classes: int, pool: bool
    ) -> None:
        super().__init__()
        self.rnn = layer(inputs, hidden, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(2 * hidden, classes)
        self.pool = pool

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [T, B, I], lengths [B] -> scores [B, classes], or [T, B, classes]."""
        h, _ = self.rnn(x, lengths=lengths)
        if self.pool:
            # The output is 0 past an utterance's end
            h = h.sum(0) / lengths[:, None]
        return self.output(self.dropout(h))


def pad(series: Sequence[Tensor], targets: Sequence[Tensor]) -> Utterances:
    return Utterances(
        nn.utils.rnn.pad_sequence([*series]),
        torch.tensor([len(s) for s in series]),
        nn.utils.rnn.pad_sequence([*targets], batch_first=True),
        torch.tensor([len(t) for t in targets]),
    )


def real_frames(data: Utterances) -> Tensor:
    """[frames, I], without the padding."""
    return data.x[torch.arange(len(data.x))[:, None] < data.lengths]


def normalize(data: Utterances, like: Tensor) -> Utterances:
    inside = torch.arange(len(data.x))[:, None] < data.lengths
    x = (data.x - like.mean(0)) / like.std(0)
    return data._replace(x=x * inside[..., None])


def move(data: Utterances, device: str) -> Utterances:
    return Utterances(*(t.to(device) for t in data))


def noisy_batches(data: Utterances, options: argparse.Namespace) -> Iterator[Utterances]:
    """Forever: batches whose frames have noise, against learning them by heart."""
    for rows in training.minibatches(len(data.lengths), 32, options.seed):
        batch = data.select(rows)
        x = batch.x + 0.3 * torch.randn(batch.x.shape)
        yield move(batch._replace(x=x), options.device)


def parse_ts(text: str, name: str) -> Utterances:
    """A file of the UCR and UEA archive: a line for each series, dimensions between colons, the
    class at its end."""
    _head, mark, body = text.partition("@data")
    series = []
    labels = []
    try:
        for line in body.split():
            *dimensions, label = line.split(":")
            rows = [[float(value) for value in d.split(",")] for d in dimensions]
            series.append(torch.tensor(rows).T)
            labels.append(torch.tensor([int(label) - 1]))
        if not mark or not series or min(labels) < 0:
            raise ValueError
        return pad(series, labels)
    except (ValueError, RuntimeError):
        training.fail(f"cannot learn from {name}: it is no .ts file of series and classes 1, 2 ...")


def read_vowels(options: argparse.Namespace) -> tuple[Utterances, Utterances]:
    """Training and test."""
    if options.data is not None:
        data = parse_ts(training.read_text(options.data), str(options.data))
        rows = torch.randperm(len(data.lengths))
        test = len(rows) // 4
        if not test:
            training.fail(f"cannot learn from {options.data}: 4 series at least are needed")
        return data.select(rows[test:]), data.select(rows[:test])
    with zipfile.ZipFile(training.fetch(VOWELS)) as archive:
        name = "sktime/datasets/data/JapaneseVowels/JapaneseVowels_{}.ts"
        return tuple(
            parse_ts(archive.read(name.format(part)).decode(), part) for part in ("TRAIN", "TEST")
        )  # type: ignore[return-value]


def nearest_mean(train: Utterances, test: Utterances) -> float:
    """The accuracy of the class whose utterances' mean is nearest to an utterance's mean."""
    labels = train.targets[:, 0]
    means = train.x.sum(0) / train.lengths[:, None]
    classes = labels.unique()
    centres = torch.stack([means[labels == c].mean(0) for c in classes])
    nearest = torch.cdist(test.x.sum(0) / test.lengths[:, None], centres).argmin(1)
    return (classes[nearest] == test.targets[:, 0]).double().mean().item()


def recognize_speakers(options: argparse.Namespace) -> list[training.Run]:
    train, test = read_vowels(options)
    like = real_frames(train)
    train = normalize(train, like)
    test = normalize(test, like)
    if options.data is None:
        training.print_source(
            "JapaneseVowels (Kudo, Toyama and Shimbo, 1999; UCI), in the wheel of sktime 1.2.0: "
            "real speech of 9 men",
            "CC BY 4.0 (UCI); sktime: BSD-3-Clause",
        )
    classes = 1 + int(torch.cat([train.targets, test.targets]).max())
    print(f"{len(train.lengths)} utterances to learn, {len(test.lengths)} to test")
    options = argparse.Namespace(**{**vars(options), "steps": options.vowel_steps})
    model = Recognizer(training.layer(options.cell), train.x.shape[2], 64, classes, pool=True)

    def loss(model: nn.Module, batch: Utterances) -> Tensor:
        scores = model(batch.x, batch.lengths)
        return nn.functional.cross_entropy(scores, batch.targets[:, 0])

    runs = training.train(model, loss, noisy_batches(train, options), options)
    on_device = move(test, options.device)
    with torch.no_grad():
        guesses = model(on_device.x, on_device.lengths).argmax(1)
    accuracy = (guesses == on_device.targets[:, 0]).double().mean().item()
    training.print_comparison(runs)
    rows = [
        ("nearest mean", f"{nearest_mean(train, test):.1%}"),
        (runs[0].name, f"{accuracy:.1%}"),
    ]
    training.print_table("speakers", ["correct"], rows)
    return runs


class Espeak:
    """The library of eSpeak NG: the system's, or that of its wheel, unpacked."""

    def __init__(self) -> None:
        path = ctypes.util.find_library("espeak-ng")
        data = None
        if path is None:
            wheel = training.fetch(ESPEAK)
            folder = wheel.parent.parent / "espeak-ng"
            if not folder.exists():
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder)
            names = ("libespeak-ng.so", "libespeak-ng.dylib", "espeak-ng.dll")
            inside = [folder / "espeakng_loader" / name for name in names]
            path = str(next((p for p in inside if p.exists()), names[0]))
            data = str(folder / "espeakng_loader").encode()
        self.library = ctypes.CDLL(path)
        synchronous = 2
        self.rate = self.library.espeak_Initialize(synchronous, 0, data, 0)
        if self.rate < RATE:
            raise OSError("eSpeak NG does not find its data")
        self.sound: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self.callback = kind(self.receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self.sound.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> Tensor:
        """float32 [samples] at RATE."""
        self.sound.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise OSError(f"eSpeak NG has no voice {voice}")
        for parameter, value in ((1, speed), (3, pitch)):
            self.library.espeak_SetParameter(parameter, value, 0)
        spoken = text.encode() + b"\0"
        self.library.espeak_Synth(spoken, ctypes.c_size_t(len(spoken)), 0, 0, 0, 1, None, None)
        sound = torch.from_numpy(np.concatenate(self.sound)).float()[None, None] / 2**15
        size = sound.shape[2] * RATE // self.rate
        return nn.functional.interpolate(sound, size, mode="linear")[0, 0]


def mel_filters() -> Tensor:
    """Triangles [frequencies, BANDS], evenly spaced on the mel scale."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    mels = torch.linspace(0, top, BANDS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def features(sound: Tensor, filters: Tensor) -> Tensor:
    """Logarithms of mel bands, two windows of 25 ms in a frame of 20 ms: [T, 2 * BANDS]."""
    sound = sound + 1e-3 * torch.randn(len(sound))
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True).abs().square()
    bands = (spectrum.T @ filters + 1e-6).log()
    return bands[: len(bands) // 2 * 2].reshape(-1, 2 * BANDS)


def synthesize(espeak: Espeak, voices: str, count: int, drawn: random.Random) -> Utterances:
    """Utterances of 1 to 4 words."""
    filters = mel_filters()
    series = []
    targets = []
    for _ in range(count):
        phrase = " ".join(drawn.choices(WORDS.split(), k=drawn.randint(1, 4)))
        voice = drawn.choice(voices.split())
        sound = espeak.say(phrase, voice, drawn.randint(140, 200), drawn.randint(30, 70))
        series.append(features(sound, filters))
        targets.append(torch.tensor([1 + LETTERS.index(letter) for letter in phrase]))
    return pad(series, targets)


def read_words(options: argparse.Namespace) -> tuple[Utterances, Utterances] | None:
    """Training and test; None where eSpeak NG cannot be had."""
    drawn = random.Random(options.seed)
    count = options.utterances
    try:
        espeak = Espeak()
        train = synthesize(espeak, TRAINING_VOICES, count, drawn)
        test = synthesize(espeak, TEST_VOICES, max(count // 6, 20), drawn)
    except (OSError, SystemExit) as error:
        reason = f": {error}" if isinstance(error, OSError) else ""
        print(f"The words are left out, because eSpeak NG cannot be had{reason}")
        return None
    like = real_frames(train)
    return normalize(train, like), normalize(test, like)


def text_of(classes: Tensor) -> str:
    return "".join(LETTERS[c - 1] for c in classes.tolist() if c)


def greedy(scores: Tensor, lengths: Tensor) -> list[str]:
    """The best class of each frame, repetitions taken as one, blanks left out."""
    best = scores.argmax(2)
    return [text_of(torch.unique_consecutive(best[:n, b])) for b, n in enumerate(lengths.tolist())]


def edits(guess: Sequence[str], truth: Sequence[str]) -> int:
    """The least number of insertions, deletions and substitutions from one to the other."""
    row = [*range(len(truth) + 1)]
    for i, word in enumerate(guess, 1):
        above = row
        row = [i]
        for j, true in enumerate(truth):
            row.append(min(above[j] + (word != true), above[j + 1] + 1, row[j] + 1))
    return row[-1]


def word_error_rate(guesses: Sequence[str], truths: Sequence[str]) -> float:
    errors = sum(edits(guess.split(), truth.split()) for guess, truth in zip(guesses, truths))
    return errors / sum(len(truth.split()) for truth in truths)


def nearest_phrase(train: Utterances, test: Utterances) -> list[str]:
    """What is said in the utterance of training whose mean and number of frames are nearest."""

    def summary(data: Utterances) -> Tensor:
        seconds = data.lengths[:, None] / 50
        return torch.cat([data.x.sum(0) / data.lengths[:, None], seconds], 1)

    nearest = torch.cdist(summary(test), summary(train)).argmin(1)
    return [text_of(train.targets[i]) for i in nearest.tolist()]


def recognize_words(
    options: argparse.Namespace, train: Utterances, test: Utterances
) -> tuple[list[training.Run], Tensor]:
    """What `train` returned, and the probabilities [T, classes] of a test's letters."""
    training.print_source(
        "spoken words, synthetic: made now by eSpeak NG (espeakng-loader 0.2.4 or the system's)",
        "of the words none; eSpeak NG: GPL-3.0",
    )
    print(f"{len(train.lengths)} utterances to learn, {len(test.lengths)} to test, in other voices")
    classes = 1 + len(LETTERS)
    model = Recognizer(training.layer(options.cell), 2 * BANDS, options.hidden, classes, pool=False)

    def loss(model: nn.Module, batch: Utterances) -> Tensor:
        scores = model(batch.x, batch.lengths).log_softmax(2)
        return nn.functional.ctc_loss(
            scores, batch.targets, batch.lengths, batch.target_lengths, zero_infinity=True
        )

    runs = training.train(model, loss, noisy_batches(train, options), options)
    with torch.no_grad():
        scores = model(test.x.to(options.device), test.lengths.to(options.device)).cpu()
    guesses = greedy(scores, test.lengths)
    truths = [text_of(target) for target in test.targets]
    training.print_comparison(runs)
    rows = [
        ("nearest utterance", f"{word_error_rate(nearest_phrase(train, test), truths):.1%}"),
        (runs[0].name, f"{word_error_rate(guesses, truths):.1%}"),
    ]
    training.print_table("words", ["word error rate"], rows)
    for guess, truth in [*zip(guesses, truths)][:5]:
        print(f"  said: {truth:28} heard: {guess}")
    longest = int(test.lengths.argmax())
    return runs, scores[: int(test.lengths[longest]), longest].softmax(1)


def draw(
    path: Path, runs: list[training.Run], words: tuple[list[training.Run], Tensor] | None
) -> None:
    pyplot = training.pyplot()
    count = 3 if words else 1
    figure, axes = pyplot.subplots(count, figsize=(7, 3 * count), layout="constrained")
    axes = [axes] if count == 1 else axes
    training.plot_losses(axes[0], runs, "nats")
    axes[0].set_title("Speakers of Japanese vowels")
    if words:
        word_runs, probabilities = words
        training.plot_losses(axes[1], word_runs, "nats per letter, CTC")
        axes[1].set_title("Words, synthetic")
        heard = greedy(probabilities[:, None], torch.tensor([len(probabilities)]))[0]
        extent = (0, len(probabilities) / 50, 1 + len(LETTERS), 0)
        axes[2].imshow(probabilities.T, aspect="auto", cmap="Blues", extent=extent)
        axes[2].set_yticks([i + 0.5 for i in range(1 + len(LETTERS))], ["-", "_", *LETTERS[1:]])
        axes[2].tick_params(axis="y", labelsize=6)
        axes[2].set(xlabel="seconds", ylabel="letter", title=f"Alignment: {heard}")
    figure.savefig(path, dpi=100)
    print(f"Loss curves and alignment: {path}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__, cell="lstm", steps=600, rate=3e-3)
    option = parser.add_argument
    positive = training.positive
    option("--hidden", type=positive, default=96, help="hidden units (default: %(default)s)")
    option("--utterances", type=positive, default=1800, help="to synthesise (default: %(default)s)")
    option("--vowel-steps", type=positive, default=400, help="of the speakers' (default: 400)")
    quick = {"steps": 10, "vowel_steps": 20, "utterances": 60, "hidden": 32}
    return training.parse(parser, arguments, **quick)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    speakers = recognize_speakers(options)
    sets = read_words(options)
    words = recognize_words(options, *sets) if sets else None
    draw(options.out / "speech.png", speakers, words)


if __name__ == "__main__":
    main()
