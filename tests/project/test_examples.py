"""The examples and the benchmark, as their users start them."""

import importlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import rnn
from rnn.layer_types import NO_MASKS

ROOT = Path(__file__).parents[2]
HELPERS = ("texts", "training")
EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem not in HELPERS)
# Those that make their data themselves.
MADE = {"long_memory", "maze"}
each_example = pytest.mark.parametrize("name", EXAMPLES)
each_reader = pytest.mark.parametrize("name", sorted({*EXAMPLES} - MADE))


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # Where pip finds the package index is this machine's.
    kept = re.compile(r"PIP_\w+|HOME|SSL_CERT_FILE|\w+_proxy|OMP_NUM_THREADS", re.I)
    environment = {name: value for name, value in os.environ.items() if kept.fullmatch(name)}
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        text=True,
        capture_output=True,
        env={**environment, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )


@cache
def index_is_reached() -> bool:
    code = (
        "import sys, tempfile; sys.path.insert(0, 'examples'); import training; "
        "training.download('tqdm==4.67.1', tempfile.mkdtemp(), '--only-binary')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.examples
@each_example
@pytest.mark.parametrize("option", ["--compare", "--cell=rnn"])
def test_quick(name: str, option: str, tmp_path: Path) -> None:
    done = run(f"examples/{name}.py", "--quick", option, "--out", tmp_path)
    if "cannot download" in done.stderr and not index_is_reached():
        pytest.skip(f"the package index is not reached: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "Data: " in done.stdout and "Licence: " in done.stdout
    assert ("torch.nn." in done.stdout) == (option == "--compare")
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    picture = tmp_path / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in done.stdout
    # Training's losses are numbers.
    assert "nan" not in done.stdout


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports an example, to call what is in it without a process of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture
def refused(
    example: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The one line that an example refuses these arguments with."""

    def call(name: str, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            example(name).main([*map(str, arguments), "--out", str(tmp_path)])
        said = capsys.readouterr()
        assert stopped.value.code == 2
        assert len(said.err.strip().splitlines()) == 1, said.err
        assert not said.out
        return said.err

    return call


@each_reader
@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe\x00" * 999], ids=["none", "empty", "bytes"]
)
def test_data_is_refused(
    name: str, content: bytes | None, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused(name, "--data", path)


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        ("language_model", "text", "too short", "has 9 characters"),
        ("sentiment", "rated", "1\tgood\nbad\n", "line 2: a number, a tab"),
        ("sentiment", "rated", "1\tgood\nnan\tbad\n", "line 2: a number, a tab"),
        ("sentiment", "rated", "1\tgood\n", "1 sentences; at least 50"),
        ("translation", "pairs", "one\teins\ntwo\n", "line 2: a source, a tab"),
        ("translation", "de.po", 'msgid "one"\nmsgstr "eins\\"\n', "not a gettext catalogue"),
        ("translation", "de.po", 'msgid "one"\nmsgstr "eins"\n', "1 translations; at least 50"),
        ("forecasting", "data.csv", "day,sort\n1/1,sun\n", "no column of numbers"),
        ("forecasting", "data.csv", "day,degrees\n1/1,3\n1/2,\n", "line 3: a number"),
        ("forecasting", "data.csv", "degrees\n" + "3\n" * 99, "99 steps of time are too few"),
    ],
)
def test_malformed_data_is_refused(
    name: str, file: str, content: str, said: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / file
    path.write_text(content)
    assert said in refused(name, "--data", path)


def test_no_network(
    example: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """pip asks an address where nobody answers."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    training = example("training")
    monkeypatch.setattr(training, "CACHE", tmp_path / "cache")
    with pytest.raises(SystemExit) as stopped:
        training.fetch("vega-datasets==0.9.0")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "cannot download vega-datasets==0.9.0, is there a network?" in said
    assert len(said.splitlines()) == 1


def own_data(name: str, folder: Path) -> Path:
    """A small file of what the example's --data takes."""
    path = folder / "data"
    if name == "sentiment":
        lines = [f"{2 if i % 2 else -2}\ta {'good' if i % 2 else 'bad'} film" for i in range(60)]
    elif name == "translation":
        lines = [f"{word} {i % 9}\t{i % 9} {word}" for i in range(40) for word in ("a", "the")]
    elif name == "forecasting":
        lines = ["day,height", *(f"{i}/1,{math.sin(i / 5)}" for i in range(200))]
    else:
        lines = ["All work and no play makes Jack a dull boy."] * 40
    path.write_text("\n".join(lines))
    return path


@pytest.mark.examples
@pytest.mark.parametrize("name", ["forecasting", "language_model", "sentiment", "translation"])
def test_own_data(name: str, tmp_path: Path) -> None:
    more = ["--season", 31, "--window", 20] if name == "forecasting" else []
    data = own_data(name, tmp_path)
    done = run(f"examples/{name}.py", "--quick", "--data", data, "--out", tmp_path, *more)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{name}.png").exists()
    assert "Licence: " not in done.stdout


def test_chrf(example: Callable[[str], Any]) -> None:
    """By hand, for texts of two characters, whose n-grams are of orders 1 and 2 alone."""
    translation = example("translation")
    assert translation.chrf(["Alle Seiten"], ["Alle Seiten"]) == pytest.approx(100)
    # Precision and recall 1/2 of single characters, 0 of the rest: an order's share is a sixth.
    assert translation.chrf(["ab"], ["ac"]) == pytest.approx(100 / 12)


def test_catalogue(example: Callable[[str], Any]) -> None:
    text = """
msgid ""
msgstr "Language: de"

#, fuzzy
msgid "Cat"
msgstr "Hund"

#: views.py
msgid "One "
"page"
msgstr "Eine \\"Seite\\""

msgid "Nothing"
msgstr ""
"""
    assert [*example("translation").catalogue(text)] == [("One page", 'Eine "Seite"')]


def test_pieces_of_words(example: Callable[[str], Any]) -> None:
    """What is split and numbered is the text again."""
    texts = ["Delete this page", "Delete %(count)s pages", "These pages"]
    pieces = example("translation").Pieces(texts, 20)
    assert " pages" in pieces.index
    for text in texts:
        numbers = pieces.encode(text).tolist()
        assert len(numbers) < len(text)
        assert pieces.decode(numbers) == text


def test_retrieval(example: Callable[[str], Any]) -> None:
    """A known pair does not see itself: neither its translation nor the pieces of it alone."""
    translation = example("translation")
    texts = ("red page", "red pages", "blue cat", "blue cats")
    pairs = [translation.Pair(text, text[::-1]) for text in texts]
    assert translation.nearest(pairs, ["red pages!"], 1) == [[1]]
    assert translation.nearest(pairs, texts, 1, others=True) == [[1], [0], [3], [2]]
    # The pieces are characters: "k" and "z" are in the second pair alone.
    pairs = [translation.Pair("a", "b"), translation.Pair("k", "z")]
    known = translation.Known(translation.Pieces(["abkz"], 1), pairs, 1)
    index = known.pieces.index
    asked = translation.make_batch(known, [translation.Pair("k", "")], [[0]], "cpu")
    learnt = translation.make_batch(known, [pairs[1]], [[0]], "cpu")
    assert asked.wanted[0, index["z"]] == 1
    assert learnt.wanted[0, index["z"]] == 0
    assert asked.similar[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_words_at_place(example: Callable[[str], Any]) -> None:
    translation = example("translation")
    assert translation.words_at_place(["Alle Seiten", "x"], ["Alle alten Seiten", "x"]) == 0.5


def test_beam_search(example: Callable[[str], Any]) -> None:
    """A beam with room for all texts finds the likeliest; of one, the likeliest next piece."""
    translation = example("translation")
    torch.manual_seed(7)
    pieces = translation.Pieces(["ab", "ba"], 1)
    model = translation.Translator(rnn.GRU, len(pieces.names), 8).eval()
    # What it looks up would decide all, and the likeliest next piece be the best.
    torch.nn.init.zeros_(model.follow)
    torch.nn.init.zeros_(model.ask)
    pairs = [translation.Pair("ab", "ba"), translation.Pair("ba", "ab")]
    known = translation.Known(pieces, pairs, 1)
    batch = translation.make_batch(known, [translation.Pair("ab", "")], [[0]], "cpu")

    @torch.no_grad()
    def next_scores(text: Sequence[int]) -> torch.Tensor:
        memory, state = model.encode(batch)
        given = torch.tensor([translation.BEGIN, *text])[:, None]
        return model.decode(memory, given, state)[0][0]

    greedy: list[int] = []
    while len(greedy) < 3 and translation.END not in greedy:
        greedy.append(int(next_scores(greedy)[-1].argmax()))
    scores: dict[tuple[int, ...], float] = {}
    for numbers in itertools.product(range(len(pieces.names)), repeat=3):
        end = numbers.index(translation.END) + 1 if translation.END in numbers else 3
        text = numbers[:end]
        each = next_scores(text[:-1])[range(len(text)), list(text)]
        scores[text] = each.mean().item()
    best = max(scores, key=scores.__getitem__)
    assert best != tuple(greedy)
    for width, wanted in ((1, greedy), (len(scores), best)):
        found = translation.translate(model, known, ["ab"], width, limit=3)
        assert found == [pieces.decode(wanted)]


def test_language_model(tmp_path: Path) -> None:
    plot = tmp_path / "curves.png"
    done = run(
        "examples/language_model.py",
        "--hidden",
        64,
        "--batch",
        16,
        "--length",
        32,
        "--steps",
        60,
        "--rate",
        0.01,
        "--compare",
        "--out",
        tmp_path,
        "--plot",
        plot,
    )
    assert done.returncode == 0, done.stderr
    difference = re.search(r"largest difference in 50 steps +(\S+)", done.stdout)
    first, later = (
        re.search(rf"loss at {when} +(\S+) +(\S+)", done.stdout)
        for when in ("the start", "step 50")
    )
    assert difference
    assert first
    assert later
    assert float(first[1]) - float(later[1]) > 0.5
    assert float(difference[1]) < 1e-3
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "It writes:" in done.stdout
    assert "characters/s" in done.stdout
    assert "60/60" in done.stderr


def test_cell_of_the_documentation() -> None:
    """It runs, and its adjoint is right: against the formula's gradients, which autograd finds."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/kernels.md").read_text(), re.S)[0]
    scope: dict[str, Any] = {}
    exec(code, scope)
    given: Any = [
        torch.randn(n, dtype=torch.float64, requires_grad=True)
        for n in ((5, 2, 3), (8, 3), (8, 4), (8,), (8,), (1, 2, 4))
    ]
    found = [
        rnn.functional.recurrence(scope["mgu"], *given)[0],
        rnn.composite.composite(scope["mgu"], given, NO_MASKS, (False,), 0)[0],
    ]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), given) for y in found))


@each_example
def test_help(name: str, example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        example(name).main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    words = "--cell --compare --data --steps --rate --quick --seed --device --out"
    assert all(word in said for word in words.split())


def test_help_of_the_benchmark() -> None:
    done = run("bench/run.py", "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("--device", "--suite", "--cell", "--dtype"))
