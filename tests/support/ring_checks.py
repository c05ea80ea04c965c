"""What ranks of a job compute in a ring, beside the same without one."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from longrope import ops
from longrope.distributed import ranks
from longrope.distributed.ring import RingAttention
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.sharded import ShardedEvaluator
from longrope.patching import rope_settings
from support import tiny_models

#: Attention by name: tokens, heads of queries and of keys, dtype, and options.
ATTENTIONS = {
    "causal": (37, 4, 2, torch.float64, {}),
    "even chunks": (64, 2, 2, torch.float64, {"scale": 0.3}),
    "one token a chunk": (8, 4, 1, torch.float64, {}),
    "window": (41, 4, 2, torch.float64, {"window": 7}),
    "window of one": (41, 2, 1, torch.float64, {"window": 1}),
    "softcap": (37, 4, 4, torch.float64, {"softcap": 0.7}),
    "not causal": (37, 4, 2, torch.float64, {"causal": False}),
    "float32": (37, 4, 2, torch.float32, {"window": 20}),
    "bfloat16": (37, 4, 2, torch.bfloat16, {}),
}
#: Models by name: kind, and changes of its configuration.
MODELS = {
    "llama": ("llama", {}),
    "mistral, sliding window": ("mistral", {"sliding_window": 12}),
    "qwen2, sliding window in one layer": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "a head with a scale": ("llama", {"scaled": True}),
}  # fmt: skip
#: Evaluations by name: tokens of a window, rows of a batch, last tokens scored, blocks.
EVALUATIONS = {
    "even": (64, 4, None, 1),
    "uneven": (53, 100, None, 3),
    "last tokens": (37, 5, 4, 2),
}


@ranks.on_all_ranks
def run() -> dict:
    """Return the largest differences, by name."""
    job = ranks.current()
    found = {name: _attention_error(job, *case) for name, case in ATTENTIONS.items()}
    for name, (kind, changes) in MODELS.items():
        for how, case in EVALUATIONS.items():
            found[f"{name}: {how}"] = _evaluation_error(job, kind, dict(changes), *case)
    return found


def _attention_error(job, length, heads, key_heads, dtype, options) -> float:
    random = torch.Generator().manual_seed(length)
    q = torch.randn(2, heads, length, 16, generator=random, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, 2, key_heads, length, 16, generator=random, dtype=torch.float64).to(dtype)
    ring = RingAttention(job, length)
    mine = ring.positions
    out = ring(q[:, :, mine], k[:, :, mine], v[:, :, mine], **options)
    assert out.dtype == dtype
    whole = ops.reference.attention(q.double(), k.double(), v.double(), **options)
    return (out.double() - whole[:, :, mine]).abs().max().item()


def _evaluation_error(job, kind, changes, length, rows, last_tokens, blocks) -> float:
    scaled = changes.pop("scaled", False)
    model = tiny_models.build(kind, **changes)
    if scaled:  # more than a matrix product: logits are needed
        model.lm_head.register_forward_hook(lambda module, arguments, output: output * 1.5)
    options = SearchOptions(target_length=length, attention_factor="yarn")
    problem = Problem.of(rope_settings(model), options)
    random = np.random.default_rng(0)
    candidates = [
        dataclasses.replace(candidate, start_tokens=start_tokens)
        for candidate, start_tokens in zip(problem.seeds().values(), (0, 5, 20), strict=False)
    ]
    windows = torch.from_numpy(random.integers(1, 64, (2, length)))
    whole = PopulationEvaluator(model, problem.factors, rows, last_tokens)
    shared = ShardedEvaluator(model, problem.factors, rows, last_tokens, job)
    expected, counts = whole.block_sums(candidates, windows, blocks)
    sums, same_counts = shared.block_sums(candidates, windows, blocks)
    assert same_counts.equal(counts)
    assert len(set(job.gather(tuple(sums.flatten().tolist())))) == 1  # the same bits on all
    means = (expected / counts).flatten()
    assert means.std() > 1e-3  # candidates and windows matter
    return ((sums / counts).flatten() - means).abs().max().item()
