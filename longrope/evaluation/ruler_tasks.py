"""The prompts of RULER's six synthetic tasks (arXiv 2404.06654), made locally.

Wording, counts and answer prefixes are those of RULER's own data scripts
(https://github.com/NVIDIA/RULER, Apache-2.0), one spelling mistake apart, so that instruct models
see what they see there; lines of variables stand on lines of their own. Random choices and, without
the package `wonderwords`, the words are ours. So scores are those of these six tasks and never of
"RULER", whose other seven need texts to be downloaded.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from longrope.evaluation.passkey import FILLER
from longrope.evaluation.ruler_words import single_words, words

#: From this length on the words to be counted are as frequent as RULER's for long prompts.
_LONG = 4096
#: Names of a chain of variables: the one with the value, and 4 hops.
_CHAIN = 5
_COMMON = 10
_CAPITALS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


class Sample(NamedTuple):
    """A prompt up to the answer, and the strings that a right answer contains."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """How one task makes prompts.

    `make(units, length, random)` gives one with so many units (of noise, or words) for prompts of
    `length` tokens. `least` is the fewest units, and `new_tokens` how many an answer may have.
    """

    make: Callable[[int, int, np.random.Generator], Sample]
    new_tokens: int
    least: int


def _niah(
    units: int, random: np.random.Generator, kind: str, name: Callable, value: Callable, noise: bool
) -> Sample:
    """Hide one needle among lines of noise, or among other needles."""
    query, answer = name(random), value(random)

    def needle(key: str, hidden: str) -> str:
        return f"One of the special magic {kind}s for {key} is: {hidden}."

    def other() -> str:
        while (key := name(random)) == query:
            pass
        return needle(key, value(random))

    lines = [FILLER if noise else other() for _ in range(units)]
    lines.insert(int(random.integers(units)), needle(query, answer))
    context = "\n".join(lines)
    return Sample(
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic "
        f"{kind} for {query} mentioned in the provided text? The special magic {kind} for {query} "
        "mentioned in the provided text is",
        (answer,),
    )


def _word(random: np.random.Generator) -> str:
    adjectives, nouns, _ = words()
    return f"{random.choice(adjectives)}-{random.choice(nouns)}"


def _number(random: np.random.Generator) -> str:
    return str(random.integers(10**6, 10**7))


def _uuid(random: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=random.bytes(16), version=4))


def _single(units: int, length: int, random: np.random.Generator) -> Sample:
    return _niah(units, random, "number", _word, _number, noise=True)


def _multikey_words(units: int, length: int, random: np.random.Generator) -> Sample:
    return _niah(units, random, "number", _word, _number, noise=False)


def _multikey_uuids(units: int, length: int, random: np.random.Generator) -> Sample:
    return _niah(units, random, "uuid", _uuid, _uuid, noise=False)


def _chain(units: int, letters: int, random: np.random.Generator) -> tuple[str, list[str]]:
    """Return the question about a chain of variables in noise, and their names."""
    names: list[str] = []
    while len(names) < _CHAIN:
        name = "".join(random.choice(_CAPITALS, letters))
        if name not in names:
            names.append(name)
    value = int(random.integers(10000, 99999))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)]
    context = [FILLER] * units
    places = np.sort(random.choice(units, _CHAIN, replace=False))
    for number, (place, line) in enumerate(zip(places, lines, strict=True)):
        context.insert(int(place) + number, line)
    listed = "\n".join(context)
    return (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{listed}\nQuestion: Find all variables that are assigned the value {value} in the text "
        "above. Answer: According to the chain(s) of variable assignment in the text above, "
        f"{_CHAIN} variables are assigned the value {value}, they are:"
    ), names


def _variables(units: int, length: int, random: np.random.Generator) -> Sample:
    example, answer = _chain(_CHAIN, 3, random)
    question, names = _chain(units, 5, random)
    return Sample(f"{example} {' '.join(answer)}\n\n{question}", tuple(names))


def _numbered(items: list[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, 1))


def _common(units: int, often: int, seldom: int, random: np.random.Generator) -> tuple[str, list]:
    """Return the question about the most common of `units` words, and these."""
    known = single_words()
    chosen: dict[str, None] = {}
    if units <= len(known):
        chosen = dict.fromkeys(random.choice(known, units, replace=False).tolist())
    while len(chosen) < units:  # longer lists than there are words have pairs of them
        chosen[_word(random)] = None
    common, uncommon = list(chosen)[:_COMMON], list(chosen)[_COMMON:]
    listed = random.permutation(common * often + uncommon * seldom).tolist()
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{_numbered(listed)}\nQuestion: What are the "
        f"{_COMMON} most common words in the above list? Answer: The top {_COMMON} words that "
        "appear most often in the list are:"
    ), common


def _common_words(units: int, length: int, random: np.random.Generator) -> Sample:
    long = length >= _LONG
    example, answer = _common(*((40, 10, 3) if long else (20, 3, 1)), random)
    question, common = _common(units, *((30, 3) if long else (6, 1)), random)
    return Sample(f"{example} {_numbered(answer)}\n{question}", tuple(common))


def _frequent_words(units: int, length: int, random: np.random.Generator) -> Sample:
    coded: dict[str, None] = {}
    while len(coded) < max(4, length // 50):
        coded["".join(random.choice(_LETTERS, 6))] = None
    vocabulary = ["...", *list(coded)[1:]]  # the most frequent is noise
    counts = (units / (np.arange(1, len(vocabulary) + 1) ** 2 * (math.pi**2 / 6))).astype(int)
    text = " ".join(random.permutation(np.repeat(vocabulary, counts)))
    return Sample(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {text}\nQuestion: Do not provide any explanation. "
        "Please ignore the dots '....'. What are the three most frequently appeared words in the "
        "above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:",
        tuple(vocabulary[1:4]),
    )


#: By name, with RULER's numbers of new tokens. Fewer units would leave a task without its point:
#: a haystack, a place for each line of the chain, ranks 2 to 5 with different counts.
TASKS = {
    "niah_single_1": Task(_single, 128, 1),
    "niah_multikey_2": Task(_multikey_words, 128, 1),
    "niah_multikey_3": Task(_multikey_uuids, 128, 1),
    "vt": Task(_variables, 30, _CHAIN),
    "cwe": Task(_common_words, 120, 2 * _COMMON),
    "fwe": Task(_frequent_words, 50, 60),
}
RULER_TASKS = tuple(TASKS)
