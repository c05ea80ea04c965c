"""What an export carries, refuses and promises to other readers."""

from __future__ import annotations

import json
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import tiny_models
from support.tiny_models import ORIGINAL, TARGET, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import longrope
from longrope.checkpoints import hf, plan_export
from longrope.checkpoints.plan import HUGE
from longrope.checkpoints.source import shard_size

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def rope_of(folder):
    return json.loads((folder / "config.json").read_text())["rope_parameters"]


# --- what readers compute -----------------------------------------------------------------------


def vllm_tables(rope, head_dim, max_position):
    """Return vLLM's short and long tables `[positions, rotary_dim]`, cosines then sines.

    Restated from Phi3LongRoPEScaledRotaryEmbedding and get_rope of
    vllm/model_executor/layers/rotary_embedding (main, 2025-12): float32 throughout, neither
    `factor` nor `attention_factor` is read, both mscales fall back to a formula of the lengths.
    """
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    original = rope["original_max_position_embeddings"]
    usual = longrope.su_attention_factor(max_position / original, original)

    def table(rows, factors, mscale):
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
        factors = torch.tensor(factors, dtype=torch.float32)
        angles = torch.outer(
            torch.arange(rows, dtype=torch.float), 1.0 / (factors * rope["rope_theta"] ** exponents)
        )
        return torch.cat([angles.cos() * mscale, angles.sin() * mscale], -1)

    short = table(original, rope["short_factor"], rope.get("short_mscale", usual))
    long = table(max_position, rope["long_factor"], rope.get("long_mscale", usual))
    return short, long


@pytest.mark.parametrize("short", ["long", "none"])
def test_vllm_has_the_same_tables(tmp_path, short):
    lambdas = [1, 1.25, 2, 3, 4, 4.5, 5, np.inf]
    factors = tiny_models.factors("yarn", lambdas=lambdas, attention_factor=1.3)
    model = tiny_models.build()
    if short == "none":
        with pytest.warns(UserWarning, match="beyond 32 tokens"):
            longrope.export(model, tmp_path / "out", factors, short)
    else:
        longrope.export(model, tmp_path / "out", factors, short)
    tables = vllm_tables(rope_of(tmp_path / "out"), tiny_models.ROTARY_DIM, TARGET)
    ours = [factors if short == "long" else factors.replace(lambdas=np.ones(8)), factors]
    for table, expected in zip(tables, ours, strict=True):
        angles = np.outer(np.arange(len(table)), expected.inv_freq())
        waves = 1.3 * np.concatenate([np.cos(angles), np.sin(angles)], -1)
        np.testing.assert_allclose(table.numpy(), waves, atol=2e-5)


def test_an_infinite_lambda_is_a_huge_one_for_readers_and_comes_back(tmp_path):
    lambdas = [1, 1, 2, 3, 4, 4, np.inf, np.inf]
    factors, model, ids = (
        tiny_models.factors("yarn", lambdas=lambdas),
        tiny_models.build(),
        tokens(),
    )
    longrope.export(model, tmp_path / "out", factors)
    assert rope_of(tmp_path / "out")["long_factor"][-2:] == [HUGE, HUGE]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    longrope.apply(model, factors)
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), atol=1e-4, rtol=0)
    loaded, _ = longrope.load(tmp_path / "out")
    assert longrope.patching.rotary_of(loaded).tiers[-1] == factors


def test_tiers_are_exported_by_their_last_and_come_back(tmp_path):
    tiers = tiny_models.factors("yarn").ladder(step=1.5)
    longrope.export(tiny_models.build(), tmp_path / "out", tiers)
    assert rope_of(tmp_path / "out")["long_factor"] == tiers[-1].lambdas.tolist()
    assert longrope.Tiers.load(tmp_path / "out" / "longrope.json") == tiers
    assert longrope.patching.rotary_of(longrope.load(tmp_path / "out")[0]).tiers == tiers


def test_a_scaled_model_is_short_as_loaded(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    model, ids = tiny_models.build(rope=scaling), tokens(1, ORIGINAL)
    expected = logits(model, ids)
    factors = longrope.RescaleFactors.yarn(
        original_length=ORIGINAL // 2, target_length=TARGET, rotary_dim=tiny_models.ROTARY_DIM
    ).replace(attention_factor=1.0)
    with pytest.warns(UserWarning, match="beyond 32 tokens"):
        longrope.export(model, tmp_path / "out", factors, "none")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(plain, ids), expected, atol=1e-4, rtol=0)
    loaded, _ = longrope.load(tmp_path / "out")
    assert torch.equal(logits(loaded, ids), expected)


def test_factors_that_are_applied_make_no_difference(tmp_path):
    model, factors = tiny_models.build(), tiny_models.factors("yarn")
    longrope.export(model, tmp_path / "before", factors)
    longrope.apply(model, factors.ladder())
    longrope.export(model, tmp_path / "after", factors)
    for name in ("config.json", "model.safetensors", "longrope.json", "README.md"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


# --- what is carried ----------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """Return a folder as people have them: shards, tied bf16 weights, tokenizer, licence."""
    folder = tmp_path / "source"
    model = tiny_models.build(dtype=torch.bfloat16, tie_word_embeddings=True)
    model.generation_config.update(temperature=0.5, do_sample=True)
    model.save_pretrained(folder, max_shard_size="30KB")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=ORIGINAL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("Do as you please.\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    return folder


def tensors(folder):
    """Return `{name: (dtype, bytes)}` of a folder's weights."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = content.get_tensor(name)
                found[name] = (tensor.dtype, tensor.view(torch.uint8).numpy().tobytes())
    return found


def test_weights_keep_their_shards_dtype_and_ties(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    longrope.export(model, tmp_path / "out", tiny_models.factors("yarn"))
    exported = tensors(tmp_path / "out")
    assert exported == tensors(source)
    names = [
        {f.name for f in folder.glob("*.safetensors")} for folder in (source, tmp_path / "out")
    ]
    assert names[0] == names[1] and len(names[0]) > 2
    assert shard_size(tmp_path / "out") <= shard_size(source)
    assert "lm_head.weight" not in exported
    assert longrope.load(tmp_path / "out")[0].dtype == torch.bfloat16


def test_what_belongs_to_a_model_is_carried(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    longrope.export(model, tmp_path / "out", tiny_models.factors("yarn"))
    there, here = (AutoTokenizer.from_pretrained(f) for f in (source, tmp_path / "out"))
    assert here("w3 w9 w61")["input_ids"] == there("w3 w9 w61")["input_ids"] == [3, 9, 61]
    assert here.chat_template == there.chat_template
    assert (there.model_max_length, here.model_max_length) == (ORIGINAL, TARGET)
    again, tokenizer = longrope.load(tmp_path / "out")
    assert again.generation_config.temperature == 0.5
    assert tokenizer.chat_template == there.chat_template
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (source / "LICENSE").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card.split("---")[1]
    assert "base_model" not in card and str(tmp_path) not in card


def test_a_tokenizer_of_the_caller_is_saved(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    path = tmp_path / "out"
    longrope.export(tiny_models.build(), path, tiny_models.factors("yarn"), tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(path).model_max_length == TARGET


# --- the card -----------------------------------------------------------------------------------


def test_the_card_says_what_was_measured_and_what_was_not(tmp_path):
    model, factors = tiny_models.build(), tiny_models.factors("yarn", start_tokens=4)
    documents = [row.numpy() for row in tokens(2, 200)]
    with pytest.warns(UserWarning, match="beyond 32 tokens"):
        measured = longrope.measure_export(model, factors, documents, short="none", data="noise")
    assert measured.ranges == ((0, 32), (32, 64), (64, 128))
    window = {"length": TARGET, "stride": TARGET, "ranges": measured.ranges}
    loaded = longrope.perplexity(model, documents, **window)
    dropped = factors.replace(start_tokens=0)
    lengths = {"loaded": loaded}
    for name, applied in (("export", dropped), ("known", factors), ("tiers", factors.ladder())):
        lengths[name] = longrope.perplexity(longrope.apply(model, applied), documents, **window)
    longrope.apply(model, dropped.replace(lambdas=np.ones(8)))
    within = longrope.perplexity(model, documents, length=ORIGINAL, stride=ORIGINAL)
    rows = [(row.by_range, row.overall) for row in measured.rows]
    assert rows.pop(2)[0][0] == pytest.approx(within, rel=1e-4)
    for (by_range, overall), expected in zip(rows, lengths.values(), strict=True):
        assert (*by_range, overall) == pytest.approx((*expected.by_range, expected), rel=1e-4)
    longrope.export(
        longrope.remove(model), tmp_path / "out", factors, drop_start_tokens=True,
        measured=measured, found={"method": "gradient", "options": {"seed": 7, "race": None}},
    )  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert measured.table() in card and "2 documents of noise" in card
    assert "| method | gradient |" in card and "| options: seed | 7 |" in card
    assert "race" not in card and "4, left out here" in card
    longrope.export(model, tmp_path / "unmeasured", dropped)
    card = (tmp_path / "unmeasured" / "README.md").read_text()
    assert "It was not measured" in card and "was not said" in card


def test_measuring_leaves_a_model_as_it_was():
    model, factors = tiny_models.build(), tiny_models.factors("yarn")
    ids, documents = tokens(1, 100), [tokens(1, TARGET)[0]]
    for applied, tiers in ((factors, "row"), (factors.ladder(), "position")):
        expected = logits(longrope.apply(model, applied, tiers), ids)
        longrope.measure_export(model, factors, documents)
        assert torch.equal(logits(model, ids), expected)


# --- refusals -----------------------------------------------------------------------------------


def test_wrong_arguments_get_one_sentence_and_nothing_is_written(tmp_path):
    model, factors = tiny_models.build(), tiny_models.factors("yarn")

    def said(model=model, factors=factors, kind=ValueError, **arguments):
        with pytest.raises(kind) as caught:
            longrope.export(model, tmp_path / "out", factors, **arguments)
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    other = {"original_length": ORIGINAL, "target_length": TARGET}
    assert said(factors=longrope.RescaleFactors.pi(**other, rotary_dim=32)) == (
        "factors: expected rotary_dim 16, as in the model, got 32"
    )
    theta = longrope.RescaleFactors.pi(**other, rotary_dim=16, rope_theta=5e5)
    assert "expected rope_theta 10000, as in the model" in said(factors=theta)
    assert said(factors=tiny_models.factors("yarn", target=ORIGINAL)) == (
        "factors: expected a target_length beyond the model's window of 32 tokens, got 32"
    )
    starts = said(factors=factors.replace(start_tokens=8))
    assert starts.startswith("drop_start_tokens: expected True") and "got False and 8" in starts
    assert said(gguf_type="q8_0") == "gguf_type: expected None with format 'hf', got 'q8_0'"
    assert said(format="gguf", gguf_type="q4").startswith("gguf_type: expected one of 'f32'")
    for tokenizer in (5, "folder", len):
        kind = type(tokenizer).__name__
        expected = f"tokenizer: expected None or a tokenizer with save_pretrained, got {kind}"
        assert said(tokenizer=tokenizer) == expected
    saved = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel()))
    assert said(tokenizer=saved, format="gguf").startswith("tokenizer: expected None with format")
    assert said(measured=5).startswith("measured: expected None or what longrope.measure_export")
    assert said(short="short").startswith('short: expected "long", "none" or RescaleFactors')
    assert said(short=factors).startswith("short: expected a target_length below that of factors")
    assert said(short=factors.replace(target_length=64, start_tokens=2)).endswith("got 2")
    assert said(format="onnx").startswith("format: expected one of 'hf'")
    assert said(factors=[factors], kind=TypeError).startswith("factors: expected RescaleFactors or")
    dynamic = tiny_models.build(rope={"rope_type": "dynamic", "factor": 2.0})
    assert said(model=dynamic, short="none").startswith('short: expected "long" or factors')
    windows = tiny_models.build("mistral", sliding_window=16)
    assert "every layer has a sliding window" in said(model=windows)
    with pytest.raises(ValueError, match="path: expected a path, got int"):
        longrope.export(model, 3, factors)


def test_factors_for_another_window_are_exported_with_a_warning(tmp_path):
    factors = tiny_models.factors("yarn", original_length=24)
    with pytest.warns(UserWarning, match="original length of 24 tokens, and the model's is 32"):
        longrope.export(tiny_models.build(), tmp_path / "out", factors)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    model, factors = tiny_models.build(), tiny_models.factors("yarn")
    (tmp_path / "out").mkdir()
    longrope.export(model, tmp_path / "out", factors)  # an empty one is taken
    (tmp_path / "usual").write_text("")
    usual = (tmp_path / "usual").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {usual}
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="path: expected a new or an empty folder"):
        longrope.export(model, tmp_path / "out", factors)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ValueError, match="path: expected a folder, got the file"):
        longrope.export(model, tmp_path / "out" / "config.json", factors)


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for the disk: weights do not fit, the rest does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    model, factors = tiny_models.build(), tiny_models.factors("yarn")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"^path: cannot write .*out: ") as caught:
            longrope.export(model, tmp_path / "out", factors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "about", interrupt)  # after the weights
    with pytest.raises(KeyboardInterrupt):
        longrope.export(tiny_models.build(), tmp_path / "out", tiny_models.factors("yarn"))
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_other_folders(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a folder that longrope.export wrote"):
        longrope.load(tmp_path)
    tiny_models.factors("yarn").ladder().save(tmp_path / "longrope.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"longrope\.json: expected the source's settings"):
        longrope.load(tmp_path)


def test_a_plan_says_whether_there_is_a_crossing():
    model, factors = tiny_models.build(), tiny_models.factors("yarn")
    assert not plan_export(model, factors).crosses
    with pytest.warns(UserWarning, match="beyond 32 tokens"):
        assert plan_export(model, factors, "none").crosses
