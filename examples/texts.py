"""Texts for the translation example: message catalogues, pieces of words, and how alike two texts
are."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

PADDING, UNKNOWN, BEGIN, END = range(4)
WORD = re.compile(r" ?(?:%\(\w+\)\w|\{\w*\}|\w+|[^\w ])")


class Pair(NamedTuple):
    source: str
    target: str


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


def words_at_place(translations: Sequence[str], references: Sequence[str]) -> float:
    """The share of the references' words that are at the same place in the translations."""
    pairs = [(a.split(), b.split()) for a, b in zip(translations, references)]
    right = sum(x == y for a, b in pairs for x, y in zip(a, b))
    return right / max(sum(len(b) for _, b in pairs), 1)


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
