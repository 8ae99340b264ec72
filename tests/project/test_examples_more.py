"""Parts of the examples on speech, music, captions, memory and mazes, without their data."""

import argparse
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rnn

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def examples_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each imports the trainer from the folder in which it is."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", seed=0, **given)


# --- speech -------------------------------------------------------------------------------------


def test_series_of_an_archive() -> None:
    speech = import_module("speech")
    text = "#c\n@classLabel true 1 2\n@data\n1,2,3:4,5,6:2\n7:8:1\n"
    data = speech.parse_ts(text, "x")
    assert data.lengths.tolist() == [3, 1]
    assert data.x[:, 0].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert data.x[:, 1].tolist() == [[7, 8], [0, 0], [0, 0]]
    assert data.targets.tolist() == [[1], [0]]


@pytest.mark.parametrize(
    "text",
    ["no data", "@data\n", "@data\n1,2:a\n", "@data\n1,x:1\n", "@data\n1:0\n", "@data\n1,2:3:1\n"],
)
def test_series_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    speech = import_module("speech")
    with pytest.raises(SystemExit) as stopped:
        speech.parse_ts(text, "some.ts")
    assert stopped.value.code == 2
    assert "some.ts" in capsys.readouterr().err


def test_word_errors() -> None:
    speech = import_module("speech")
    assert speech.edits(["a", "b", "c"], ["a", "b", "c"]) == 0
    assert speech.edits(["a", "c"], ["a", "b", "c"]) == 1
    assert speech.edits(["x", "a", "b"], ["a", "b", "c"]) == 2
    assert speech.word_error_rate(["a b", ""], ["a c", "d e"]) == 0.75


def test_greedy_letters() -> None:
    """Repetitions are one letter, a blank between two makes them two, frames past the end count
    for nothing."""
    speech = import_module("speech")
    classes = [1 + speech.LETTERS.index(letter) for letter in "thre"]
    t, h, r, e = classes
    frames = torch.tensor([[t, t, h, 0, r, e, e, 0, e, t]]).T
    scores = nn.functional.one_hot(frames, 1 + len(speech.LETTERS)).float()
    assert speech.greedy(scores, torch.tensor([9])) == ["three"]


def test_no_espeak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and no words."""
    speech = import_module("speech")

    def missing() -> None:
        raise OSError("no such library")

    monkeypatch.setattr(speech, "Espeak", missing)
    assert speech.read_words(options(utterances=1)) is None
    said = capsys.readouterr().out
    assert said == "The words are left out, because eSpeak NG cannot be had: no such library\n"


def test_utterances_do_not_see_the_padding() -> None:
    speech = import_module("speech")
    model = speech.Recognizer(rnn.LSTM, 3, 4, 2, pool=True).double().eval()
    x = torch.randn(7, 1, 3, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(5, 1, 3, dtype=torch.float64)])
    torch.testing.assert_close(model(padded, torch.tensor([7])), model(x, torch.tensor([7])))


# --- music --------------------------------------------------------------------------------------

NOTE = "<note>{}<pitch><step>{}</step>{}<octave>4</octave></pitch><duration>{}</duration>{}</note>"


def musicxml(*notes: str) -> bytes:
    part = f"<part><measure><attributes><divisions>2</divisions></attributes>{''.join(notes)}"
    return f"<score>{4 * (part + '</measure></part>')}</score>".encode()


def test_score_of_musicxml() -> None:
    """Quarters and eighths; a sixteenth between two eighths and a grace note are left out, a tied
    note goes on."""
    music = import_module("music")
    middle_c = music.FIRST_PITCH + 60 - music.LOW
    notes = [
        NOTE.format("", "C", "", 2, ""),
        NOTE.format("<grace/>", "G", "", 1, ""),
        NOTE.format("", "D", "<alter>-1</alter>", 1, ""),
        "<note><rest/><duration>3</duration></note>",
        NOTE.format("", "E", "", 2, ""),
        NOTE.format("", "E", "", 2, "<tie type='stop'/>"),
        NOTE.format("", "C", "", 16, ""),
    ]
    score = music.read_score(musicxml(*notes))
    rest, hold = music.REST, music.HOLD
    expected = [middle_c, hold, middle_c + 1, rest, rest, rest]
    expected += [middle_c + 4, hold, hold, hold, middle_c, *[hold] * 15]
    assert score.shape == (26, 4)
    assert score[:, 0].tolist() == expected
    assert music.notes_in([score]) == 4 * 3
    assert [*music.notes_of(expected)][:2] == [(0, 2, 60), (2, 3, 61)]


def test_score_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    music = import_module("music")
    assert music.scores_in([b"", b"PK broken", b"<score/>", musicxml()]) == []
    with pytest.raises(SystemExit) as stopped:
        music.read_chorales(argparse.Namespace(data=tmp_path))
    assert stopped.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_midi() -> None:
    """Its bytes, by the Standard MIDI File's specification."""
    music = import_module("music")
    pitch = music.FIRST_PITCH + 60 - music.LOW
    rest, hold = music.REST, music.HOLD
    found = music.midi(torch.tensor([[pitch, rest, rest, rest], [hold, rest, rest, rest]]))
    assert found[:14] == b"MThd\0\0\0\6\0\1\0\5\1\xe0"
    notes = b"\0\x90\x3c\x50\x83\x60\x80\x3c\x50\0\xff\x2f\0"
    assert b"MTrk" + len(notes).to_bytes(4, "big") + notes in found
    assert found.count(b"MTrk") == 5


def test_transposed() -> None:
    music = import_module("music")
    tokens = torch.tensor([[music.HOLD, 20], [music.REST, 21]])
    moved = music.transpose(tokens, torch.tensor([5, -3]))
    assert moved.tolist() == [[music.HOLD, 17], [music.REST, 18]]


def test_composing_is_one_pass() -> None:
    """Token by token the scores are those of the whole piece at once: states and voices agree."""
    music = import_module("music")
    model = music.Composer(rnn.GRU, 8).double().eval()
    tokens = torch.randint(music.TOKENS, (12, 1))
    whole, _ = model(tokens)
    state = None
    for n, token in enumerate(tokens):
        one, state = model(token[None], state, first=n % music.VOICES)
        torch.testing.assert_close(one[0], whole[n])


# --- captions -----------------------------------------------------------------------------------


def test_bleu() -> None:
    """By hand: 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 of four words."""
    captioning = import_module("captioning")
    truth = [["the", "cat", "sat", "on", "the", "mat"]]
    assert captioning.bleu(truth, truth) == pytest.approx(1)
    found = captioning.bleu([["the", "cat", "sat", "on", "a", "mat"]], truth)
    assert found == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    shorter = captioning.bleu([["the", "cat", "sat", "on"]], truth)
    assert shorter == pytest.approx(np.exp(1 - 6 / 4))
    assert captioning.bleu([["dog"]], truth) == 0


def test_commonest_name() -> None:
    captioning = import_module("captioning")
    names = [name.split() for name in ("A B", "A B", "A C", "D")]
    assert captioning.commonest_name(names) == ["A", "B"]
    assert captioning.words_right([["A", "B"]], [["A", "C", "D"]]) == pytest.approx(1 / 3)


def test_captions_word_by_word() -> None:
    """The best words are those that the model scores best when it reads them."""
    captioning = import_module("captioning")
    vocabulary = [*captioning.SPECIAL, "A", "B", "C"]
    model = captioning.Captioner(rnn.LSTM, len(vocabulary), 8).double().eval()
    images = torch.rand(3, 1, captioning.SIZE, captioning.SIZE, dtype=torch.float64)
    names, attention = captioning.caption(model, images, vocabulary, longest=4)
    assert attention.shape == (4, 3, captioning.PLACES**2)
    torch.testing.assert_close(attention.sum(2), torch.ones(4, 3, dtype=torch.float64))
    for image, name in zip(images, names):
        words = captioning.encode_names([name], vocabulary)[0]
        scores = model(image[None], words[:-1, None])[:, 0]
        scores[:, captioning.UNKNOWN] = -torch.inf
        best = scores.argmax(1)
        assert best[: len(name)].tolist() == words[1 : len(name) + 1].tolist()


# --- memory -------------------------------------------------------------------------------------


def test_problems_of_memory() -> None:
    long_memory = import_module("long_memory")
    generator = torch.Generator().manual_seed(0)
    x, answer = long_memory.adding_batch(20, 5, generator)
    assert x.shape == (20, 5, 2)
    for column, total in zip(x.unbind(1), answer[0, :, 0]):
        marked = column[column[:, 1] == 1, 0]
        assert len(marked) == 2
        torch.testing.assert_close(marked.sum(), total)
    x, symbols = long_memory.copy_batch(20, 5, generator)
    shown = x.argmax(2)
    assert torch.equal(shown[: long_memory.SHOWN], symbols)
    assert (shown[long_memory.SHOWN : -long_memory.SHOWN] == long_memory.SILENCE).all()
    assert (shown[-long_memory.SHOWN :] == long_memory.RECALL).all()


def test_chrono_keeps_more_of_the_gradient() -> None:
    """The first step gets more of it from the start."""
    long_memory = import_module("long_memory")
    by_name = {variant.name: variant for variant in long_memory.VARIANTS}
    problem = long_memory.PROBLEMS[1]
    x, answer = problem.batch(50, 8, torch.Generator().manual_seed(0))
    parts = []
    for name in ("RNN", "LSTM", "LSTM, chrono"):
        torch.manual_seed(0)
        layer = by_name[name].make(problem.inputs, 16, 50)
        model = long_memory.Model(layer, 16, problem.outputs, problem.answers)
        flow = rnn.gradient_flow(model, x, lambda y: problem.loss(y, answer)).norms["rnn.l0"]
        parts.append((flow[0] / flow[-1]).item())
    assert parts[0] < parts[2]
    assert parts[1] < parts[2]


@pytest.mark.parametrize("name", ["long_memory", "maze"])
def test_what_makes_its_data_takes_none(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        import_module(name).main(["--data", "x", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert "--data: this example makes its" in said.err
    assert len(said.err.splitlines()) == 1
    assert not said.out


# --- mazes --------------------------------------------------------------------------------------


def test_maze() -> None:
    """Who remembers the light wins all episodes; who turns left always, half of them."""
    maze = import_module("maze")
    world = maze.TMaze(200, 6, seed=0)
    remembered = np.zeros(200, dtype=int)
    ends = wins = 0
    for _ in range(60):
        seen = world.observe()
        assert (seen[:, 2:].sum(1) == 1).all()
        remembered[seen[:, 0] == 1] = maze.LEFT
        remembered[seen[:, 1] == 1] = maze.RIGHT
        actions = np.where(seen[:, 3] == 1, remembered, maze.FORWARD)
        reward, ended, won = world.step(actions)
        assert (reward[won] == 1).all() and (reward[~won] == 0).all()
        ends += ended.sum()
        wins += won.sum()
    assert ends > 1000
    assert wins == ends


def test_maze_that_is_given_up() -> None:
    maze = import_module("maze")
    world = maze.TMaze(3, 2, seed=0)
    limits = maze.PATIENCE * (world.length + 1)
    ended = np.zeros(3, dtype=bool)
    for time in range(1, limits.min() + 1):
        reward, ended, won = world.step(np.full(3, maze.LEFT))
        assert not won.any()
        assert reward == pytest.approx(-0.05)
        assert (ended == (limits == time)).all()
    assert ended.any()


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("memory", [True, False])
def test_policy_with_and_without_resets(cell: str, memory: bool) -> None:
    """The window in one call against torch.nn's layer, step by step with zeroed states."""
    maze = import_module("maze")
    training = import_module("training")
    policy = maze.Policy(training.layer(cell), 8, memory).double()
    twin = training.torch_twin(policy)
    seen = torch.randn(9, 4, maze.OBSERVATIONS, dtype=torch.float64)
    resets = torch.rand(9, 4) < 0.3
    state = None
    for _ in range(2):
        *found, state = policy(seen, state, resets)
        torch.testing.assert_close(
            found, [*twin(seen, None, resets)[:2]]
        ) if state is None else None
    states = torch.randn(1, 4, 8, dtype=torch.float64)
    state = (states, states.cos()) if cell == "lstm" else states
    ours = policy(seen, state, resets)
    theirs = twin(seen, state, resets)
    torch.testing.assert_close(ours, theirs)
    if not memory:
        scores = policy(seen[3:4], None, resets[3:4])[0]
        torch.testing.assert_close(ours[0][3:4], scores)


def test_returns_end_with_the_episode() -> None:
    maze = import_module("maze")
    player = maze.Player(
        maze.Policy(rnn.GRU, 4, memory=True), options(batch=2, corridor=3, window=3)
    )
    with torch.no_grad():
        player.policy.critic.weight.zero_()
        player.policy.critic.bias.fill_(10.0)
        rewards = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
        resets = torch.tensor([[True, True], [False, True], [False, False]])
        player.resets = torch.tensor([False, True])
        found = player.returns_of(rewards, resets)
    d = maze.DISCOUNT
    last = 3 + 10 * d
    expected = [[1 + d * (2 + d * last), 1.0], [2 + d * last, 2 + 3 * d], [last, 3.0]]
    torch.testing.assert_close(found, torch.tensor(expected))
