"""What a dry run says that a plan costs at most."""

import pytest
import torch
from support.extension_runs import documents
from support.tiny_models import build
from support.tiny_search import SIZES, build_model

import longrope
from longrope.evaluation import memory
from longrope.extension import finetune
from longrope.extension.estimate import estimate
from longrope.extension.run import ExtendArguments, prepared

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 8192
SEARCH = {"kind": "search", "length": LENGTH, "tiers": "one", "steps": 2}
TRAIN = {
    "kind": "finetune", "length": LENGTH, "tiers": "one", "steps": 1, "batch_size": 2,
    "rows_per_pass": 2, "warmup_steps": 0,
}  # fmt: skip
#: 2 layers of keys and values of one head of 16 float32.
CACHE = 256 * LENGTH
#: Bytes of a token in a pass without gradients, and kept in one with.
FORWARD, KEPT = (8 * 32 + 3 * 48) * 4, 2 * (8 * 32 + 4 * 48) * 4


def costs(stages, target, model=None, texts=None):
    model = model or build_model()
    texts = documents() if texts is None else texts
    arguments = ExtendArguments(target_length=target, out="x", stages=stages)
    plan, kept, held = prepared(model, texts, arguments)
    return estimate(model, plan, kept, len(held))


def tokens(stages, target):
    """Return the tokens of each stage."""
    return [cost.tokens for cost in costs(stages, target)]


def long_costs(stages, dtype=torch.float32):
    """Return the costs of stages of long rows, and the number of the model's parameters."""
    model = build(**SIZES | {"max_position_embeddings": 1024}).to(dtype)
    texts = documents(3, LENGTH + 2)
    return costs(stages, LENGTH, model, texts), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tiers", ["position", "one"])
@pytest.mark.parametrize("per", ["model", "head"])
def test_a_search_takes_at_most_what_was_said_and_not_half(tiers, per):
    options = {"per": per, "samples": 2, "steps": 40}
    result = longrope.search(
        build_model(), documents(), target_length=64, ladder=tiers == "position", progress=False,
        **options,
    )  # fmt: skip
    taken = 64 * sum(evaluation.forward_equivalents for evaluation in result.history)
    stages = [{"kind": "search", "length": 64, "tiers": tiers, **options}]
    assert taken <= tokens(stages, 64)[0] < 2 * taken


def test_a_second_search_is_counted_on_top_of_the_first():
    """Its bound of lambda is that of what multiplies the first stage, here 2x of 4x in all."""
    first = {"kind": "search", "length": 32, "tiers": "one", "steps": 2}
    train = {"kind": "finetune", "length": 32, "tiers": "one", "steps": 1, "batch_size": 1}
    second = {
        "kind": "search", "length": 64, "tiers": "one", "method": "evolution", "population": 4,
        "parents": 2, "iterations": 1, "critical_dimension": True, "max_lambda": 3.0,
    }  # fmt: skip
    assert len(tokens([first, train | {"warmup_steps": 0}, second], 64)) == 4


def test_a_search_takes_what_is_planned_for_it_and_no_weights(monkeypatch):
    found, _ = long_costs([SEARCH])
    assert found[0].memory == LENGTH * KEPT
    free = LENGTH * KEPT
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    found, _ = long_costs([SEARCH])
    assert found[0].memory == 2 * CACHE + LENGTH // 16 * KEPT
    assert found[1].memory == CACHE + memory.CPU_TOKENS_PER_BATCH * FORWARD
    rows = {"batch_size": 3, "method": "evolution"}
    found, _ = long_costs([{k: SEARCH[k] for k in ("kind", "length", "tiers")} | rows])
    chunk = memory.CPU_TOKENS_PER_BATCH // 4  # for three rows, a power of two
    assert found[0].memory == 3 * (CACHE + chunk * FORWARD)


def test_recovery_has_gradients(monkeypatch):
    ladder = {**SEARCH, "tiers": "position"}
    found, _ = long_costs([ladder, {"kind": "recover", "lengths": [512, 1024]}])
    assert found[1].memory == 1024 * KEPT


def test_the_copy_that_training_makes_is_there_from_then_on():
    half = {"length": LENGTH // 2}
    plain, _ = long_costs([SEARCH | half, SEARCH], torch.bfloat16)
    found, parameters = long_costs([SEARCH | half, TRAIN | half, SEARCH], torch.bfloat16)
    first, again, table = (cost.memory for cost in plain)
    trained = 16 * parameters + LENGTH * KEPT
    copy = 2 * parameters
    assert [cost.memory for cost in found] == [first, trained, again + copy, table + copy]


def test_adapters_are_trained_beside_a_copy():
    pytest.importorskip("peft")
    found, parameters = long_costs([SEARCH, TRAIN | {"lora_rank": 3}], torch.bfloat16)
    config = longrope.FinetuneConfig(lora_rank=3).resolved()
    adapters = finetune._trainable(build_model(), config).get_nb_trainable_parameters()[0]
    assert found[1].memory == 2 * parameters + 16 * adapters + 2 * LENGTH * KEPT


@pytest.mark.parametrize("config", [{}, {"lora_rank": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("over", [0, 1])
def test_a_dry_run_computes_again_what_the_run_does(tmp_path, monkeypatch, config, dtype, over):
    if config:
        pytest.importorskip("peft")
    (_, whole, _), _ = long_costs([SEARCH, TRAIN | config], dtype)
    free = whole.memory + 2 * LENGTH * KEPT - over
    monkeypatch.setattr(finetune, "free_memory", lambda device: free)
    (_, cost, _), _ = long_costs([SEARCH, TRAIN | config], dtype)
    assert cost.tokens == (3 + over) * 2 * LENGTH
    saved = KEPT - (2 * 32 * 4 + KEPT // 2) if over else 0  # but layers' inputs, and one layer
    assert cost.memory == whole.memory - 2 * LENGTH * saved

    copied = build(**SIZES | {"max_position_embeddings": 1024}).to(dtype)
    options = {k: TRAIN[k] for k in ("tiers", "batch_size", "rows_per_pass")} | config
    stage = finetune.FinetuneStage("train", LENGTH, None, longrope.FinetuneConfig(**options))
    finetune._trainable(copied, stage.config.resolved())
    held = sum(p.nbytes for p in copied.parameters())
    monkeypatch.setattr(finetune, "free_memory", lambda device: free - held)
    assert finetune._recomputes(copied, stage, tmp_path) is bool(over)
