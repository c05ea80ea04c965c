"""Rows of training text."""

import itertools

import pytest
import torch

from longrope.extension.data import NO_TARGET, TrainingRows, check_enough

LENGTHS = (50, 7, 23, 12)
#: Every token says where it is from: document times 100 plus its place.
DOCUMENTS = [torch.arange(n) + 100 * i for i, n in enumerate(LENGTHS)]
BOS, EOS = 900, 901


def rows(length=20, count=200, seed=3, documents=DOCUMENTS, **options):
    return TrainingRows(documents, length, count, seed, **options)


def cuts(row):
    """Return the pieces of a row, by positions that start again."""
    starts = [i for i, p in enumerate(row["position_ids"].tolist()) if p == 0]
    ends = [*starts[1:], len(row["position_ids"])]
    return [row["input_ids"][a:b].tolist() for a, b in zip(starts, ends, strict=True)]


def test_a_row_is_a_window_of_one_document():
    seen = set()
    for row in rows():
        (tokens,) = cuts(row)
        assert tokens == list(range(tokens[0], tokens[0] + 20))
        assert row["targets"].tolist() == [*tokens[1:], NO_TARGET]
        assert row["position_ids"].tolist() == list(range(20))
        seen.add(tokens[0])
    # All places of both documents that hold a row: 31 and 4.
    assert seen == set(range(31)) | set(range(200, 204))


@pytest.mark.parametrize("packed", [False, True])
def test_a_later_stage_goes_on_behind_the_rows_of_those_before(packed):
    every, later = rows(packed=packed), rows(count=50, packed=packed, first=150)
    for index in range(50):
        assert later.pieces(index) == every.pieces(150 + index)


def test_rows_depend_on_the_seed_and_their_number_alone():
    made = rows(packed=True)
    again = rows(packed=True)
    for index in (17, 3):
        assert torch.equal(made[index]["input_ids"], again[index]["input_ids"])
    other = rows(packed=True, seed=4)
    assert any(not torch.equal(made[i]["input_ids"], other[i]["input_ids"]) for i in range(5))


@pytest.mark.parametrize("bos, eos", [(None, None), (BOS, EOS), (BOS, None), (None, EOS)])
def test_packed_rows_hold_every_token_of_every_epoch_once(bos, eos):
    made = rows(packed=True, bos=bos, eos=eos)
    stream = torch.cat([made[i]["input_ids"] for i in range(40)]).tolist()
    whole = [
        ([] if bos is None else [bos]) + d.tolist() + ([] if eos is None else [eos])
        for d in DOCUMENTS
    ]
    total = sum(map(len, whole))
    orders = []
    for epoch in range(len(stream) // total):
        tokens = stream[epoch * total : (epoch + 1) * total]
        matches = [
            order for order in itertools.permutations(range(4))
            if tokens == [t for i in order for t in whole[i]]
        ]  # fmt: skip
        assert len(matches) == 1
        orders += matches
    assert len(set(orders)) > 1


def test_packed_documents_start_again_and_predict_nothing_of_the_next():
    made = rows(packed=True, bos=BOS, eos=EOS)
    for row in itertools.islice(made, 30):
        pieces = cuts(row)
        assert sum(map(len, pieces)) == 20
        expected = [t for piece in pieces for t in (*piece[1:], NO_TARGET)]
        assert row["targets"].tolist() == expected
        for piece in pieces:
            text = [t for t in piece if t < BOS]
            assert text == list(range(text[0], text[0] + len(text))) if text else True
            assert BOS not in piece[1:]
            assert EOS not in piece[:-1]


@pytest.mark.parametrize("bos", [None, BOS])
def test_a_packed_document_that_ends_with_eos_gets_no_other(bos):
    ends = torch.tensor([EOS])
    texts = [torch.cat([DOCUMENTS[0], ends]), DOCUMENTS[1], torch.cat([DOCUMENTS[2], ends]), ends]
    texts = [text.to(torch.uint16) for text in texts]
    made = rows(packed=True, bos=bos, eos=EOS, documents=texts)
    plain = [*DOCUMENTS[:3], torch.arange(0)]
    expected = rows(packed=True, bos=bos, eos=EOS, documents=plain)
    for index in range(60):
        for name, values in expected[index].items():
            assert torch.equal(made[index][name], values)


def test_short_rows_hold_short_windows():
    made = rows(count=300, short_share=0.4, short_length=8, bos=BOS)
    short = 0
    for row in made:
        sizes = [len(piece) for piece in cuts(row)]
        assert sizes in ([20], [8, 8, 4])
        assert all(piece[0] == BOS for piece in cuts(row))
        short += len(sizes) > 1
    assert 90 < short < 150


def test_rows_say_what_they_are_made_of():
    made = rows(bos=BOS)
    begin = int(made[5]["input_ids"][1])
    assert made.names(5) == f"document {begin // 100} from token {begin % 100}"
    assert rows(packed=True, length=90).names(0).endswith("and others")


def test_documents_stay_what_they_are():
    texts = [torch.arange(60, dtype=torch.uint8)]
    made = rows(documents=texts)
    assert made.documents[0] is texts[0]
    assert made[0]["input_ids"].dtype == torch.int64


def test_too_little_text():
    with pytest.raises(ValueError, match="one of at least 51 tokens for stage x, got 4 documents"):
        check_enough(DOCUMENTS, 51, False, "x")
    check_enough(DOCUMENTS, 51, True, "x")
    with pytest.raises(ValueError, match=r"at least 93 tokens .* 92 tokens altogether"):
        check_enough(DOCUMENTS, 93, True, "x")
