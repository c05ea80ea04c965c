"""Stages that could not begin, or not be measured, are refused before the first one does."""

import pytest
import torch
from support import families
from support.extension_runs import documents
from support.tiny_search import build_model

import longrope

pytestmark = pytest.mark.usefixtures("one_thread")
SEARCH = {"kind": "search", "steps": 2, "samples": 1}
ONE = SEARCH | {"tiers": "one"}
TRAIN = {"kind": "finetune", "steps": 1, "batch_size": 1, "warmup_steps": 0}


@pytest.fixture
def refused(tmp_path):
    """Return a function that expects a run to be refused before it writes anything."""

    def check(message, stages, target, model=None, texts=None, **options):
        with pytest.raises(ValueError, match=message):
            longrope.extend(
                model or build_model(), texts or documents(), target_length=target,
                out=tmp_path / "run", stages=stages, progress=False, **options,
            )  # fmt: skip
        assert not (tmp_path / "run").exists()

    return check


def texts_of_the_families():
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(1, 60, (8, 160), generator=generator))


@pytest.mark.parametrize(
    "stages, name",
    [
        (None, "search-1"),
        ([ONE | {"length": 64}, TRAIN | {"length": 64}], "finetune-2"),
        ([ONE | {"length": 64}, TRAIN | {"length": 64, "tiers": "row"}], "finetune-2"),
        ([ONE | {"length": 64}, {"kind": "recover", "lengths": [32]}], "recover-2"),
    ],
)
def test_tiers_by_position_in_a_family_that_has_none(refused, stages, name):
    model = families.build("gpt_oss")
    message = rf'stage {name}: model: .* got gpt-oss, .* fine-tuning with tiers="one" work'
    refused(message, stages, 64, model, texts_of_the_families())


def test_such_a_family_is_extended_with_one_set(tmp_path):
    stages = [
        ONE | {"length": 48}, TRAIN | {"length": 48, "tiers": "one"}, ONE | {"length": 64},
    ]  # fmt: skip
    result = longrope.extend(
        families.build("gpt_oss"), texts_of_the_families(), target_length=64, out=tmp_path,
        stages=stages, progress=False, test_windows=2,
    )  # fmt: skip
    assert result.tiers.limits == (64,)


def test_tiers_by_position_where_no_layer_sees_beyond_the_window(refused):
    model = families.build("mistral")
    window = longrope.rope_settings(model).loaded_length
    model.config.sliding_window = window
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    for after in (TRAIN | {"length": 2 * window}, {"kind": "recover", "lengths": [window]}):
        stages = [ONE | {"length": 2 * window}, after]
        message = f"stage {after['kind']}-2: model: expected a layer that sees beyond the first"
        refused(message, stages, 2 * window, model, texts_of_the_families())


@pytest.mark.parametrize(
    "target, second, message",
    [
        (33, {}, "target_length: expected more than 33 tokens, so that the last tier"),
        (
            64,
            {"method": "evolution", "steps": None, "critical_dimension": True, "max_lambda": 1.5},
            "max_lambda: expected at least the extension ratio 2 ",
        ),
    ],
)
def test_a_search_that_could_not_begin_after_training(refused, target, second, message):
    stages = [
        SEARCH | {"length": 32}, TRAIN | {"length": 32}, SEARCH | {"length": target} | second,
    ]  # fmt: skip
    refused(f"stage search-3: {message}", stages, target)


def test_a_bos_that_the_model_has_not_is_refused_for_the_whole_run(refused):
    stages = [SEARCH | {"length": 32}, SEARCH | {"length": 64, "bos": True}]
    refused("bos: expected a model whose config names a bos_token_id", stages, 64)


@pytest.mark.parametrize("tokenizer", [5, "folder", documents])
def test_a_tokenizer_that_cannot_be_saved(refused, tokenizer):
    message = "tokenizer: expected None or a tokenizer with save_pretrained, got "
    refused(message + type(tokenizer).__name__, [ONE | {"length": 64}], 64, tokenizer=tokenizer)


def test_the_plan_by_the_ratio_too(refused):
    """8 windows of 16 tokens are trained; the second search has one token more."""
    config = longrope.FinetuneConfig(steps=1, batch_size=1)
    message = "stage search-3: target_length: expected more than 129 tokens"
    refused(message, None, 129, texts=documents(length=150), finetune=config)
