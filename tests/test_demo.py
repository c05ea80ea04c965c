"""The packaged model, its corpus, and `longrope demo` end to end with a small budget."""

from __future__ import annotations

import csv

import pytest
import torch

from longrope import RescaleFactors, Tiers, apply, perplexity
from longrope.demo import corpus, report, run, train
from longrope.runs import style


def write_library(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x = 1\n" * 400)


def test_held_out_files_are_listed_with_the_role_that_the_rule_gives_them():
    lines = corpus.HELD_OUT_LIST.read_text().splitlines()
    roles = dict(reversed(line.split(" ", 1)) for line in lines)
    assert len(roles) == len(lines) > 100
    assert {corpus.role(name) for name in roles} == {"search", "test"}
    assert all(corpus.role(name) == wanted for name, wanted in roles.items())


def test_a_role_depends_on_the_module_path_alone(tmp_path):
    names = [f"package_{i}/module_{i}.py" for i in range(60)]
    write_library(tmp_path, [*names, "test/never.py", "site-packages/never.py"])
    found = {r: corpus.source_files(r, tmp_path) for r in ("train", "search", "test")}
    assert sorted(name for files in found.values() for name in files) == sorted(names)
    assert all(corpus.role(name) == r for r, files in found.items() for name in files)
    assert len(found["train"]) > len(found["search"]) + len(found["test"]) > 0


def test_an_interpreter_without_sources_is_told_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.py files") as caught:
        corpus.documents("train", stdlib=tmp_path)
    assert "\n" not in str(caught.value)


def test_training_windows_come_from_the_documents_and_depend_on_the_seed():
    documents = corpus.documents("train", min_length=train.CONTEXT)[:3]
    windows = train.RandomWindows(documents, count=20, seed=0)
    again = train.RandomWindows(documents, count=20, seed=0)
    other = train.RandomWindows(documents, count=20, seed=1)
    texts = [d.tobytes() for d in documents]
    for i in range(20):
        window = windows[i]["input_ids"]
        assert len(window) == train.CONTEXT
        assert any(window.numpy().tobytes() in text for text in texts)
        assert window.equal(again[i]["input_ids"])
    assert any(not windows[i]["input_ids"].equal(other[i]["input_ids"]) for i in range(20))


def test_the_optimizer_obeys_a_schedule_after_its_state_was_loaded():
    model = train.build_model(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    optimizer = train.optimizer_of(model)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does, which copies the groups
    held = [p for part in optimizer.parts for g in part.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    ids = torch.arange(20)[None]
    for moves in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        changed = [not p.equal(b) for p, b in zip(model.parameters(), before, strict=True)]
        assert all(changed) if moves else not any(changed)


def test_the_packaged_model_is_what_the_training_script_builds():
    packaged, built = run.load_packaged_model(), train.build_model()
    shapes = {name: p.shape for name, p in packaged.state_dict().items()}
    assert shapes == {name: p.shape for name, p in built.state_dict().items()}
    assert packaged.config.max_position_embeddings == run.ORIGINAL_LENGTH == train.CONTEXT


def test_search_and_test_excerpts_come_from_different_files():
    searched, tested = run.excerpts("search", 4, seed=0), run.excerpts("test", 4, seed=0)
    assert {len(e) for e in searched + tested} == {run.TARGET_LENGTH}
    test_texts = [d.tobytes() for d in corpus.documents("test")]
    assert not any(e.tobytes() in text for e in searched for text in test_texts)


def test_the_demo_beats_every_baseline_and_saves_what_it_says(tmp_path, monkeypatch, capsys):
    evolution, gradient = run.SEARCHES
    small = {"method": "evolution", "population": 8, "mutations": 4, "crossovers": 4}
    monkeypatch.setitem(run.SEARCHES, evolution, small)
    monkeypatch.setattr(run, "SEARCH_SAMPLES", 1)
    monkeypatch.setattr(run, "TEST_SAMPLES", 2)
    table = run.run(tmp_path / "out", seed=0, iterations=2, steps=2)
    closed = ["none", "PI", "NTK", "dynamic NTK", "YaRN", "Llama 3's rule", "MrRoPE-Uni",
              "MrRoPE-Pro", "CoPE"]  # fmt: skip
    assert list(table) == [*closed, evolution, gradient, run.BY_POSITION]
    at_target = {name: row[-1] for name, row in table.items()}
    assert at_target["none"] > 2 * table["none"][0]  # past its window the model breaks down
    assert at_target[evolution] < min(at_target["none"], at_target["PI"], at_target["NTK"])
    assert at_target[gradient] < 0.95 * at_target["YaRN"]
    # The original window is as it was: there the model's own float32 angles turn it.
    assert table[run.BY_POSITION][0] == pytest.approx(table["none"][0], rel=1e-6)
    assert at_target[run.BY_POSITION] < at_target[gradient]
    assert Tiers.load(tmp_path / "out" / "tiers.json").limits == run.LENGTHS
    with (tmp_path / "out" / "perplexity.csv").open() as file:
        saved = {row[0]: [float(v) for v in row[1:]] for row in list(csv.reader(file))[1:]}
    assert saved == {name: pytest.approx(row, abs=1e-5) for name, row in table.items()}
    factors = RescaleFactors.load(tmp_path / "out" / "factors.json")
    assert factors.target_length == run.TARGET_LENGTH
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert "Next: longrope search" in capsys.readouterr().out


def test_a_method_may_be_a_list_of_sets_and_every_measurement_moves_the_bar(tmp_path, capsys):
    model, lengths = run.load_packaged_model(), run.LENGTHS
    assert model.dtype == torch.float32  # on every processor
    baselines = run.baselines(rotary_dim=64, rope_theta=10000.0)
    short = baselines["none"].replace(target_length=run.ORIGINAL_LENGTH)
    methods = {"none": baselines["none"], "YaRN": [short, baselines["YaRN"]]}
    documents = run.excerpts("test", 1, seed=0)
    table = run.measure(model, methods, documents)
    # The first set serves the model's own window.
    assert table["YaRN"][0] == pytest.approx(table["none"][0], rel=1e-6)
    assert table["YaRN"][-1] < 0.5 * table["none"][-1]
    # Windows that are the begin of longer ones measure as those by themselves.
    apply(model, methods["YaRN"])
    alone = [perplexity(model, documents, length=n, stride=n) for n in lengths]
    assert table["YaRN"] == pytest.approx(alone, rel=1e-5)
    assert "100%" in capsys.readouterr().err
    report.save_plot(table, methods, lengths, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_of_the_demo_has_a_colour_of_its_own():
    names = [*run.baselines(rotary_dim=64, rope_theta=10000.0), *run.SEARCHES, run.BY_POSITION]
    drawn = {each.label: each.color for each in style.STYLES.values()}
    assert len({drawn[name] for name in names}) == len(names)
