"""Many-shot in-context learning: accuracy by the number of examples in the prompt.

`python examples/many_shot.py [--model FOLDER] [--data TASK.tsv]`

A prompt is lines `text: label`, then a text without its label; the model's answer is the label with
the highest likelihood. Examples cost context, not training: what a long window buys is room for
hundreds of them. The default task is public names of Python's standard library, each a class, a
function or a constant, which the packaged model can tell apart after some examples of how.

What a real model needs: any base or chat model with a window that its examples fit, some 20 tokens
each for short texts: 6,000 examples in 128k tokens. The examples go through the model once for each
number of them, and every question reads their cache. For an 8B Llama at 128k tokens that is 16 GiB
of keys and values and 7e15 FLOP: half a minute on an H100, a day on a desktop's CPU.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import random
from pathlib import Path

import common
import torch

#: Modules whose public names are the default task.
MODULES = (
    "argparse", "ast", "asyncio", "calendar", "ctypes", "decimal", "email", "enum", "http", "json",
    "logging", "os", "pathlib", "pickle", "re", "shutil", "signal", "socket", "ssl", "stat",
    "statistics", "subprocess", "tarfile", "threading", "tokenize", "typing", "unittest", "zipfile",
)  # fmt: skip


def names() -> list[tuple[str, str]]:
    """Return public names of the standard library and their kinds, sorted."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name, value in vars(module).items():
            if name.startswith("_") or not 4 <= len(name) <= 16:
                continue
            if inspect.isclass(value):
                found[name] = "class"
            elif inspect.isroutine(value):
                found[name] = "function"
            elif isinstance(value, int):
                found[name] = "constant"
    return sorted(found.items())


def read(path: Path) -> list[tuple[str, str]]:
    """Return the texts and labels of a file of `text<TAB>label` lines."""
    pairs = [line.rsplit("\t", 1) for line in path.read_text().splitlines() if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise SystemExit(f"--data: expected lines of text, a tab and a label in {path}")
    return [(text, label) for text, label in pairs]


def balanced(task: list[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    """Return the task in random order, the labels in turns."""
    chance = random.Random(seed)
    by_label: dict[str, list[tuple[str, str]]] = {}
    for pair in chance.sample(task, len(task)):
        by_label.setdefault(pair[1], []).append(pair)
    rounds = zip(*by_label.values(), strict=False)
    return [pair for turn in rounds for pair in chance.sample(turn, len(turn))]


def likelihood(reader: common.Reader, cache, ids: list[int], scored: int) -> float:
    """Return the mean log-likelihood of the last `scored` tokens of `ids` behind a cache."""
    logits, _ = reader.step(ids, copy.deepcopy(cache), keep=scored + 1)
    found = logits[:-1].float().log_softmax(-1)
    return float(found.gather(-1, torch.tensor(ids[-scored:])[:, None].to(found.device)).mean())


def accuracy(reader: common.Reader, shots: list, questions: list, labels: list[str]) -> float:
    """Return the share of questions whose label is the likeliest after the examples."""
    encode = reader.tokenizer.encode
    prompt = encode("".join(f"{text}: {label}\n" for text, label in shots) or "\n")
    _, cache = reader.step(prompt)
    right = 0
    for text, label in questions:
        asked = encode(f"{text}:", add_special_tokens=False)
        answers = [encode(f" {one}\n", add_special_tokens=False) for one in labels]
        scores = [likelihood(reader, cache, asked + answer, len(answer)) for answer in answers]
        right += labels[scores.index(max(scores))] == label
    return right / len(questions)


def main(argv: list[str] | None = None) -> dict[int, float]:
    """Print and return accuracy by number of examples."""
    p = common.parser(__doc__)
    p.add_argument("--data", type=Path, help="lines of text, a tab and a label")
    p.add_argument("--questions", type=int, default=30)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    reader = common.load(args)
    task = balanced(names() if args.data is None else read(args.data), args.seed)
    labels = sorted({label for _, label in task})
    questions, examples = task[: args.questions], task[args.questions :]
    length = {pair: len(reader.tokenizer.encode(f"{pair[0]}: {pair[1]}\n")) for pair in task}
    room = reader.window - 2 * max(length.values())
    print(f"{len(labels)} labels; guessing is right in {1 / len(labels):.0%}")
    print(f"{'examples':>9}{'tokens':>8}{'right':>8}")
    found, shots = {}, 1
    while shots <= len(examples):
        tokens = sum(length[pair] for pair in examples[:shots])
        if tokens > room:
            break
        found[shots] = accuracy(reader, examples[:shots], questions, labels)
        print(f"{shots:>9}{tokens:>8}{found[shots]:>8.0%}")
        shots *= 4
    print(reader.costs(reader.window))
    return found


if __name__ == "__main__":
    common.run(main)
