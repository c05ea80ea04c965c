"""Token ids kept on disk: the same documents, without the tokenizer."""

from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longrope.documents import load_data
from longrope.documents.cache import TokenCache
from longrope.documents.tokens import Encoder


def tokenizer(words=("one", "two", "three")):
    ids = {word: number for number, word in enumerate(["[UNK]", *words])}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one two three " * 30)
    lines = [json.dumps({"text": text}) for text in ("two two", "three", "one one one")]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


@pytest.fixture
def never(monkeypatch):
    """Return a function after which no text is tokenised."""

    def from_now_on():
        def refuse(self, text):
            raise AssertionError("tokenised")

        monkeypatch.setattr(Encoder, "__call__", refuse)

    return from_now_on


def lists(documents):
    return [document.tolist() for document in documents]


def test_the_second_call_tokenises_nothing(files, tmp_path, never):
    plain = load_data(files, tokenizer())
    cache = tmp_path / "cache"
    first = load_data(files, tokenizer(), cache=cache)
    assert lists(first) == lists(plain) and len(list(cache.iterdir())) == 2
    os.rename(files / "a.txt", files / "aa.txt")  # the content counts
    never()
    again = load_data(files, tokenizer(), cache=cache)
    assert lists(again) == lists(plain) and again.bos is plain.bos
    assert {document.dtype for document in again} == {np.dtype(np.uint8)}


@pytest.mark.parametrize("change", ["content", "tokenizer", "field"])
def test_what_has_changed_is_tokenised_anew(files, tmp_path, change):
    cache, words, field = tmp_path / "cache", ("one", "two", "three"), "text"
    load_data(files / "b.jsonl.gz", tokenizer(), cache=cache)
    if change == "content":
        lines = json.dumps({"text": "one"})
        (files / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif change == "tokenizer":
        words = ("two", "one", "three")
    else:
        field = "other"
        line = json.dumps({"text": "one", "other": "two"})
        (files / "b.jsonl.gz").write_bytes(gzip.compress(line.encode()))
        load_data(files / "b.jsonl.gz", tokenizer(), cache=cache)
    options = {"text_field": field}
    expected = load_data(files / "b.jsonl.gz", tokenizer(words), **options)
    found = load_data(files / "b.jsonl.gz", tokenizer(words), cache=cache, **options)
    assert lists(found) == lists(expected)
    assert len(list(cache.iterdir())) == (3 if change == "field" else 2)


@pytest.mark.parametrize("name", ["ids.npy", "lengths.npy"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "an archive", "a broken archive"])
def test_a_damaged_entry_is_made_anew(files, tmp_path, never, name, damage):
    cache = tmp_path / "cache"
    plain = lists(load_data(files, tokenizer(), cache=cache))
    for entry in cache.iterdir():
        content = (entry / name).read_bytes()
        if damage == "gone":
            (entry / name).unlink()
        elif damage == "an archive":
            with (entry / name).open("wb") as file:
                np.savez(file, np.arange(3))
        elif damage == "a broken archive":
            (entry / name).write_bytes(b"PK\x03\x04" + content)
        elif damage == "cut":
            (entry / name).write_bytes(content[:-1])
        else:
            (entry / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert lists(load_data(files, tokenizer(), cache=cache)) == plain
    never()
    assert lists(load_data(files, tokenizer(), cache=cache)) == plain


def test_what_is_left_out_is_said_every_time(files, tmp_path):
    (files / "c.jsonl").write_text('{"text": "one two"}\n{"text": null}\n')
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out 1 null row"):
            load_data(files, tokenizer(), cache=tmp_path / "cache")


def test_bytes_functions_and_ready_made_ids_are_not_kept(files, tmp_path):
    cache = tmp_path / "cache"
    load_data(files, cache=cache)
    load_data(files, lambda text: [len(text)], cache=cache)
    np.save(files / "d.npy", np.arange(9))
    assert TokenCache(cache, Encoder(tokenizer()), "text").entry(files / "d.npy") is None
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(files, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="cache: cannot write to"):
        load_data(files, tokenizer(), cache=tmp_path / "cache")


def test_the_commands_name_their_option(files, tmp_path):
    from longrope.cli.inputs import load_documents

    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="--token-cache: cannot write to"):
        load_documents("DATA", files, tokenizer(), 1, token_cache=tmp_path / "cache")
    kept = load_documents("DATA", files, tokenizer(), 1, token_cache=tmp_path / "kept")
    assert lists(kept) == lists(load_data(files, tokenizer()))
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_special_tokens_that_are_split_are_another_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("one two three")
    whole, split = tokenizer(), tokenizer()
    for made in (whole, split):
        made.add_special_tokens({"additional_special_tokens": ["two three"]})
    split.split_special_tokens = True
    found = [
        lists(load_data(tmp_path / "a.txt", made, cache=tmp_path / "cache"))
        for made in (whole, split)
    ]
    assert found[0] != found[1] == lists(load_data(tmp_path / "a.txt", split))


def test_a_cache_among_the_documents_is_refused(files):
    for inside in (files, files / "cache"):
        with pytest.raises(ValueError, match=r"cache: expected a folder outside '.*texts', whose"):
            load_data(files, tokenizer(), cache=inside)
    for _ in range(2):  # hidden files are no documents
        assert len(load_data(files, tokenizer(), cache=files / ".cache")) == 4


@pytest.mark.parametrize("lengths", [np.int64(3), np.zeros((2, 2)), np.array([90.0, 1])])
def test_an_entry_of_another_shape_is_read_again(files, tmp_path, lengths):
    first = load_data(files / "a.txt", tokenizer(), cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    np.save(entry / "lengths.npy", lengths)
    again = load_data(files / "a.txt", tokenizer(), cache=tmp_path / "cache")
    assert lists(again) == lists(first)
