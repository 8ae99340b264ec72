"""Composes in four voices: a recurrent layer learns Bach's chorales note by note, and writes one.

A chorale is read eighth by eighth, the four voices one after the other in each: a token is a pitch
that is struck, a pitch held on, or a rest. Each window of training is moved to a key drawn at
random. The result is a MIDI file, which every music player plays, and a piano roll."""

import argparse
import itertools
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from tqdm import tqdm

import training

SOURCE = "music21==10.5.1"
VOICES = 4
LOW, HIGH = 30, 90  # MIDI pitches
HOLD, REST, FIRST_PITCH = range(3)
TOKENS = FIRST_PITCH + HIGH - LOW
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


class Composer(nn.Module):
    """Scores of the next token, from all tokens before it and the voice that is next."""

    def __init__(self, layer: Callable[..., Any], hidden: int) -> None:
        super().__init__()
        self.token = nn.Embedding(TOKENS, hidden)
        self.voice = nn.Embedding(VOICES, hidden)
        self.rnn = layer(hidden, hidden)
        self.dropout = nn.Dropout(0.2)
        self.output = nn.Linear(hidden, TOKENS)

    def forward(self, tokens: Tensor, state: Any = None, first: int = 0) -> tuple[Tensor, Any]:
        """tokens [T, B], the first of them of voice `first` -> scores [T, B, TOKENS] of the tokens
        that follow them, and the last state."""
        voices = (torch.arange(len(tokens), device=tokens.device) + first + 1) % VOICES
        h, state = self.rnn(self.token(tokens) + self.voice(voices)[:, None], state)
        return self.output(self.dropout(h)), state


def pitch_of(note: ElementTree.Element) -> int | None:
    pitch = note.find("pitch")
    if pitch is None:
        return None
    semitone = SEMITONES[pitch.findtext("step", "")] + int(float(pitch.findtext("alter", "0")))
    return semitone + 12 * (int(pitch.findtext("octave", "")) + 1)


def read_part(part: ElementTree.Element) -> list[int]:
    """The tokens of a voice, one an eighth. What begins between two eighths is left out, and of
    notes at once the first is taken."""
    tokens: list[int] = []
    now = Fraction(0)
    divisions = 1
    for element in (e for measure in part.findall("measure") for e in measure):
        divisions = int(element.findtext("divisions") or divisions)
        moves = element.tag in ("note", "forward", "backup")
        if not moves or element.find("grace") is not None or element.find("chord") is not None:
            continue
        length = 2 * Fraction(int(element.findtext("duration", "")), divisions)
        if element.tag == "backup":
            now -= length
            continue
        begin = math.ceil(now)
        now += length
        if begin < len(tokens) or begin >= now:
            continue
        pitch = pitch_of(element)
        inside = pitch is not None and LOW <= pitch < HIGH
        struck = FIRST_PITCH + pitch - LOW if inside and pitch is not None else REST
        tied = any(tie.get("type") == "stop" for tie in element.findall("tie"))
        tokens.append(HOLD if tied and tokens else struck)
        # An empty eighth, where a voice begins late, is a rest as well
        follow = HOLD if struck != REST else REST
        tokens += [follow] * (math.ceil(now) - begin - 1)
    return tokens


def read_score(content: bytes) -> Tensor | None:
    """int64 [eighths, VOICES] of a MusicXML file, compressed or not; None if it has not four
    voices."""
    if content.startswith(b"PK"):
        with zipfile.ZipFile(BytesIO(content)) as archive:
            inside = [n for n in archive.namelist() if not n.startswith("META-INF")]
            content = archive.read(next(n for n in inside if n.endswith("xml")))
    parts = [read_part(part) for part in ElementTree.fromstring(content).findall("part")]
    if len(parts) != VOICES or min(map(len, parts)) < 16:
        return None
    length = min(map(len, parts))
    return torch.tensor([part[:length] for part in parts]).T


def scores_in(files: Sequence[bytes]) -> list[Tensor]:
    """Of each file that can be read as four voices."""
    found = []
    for content in tqdm(files, unit="file", disable=len(files) < 2):
        try:
            score = read_score(content)
        except (ElementTree.ParseError, zipfile.BadZipFile, StopIteration, ValueError, KeyError):
            continue
        if score is not None:
            found.append(score)
    return found


def read_chorales(options: argparse.Namespace) -> list[Tensor]:
    """The user's MusicXML, or Bach's, which are kept after the first time."""
    if options.data is not None:
        kinds = (".mxl", ".xml", ".musicxml")
        paths = [options.data]
        if options.data.is_dir():
            paths = sorted(p for p in options.data.rglob("*") if p.suffix in kinds)
        try:
            scores = scores_in([path.read_bytes() for path in paths])
        except OSError as error:
            training.fail(f"cannot read {options.data}: {error.strerror}")
        if len(scores) < 2:
            training.fail(
                f"cannot learn from {options.data}: a folder with MusicXML of four voices is "
                f"needed, two files at least, and {len(scores)} have been found"
            )
        return scores
    wheel = training.fetch(SOURCE)
    cache = wheel.parent.parent / "chorales.pt"
    if cache.exists():
        return list(torch.load(cache, weights_only=True))
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("music21/corpus/bach/bwv")]
        scores = scores_in([archive.read(name) for name in names if name.endswith("l")])
    torch.save(scores, cache)
    return scores


def transpose(tokens: Tensor, semitones: Tensor) -> Tensor:
    """tokens [..., B] moved by semitones [B]."""
    moved = (tokens + semitones).clamp(FIRST_PITCH, TOKENS - 1)
    return torch.where(tokens < FIRST_PITCH, tokens, moved)


def windows(
    scores: Sequence[Tensor], eighths: int, size: int, options: argparse.Namespace
) -> Iterator[Tensor]:
    """Forever: tokens [T, B] of windows of the scores, each in a key of its own."""
    generator = torch.Generator().manual_seed(options.seed)
    lengths = torch.tensor([float(len(score)) for score in scores])
    while True:
        batch = []
        for n in torch.multinomial(lengths, size, replacement=True, generator=generator).tolist():
            score = scores[n]
            last = max(len(score) - eighths, 0)
            begin = int(torch.randint(last + 1, (), generator=generator))
            batch.append(score[begin : begin + eighths].flatten())
        tokens = nn.utils.rnn.pad_sequence(batch, padding_value=REST)
        keys = torch.randint(-5, 7, (size,), generator=generator)
        yield transpose(tokens, keys).to(options.device)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    scores, _ = model(tokens[:-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), tokens[1:].flatten())


@torch.no_grad()
def model_bits(model: Composer, scores: Sequence[Tensor], device: str) -> float:
    """Bits per note struck, in all scores but for their first eighth."""
    nats = 0.0
    for score in scores:
        tokens = score.flatten().to(device)[:, None]
        found, _ = model(tokens[:-1])
        losses = nn.functional.cross_entropy(found[:, 0], tokens[1:, 0], reduction="none")
        nats += losses[VOICES - 1 :].sum().item()
    return nats / math.log(2) / notes_in(scores)


def notes_in(scores: Sequence[Tensor]) -> int:
    return sum(int((score[1:] >= FIRST_PITCH).sum()) for score in scores)


def bigram_bits(train: Sequence[Tensor], test: Sequence[Tensor]) -> float:
    """The same, of the chances of a token after the voice's token before, held notes known by their
    pitch: counts in training and in all keys, each count with some of the tokens' frequency."""
    shape = (VOICES, TOKENS, TOKENS)
    counts = torch.zeros(shape, dtype=torch.float64)
    for score in train:
        for semitones in range(-5, 7):
            moved = transpose(score, torch.tensor(semitones))
            before = sounding(moved)
            for voice in range(VOICES):
                index = (torch.full_like(before[:-1, voice], voice), before[:-1, voice])
                one = torch.ones(len(score) - 1, dtype=torch.float64)
                counts.index_put_((*index, moved[1:, voice]), one, accumulate=True)
    overall = (counts.sum(1, keepdim=True) + 1) / (counts.sum(1, keepdim=True) + 1).sum(2, True)
    chances = (counts + 5 * overall) / (counts.sum(2, keepdim=True) + 5)
    nats = 0.0
    for score in test:
        before = sounding(score)
        for voice in range(VOICES):
            nats -= chances[voice, before[:-1, voice], score[1:, voice]].log().sum().item()
    return nats / math.log(2) / notes_in(test)


def sounding(score: Tensor) -> Tensor:
    """The token of the note that sounds in each eighth and voice, [eighths, VOICES]."""
    found = score.clone()
    for before, now in itertools.pairwise(found):
        now.copy_(torch.where(now == HOLD, before, now))
    return found


@torch.no_grad()
def compose(model: Composer, opening: Tensor, eighths: int, temperature: float) -> Tensor:
    """`eighths` that follow the opening [eighths, VOICES], token by token: all of them."""
    tokens = opening.flatten().tolist()
    device = model.output.weight.device
    scores, state = model(torch.tensor(tokens, device=device)[:, None])
    for _ in range(VOICES * eighths):
        chances = (scores[-1, 0] / temperature).softmax(0)
        tokens.append(int(torch.multinomial(chances, 1)))
        last = torch.tensor([[tokens[-1]]], device=device)
        scores, state = model(last, state, first=(len(tokens) - 1) % VOICES)
    return torch.tensor(tokens).view(-1, VOICES)


def notes_of(voice: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Begin and end in eighths, and the MIDI pitch."""
    begin: int | None = None
    for now, token in enumerate([*voice, REST]):
        if token == HOLD:
            continue
        if begin is not None:
            yield begin, now, LOW + voice[begin] - FIRST_PITCH
        begin = now if token >= FIRST_PITCH else None


def midi(score: Tensor, beats_per_minute: int = 80) -> bytes:
    """A Standard MIDI File with a track for each voice."""
    eighth = 240
    tracks = [struct.pack(">BBBB", 0, 0xFF, 0x51, 3) + (60_000_000 // beats_per_minute).to_bytes(3)]
    for channel, voice in enumerate(score.T.tolist()):
        events = []
        for begin, end, pitch in notes_of(voice):
            events += [(end * eighth, 0x80, pitch), (begin * eighth, 0x90, pitch)]
        track = b""
        now = 0
        # Of one time ends come first
        for time, kind, pitch in sorted(events):
            track += variable_length(time - now) + bytes([kind | channel, pitch, 80])
            now = time
        tracks.append(track)
    head = struct.pack(">4sIHHH", b"MThd", 6, 1, len(tracks), 2 * eighth)
    ended = [track + b"\x00\xff\x2f\x00" for track in tracks]
    return head + b"".join(struct.pack(">4sI", b"MTrk", len(t)) + t for t in ended)


def variable_length(number: int) -> bytes:
    """Seven bits in a byte, the top bit set in all but the last."""
    found = [number & 127]
    while number := number >> 7:
        found.append(number & 127 | 128)
    return bytes(found[::-1])


def draw(path: Path, runs: list[training.Run], score: Tensor, given: int) -> None:
    pyplot = training.pyplot()
    figure, (above, below) = pyplot.subplots(2, figsize=(8, 7), layout="constrained")
    training.plot_losses(above, runs, "nats per token")
    for n, (voice, name) in enumerate(zip(score.T.tolist(), ("soprano", "alto", "tenor", "bass"))):
        for begin, end, pitch in notes_of(voice):
            below.barh(pitch, (end - begin) / 2 - 0.06, left=begin / 2, color=f"C{n}")
        below.barh(0, 0, color=f"C{n}", label=name)
    below.axvline(given / 2, color="gray", linestyle=":", label="from here on composed")
    below.set(xlabel="quarters", ylabel="MIDI pitch", ylim=(LOW + 5, HIGH - 5))
    below.legend(ncols=5, fontsize=8)
    figure.savefig(path, dpi=100)
    print(f"Loss curves and piano roll: {path}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__, cell="lstm", steps=500, rate=5e-3)
    option = parser.add_argument
    positive = training.positive
    option("--hidden", type=positive, default=192, help="hidden units (default: %(default)s)")
    option("--eighths", type=positive, default=32, help="of a window (default: %(default)s)")
    option("--batch", type=positive, default=32, help="windows of a step (default: %(default)s)")
    option("--temperature", type=float, default=0.8, help="of the piece (default: %(default)s)")
    quick = {"steps": 10, "hidden": 32, "eighths": 16}
    options = training.parse(parser, arguments, **quick)
    if not options.temperature > 0:
        training.fail(f"--temperature {options.temperature}: a number above 0 is needed")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    scores = read_chorales(options)
    if options.data is None:
        training.print_source(
            "Bach's four-part chorales, in the wheel of music21 10.5.1 (encoded by M. Greentree "
            "and others)",
            "the music is in the public domain; encodings with their encoders' permission, see "
            "corpus/license.txt in the wheel",
        )
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(options.seed))
    held_out = max(len(scores) // 10, 1)
    test = [scores[n] for n in order[:held_out].tolist()]
    train = [scores[n] for n in order[held_out:].tolist()]
    print(f"{len(train)} pieces to learn with {notes_in(train):,} notes, {len(test)} to test")

    model = Composer(training.layer(options.cell), options.hidden)
    batches = windows(train, options.eighths, options.batch, options)
    runs = training.train(model, loss, batches, options)
    training.print_comparison(runs)
    bits = model_bits(model, test, options.device)
    rows = [
        ("bigram of each voice", f"{bigram_bits(train, test):.3f}"),
        (runs[0].name, f"{bits:.3f}"),
    ]
    training.print_table("pieces of the test", ["bits per note"], rows)
    given = 16
    piece = compose(model, test[0][:given], 64 if options.quick else 112, options.temperature)
    path = options.out / "music.mid"
    path.write_bytes(midi(piece))
    print(f"A chorale that begins as one of the test: {path}")
    draw(options.out / "music.png", runs, piece, given)


if __name__ == "__main__":
    main()
