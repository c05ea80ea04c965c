"""Which heads want which factors: how far each looks, beside what a search by head has found.

How far a head looks is measured on test documents with the shared factors that the search began
with, so that it is no result of the search: the share of its attention on tokens farther back than
the original window, of queries in the second half of the target's. Beside it are the factors of the
last tier over those shared ones: the attention factor, and the mean of log2 lambda over the pairs
that turn between once in the target's window and eight times in the original one. Query heads of
one key head are taken together. The last lines are Spearman's rank correlations; with the factors
of more searches, of other documents, also those between the searches.

    python benchmarks/head_roles.py --factors RUN/factors.json OTHER_RUN/factors.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from search_comparison import load, parser

import longrope


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = parser(__doc__.splitlines()[0], samples=3)
    p.add_argument(
        "--factors", type=Path, required=True, nargs="+", help="of searches with per='head'"
    )
    return p.parse_args()


@torch.no_grad()
def far_attention(model: torch.nn.Module, shared, documents) -> np.ndarray:
    """Return the share of attention beyond the original window, by layer and key head."""
    longrope.apply(model, shared)
    model.set_attn_implementation("eager")  # which returns the weights
    query = torch.arange(shared.target_length)
    far = query[:, None] - query >= shared.original_length
    shares = []
    for document in documents:
        ids = torch.as_tensor(document)[None, : shared.target_length]
        weights = model(ids, output_attentions=True, use_cache=False).attentions
        shares.append([
            (layer[0] * far).sum(-1)[:, shared.target_length // 2 :].mean(-1).tolist()
            for layer in weights
        ])  # fmt: skip
    longrope.remove(model)
    by_query_head = np.mean(shares, axis=0)
    layers, keys = len(by_query_head), model.config.num_key_value_heads
    return by_query_head.reshape(layers, keys, -1).mean(-1)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's correlation of values without ties."""
    ranks = (np.argsort(np.argsort(values.ravel())) for values in (one, other))
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    """Measure and print a table."""
    args = arguments()
    own, *others = map(longrope.RescaleFactors.load, args.factors)
    if any(found.shared is None for found in (own, *others)):
        raise SystemExit("--factors: expected factors by head beside the set that they began with")
    model, documents = load(args)
    far = far_attention(model, own.shared.factors, documents(args.seeds[0])[2])
    turns = own.base_inv_freq() / (2 * np.pi)
    pairs = (turns * own.target_length > 1) & (turns * own.original_length < 8)

    def wanted(found: longrope.RescaleFactors) -> tuple[np.ndarray, np.ndarray]:
        shared = found.shared.factors
        stretch = np.log2(found.lambdas / shared.lambdas)[..., pairs].mean(-1)
        return found.attention_factor / shared.attention_factor, stretch

    strength, stretch = wanted(own)
    print(f"{pairs.sum()} of {len(pairs)} pairs\n")
    print("| layer | head | attention beyond | attention factor | log2 lambda |")
    print("| --- " * 5 + "|")
    for layer, head in np.ndindex(far.shape):
        at = layer, head
        print(f"| {layer} | {head} | {far[at]:.3f} | {strength[at]:.3f} | {stretch[at]:+.3f} |")
    told = {"attention beyond": (far, far)}
    told |= {str(path): wanted(other) for path, other in zip(args.factors[1:], others, strict=True)}
    for name, (strengths, stretches) in told.items():
        print(
            f"\nrank correlation with {name}: attention factor "
            f"{rank_correlation(strengths, strength):+.2f}, "
            f"log2 lambda {rank_correlation(stretches, stretch):+.2f}"
        )


if __name__ == "__main__":
    main()
