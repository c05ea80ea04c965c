"""Ring attention, and windows sharded over ranks, beside the whole."""

import pytest
import torch
from support import ring_checks

from longrope import ops
from longrope.distributed.ranks import Ranks
from longrope.distributed.ring import RingAttention, visible, zigzag
from longrope.ops.reference.attention import visible_keys

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = pytest.mark.parametrize("size", [2, 4])


class Replayed(Ranks):
    """One rank of a ring whose other ranks' keys and values are known."""

    def __init__(self, rank, size, held):
        self.rank, self.size, self.held, self.step = rank, size, held, 0

    def pass_on(self, outgoing, incoming):
        torch.testing.assert_close(outgoing, self.held[(self.rank - self.step) % self.size])
        self.step += 1
        incoming.fill_(torch.nan)  # until it was waited for
        arrived = self.held[(self.rank - self.step) % self.size]
        return lambda: incoming.copy_(arrived)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_zigzag_covers_every_position_once_and_balances_causal_work(size):
    for length in (2 * size, 2 * size + 1, 100, 101):
        shares = zigzag(length, size)
        chunks = [chunk for share in shares for chunk in share]
        assert sorted(p for chunk in chunks for p in chunk) == list(range(length))
        lengths = {len(chunk) for chunk in chunks}
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 1
    work = [sum(p + 1 for chunk in share for p in chunk) for share in zigzag(240 * size, size)]
    assert len(set(work)) == 1


def test_what_a_chunk_sees_is_what_the_mask_says():
    """Every pair of short chunks: all, some or none, and never more is computed than needed."""
    for causal in (True, False):
        for window in (None, 1, 2, 3, 5, 9):
            whole = torch.zeros(1, 1, 12, 1)
            mask = visible_keys(whole, whole, causal=causal, window=window)[0]
            chunks = [range(a, b) for a in range(0, 12, 2) for b in range(a + 1, min(a + 4, 12))]
            for queries in chunks:
                for keys in chunks:
                    if queries != keys and set(queries) & set(keys):
                        continue
                    seen = visible(queries, keys, causal, window)
                    expected = mask[queries.start : queries.stop, keys.start : keys.stop]
                    if seen is None:
                        assert not expected.any()
                        continue
                    got = visible_keys(
                        whole[:, :, : len(queries)], whole[:, :, : len(keys)], **seen
                    )[0]
                    assert torch.equal(got, expected)
                    assert expected.any()
                    assert seen["causal"] is (causal and keys[-1] > queries[0])
                    assert ("window" in seen) <= (not expected.all())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [10, 23, 40])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 0.5}, {"causal": False}])
def test_a_ring_of_any_size_equals_the_reference(size, length, options):
    q = torch.randn(2, 4, length, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, length, 8, dtype=torch.float64)
    whole = ops.reference.attention(q, k, v, **options)
    mine = [RingAttention(Replayed(r, size, []), length).positions for r in range(size)]
    held = [torch.stack([k, v])[..., p, :] for p in mine]
    for rank in range(size):
        ring = RingAttention(Replayed(rank, size, held), length)
        out = ring(q[:, :, mine[rank]], *held[rank], **options)
        torch.testing.assert_close(out, whole[:, :, mine[rank]], rtol=0, atol=1e-12)
        assert ring.ranks.step == size - 1


@SIZES
@pytest.mark.parametrize("name", ring_checks.ATTENTIONS)
def test_ring_attention_of_a_job_equals_the_reference(ranks, name, size):
    dtype = ring_checks.ATTENTIONS[name][3]
    # One rounding of results of the size of 1 in bfloat16.
    most = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    for rank in ranks("rings", size):
        assert rank[name] <= most


@SIZES
@pytest.mark.parametrize("how", ring_checks.EVALUATIONS)
@pytest.mark.parametrize("model", ring_checks.MODELS)
def test_a_sharded_evaluation_equals_the_whole(ranks, model, how, size):
    for rank in ranks("rings", size):
        assert rank[f"{model}: {how}"] <= 1e-5


@SIZES
def test_a_sharded_search_finds_nearly_what_one_process_finds(ranks, alone, size):
    expected = alone[1]["evolution"]["history"]
    for rank in ranks("searches", size):
        history = rank["sharded"]["history"]
        assert history == ranks("searches", size)[0]["sharded"]["history"]
        # Rounding may turn two candidates round later; the first population is the same.
        for one, other in zip(history[:6], expected[:6], strict=True):
            assert one["lambdas"] == other["lambdas"]
            assert one["nll"] == pytest.approx(other["nll"], abs=1e-5)
