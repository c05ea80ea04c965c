"""Passkey beyond the window, without fine-tuning: `python benchmarks/retrieval.py --out DIR`.

The packaged retriever (window 512), or another model of bytes, at up to 8 times its window: as
loaded; YaRN for every position; and by position YaRN, Llama 3's rule, MrRoPE-Pro, and factors that
a search finds by the loss of keys in prompts of other seeds. docs/evaluation.md has the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import longrope
from longrope.demo import RETRIEVER
from longrope.evaluation.passkey import token_exact
from longrope.evaluation.prompts import PromptTokens
from longrope.factors.baselines import BASELINES

RATIO = 8
#: Prompts that the search sees: none of them is measured.
SEARCH_SEED, SEARCH_PROMPTS = 10_000, 24
#: The bytes of a key, which alone are scored there.
KEY_BYTES = 5


def searched(model, target: int, steps: int, out: Path) -> longrope.RescaleFactors:
    """Search factors by the loss of the keys of passkey prompts."""
    tokens = PromptTokens(None, model)
    documents = [
        np.array(token_exact(tokens, target, 1, 0, np.random.default_rng((SEARCH_SEED, i))).ids)
        for i in range(SEARCH_PROMPTS)
    ]
    return longrope.search(
        model, documents, target_length=target, last_tokens=KEY_BYTES, start_tokens=0,
        steps=steps, out=out, progress=True,
    ).factors  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="folder of the run")
    p.add_argument("--model", default=RETRIEVER, help="folder of a model of bytes")
    p.add_argument("--trials", type=int, default=50, help="prompts of each length")
    p.add_argument("--steps", type=int, default=40, help="steps of the search")
    args = p.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    rope = longrope.rope_settings(model)
    target = RATIO * rope.loaded_length
    names = ("yarn", "llama3", "mrrope-pro")
    rules = {name: BASELINES[name](**rope.lengths(target)) for name in names}
    sets = {"yarn, every position": rules["yarn"]}
    sets |= {name: factors.ladder() for name, factors in rules.items()}
    sets["position"] = searched(model, target, args.steps, args.out / "search").ladder()
    result = longrope.evaluate(
        model, [], lengths=[rope.loaded_length * 2**k for k in range(4)], factors=sets,
        out=args.out, tasks=["passkey"], trials=args.trials, progress=True,
    )  # fmt: skip
    print(result)


if __name__ == "__main__":
    main()
