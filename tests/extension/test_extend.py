"""`longrope.extend` from the outside: what a run leaves, resuming, bad input, the command."""

import importlib
import json
import math
import os

import pytest
import torch
from support import extension_runs, tiny_models
from support.extension_runs import STAGES, TARGET, documents
from support.threads import threads
from support.tiny_search import build_model

import longrope
from longrope.extension import folder, run, stages
from longrope.extension.folder import weights_hash
from longrope.report.extension import page

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its result, and the model that was given."""
    model = build_model()
    with threads(1):
        result = longrope.extend(
            model, documents(), target_length=TARGET, out=tmp_path_factory.mktemp("run"),
            stages=STAGES, progress=False, test_windows=2,
        )  # fmt: skip
    return result, model


# --- what it leaves -----------------------------------------------------------------------------


def test_the_given_model_is_not_changed(finished):
    result, model = finished
    assert weights_hash(model) == weights_hash(build_model())
    assert weights_hash(result.model) != weights_hash(model)
    assert not hasattr(model.model.rotary_emb, "tiers")


def test_the_folder_gives_the_extended_model_back(finished):
    result, _ = finished
    model, _ = longrope.load(result.folder / "model")
    assert weights_hash(model) == weights_hash(result.model)
    assert longrope.Tiers(model.model.rotary_emb.tiers) == result.tiers
    assert longrope.Tiers.load(result.folder / "tiers.json") == result.tiers
    ids = torch.randint(40, (1, TARGET))
    assert torch.equal(model(ids).logits, result.model(ids).logits)


def test_the_table_has_a_row_for_the_model_as_it_was_and_for_each_stage(finished):
    result, model = finished
    rows = result.measured.rows
    assert [row.name.partition(":")[0] for row in rows] == [
        "the model as it was", "search-1", "finetune-2", "search-3", "recover-4",
    ]  # fmt: skip
    assert result.measured.ranges == ((0, 16), (16, 32), (32, 64))
    # A search leaves the original window to the original model.
    assert rows[1].by_range[0] == pytest.approx(rows[0].by_range[0], rel=1e-5)
    assert rows[2].by_range[0] != rows[0].by_range[0]
    assert result.measured.table() == (result.folder / "table.md").read_text().strip()
    card = (result.folder / "model" / "README.md").read_text()
    assert card.count(rows[3].name) == 1
    assert "| stage one | factors for 32 tokens" in card
    # On text that no stage sees.
    plan, kept, held_out = run.prepared(
        model, documents(), run.ExtendArguments(target_length=TARGET, out="x", stages=STAGES)
    )
    assert len(kept) == 11
    (excerpt,) = held_out
    assert len(excerpt) == TARGET
    assert not any((text.unfold(0, TARGET, 1) == excerpt).all(1).any() for text in kept)
    assert plan == result.plan


def test_a_second_search_goes_on_from_what_the_weights_were_trained_under(finished):
    result, _ = finished
    first = longrope.Tiers.load(result.folder / "stages" / "01-search-1" / "tiers.json")
    second = longrope.Tiers.load(result.folder / "stages" / "03-search-3" / "tiers.json")
    assert second[: len(first)] == first
    assert second.limits == (16, 32, 64)


# --- resuming -----------------------------------------------------------------------------------


def test_a_finished_run_is_not_done_again(finished, monkeypatch):
    result, _ = finished
    monkeypatch.setattr(run, "run_stage", None)
    monkeypatch.setattr(run, "export", None)
    again = extension_runs.run(result.folder)
    assert weights_hash(again.model) == weights_hash(result.model)
    assert again.tiers == result.tiers
    assert again.measured.table() == result.measured.table()


def test_the_rules_without_a_search_are_measured_beside_it_once(finished, monkeypatch):
    result, _ = finished
    known = json.loads((result.folder / "baselines.json").read_text())
    assert [row["name"] for row in known.values()] == ["PI", "NTK", "YaRN"]
    assert all(len(row["by_range"]) == len(result.measured.ranges) for row in known.values())
    assert f"{known['yarn']['overall']:.3f}" in (result.folder / "report.html").read_text()
    monkeypatch.setattr(stages.Work, "table_row", None)
    extension_runs.run(result.folder)
    assert json.loads((result.folder / "baselines.json").read_text()) == known


def test_an_interrupt_between_stages_redoes_nothing_before_it(finished, tmp_path, monkeypatch):
    own, called = run.run_stage, []

    def stopping(work, stage, state):
        called.append(stage.name)
        if called == ["search-1", "finetune-2", "search-3"]:
            raise KeyboardInterrupt
        return own(work, stage, state)

    monkeypatch.setattr(run, "run_stage", stopping)
    with pytest.raises(KeyboardInterrupt):
        extension_runs.run(tmp_path)
    called.clear()
    extension_runs.run(tmp_path)
    assert called == ["search-3", "recover-4"]
    for name in extension_runs.RESULTS:
        assert (tmp_path / name).read_bytes() == (finished[0].folder / name).read_bytes()


def test_what_is_held_out_is_seen_by_no_stage_in_any_copy(tmp_path):
    def prepared(texts, **more):
        options = run.ExtendArguments(target_length=TARGET, out=tmp_path, test_windows=99, **more)
        return run.prepared(build_model(), texts, options)

    texts = documents()
    with pytest.warns(UserWarning, match="documents: left out 1 that are copies of one held out"):
        _, kept, test = prepared([*texts, *texts[:6]])
    assert len(kept) + len(test) <= len(texts) + 6
    seen = [row for document in kept for row in document.unfold(0, TARGET, 1).tolist()]
    assert not any(window.tolist() in seen for window in test)
    with pytest.raises(ValueError, match=r"held_out: .* no stage sees, got 2 that are among"):
        prepared(texts, held_out=[texts[3].numpy(), texts[5][:TARGET], texts[7]])


def test_a_bos_that_one_stage_names_is_that_of_the_whole_run(tmp_path, monkeypatch):
    seen = []
    for name in ("evaluation.perplexity", "extension.recover", "factor_search.checks"):
        module = importlib.import_module(f"longrope.{name}")

        def chosen(bos, *rest, own=module.bos_token):
            seen.append(bos)
            return own(bos, *rest)

        monkeypatch.setattr(module, "bos_token", chosen)
    plan = [STAGES[0] | {"length": TARGET, "bos": False}, STAGES[3]]
    sizes = {"max_position_embeddings": 16, "vocab_size": 64, "bos_token_id": 1}
    extension_runs.run(tmp_path, lambda: tiny_models.build(**sizes), stages=plan)
    assert len(seen) > 6 and set(seen) == {False}


def test_a_compiled_model_resumes_with_the_weights_of_its_run(finished, tmp_path, monkeypatch):
    own, first = run.run_stage, True

    def stopping(work, stage, state):
        if first and stage.name == "search-3":
            raise KeyboardInterrupt
        return own(work, stage, state)

    def compiled():
        return torch.compile(build_model(), backend="eager")

    monkeypatch.setattr(run, "run_stage", stopping)
    with pytest.raises(KeyboardInterrupt):
        extension_runs.run(tmp_path, compiled)
    first = False
    extension_runs.run(tmp_path, compiled)
    for name in extension_runs.RESULTS:
        assert (tmp_path / name).read_bytes() == (finished[0].folder / name).read_bytes()


def test_stages_of_fine_tuning_take_one_row_after_another(tmp_path, monkeypatch):
    firsts = []

    def counted(model, documents, tiers, stage, out, progress, first):
        firsts.append(first)
        return model

    monkeypatch.setattr(stages, "finetune", counted)
    search = {"kind": "search", "length": TARGET, "steps": 1, "samples": 1}
    train = STAGES[1] | {"length": TARGET}
    extension_runs.run(tmp_path, stages=[search, train, train | {"batch_size": 4}, train])
    assert firsts == [0, 6, 18]


def test_weights_that_were_altered_on_disk_are_refused(finished, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    out = tmp_path / "run"
    shutil.copytree(finished[0].folder, out)
    path = out / "stages" / "02-finetune-2" / folder.WEIGHTS / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not hold the weights that stage finetune-2 ended"):
        extension_runs.run(out)


def test_weights_that_are_gone_or_damaged_are_refused_in_one_sentence(finished, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished[0].folder, out)
    weights = out / "stages" / "02-finetune-2" / folder.WEIGHTS
    (weights / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"out: cannot read .*weights \(.*\); choose another"):
        extension_runs.run(out)
    shutil.rmtree(weights)
    with pytest.raises(ValueError, match=r"weights \(there is no such folder\); choose another"):
        extension_runs.run(out)


def test_tiers_of_a_stage_that_are_gone_or_damaged_are_refused_in_one_sentence(finished, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished[0].folder, out)
    tiers = out / "stages" / "01-search-1" / folder.TIERS
    tiers.write_text("half")
    with pytest.raises(ValueError, match=r"out: cannot read .*tiers\.json \(.*\); choose another"):
        extension_runs.run(out)
    tiers.unlink()
    with pytest.raises(ValueError, match=r"tiers\.json \(there is no such file\); choose another"):
        extension_runs.run(out)


@pytest.mark.parametrize("gone", ["model", "tiers.json", "table.md"])
def test_a_result_that_was_removed_is_written_again(finished, tmp_path, gone):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished[0].folder, out)
    (shutil.rmtree if gone == "model" else os.unlink)(out / gone)
    extension_runs.run(out)
    for name in extension_runs.RESULTS:
        assert (out / name).read_bytes() == (finished[0].folder / name).read_bytes()


def test_perplexities_that_overflow_are_kept_and_taken_again(tmp_path):
    def sure():
        model = build_model()
        with torch.no_grad():
            model.lm_head.weight *= 300
        return model

    def shown():
        result = extension_runs.run(tmp_path, sure)
        assert {row.overall for row in result.measured.rows} == {math.inf}
        return result.measured.table()

    first = shown()
    assert shown() == first == (tmp_path / "table.md").read_text().strip()
    assert "perplexity inf" in folder.summary(tmp_path)["3 search-3"]
    rows = page(tmp_path, "run").rows
    assert {row.value for row in rows if row.measure == "perplexity"} == {math.inf}


def test_weights_of_several_types_come_back_as_they_were(tmp_path):
    model, other = build_model().bfloat16(), build_model().bfloat16()
    for each in (model, other):
        each.model.norm.float()
    with torch.no_grad():
        model.model.norm.weight.mul_(1 / 3)
    folder.save_weights(model, tmp_path / "weights")
    folder.load_weights(other, tmp_path / "weights")
    assert weights_hash(other) == weights_hash(model)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"stages": [STAGES[0] | {"steps": 3}, *STAGES[1:]]},
            r"another context extension \(stages.search-1.options.steps: 2 there, 3 here\)",
        ),
        ({"seed": 5}, r"\(stages.search-1.options.seed: 0 there, 5 here\)"),
        (
            {"test_windows": 1, "held_out": [torch.arange(64) % 40]},
            r"another context extension \(documents: ",
        ),
    ],
)
def test_the_folder_of_another_plan_is_refused(finished, changes, message):
    before = (finished[0].folder / "journal.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        extension_runs.run(finished[0].folder, **changes)
    assert (finished[0].folder / "journal.jsonl").read_bytes() == before


def test_only_what_a_killed_run_was_writing_is_cleared(tmp_path):
    stage = tmp_path / "stages" / "01-search-1"
    (stage / ".weights.abcd1234").mkdir(parents=True)
    (tmp_path / ".model.abcd1234").mkdir()
    (tmp_path / ".tiers.json.abcd1234").touch()
    (tmp_path / ".pre-commit-config.yaml").touch()
    (tmp_path / ".config.d").mkdir()
    folder.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".config.d", ".pre-commit-config.yaml", "stages",
    ]  # fmt: skip
    assert not list(stage.iterdir())


def test_without_resume_an_earlier_run_is_set_aside(finished, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished[0].folder, out)
    stages = [{"kind": "search", "length": TARGET, "steps": 2, "samples": 1}]
    extension_runs.run(out, stages=stages, resume=False)
    assert (out / "previous-1" / "model" / "model.safetensors").is_file()
    assert len(list((out / "stages").iterdir())) == 1


@pytest.mark.filterwarnings("ignore:report")  # of a stage: it is not written either
@pytest.mark.parametrize(
    "most, said",
    [
        (1_500, r"File too large: .*config\.json"),
        (20_000, r"cannot write .*checkpoint-1 .*goes on"),
    ],
)
def test_a_full_disk_ends_in_one_sentence_and_the_run_goes_on_later(finished, tmp_path, most, said):
    """At the start, and in a stage of fine-tuning."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(OSError, match=said) as caught:
            extension_runs.run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    extension_runs.run(tmp_path)
    for name in extension_runs.RESULTS:
        assert (tmp_path / name).read_bytes() == (finished[0].folder / name).read_bytes()


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, message",
    [
        ([torch.arange(64) % 40], "at least 2 of 64 tokens or more, one for the table, got 1 "),
        ([torch.arange(63) % 40] * 3, r"got 0 \(of 3, the longest 63\)"),
        ([], "documents: expected at least one document, got none"),
        (["text"], r"documents\[0\]: expected token ids, got text"),
    ],
)
def test_too_little_text(tmp_path, texts, message):
    with pytest.raises(ValueError, match=message):
        longrope.extend(build_model(), texts, target_length=TARGET, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_documents_without_a_token_to_predict_are_left_out(tmp_path):
    texts = documents()
    few = [torch.zeros(0), texts[0][:1], *texts, []]
    arguments = run.ExtendArguments(target_length=TARGET, out=tmp_path / "run", stages=STAGES)
    with pytest.warns(UserWarning, match="documents: 3 of 15 are shorter than 2 tokens and left"):
        _, kept, held_out = run.prepared(build_model(), few, arguments)
    for found, expected in zip(
        (kept, held_out), run.prepared(build_model(), texts, arguments)[1:], strict=True
    ):
        assert folder.digests(found) == folder.digests(expected)
    with pytest.warns(UserWarning, match="1 of 1"), pytest.raises(ValueError, match="got 0"):
        run.prepared(build_model(), [[1]], arguments)


def test_models_and_arguments_that_are_refused(tmp_path, monkeypatch):
    def refused(message, model=None, **arguments):
        given = {"target_length": TARGET, "out": tmp_path / "run", "stages": STAGES} | arguments
        with pytest.raises(ValueError, match=message):
            longrope.extend(model or build_model(), documents(), **given)
        assert not (tmp_path / "run").exists()

    patched = longrope.apply(build_model(), tiny_models.factors().replace(original_length=16))
    refused("model: expected a model without factors applied", patched)
    quantised = build_model()
    quantised.is_quantized = True
    refused("got a quantised model", quantised)
    dropping = build_model()
    dropping.config.attention_dropout = 0.1
    refused("model: expected no dropout in attention", dropping)
    refused("finetune: expected None or a FinetuneConfig, got dict", finetune={})
    refused("target_length: expected more than the window", target_length=16)
    refused("out: expected a path, got int", out=3)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        refused("extend: expected a job .* got WORLD_SIZE=2, LOCAL_RANK=None and 1 joined")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    refused("holds config.json and no journal of a context extension", out=tmp_path / "other")
