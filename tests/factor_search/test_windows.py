"""Windows of a search: random places outside those of validation, and texts that are too short."""

import tracemalloc

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tiny_search import SIZES

from longrope.factor_search.windows import RandomWindows, WindowsByRole, place_windows

BOS = 39


def listed(documents, length, held_out):
    """Return every place at which a window may start, by document; as earlier versions held it."""
    found = []
    for index, document in enumerate(documents):
        starts = np.arange(len(document) - length + 1)
        for where, start in held_out:
            if where == index:
                starts = starts[(starts + length <= start) | (starts >= start + length)]
        if len(starts):
            found.append((document, starts))
    return found


def held_out_of(kind, documents, length, random):
    if kind == "none":
        return []
    if kind == "disjoint":
        return place_windows(documents, length, int(random.integers(1, 8)), random)
    return [
        (index, int(start))
        for index, document in enumerate(documents)
        if len(document) >= length
        for start in random.integers(0, len(document) - length + 1, size=random.integers(5))
    ]


@pytest.mark.parametrize("kind", ["none", "disjoint", "overlapping"])
def test_random_windows_are_those_of_a_draw_from_all_free_places(kind):
    drawn = 0
    for seed in range(100):
        random = np.random.default_rng([seed, 1])
        length = int(random.integers(1, 14))
        sizes = random.integers(0, 80, size=random.integers(1, 7))
        documents = [torch.arange(n) + 1000 * i for i, n in enumerate(sizes.tolist())]
        held_out = held_out_of(kind, documents, length, random)
        free = listed(documents, length, held_out)
        windows = RandomWindows(documents, length, held_out, np.random.default_rng(seed))
        random, order = np.random.default_rng(seed), []
        for _ in range(20 if free else 0):
            order = order or random.permutation(len(free)).tolist()
            document, starts = free[order.pop()]
            start = int(starts[random.integers(len(starts))])
            assert windows.draw(1)[0].tolist() == document[start : start + length].tolist()
            drawn += 1
    assert drawn > 1000


def test_random_windows_of_a_large_document_take_no_memory_of_its_size():
    tokens = torch.zeros(1, dtype=torch.uint8).expand(1 << 24)
    tracemalloc.start()
    try:
        windows = RandomWindows([tokens], 64, [(0, 5), (0, 1 << 20)], np.random.default_rng(0))
        assert windows.draw(3).shape == (3, 64)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def drawn(documents, validation=None):
    randoms = [np.random.default_rng(seed) for seed in range(2)]
    model = tiny_models.build(**SIZES)
    return WindowsByRole.draw(model, documents, validation, 16, 2, *randoms, screened=0, bos=BOS)


@pytest.mark.parametrize("name", ["documents", "validation"])
def test_texts_that_are_too_short_without_their_bos_are_refused(name):
    short = torch.tensor([BOS, BOS, *range(14)])
    whole = torch.tensor([BOS, *range(15)])
    sets = {"documents": [whole], "validation": [whole]} | {name: [short, short]}
    expected = rf"^{name}: expected one of at least 15 tokens behind the BOS .* longest 14 tokens$"
    with pytest.raises(ValueError, match=expected):
        drawn(**sets)
    found = drawn(**sets | {name: [short, whole]})  # one with enough text is enough
    assert all((w == whole).all() for w in found.windows.values())
