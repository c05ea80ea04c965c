"""What a dry run says that a plan costs at most."""

import pytest
from support.extension_runs import documents
from support.tiny_search import build_model

import longrope
from longrope.extension.estimate import estimate
from longrope.extension.run import ExtendArguments, prepared

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(stages, target):
    """Return the tokens of each stage."""
    model = build_model()
    arguments = ExtendArguments(target_length=target, out="x", stages=stages)
    plan, kept, held = prepared(model, documents(), arguments)
    return [cost.tokens for cost in estimate(model, plan, kept, len(held))]


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
