"""The search of a ladder keeps to the memory that was planned for it."""

import pytest
import torch
from support.tiny_search import build_documents, build_model

import longrope
from longrope.evaluation.memory import BatchPlan
from longrope.evaluation.nll import NextTokenNLL
from longrope.factor_search import ladder, range_evaluator, run

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET, CHUNK = 64, 16


def search(**changes):
    options = {"samples": 2, "steps": 2, "ladder": True, "progress": False} | changes
    return longrope.search(build_model(), build_documents(), target_length=TARGET, **options)


@pytest.mark.parametrize("rows", [1, 4])
def test_no_tier_puts_more_tokens_into_a_pass_than_planned(monkeypatch, rows):
    monkeypatch.setattr(run, "plan_batches", lambda *_, **__: BatchPlan(rows, CHUNK))
    sizes, own = set(), NextTokenNLL.append

    def append(self, ids, start, cache):
        if not torch.is_grad_enabled():
            sizes.add(ids.numel())
        return own(self, ids, start, cache)

    monkeypatch.setattr(NextTokenNLL, "append", append)
    search(method="evolution", steps=None, population=8, iterations=1)
    assert max(sizes) == rows * CHUNK


def test_rows_of_a_range_share_the_tokens_and_the_keys_of_the_plan():
    rows = ladder.rows_of_range
    assert rows(2, None, 64, 16, 32) == 4
    assert rows(1, 2048, 65536, 256, 512) == 8
    assert rows(1, 2048, 65536, 32768, 65536) == 1
    assert rows(2, 1024, 4096, 1024, 2048) == 2


def test_prefixes_that_are_not_kept_are_gone_when_the_range_runs(monkeypatch):
    monkeypatch.setattr(ladder, "KEPT_SHARE", 0.0)
    counts, own = [], range_evaluator.Prefix.of_windows

    def of_windows(self, *args, **options):
        cache = own(self, *args, **options)
        counts.append(len(self._kept))
        return cache

    monkeypatch.setattr(range_evaluator.Prefix, "of_windows", of_windows)
    search()
    assert counts and not any(counts)
