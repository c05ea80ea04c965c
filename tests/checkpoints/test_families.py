"""Every family: exported, read by plain transformers in a process of its own, and loaded again."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import plain_reader
from support.families import VERSION_5, build, sizes
from support.tiny_models import ORIGINAL, TARGET, tokens
from transformers import AutoModelForCausalLM

import longrope
from longrope.checkpoints import plan_export
from longrope.checkpoints.hf import only_version_5
from longrope.patching import SUPPORTED_MODEL_TYPES
from longrope.patching.families import family_of

pytestmark = pytest.mark.usefixtures("one_thread")

SHORTS = ("long", "none")
#: Within the original window, its last length, the first beyond, far beyond.
LENGTHS = (20, ORIGINAL, ORIGINAL + 1, TARGET - 20)


def factors_of(family):
    made = longrope.RescaleFactors.yarn(**sizes(family))
    if family == "phi3":  # what transformers 4 reads too
        usual = longrope.su_attention_factor(TARGET / ORIGINAL, ORIGINAL)
        made = made.replace(attention_factor=usual)
    return made


@torch.no_grad()
def logits(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export every family in both ways, and let one other process run all of the folders."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(5)
    inputs = [tokens(1, length)[0].tolist() for length in LENGTHS]
    folders = []
    for family in SUPPORTED_MODEL_TYPES:
        if family in ("gemma3_text", "olmo3") and not VERSION_5:
            continue  # their decoders in transformers 4 are ones that longrope.apply refuses
        for short in SHORTS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, factors = build(family), factors_of(family)
                if not VERSION_5 and only_version_5(plan_export(model, factors, short)):
                    continue
                path = longrope.export(model, folder / f"{family}-{short}", factors, short)
            folders.append(str(path))
    (folder / "job.json").write_text(json.dumps({"folders": folders, "inputs": inputs}))
    job = [sys.executable, plain_reader.__file__, str(folder / "job.json")]
    subprocess.run(job, check=True, cwd=folder, timeout=250)
    return folder, inputs


@pytest.fixture(params=SUPPORTED_MODEL_TYPES)
def family(request):
    return request.param


@pytest.mark.parametrize("short", SHORTS)
def test_a_plain_reader_follows_the_rule(exported, family, short):
    folder, inputs = exported
    read = Path(folder, f"{family}-{short}.logits.safetensors")
    if not read.exists():
        pytest.skip("not with transformers 4")
    read = load_file(read)
    model, factors = build(family), factors_of(family)
    plain = [logits(model, ids) for ids in inputs]
    long = factors.replace(start_tokens=0)
    first = long.replace(target_length=ORIGINAL)
    if short == "none":
        lambdas = longrope.RescaleFactors.none(**sizes(family)).lambdas
        first = first.replace(lambdas=lambdas)
    longrope.apply(model, [first, long], tiers="row")
    for number, ids in enumerate(inputs):
        torch.testing.assert_close(read[str(number)], logits(model, ids), atol=1e-4, rtol=0)
        assert (read[str(number)] - plain[number]).abs().max() > 1e-3  # the factors bite


def test_load_gives_the_tiers_back(exported, family):
    folder, inputs = exported
    path = folder / f"{family}-long"
    if not path.exists():
        pytest.skip("not with transformers 4")
    model, expected = build(family), factors_of(family).ladder()
    loaded, tokenizer = longrope.load(path)
    assert tokenizer is None
    assert list(longrope.patching.rotary_of(loaded).tiers) == list(expected)
    assert loaded.config.max_position_embeddings == ORIGINAL
    within = inputs[LENGTHS.index(ORIGINAL)]
    if family_of(model).tiers:
        assert torch.equal(logits(loaded, within), logits(model, within))
    by_position = family_of(model).tiers
    longrope.apply(model, expected, tiers="position" if by_position else "row")
    assert torch.equal(logits(loaded, inputs[-1]), logits(model, inputs[-1]))
    longrope.remove(loaded), longrope.remove(model)
    assert torch.equal(logits(loaded, inputs[-1]), logits(model, inputs[-1]))


@pytest.mark.filterwarnings("ignore:transformers 4 knows no rope type")
def test_heads_of_the_size_that_a_family_has_by_default(family, tmp_path):
    """Mixtral says `"head_dim": null` then, and cannot read that beside a scaling."""
    if family == "ministral":
        pytest.skip("transformers builds none without head_dim")
    if family in ("gemma3_text", "olmo3") and not VERSION_5:
        pytest.skip("longrope.apply refuses what transformers 4 has of it")
    model = build(family, head_dim=None)
    factors = longrope.RescaleFactors.yarn(**longrope.rope_settings(model).lengths(TARGET))
    plan = plan_export(model, factors)
    if not VERSION_5 and only_version_5(plan):
        pytest.skip("not with transformers 4")
    path = longrope.export(model, tmp_path / "exported", factors)
    kernel = "eager" if family in ("gpt_oss", "gemma2") else None
    read = AutoModelForCausalLM.from_pretrained(path, attn_implementation=kernel).eval()
    ids = tokens(1, TARGET - 20)[0].tolist()
    longrope.apply(model, plan.rule, tiers="row")
    torch.testing.assert_close(logits(read, ids), logits(model, ids), atol=1e-4, rtol=0)
