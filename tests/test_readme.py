"""The code in the README runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.byte_tokenizer import byte_tokenizer
from typer.main import get_command

from longrope.cli.main import app

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def blocks():
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(found) == 3
    return found


def test_your_model(blocks, tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)
    tiny_models.build(vocab_size=256, pad_token_id=None).save_pretrained("path/to/model")
    byte_tokenizer().save_pretrained("path/to/model")
    Path("books").mkdir()
    for index in range(6):
        text = torch.randint(97, 123, (700,), dtype=torch.uint8).numpy().tobytes()
        Path(f"books/{index}.txt").write_bytes(text)
    names: dict = {}
    exec(blocks[0], names)
    printed = [float(line) for line in capsys.readouterr().out.split("\n") if line]
    assert len(printed) == 2 and all(p > 1 for p in printed)
    assert names["result"].factors.target_length == 8 * tiny_models.ORIGINAL
    assert Path("run/factors.json").is_file()


def test_kernels(blocks):
    names: dict = {}
    exec(blocks[1], names)
    whole = names["ops"].attention(
        names["q"],
        names["ops"].rerotate(names["k"], names["positions"], names["pi"], names["yarn"]),
        names["v"],
    )
    torch.testing.assert_close(names["out"], whole, rtol=1e-4, atol=1e-4)
    assert names["nll"].shape == (99,)


def test_a_model_of_your_own(blocks, tmp_path, monkeypatch, one_thread):
    """At a length for a CPU: benchmarks/readme_example.py runs the whole where it fits."""
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    Path("books/0.txt").write_text("It was a bright cold day in April. " * 20)
    code, target = blocks[2], "2048 * 1024"
    assert code.count(target) == 2 and code.count("base_length=4096") == 1
    code = code.replace(target, "1024").replace("base_length=4096", "base_length=256")
    names: dict = {}
    with pytest.warns(UserWarning, match="random weights"):
        exec(code, names)
    assert names["output"].shape == (2, 1024, 512)
    assert names["model"].tiers.limits == (256, 512, 1024)


ROOT = README.parent
COMMANDS = get_command(app).commands


@pytest.mark.parametrize(
    "path",
    [*sorted(ROOT.glob("docs/*.md")), README, ROOT / ".ci/gpu_check.sh"],
    ids=lambda p: p.name,
)
def test_commands_have_the_options_that_they_are_shown_with(path):
    text = path.read_text().replace("\\\n", " ")
    for name, rest in re.findall(rf"longrope ({'|'.join(COMMANDS)})\b([^\n`]*)", text):
        known = {option for p in COMMANDS[name].params for option in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= known | {"--help"}, name + rest
