"""From text to ids: long texts in pieces, what a tokenizer adds, the types of ids."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import longrope
from longrope.documents import Documents, tokens
from longrope.documents.checks import as_documents


def sample(size, seed=0):
    """Return text of words of some scripts, spaces and line ends."""
    random = np.random.default_rng(seed)
    words = [
        "the",
        "cat",
        "sat",
        "häuser",
        "你好世界",
        "🙂",
        "नमस्ते",
        "x_1",
        "==",
        "12345",
        "  ",
        "\n",
    ]
    return " ".join(words[i] for i in random.integers(len(words), size=size))


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet)


def whole_text():
    """Make one without pre-tokenizer and with a space before the text, as Llama 2 has."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(marks)
    return made, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], max_token_length=10)


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"])


def unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return made, trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"]
    )


@pytest.mark.parametrize("kind", [byte_level, whole_text, word_piece, unigram])
def test_a_long_text_has_the_tokens_of_the_whole(kind, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 1000)
    monkeypatch.setattr(tokens, "SHARED", 300)
    made, trainer = kind()
    made.train_from_iterator(sample(3000, seed=1).split("\n"), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    encode = tokens.Encoder(tokenizer)
    joints = []
    joint = tokens._joint
    monkeypatch.setattr(tokens, "_joint", lambda *a: joints.append(joint(*a)) or joints[-1])
    for text in (sample(4000), "a" * 5000, " " * 2500 + "x" + " " * 2500, "ab " * 3000):
        expected = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert encode(text).tolist() == expected
        assert encode(iter([text[:7], text[7:3000], text[3000:]])).tolist() == expected
    assert sum(found is not None for found in joints) > 10


def with_bos(before=("<s>",), after=()):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(90)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if before or after:
        made.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(name, vocabulary[name]) for name in {*before, *after}],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_what_the_tokenizer_adds_is_in_a_document_once(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("w1 w2", "<s> w1 w2"):
        path.write_text(text)
        found = longrope.load_data(path, with_bos())
        assert found[0].tolist() == [1, 4, 5] and found.bos == 1
    assert longrope.load_data(path, with_bos(after=("</s>",)))[0].tolist() == [1, 4, 5, 2]
    path.write_text("w1 w2")
    found = longrope.load_data(path, with_bos(before=()))
    assert found[0].tolist() == [4, 5] and found.bos is None
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "w1"}\n')
    with pytest.warns(UserWarning, match="left out 1 empty document"):
        assert [d.tolist() for d in longrope.load_data(tmp_path / "a.jsonl", with_bos())] == [
            [1, 4]
        ]


def test_what_is_known_of_bos_goes_with_the_list(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("w1 w2 w3")
    found = longrope.load_data(tmp_path, with_bos(), min_length=2)
    assert isinstance(found[1:], Documents) and found[1:].bos == 1
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again, Documents) and again.bos == 1
    assert longrope.load_data(tmp_path).bos is None
    # Nothing is known of a function, or of ids that were in a file.
    assert not hasattr(longrope.load_data(tmp_path, lambda text: [1]), "bos")
    (tmp_path / "ids.jsonl").write_text("[1, 2, 3]\n")
    assert not hasattr(longrope.load_data(tmp_path, with_bos()), "bos")


@pytest.mark.parametrize(("most", "kind"), [(255, "u1"), (256, "u2"), (65535, "u2"), (65536, "u4")])
def test_ids_take_the_smallest_type_that_holds_them(tmp_path, most, kind):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([0, most]))
    (document,) = longrope.load_data(path)
    assert document.dtype == np.dtype(kind)
    (checked,) = as_documents([document], vocab_size=most + 1)
    assert checked.element_size() == document.dtype.itemsize
    with pytest.raises(ValueError, match=f"token id {most} is outside"):
        as_documents([document], vocab_size=most)


def test_the_memory_for_a_long_line_does_not_grow_with_its_tokens(tmp_path):
    made, trainer = byte_level()
    made.train_from_iterator([sample(2000)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    text = sample(300_000).encode("ascii", "ignore").decode()
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}))
    tracemalloc.start()
    (document,) = longrope.load_data(path, tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The line, its text twice, and at most 40 MB for the pieces; all at once it were 200 a token.
    assert peak < 3 * path.stat().st_size + document.nbytes + 40e6
