"""GGUF: what is in the file, read back, and what llama.cpp's own arithmetic makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tiny_models import ORIGINAL, TARGET

import longrope
from longrope.checkpoints import gguf as ours
from longrope.factors import RescaleFactors

gguf = pytest.importorskip("gguf")

NUMBERS = {"f32": 1e-7, "f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3}


def export(tmp_path, factors=None, model=None, **arguments):
    factors = tiny_models.factors("yarn") if factors is None else factors
    model = tiny_models.build() if model is None else model
    path = longrope.export(model, tmp_path / "out", factors, format="gguf", **arguments)
    return gguf.GGUFReader(path / ours.NAME), (path / "README.md").read_text()


def weights(reader):
    """Return the tensors as float32, in the order of rows that transformers has."""
    found = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = values.reshape(tensor.shape[::-1].tolist())
    return found


@pytest.mark.parametrize("gguf_type", NUMBERS)
def test_weights_are_the_model_s(tmp_path, gguf_type):
    model = tiny_models.build(attention_bias=True)
    torch.nn.init.normal_(model.model.layers[1].self_attn.k_proj.bias)
    reader, card = export(tmp_path, model=model, gguf_type=gguf_type)
    found, state = weights(reader), model.state_dict()
    assert len(found) == len(state) + 2
    assert f"Weights are {gguf_type}." in card
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_up.weight"] == types["output.weight"] == gguf_type.upper()
    assert types["output_norm.weight"] == types["rope_factors_long.weight"] == "F32"
    close = {"rtol": 0, "atol": NUMBERS[gguf_type] * 0.8}
    up = state["model.layers.0.mlp.up_proj.weight"].numpy()
    np.testing.assert_allclose(found["blk.0.ffn_up.weight"], up, **close)
    # Channels 2i and 2i + 1 of a head turn together there, i and i + 8 here.
    for kind in ("weight", "bias"):
        there = found[f"blk.1.attn_k.{kind}"].reshape(2, 8, 2, -1)
        here = state[f"model.layers.1.self_attn.k_proj.{kind}"].numpy().reshape(2, 2, 8, -1)
        np.testing.assert_allclose(there, here.swapaxes(1, 2), rtol=0, atol=close["atol"] * 4)


def test_keys_and_factors_say_the_rule(tmp_path):
    factors = tiny_models.factors("yarn", lambdas=[1, 1, 2, 3, 4, 4, 4, np.inf])
    with pytest.warns(UserWarning, match="beyond 32 tokens"):
        reader, card = export(tmp_path, factors, short="none")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "llama"
    assert said["llama.context_length"] == TARGET
    assert said["llama.rope.scaling.type"] == "longrope"
    assert said["llama.rope.scaling.original_context_length"] == ORIGINAL
    assert said["llama.rope.scaling.attn_factor"] == pytest.approx(factors.attention_factor)
    assert "llama.rope.scaling.factor" not in said  # it would divide the frequencies once more
    assert said["tokenizer.ggml.model"] == "no_vocab" and "no vocabulary" in card
    found = weights(reader)
    np.testing.assert_allclose(found["rope_factors_long.weight"], [1, 1, 2, 3, 4, 4, 4, 1e30])
    assert (found["rope_factors_short.weight"] == 1).all()


def test_tied_weights_are_stored_once(tmp_path):
    model = tiny_models.build(dtype=torch.bfloat16, tie_word_embeddings=True)
    reader, card = export(tmp_path, model=model)
    names = {tensor.name for tensor in reader.tensors}
    assert "token_embd.weight" in names and "output.weight" not in names
    assert "Weights are bf16." in card


def test_what_llama_cpp_cannot_express_gets_one_sentence(tmp_path):
    def said(model=None, **arguments):
        with pytest.raises(ValueError) as caught:
            export(tmp_path, model=model, **arguments)
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    assert "llama architecture alone takes factors" in said(tiny_models.build("qwen2"))
    assert said(gguf_type="q4_0").startswith("gguf_type: expected one of 'f32', 'f16'")
    assert said(tiny_models.build("mistral", sliding_window=64)).startswith("model: expected no sl")
    odd = tiny_models.build(intermediate_size=40)
    assert said(odd, gguf_type="q8_0").endswith("for q8_0, got 40")


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": ours._LLAMA_3}}, {"type": "ByteLevel"}],
         "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel"}], None),
        ([{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel"}], None),
    ],
)  # fmt: skip
def test_only_known_ways_to_cut_a_text_are_written(steps, name):
    tokenizer = {"model": {"type": "BPE"}, "normalizer": None,
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}  # fmt: skip
    assert ours._pre_tokenizer(tokenizer) == name
    assert ours._pre_tokenizer(tokenizer | {"normalizer": {"type": "NFC"}}) is None


def test_a_byte_level_vocabulary_is_written(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = {letter: number for number, letter in enumerate("abcdefghij")} | {"ab": 10, "<e>": 11}
    made = Tokenizer(models.BPE(words, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")
    source = tmp_path / "source"
    tiny_models.build().save_pretrained(source)
    fast.save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    reader, card = export(tmp_path, model=model)
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["tokenizer.ggml.pre"] == "gpt-2" and "no vocabulary" not in card
    assert said["tokenizer.ggml.tokens"][:12] == [*"abcdefghij", "ab", "<e>"]
    assert len(said["tokenizer.ggml.tokens"]) == 64
    assert said["tokenizer.ggml.token_type"][9:13] == [1, 1, 3, 5]
    assert said["tokenizer.ggml.merges"] == ["a b"]
    assert said["tokenizer.ggml.eos_token_id"] == 11


def test_llama_cpp_has_our_perplexity(tmp_path):
    """The rule by llama.cpp itself, where its Python package is installed."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = tiny_models.build()
    sizes = {"original_length": ORIGINAL, "target_length": TARGET, "rotary_dim": 16}
    factors = RescaleFactors.yarn(**sizes)
    path = longrope.export(model, tmp_path / "out", factors, format="gguf", gguf_type="f16")
    ids = tiny_models.tokens(1, TARGET)[0]
    file = str(path / ours.NAME)
    there = llama_cpp.Llama(file, n_ctx=TARGET, logits_all=True, verbose=False)
    there.eval(ids.tolist())
    logits = torch.tensor(np.array(there.scores[: TARGET - 1]))
    nll = torch.nn.functional.cross_entropy(logits, ids[1:])
    longrope.apply(model, factors)
    expected = longrope.perplexity(model, [ids], length=TARGET, stride=TARGET)
    assert nll.exp().item() == pytest.approx(expected, rel=5e-3)
