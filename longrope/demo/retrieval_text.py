"""What the packaged retriever reads in training: texts that ask for what they said before.

Windows of three kinds, each byte with the weight of its loss: passkey prompts (`longrope.passkey`),
needles by name as in RULER's niah tasks, and strings that come again. What nobody can know (a key
where it stands for the first time) weighs nothing, what must be copied weighs much, the text around
it little.
"""

from __future__ import annotations

import string

import numpy as np

from longrope.evaluation.passkey import FILLER, KEY, QUESTION, TASK

#: Weights of the loss: of text, of what was said before, and of the answer to a passkey prompt.
TEXT, COPIED, ANSWER = 0.1, 1.0, 3.0
#: Shares of passkey prompts, needles and repeated strings; the first for windows below 256 bytes.
SHORT_MIX, LONG_MIX = (0.3, 0.35, 0.35), (0.4, 0.35, 0.25)
#: Windows below this length leave out the task of a passkey prompt, which would fill them.
_WITH_TASK = 400
_LETTERS = np.array(list(string.ascii_lowercase))


class _Window:
    """Bytes with weights."""

    def __init__(self):
        self.ids: list[int] = []
        self.weights: list[float] = []

    def add(self, text: str, weight: float = TEXT) -> None:
        data = text.encode()
        self.ids += data
        self.weights += [weight] * len(data)


def windows(random: np.random.Generator, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return windows of bytes and the weights of their losses: int64 and float32 `[count, length]`.

    `length` is at least 128.
    """
    mix = LONG_MIX if length >= 256 else SHORT_MIX
    made = [
        (_passkey, _needles, _repeated)[i](random, length) for i in random.choice(3, count, p=mix)
    ]
    ids = np.array([window.ids for window in made], np.int64)
    return ids, np.array([window.weights for window in made], np.float32)


def _word(random: np.random.Generator, size: int | None = None) -> str:
    return "".join(random.choice(_LETTERS, size or random.integers(4, 9)))


def _name(random: np.random.Generator) -> str:
    return "-".join(_word(random) for _ in range(random.integers(1, 3)))


def _digits(random: np.random.Generator, size: int) -> str:
    return "".join(map(str, random.integers(0, 10, size)))


def _filler(random: np.random.Generator, size: int) -> str:
    """Return the paper's filler, its sentences in another order, or words that mean nothing."""
    unit = FILLER + " "
    if random.random() < 0.4:
        unit = "".join(random.permutation([part.strip(". ") + ". " for part in FILLER.split(". ")]))
    if random.random() < 0.3:
        unit = " ".join(_word(random) for _ in range(40)) + ". "
    text = unit * (size // len(unit) + 2)
    start = 0 if random.random() < 0.5 else int(random.integers(len(text) - size))
    return text[start : start + size]


def _passkey(random: np.random.Generator, length: int) -> _Window:
    key, window = _digits(random, 5), _Window()
    task = TASK + "\n" if length >= _WITH_TASK else ""
    before, between, after = f"\n{KEY}\n".split("{key}")
    line = len(before + between + after) + 2 * len(key)
    room = length - len(task) - line - len("\n" + QUESTION + " ") - len(key)
    place = int(random.integers(room + 1))
    window.add(task + _filler(random, place) + before)
    window.add(key, 0)
    window.add(between)
    window.add(key, COPIED)
    window.add(after + _filler(random, room - place) + "\n" + QUESTION + " ")
    window.add(key, ANSWER)
    return window


def _needles(random: np.random.Generator, length: int) -> _Window:
    """Numbers under names, in filler, and then each of them again, in another order."""
    hidden, asked = "One of the special magic numbers for {} is: ", (
        "The special magic number for {} mentioned in the provided text is "
    )  # fmt: skip
    pairs: list[tuple[str, str]] = []
    room = length
    while len(pairs) < 6:
        name, number = _name(random), _digits(random, 7)
        room -= len(hidden.format(name) + asked.format(name)) + 2 * len(number + ".\n")
        if room < 0:
            break
        pairs.append((name, number))
    window, gaps = _Window(), []
    used = sum(
        len(hidden.format(name) + asked.format(name)) + 2 * len(number + ".\n")
        for name, number in pairs
    )
    gaps = random.multinomial(length - used, np.full(len(pairs) + 1, 1 / (len(pairs) + 1)))
    for (name, number), gap in zip(pairs, gaps, strict=False):
        window.add(_filler(random, int(gap)) + hidden.format(name))
        window.add(number, 0)
        window.add(".\n")
    window.add(_filler(random, int(gaps[-1])))
    for index in random.permutation(len(pairs)):
        name, number = pairs[index]
        window.add(asked.format(name))
        window.add(number, COPIED)
        window.add(".\n")
    return window


def _repeated(random: np.random.Generator, length: int) -> _Window:
    text, window = _word(random, int(random.integers(8, min(64, length // 2)))), _Window()
    while len(window.ids) < length:
        window.add(text, COPIED if window.ids else 0)
        window.add(_word(random, int(random.integers(1, 40))) + " ", 0)
    window.ids, window.weights = window.ids[:length], window.weights[:length]
    return window
