"""One stage of fine-tuning: the loss, the rows, checkpoints, and what stops it."""

import math
import resource

import pytest
import torch
from support import families, tiny_models
from support.tiny_search import SIZES, build_model

import longrope
from longrope import FinetuneConfig
from longrope.extension import checkpoint, finetune, trainer
from longrope.extension.plan import FinetuneStage
from longrope.patching.embedding import RescaledRotaryEmbedding
from longrope.patching.families import FAMILIES, family_of

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH, WINDOW = 32, 16
BUILT = [
    name
    for family in FAMILIES
    for name in family.model_types
    if family.since < 5 or families.VERSION_5
]
SMALL = {
    "steps": 4,
    "batch_size": 2,
    "warmup_steps": 1,
    "learning_rate": 1e-2,
    "save_steps": 1,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(40, (6, 60), generator=generator))


def tiers_of(model):
    rope = longrope.rope_settings(model)
    return longrope.RescaleFactors.yarn(**rope.lengths(LENGTH)).ladder(loaded=rope.loaded)


def train(out, documents, model=None, **config):
    model = model or build_model()
    stage = FinetuneStage("train", LENGTH, None, FinetuneConfig(**SMALL | config))
    return finetune.finetune(model, documents, tiers_of(model), stage, out, progress=False)


def same(a, b):
    """Say whether two models have the same weights, to the bit."""
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def stop_at(monkeypatch, step, error=KeyboardInterrupt):
    """Raise in the pass that begins a step."""
    own = trainer.RowTrainer.compute_loss

    def stopping(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            raise error
        return own(self, *args, **kwargs)

    monkeypatch.setattr(trainer.RowTrainer, "compute_loss", stopping)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, documents):
    """An uninterrupted stage: its folder and the model."""
    out = tmp_path_factory.mktemp("whole")
    return out, train(out, documents)


@pytest.mark.filterwarnings("error:save_pretrained writes")  # the run has the factors
def test_a_seed_of_many_bits_trains(documents, tmp_path):
    train(tmp_path, documents, seed=2**62, steps=1)
    assert (tmp_path / finetune.LOSSES).is_file()


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["position", "row", "one"])
def test_the_loss_and_its_gradients_are_those_of_the_logits_without_any(how):
    model = build_model()
    ids = torch.randint(40, (2, LENGTH))
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    with finetune._factors(model, tiers_of(model), how):
        logits = model(input_ids=ids, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        with trainer.giving_loss(model):
            model.lm_head.forward = None  # nothing calls it
            loss = model(input_ids=ids, targets=targets, position_ids=torch.arange(LENGTH)[None])
            loss.backward()
            del model.lm_head.forward
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)
    assert model(input_ids=ids).logits.shape == (2, LENGTH, 40)  # its own forward is back


@pytest.mark.parametrize("model_type", BUILT)
def test_the_loss_of_every_family_is_that_of_its_logits(model_type):
    model = families.build(model_type)
    rope = longrope.rope_settings(model)
    factors = longrope.RescaleFactors.yarn(**rope.lengths(128))
    longrope.apply(model, factors.ladder() if family_of(model).tiers else factors)
    ids = torch.randint(1, 64, (1, 100))
    positions = torch.cat([torch.arange(60), torch.arange(40)])[None]  # two documents
    targets = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum")
    with trainer.giving_loss(model):
        loss = model(input_ids=ids, targets=targets, position_ids=positions)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["position", "one"])
def test_packed_documents_do_not_see_each_other(how):
    model = build_model()
    parts = [torch.randint(40, (1, n)) for n in (20, 12)]

    def loss_of(pieces):
        ids = torch.cat(pieces, 1)
        positions = torch.cat([torch.arange(p.shape[1]) for p in pieces])[None]
        targets = torch.cat([torch.cat([p[:, 1:], torch.full((1, 1), -100)], 1) for p in pieces], 1)
        return model(input_ids=ids, targets=targets, position_ids=positions)

    with finetune._factors(model, tiers_of(model), how), trainer.giving_loss(model):
        packed, apart = loss_of(parts), sum(loss_of([part]) for part in parts)
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-4)


def test_mixed_windows_turn_short_rows_as_loaded_and_long_rows_by_the_last_factors():
    model = build_model()
    with finetune._factors(model, tiers_of(model), "row"):
        assert isinstance(model.model.rotary_emb, RescaledRotaryEmbedding)
        ids = torch.randint(40, (1, LENGTH))
        short, long = model(input_ids=ids[:, :WINDOW]).logits, model(input_ids=ids).logits
    torch.testing.assert_close(short, model(input_ids=ids[:, :WINDOW]).logits, rtol=1e-4, atol=1e-4)
    longrope.apply(model, tiers_of(model)[-1])
    assert torch.equal(long, model(input_ids=ids).logits)


def test_short_rows_of_mixed_windows_are_the_task_of_the_model_as_loaded():
    """A row that holds windows of the original length, one after another."""
    model = build_model()
    parts = [torch.randint(40, (1, WINDOW)) for _ in range(LENGTH // WINDOW)]
    expected = sum(
        torch.nn.functional.cross_entropy(
            model(input_ids=part).logits[0, :-1], part[0, 1:], reduction="sum"
        )
        for part in parts
    )
    targets = torch.cat([torch.cat([p[:, 1:], torch.full((1, 1), -100)], 1) for p in parts], 1)
    positions = torch.arange(WINDOW).repeat(len(parts))[None]
    with finetune._factors(model, tiers_of(model), "row"), trainer.giving_loss(model):
        loss = model(input_ids=torch.cat(parts, 1), targets=targets, position_ids=positions)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_a_model_whose_head_is_no_matrix_product_takes_its_own_logits():
    model = tiny_models.build(vocab_size=40)
    own = type(model).forward

    def capped(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits)
        return output

    model.forward = capped.__get__(model)
    ids = torch.randint(40, (1, 20))
    targets = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"
    )
    with trainer.giving_loss(model):
        loss = model(input_ids=ids, targets=targets, position_ids=torch.arange(20)[None])
    torch.testing.assert_close(loss, expected)
    assert model.forward.__func__ is capped


# --- steps ------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_leaves_the_model_without_factors(whole, documents):
    out, trained = whole
    assert not same(trained, build_model())
    assert not trained.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trained.modules())
    assert all(parameter.requires_grad for parameter in trained.parameters())
    rows = [line.split(",") for line in (out / finetune.LOSSES).read_text().split()]
    assert rows[0] == ["step", "loss", "grad_norm", "learning_rate"]
    assert [int(row[0]) for row in rows[1:]] == [1, 2, 3, 4]
    # Per token, not per row: next to ln 40 for a model that knows nothing.
    assert 3 < float(rows[1][1]) < 8
    lengths = {"length": LENGTH, "stride": LENGTH}
    before, after = build_model(), trained
    for model in (before, after):
        longrope.apply(model, tiers_of(model))
    try:
        assert longrope.perplexity(after, documents, **lengths) < longrope.perplexity(
            before, documents, **lengths
        )
    finally:
        longrope.remove(after)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(tmp_path, documents):
    one = train(tmp_path / "one", documents, rows_per_pass=2, steps=2)
    many = train(tmp_path / "many", documents, rows_per_pass=1, steps=2)
    losses = [
        (tmp_path / name / finetune.LOSSES).read_text().split()[1] for name in ("one", "many")
    ]
    first, second = (float(line.split(",")[1]) for line in losses)
    assert first == pytest.approx(second, rel=1e-4)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


def test_gradients_are_clipped_before_a_step(tmp_path, documents, monkeypatch):
    norms = []

    def measured(self, args, state, control, model=None, **kwargs):
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        norms.append(float(sum(squares)) ** 0.5)

    monkeypatch.setattr(trainer.GradientGuard, "on_pre_optimizer_step", measured)
    train(tmp_path, documents, max_grad_norm=1e-3)
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)


def test_activation_checkpoints_change_nothing(tmp_path, documents, whole):
    again = train(tmp_path, documents, activation_checkpointing=True)
    for a, b in zip(again.parameters(), whole[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


def test_weights_of_a_model_in_16_bits_stay_in_16_bits(tmp_path, documents, whole):
    model = train(
        tmp_path / "a", documents, build_model().bfloat16(), precision="bf16", packed=True
    )
    assert model.dtype == torch.bfloat16
    assert not same(model, build_model().bfloat16())
    # Nothing of it is left in the process for the next stage.
    assert same(train(tmp_path / "b", documents), whole[1])


def test_a_second_stage_in_the_process_is_the_stage_of_a_fresh_one(
    tmp_path, documents, monkeypatch
):
    under_autocast = []

    def loss(*args, own=trainer._loss, **kwargs):
        under_autocast.append(torch.is_autocast_enabled("cpu"))
        return own(*args, **kwargs)

    monkeypatch.setattr(trainer, "_loss", loss)
    first = train(tmp_path / "a", documents, precision="bf16")
    fresh = build_model()
    fresh.load_state_dict(first.state_dict())
    second = train(tmp_path / "b", documents, first, precision="bf16", seed=1)
    assert same(train(tmp_path / "c", documents, fresh, precision="bf16", seed=1), second)
    assert len(under_autocast) >= 3 * 4 and all(under_autocast)


def test_adapters_train_and_are_merged(tmp_path, documents):
    pytest.importorskip("peft")
    names = set(build_model().state_dict())
    model = train(tmp_path / "a", documents, lora_rank=2)
    assert set(model.state_dict()) == names
    changed = {
        n
        for n, p in build_model().state_dict().items()
        if not torch.equal(p, model.state_dict()[n])
    }
    assert changed
    assert all("proj" in name for name in changed)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- nothing is lost --------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"lora_rank": 2, "packed": True, "short_share": 0.5}])
def test_an_interrupted_stage_ends_with_the_same_weights(
    tmp_path, documents, whole, monkeypatch, config
):
    if config:
        pytest.importorskip("peft")
        whole = tmp_path, train(tmp_path / "whole", documents, **config)
    for step in (1, 2, 4):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, step)
            train(tmp_path / "cut", documents, **config)
    last = checkpoint.last_complete(tmp_path / "cut")
    assert last.name == "checkpoint-3"
    assert same(train(tmp_path / "cut", documents, **config), whole[1])


def test_a_model_with_tied_weights_goes_on_without_a_warning(tmp_path, documents, monkeypatch):
    from transformers import trainer as library

    def tied():
        return tiny_models.build(**SIZES | {"tie_word_embeddings": True})

    said = []
    monkeypatch.setattr(library.logger, "warning", lambda message, *_: said.append(message))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 3)
        train(tmp_path / "cut", documents, tied())
    cut = train(tmp_path / "cut", documents, tied())
    assert same(cut, train(tmp_path / "whole", documents, tied()))
    assert not [message for message in said if "missing keys" in message]


def test_free_memory_after_a_restart_does_not_change_how_a_stage_goes_on(
    tmp_path, documents, monkeypatch
):
    seen = []
    own = finetune._checkpoint_activations

    def noted(model, active):
        seen.append(active)
        own(model, active)

    monkeypatch.setattr(finetune, "_checkpoint_activations", noted)
    for free in (True, False):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(finetune, "recomputes", lambda *_, free=free: free)
            stop_at(patch, 2)
            train(tmp_path, documents)
    assert seen == [True, False, True, False]  # on, and off again at the end


def test_checkpoints_without_the_marker_or_a_file_are_skipped(
    tmp_path, documents, whole, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 4)
        train(tmp_path, documents, keep=3)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [
        f"checkpoint-{n}" for n in (1, 2, 3)
    ]
    (tmp_path / "checkpoint-3" / checkpoint.MARKER).unlink()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    assert checkpoint.last_complete(tmp_path).name == "checkpoint-1"
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert same(train(tmp_path, documents), whole[1])


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(
    tmp_path, documents, whole, monkeypatch
):
    own = trainer.RowTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = own(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 2 else loss

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RowTrainer, "compute_loss", broken)
        with pytest.raises(ValueError) as caught:
            train(tmp_path, documents)
    said = str(caught.value)
    assert said.startswith("finetune: expected a finite loss, got nan in step 3 of stage train, ")
    assert "rows 4 to 5 (document " in said
    assert said.endswith(f"the last good checkpoint is {tmp_path / 'checkpoint-2'}")
    assert same(train(tmp_path, documents), whole[1])


def test_a_gradient_that_is_not_finite_stops_too(tmp_path, documents):
    model = build_model()
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match=r"a finite gradient, got nan in step 1 .*no checkpoint"):
        train(tmp_path, documents, model)


def test_a_full_disk_ends_in_one_sentence_and_the_stage_goes_on_later(tmp_path, documents, whole):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            train(tmp_path, documents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"out: cannot write {tmp_path / 'checkpoint-1'} (")
    assert "\n" not in str(caught.value)
    assert checkpoint.checkpoints(tmp_path) == []
    assert same(train(tmp_path, documents), whole[1])


# --- what is refused --------------------------------------------------------------------------


def refused(monkeypatch=None, model=None, **config):
    with pytest.raises(ValueError) as caught:
        finetune.check_trainable(model or build_model(), FinetuneConfig(**SMALL | config))
    return str(caught.value)


def test_a_quantised_model_needs_adapters():
    model = build_model()
    model.is_quantized = True
    assert "got a quantised model (lora_rank trains adapters" in refused(model=model)
    finetune.check_trainable(model, FinetuneConfig(**SMALL, lora_rank=2))


def test_inference_tensors_and_jobs_of_other_kinds_are_refused(monkeypatch):
    with torch.inference_mode():
        model = build_model()
    assert "got inference tensors" in refused(model=model)
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    assert refused().startswith("finetune: expected no context parallelism")


def test_too_little_text_for_rows(tmp_path):
    with pytest.raises(ValueError, match="one of at least 32 tokens for stage train"):
        train(tmp_path, [torch.arange(31)])
    with pytest.raises(ValueError, match="eos: expected a token of the model's vocabulary of 40"):
        train(tmp_path, [torch.arange(40)], eos=True)
