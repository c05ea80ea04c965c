"""Fine-tuning by many processes with weights in shards (FSDP2), which are whole in the end."""

import csv
from unittest import mock

import pytest
from support import extension_runs, shards
from support.tiny_search import build_model
from transformers import AutoModelForCausalLM

from longrope import report
from longrope.extension.folder import weights_hash

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(ranks):
    return ranks("sharded", 2)


def run_alone(folder, **changes):
    """Return the result of one process; without reports, as the jobs."""
    with mock.patch.object(report, "at_end", lambda out: None):
        return extension_runs.run(folder, target_length=32, **changes)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run_alone(tmp_path_factory.mktemp("single"), stages=shards.STAGES)


def numbers(table):
    return [float(cell) for cell in table.replace("|", " ").split() if cell.count(".") == 1]


def losses(folder):
    with (folder / "stages" / "02-finetune-2" / "losses.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_all_ranks_end_with_the_whole_weights_of_one_process(found, single, ranks):
    assert found[0]["whole"] == found[1]["whole"]
    table = found[0]["whole"][1]
    assert numbers(table) == pytest.approx(numbers(single.measured.table()), rel=2e-3)
    exported = AutoModelForCausalLM.from_pretrained(ranks.folder("sharded", 2) / "whole/model")
    assert weights_hash(exported) == found[0]["whole"][0]


def test_each_rank_holds_half_of_the_weights_while_it_trains(found):
    whole = sum(parameter.numel() for parameter in build_model().parameters())
    assert [rank["held"] for rank in found] == [whole // 2] * 2


def test_a_job_that_stopped_in_a_step_goes_on_to_the_same_bits(found, ranks):
    assert [rank["stopped"] for rank in found] == ["stopped", "stopped"]
    assert found[0]["resumed"] == found[0]["whole"] == found[1]["resumed"]


def test_a_gradient_that_is_not_finite_in_one_share_stops_all(found):
    assert [rank["guarded"] for rank in found] == ["gradient nan"] * 2


def test_a_checkpoint_in_shards_is_not_for_a_job_of_whole_weights(found):
    for rank in found:
        error = rank["resumed whole"]
        assert error.startswith("out: expected the job to hold weights as when it wrote ")
        assert "checkpoint-2, in shards, got whole (" in error


def test_tied_weights_stay_tied(found, tmp_path):
    assert found[0]["tied"] == found[1]["tied"]
    single = run_alone(tmp_path, stages=shards.STAGES, model=shards.tied)
    assert numbers(found[0]["tied"][1]) == pytest.approx(numbers(single.measured.table()), rel=2e-3)


def test_bfloat16_loses_no_more_than_autocast(found, single, ranks):
    assert found[0]["bf16"] == found[1]["bf16"]
    got = losses(ranks.folder("sharded", 2) / "bf16")
    assert got == pytest.approx(losses(single.folder), rel=1e-2)
    assert got != losses(single.folder)


def test_what_is_refused(found):
    for rank in found:
        assert rank["adapters"].startswith("lora_rank: expected 0 with ACCELERATE_USE_FSDP")
        assert rank["files"] == (
            "finetune: expected FSDP_STATE_DICT_TYPE=FULL_STATE_DICT, got SHARDED_STATE_DICT"
        )
        assert rank["FSDP 1"] == "finetune: expected FSDP_VERSION=2, got 1"
        assert rank["DeepSpeed"].startswith("finetune: expected whole weights on every rank")
        assert rank["DeepSpeed"].endswith("got ACCELERATE_USE_DEEPSPEED=true")
