"""`longrope.load_data`: files and folders to documents of token ids."""

import builtins
import json

import numpy as np
import pytest
import torch

import longrope
from longrope.documents import as_documents


def texts(documents):
    return [bytes(d.astype(np.uint8)).decode() for d in documents]


def test_a_text_file_is_one_document_of_utf8_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("héllo", encoding="utf-8")
    (document,) = longrope.load_data(path)
    assert document.dtype == np.uint8
    assert document.tolist() == list("héllo".encode())


def test_a_folder_is_read_in_the_order_of_its_paths_without_hidden_and_binary_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.py").write_text("first")
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_text("never")
    (tmp_path / ".git" / "config").write_text("never")
    (tmp_path / "image.bin").write_bytes(b"\x89PNG\0\0never")
    with pytest.warns(UserWarning) as said:
        assert texts(longrope.load_data(tmp_path)) == ["first", "second", "third"]
    assert [str(one.message) for one in said] == [
        "load_data: left out 1 file that is not text (image.bin), 1 empty document"
    ]


def test_jsonl_takes_objects_strings_and_token_ids(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [{"text": "one", "id": 3}, "two", "", {"input_ids": [5, 6]}, [7, 8, 9]]
    path.write_text("\n".join(json.dumps(line) if line else "" for line in lines))
    documents = longrope.load_data(path)
    assert texts(documents[:2]) == ["one", "two"]
    assert [d.tolist() for d in documents[2:]] == [[5, 6], [7, 8, 9]]


def test_jsonl_names_the_line_that_is_wrong(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: expected one JSON value a line"):
        longrope.load_data(path)
    path.write_text('{"text": "fine"}\n{"body": "other"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: expected text, .* field 'text'"):
        longrope.load_data(path)
    path.write_text('{"body": "other"}\n')
    assert texts(longrope.load_data(path, text_field="body")) == ["other"]


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": [1, 2]}), path)
    assert texts(longrope.load_data(path)) == ["one", "two"]
    with pytest.raises(ValueError, match="expected a column 'body', got"):
        longrope.load_data(path, text_field="body")
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        longrope.load_data(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"needs pyarrow \(pip install pyarrow\)"):
        longrope.load_data(path)


def test_tokenizers_and_functions_make_the_tokens(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a b a")

    class HuggingFaceTokenizer:
        def convert_ids_to_tokens(self): ...

        def __call__(self, text, add_special_tokens, verbose):
            assert not add_special_tokens
            assert not verbose
            return {"input_ids": [len(word) for word in text.split()]}

    assert longrope.load_data(path, HuggingFaceTokenizer())[0].tolist() == [1, 1, 1]
    words = longrope.load_data(path, lambda text: [ord(word) for word in text.split()])
    assert words[0].tolist() == [97, 98, 97]
    assert words[0].dtype == np.uint8
    with pytest.raises(ValueError, match="tokenizer: expected a tokenizer or a function, got str"):
        longrope.load_data(path, "gpt2")


def test_min_length_leaves_out_short_documents(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("abcdef")
    assert texts(longrope.load_data(tmp_path, min_length=4)) == ["abcdef"]
    with pytest.raises(ValueError, match=r"no document of at least 7 tokens .* the longest 6"):
        longrope.load_data(tmp_path, min_length=7)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: there is no file or folder '.*nowhere'"):
        longrope.load_data(tmp_path / "nowhere")


def test_as_documents_takes_tensors_arrays_and_lists():
    given = [torch.tensor([1, 2]), np.array([3, 4], np.int32), [5, 6]]
    documents = as_documents(given)
    assert [d.tolist() for d in documents] == [[1, 2], [3, 4], [5, 6]]
    assert all(d.dtype == torch.int64 for d in documents)


@pytest.mark.parametrize(
    ("documents", "sentence"),
    [
        ([], "documents: expected at least one document, got none"),
        ("text", "documents: expected a list of documents of token ids, got str"),
        (["text"], r"documents\[0\]: expected token ids, got text"),
        (torch.tensor([1, 2, 3]), r"documents\[0\]: expected 1-D integer token ids, got int64"),
        ([[1, 2], [[1, 2]]], r"documents\[1\]: .* got int64 \[1, 2\]"),
        ([[1, 2], [0.5, 1.0]], r"documents\[1\]: .* got float32 \[2\]"),
        ([[True, False]], r"documents\[0\]: .* got bool \[2\]"),
        ([[1, 2], object()], r"documents\[1\]: .* got object"),
        ([[1, 2], [1]], r"documents\[1\]: expected at least 2 tokens, got 1"),
        ([[1, 2], []], r"documents\[1\]: expected at least 2 tokens, got 0"),
        ([[1, 2], [3, 10]], r"documents\[1\]: token id 10 is outside .* vocabulary of 10"),
        ([[1, -2]], r"documents\[0\]: token id -2 is outside"),
    ],
)
def test_as_documents_refuses_with_one_sentence(documents, sentence):
    with pytest.raises(ValueError, match=sentence):
        as_documents(documents, vocab_size=10)


def test_what_a_tokenizer_returns_is_checked(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    for wrong in ([1.5, 2], [[1, 2]], ["a"]):
        with pytest.raises(ValueError, match="tokenizer: expected a list of token ids"):
            longrope.load_data(tmp_path, tokenizer=lambda text, wrong=wrong: wrong)


def test_json_ids_beyond_64_bits_and_lone_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [1, 99999999999999999999]}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected text"):
        longrope.load_data(path)
    path.write_text('{"text": "a\\ud800b"}\n')
    assert longrope.load_data(path)[0].tolist() == list(b"a?b")
