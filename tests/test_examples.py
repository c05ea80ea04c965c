"""Every script in examples/ runs on the packaged model, at small sizes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from support import tiny_models
from support.byte_tokenizer import byte_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")


@pytest.fixture
def example(monkeypatch, one_thread):
    """Import a script as `python examples/NAME.py` does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in (*SCRIPTS, "common"):
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_says_what_a_real_model_needs(name, example):
    assert "What a real model needs:" in example(name).__doc__
    assert "GiB" in example(name).__doc__ and "FLOP" in example(name).__doc__


def test_many_shot(example, capsys):
    found = example("many_shot").main(["--target", "512", "--questions", "3"])
    assert list(found) == [1, 4, 16] and all(0 <= share <= 1 for share in found.values())
    assert "3 labels; guessing is right in 33%" in capsys.readouterr().out


def test_many_shot_reads_a_task(example, tmp_path):
    """Of two labels the one that every example has is the likelier."""
    lines = [f"item{i}\tyes" for i in range(40)] + ["other1\tno"]
    (tmp_path / "task.tsv").write_text("\n".join(lines))
    module = example("many_shot")
    reader = module.common.load(module.common.parser("x").parse_args(["--target", "512"]))
    task = module.read(tmp_path / "task.tsv")
    assert module.accuracy(reader, task[:20], task[30:34], ["no", "yes"]) == 1
    (tmp_path / "broken.tsv").write_text("no label")
    with pytest.raises(SystemExit, match="--data: expected lines of text, a tab and a label"):
        module.read(tmp_path / "broken.tsv")


def test_document_qa(example, capsys):
    module = example("document_qa")
    found = module.main(["--target", "512", "--new-tokens", "10"])
    printed = capsys.readouterr().out
    assert module.QUESTION + found in printed
    assert ("\nright" in printed) == (module.NUMBER in found)
    assert module.NUMBER in module.default_document(300)[: 300 // 10 + 40]


def test_summarise_book_cuts_what_does_not_fit(example, capsys, tmp_path):
    (tmp_path / "book.txt").write_text("It was a bright cold day in April. " * 30)
    flags = ["--target", "512", "--new-tokens", "5", "--book", str(tmp_path / "book.txt")]
    example("summarise_book").main(flags)
    printed = capsys.readouterr().out
    assert "The document has 1050 tokens; its first" in printed
    assert "507 tokens: " in printed  # the window less the new tokens


def test_the_dialogue_computes_nothing_twice(example, capsys):
    flags = ["--target", "1024", "--tool-tokens", "150", "--reply-tokens", "8"]
    found = example("agent_dialogue").main(flags)
    assert found.length == found.computed > 800
    assert found.crossings == [256, 512]
    assert found.difference < 1e-3
    assert "Factors by length would compute 768 tokens again" in capsys.readouterr().out


def test_a_chat_model_gets_its_template(example, tmp_path):
    tiny_models.build(vocab_size=256, pad_token_id=None).save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ '=' }}"
    tokenizer.save_pretrained(tmp_path / "model")
    common = example("common")
    flags = ["--model", str(tmp_path / "model")]
    reader = common.load(common.parser("x").parse_args(flags))
    assert reader.window == 8 * tiny_models.ORIGINAL
    assert reader.tokenizer.decode(reader.prompt("hello")) == "<hello>="
    with pytest.raises(SystemExit, match="--target: expected more than the model's window, 32"):
        common.load(common.parser("x").parse_args([*flags, "--target", "32"]))


def test_a_wrong_path_is_one_sentence(example, monkeypatch):
    module = example("document_qa")
    monkeypatch.setattr(sys, "argv", ["document_qa.py", "--document", "nowhere.txt"])
    with pytest.raises(SystemExit, match=r"^document_qa\.py: .*nowhere\.txt"):
        module.common.run(module.main)
