"""Ring attention: a sequence over many ranks, each of which holds its share of the tokens.

The sequence is cut into `2 W` chunks for `W` ranks, and rank `r` holds chunks `r` and `2 W - 1 - r`
(zigzag): under a causal mask early chunks have few keys to attend and late ones many, and every
rank gets the same sum of both. Keys and values go around the ring of ranks in `W - 1` steps; while
one rank's are attended, the next ones travel. What the queries of a chunk see of each chunk of keys
is attention by itself, and the parts are merged by their log-sum-exp, which is exact.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from longrope import ops
from longrope.distributed.ranks import Ranks


def zigzag(length: int, size: int) -> list[tuple[range, range]]:
    """Return the positions of the two chunks of each of `size` ranks.

    The chunks cover `range(length)` and differ by at most one in length; `length >= 2 * size` gives
    every rank two.
    """
    ends = [length * chunk // (2 * size) for chunk in range(2 * size + 1)]
    chunks = [range(a, b) for a, b in itertools.pairwise(ends)]
    return [(chunks[rank], chunks[-1 - rank]) for rank in range(size)]


class RingAttention:
    """Attention over a sequence that the ranks share; every rank calls it for its own queries.

    Parameters
    ----------
    ranks
        The ranks of the ring.
    length
        Tokens of the whole sequence, at least `2 * ranks.size`.
    """

    def __init__(self, ranks: Ranks, length: int):
        self.ranks = ranks
        self.chunks = zigzag(length, ranks.size)

    @property
    def positions(self) -> Tensor:
        """The positions of this rank's tokens, int64 `[N]`, growing."""
        return torch.cat([torch.arange(c.start, c.stop) for c in self.chunks[self.ranks.rank]])

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Return what this rank's queries attend, `[B, H, N, D]`, in the dtype of q.

        Parameters
        ----------
        q, k, v
            `[B, H, N, D]`, `[B, Hk, N, D]`: of this rank's tokens, in the order of `positions`,
            queries and keys rotated. As `ops.attention` takes them.
        causal, window, scale, softcap
            As in `ops.attention`. A window's keys are counted in the whole sequence.
        """
        rank, size = self.ranks.rank, self.ranks.size
        options = {"scale": scale, "softcap": softcap}
        queries = list(zip(self.chunks[rank], _parts(q, self.chunks[rank]), strict=True))
        attended: list[tuple[Tensor, Tensor] | None] = [None, None]
        held = torch.stack([k, v])
        for step in range(size):
            source = (rank - step) % size
            if step < size - 1:
                coming = self.chunks[(source - 1) % size]
                arriving = held.new_empty(*held.shape[:-2], sum(map(len, coming)), q.shape[-1])
                wait = self.ranks.pass_on(held, arriving)
            keys, values = held
            for at, (these, query) in enumerate(queries):
                for those, key, value in zip(
                    self.chunks[source],
                    _parts(keys, self.chunks[source]),
                    _parts(values, self.chunks[source]),
                    strict=True,
                ):
                    seen = visible(these, those, causal, window)
                    if seen is None:
                        continue
                    out, lse = ops.attention(query, key, value, **seen, **options, return_lse=True)
                    out = out.to(lse.dtype)  # rounded to a low precision once, at the end
                    so_far = attended[at]
                    attended[at] = ops.merge_attention(*so_far, out, lse) if so_far else (out, lse)
            if step < size - 1:
                wait()
                held = arriving
        # A query sees itself, so that no chunk is left without a part.
        return torch.cat([out for out, _ in attended], dim=2).to(q.dtype)


def visible(queries: range, keys: range, causal: bool, window: int | None) -> dict | None:
    """Return how `ops.attention` is told what a chunk of queries sees of one of keys.

    None where it sees nothing. What the chunks' places decide already is left out.
    """
    first, last = queries[0], queries[-1]
    if causal and keys[0] > last:
        return None
    if window is not None and keys[-1] <= first - window:
        return None
    seen = {"causal": causal and keys[-1] > first, "query_start": first - keys[0]}
    if window is not None and keys[0] <= last - window:
        seen["window"] = window
    return seen


def _parts(x: Tensor, chunks: tuple[range, range]) -> tuple[Tensor, ...]:
    """Split the tokens `[B, H, N, D]` of a rank into its two chunks."""
    return x.split([len(chunk) for chunk in chunks], dim=2)
