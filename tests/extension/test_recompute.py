"""Whether fine-tuning computes activations again, by the memory that is free when it begins."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny_search import build_model

from longrope import FinetuneConfig
from longrope.evaluation.memory import kept_per_token
from longrope.extension import finetune, sharding
from longrope.extension.plan import FinetuneStage

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 32
#: 2 layers of (8 x 32 + 4 x 48) float32.
KEPT = 3584


@pytest.fixture
def begins(tmp_path, monkeypatch):
    """Return a function that begins a stage and says whether it computes activations again."""

    def with_free(free, model=None, **config):
        model = model or finetune._trainable(build_model(), FinetuneConfig())
        monkeypatch.setattr(finetune, "free_memory", lambda device: free)
        config = FinetuneConfig(**config)
        stage = FinetuneStage("train", LENGTH, None, config)
        (tmp_path / finetune.NOTES).unlink(missing_ok=True)
        return finetune._recomputes(model, stage, tmp_path)

    return with_free


@pytest.mark.parametrize("rows", [1, 8])
def test_a_pass_gets_half_of_what_gradients_and_moments_leave(begins, rows):
    to_come = 12 * sum(p.numel() for p in build_model().parameters())
    most = to_come + 2 * rows * LENGTH * KEPT
    options = {"rows_per_pass": rows, "batch_size": 8}
    assert not begins(most, **options)
    assert begins(most - 1, **options)
    assert not begins(None, **options)


def test_what_is_asked_for_wins(begins):
    assert begins(1 << 60, activation_checkpointing=True)
    assert not begins(0, activation_checkpointing=False)


def test_adapters_alone_have_gradients_and_moments(begins):
    pytest.importorskip("peft")
    config = FinetuneConfig(lora_rank=2, seed=0)
    model = build_model().to(torch.bfloat16)
    trained = finetune._trainable(model, config).get_nb_trainable_parameters()[0]
    most = 12 * trained + 2 * LENGTH * KEPT
    assert not begins(most, model, lora_rank=2)
    assert begins(most - 1, model, lora_rank=2)
    least = 12 * trained + LENGTH * kept_per_token(model, torch.bfloat16, recompute=True)
    assert begins(least, model, lora_rank=2)
    with pytest.warns(UserWarning, match=f"need about {least} bytes"):
        assert begins(least - 1, model, lora_rank=2)


def test_ranks_that_hold_shards_make_room(begins, monkeypatch):
    """Each gives three quarters of the weights away, and has a quarter of the rest."""
    held = 4 * sum(p.numel() for p in build_model().parameters())
    monkeypatch.setattr(finetune.ranks, "current", lambda: SimpleNamespace(size=4))
    monkeypatch.setattr(sharding, "shards", lambda processes: processes == 4)
    assert finetune.trained_bytes(held) == held
    assert not begins(2 * LENGTH * KEPT)
    assert begins(2 * LENGTH * KEPT - 1)


def test_a_pass_that_does_not_fit_is_one_warning(begins):
    model = finetune._trainable(build_model(), FinetuneConfig())
    to_come = 12 * sum(p.numel() for p in model.parameters())
    least = to_come + 2 * LENGTH * kept_per_token(model, recompute=True)
    options = {"rows_per_pass": 2, "batch_size": 2}
    assert begins(least, model, **options)
    with pytest.warns(UserWarning) as caught:
        assert begins(least - 1, model, **options)
    assert [str(warning.message) for warning in caught] == [
        "stage train: the activations of 2 rows of 32 tokens, and the gradients and moments of "
        f"weights, need about {least} bytes where {least - 1} are free"
    ]
