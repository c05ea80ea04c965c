"""`longrope report` on every kind of run: finished, killed half-way, damaged."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from support import run_folders
from typer.testing import CliRunner

from longrope import report
from longrope.cli.main import app
from longrope.errors import JournalError
from longrope.evaluation.passkey_result import Accuracy
from longrope.report import writing
from longrope.runs import times


def text_of(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def rows_of(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- what it holds ------------------------------------------------------------------------------


def test_passkey_rows_have_the_interval_of_the_table(folders):
    rows = rows_of(folders["passkey"])
    assert len(rows) == 4 and {row["n"] for row in rows} == {"20"}
    for row in rows:
        found = Accuracy.of(([True] * round(20 * float(row["value"])) + [False] * 20)[:20])
        assert (float(row["low"]), float(row["high"])) == pytest.approx((found.low, found.high))
        assert f"{found.low:.0%} to {found.high:.0%}" in text_of(folders["passkey"])


@pytest.mark.parametrize("kind", run_folders.KINDS)
def test_a_report_is_one_file_with_its_figures_in_png_and_pdf(folders, kind):
    html = text_of(folders[kind])
    plots = folders[kind] / "plots"
    drawn = {path.stem for path in plots.glob("*.png")}
    assert drawn and drawn == {path.stem for path in plots.glob("*.pdf")}
    assert html.count('<img src="data:image/png;base64,') == len(drawn)
    assert not re.search(r'(src|href)="(https?:|//|/)', html)
    assert "<script" not in html and "finished" in html
    assert all((plots / f"{name}.pdf").read_bytes().startswith(b"%PDF") for name in drawn)
    for row in rows_of(folders[kind]):
        assert row["measure"] and row["set"]
        float(row["value"])


def test_the_report_of_a_search(folders):
    folder = folders["search"]
    html = text_of(folder)
    for label in ("as loaded", "PI", "NTK", "YaRN", "searched", "attention factor"):
        assert label in html
    # What a search does not measure is made by a command, which stands there.
    command = re.search(r"longrope evaluate MODEL UNSEEN.*", html)[0]
    assert "--lengths 16,32 " in command and "--baselines pi,ntk,yarn --ladder" in command
    assert (folder / "search.png").read_bytes() == (folder / "plots" / "search.png").read_bytes()
    rows = rows_of(folder)
    found = json.loads((folder / "factors.json").read_text())["lambdas"]
    assert [float(r["value"]) for r in rows if r["measure"] == "lambda"] == found
    summary = json.loads((folder / "summary.json").read_text())
    reached = {r["set"]: r["value"] for r in rows if r["measure"].endswith("held-out windows")}
    assert float(reached["as loaded"]) == summary["as_loaded"]["validation"]
    assert float(reached["searched"]) <= float(reached["YaRN"])
    assert f"{summary['forward_passes']:.0f}" in html


def test_an_evaluation_inside_a_run_is_in_its_report_too(folders, tmp_path, undrawn):
    shutil.copytree(folders["search"], tmp_path / "run")
    shutil.copytree(folders["evaluation"], tmp_path / "run" / "evaluation")
    report.write(tmp_path / "run")
    html = text_of(tmp_path / "run")
    assert "Evaluation up to 64 tokens: Perplexity" in html
    assert "longrope evaluate MODEL UNSEEN" not in html
    drawn = {figure.name for figure in writing.page_of(tmp_path / "run").figures()}
    assert {"search", "factors", "evaluation-perplexity-by-position"} <= drawn


def test_the_report_of_an_evaluation_has_perplexity_by_position(folders):
    rows = [r for r in rows_of(folders["evaluation"]) if r["measure"] == "perplexity by position"]
    assert {(r["begin"], r["end"]) for r in rows} == {("0", "16"), ("16", "32"), ("32", "64")}
    # Tiers by position leave the model's own window to the model.
    own = {r["set"]: float(r["value"]) for r in rows if r["end"] == "16"}
    assert own["<script>alert(1)</script>"] == pytest.approx(own["as loaded"], rel=1e-5)
    assert own["yarn"] != pytest.approx(own["as loaded"], rel=1e-3)


def test_the_report_of_an_extension(folders):
    html, rows = text_of(folders["extension"]), rows_of(folders["extension"])
    losses = [float(r["value"]) for r in rows if r["measure"] == "loss"]
    assert len(losses) == 30 and losses[-1] < losses[0]
    stages = {r["set"] for r in rows if r["measure"] == "perplexity"}
    assert stages == {"the model as it was", "search-1", "finetune-2", "recover-3"}
    assert {r["set"] for r in rows if r["measure"] == "lambda"} == {
        "tier to 16", "tier to 32", "tier to 64",
    }  # fmt: skip
    assert 'href="stages/01-search-1/search/report.html"' in html


# --- unfinished, damaged, none --------------------------------------------------------------------


def test_a_killed_run_shows_what_there_is(folders, tmp_path, undrawn):
    cut = tmp_path / "search"
    shutil.copytree(folders["search"], cut)
    for name in ("factors.json", "summary.json", "history.csv"):
        (cut / name).unlink()
    lines = (cut / "journal.jsonl").read_bytes().split(b"\n")
    (cut / "journal.jsonl").write_bytes(b"\n".join(lines[:9]) + b"\n" + lines[9][:20])
    extended = run_folders.extended(tmp_path / "extension", cut, stages=1)
    demo = run_folders.demo(tmp_path / "demo", cut, finished=False)
    for folder in (cut, extended, demo):
        report.write(folder)
        assert "not finished: this is what there is" in text_of(folder)
        assert rows_of(folder)
    assert "to be done" in text_of(extended)


def test_a_run_that_has_hardly_begun_has_a_report(folders, tmp_path):
    header = (folders["search"] / "journal.jsonl").read_bytes().partition(b"\n")[0]
    (tmp_path / "journal.jsonl").write_bytes(header + b"\n")
    report.write(tmp_path)
    assert "Nothing was measured yet" in text_of(tmp_path)
    assert rows_of(tmp_path) == []


@pytest.mark.parametrize(
    "kind, name, content, message",
    [
        ("search", "journal.jsonl", None, "line 3 of .* is damaged"),
        ("search", "factors.json", "{", "factors.json"),
        ("search", "summary.json", "[]", "expected a JSON object, got list"),
        ("search", "config.json", "{", "expected JSON, got a damaged file"),
        (
            "extension",
            "stages/02-finetune-2/losses.csv",
            "step,loss\n1,much\n",
            "expected a number",
        ),
        ("extension", "tiers.json", "{}", "tiers.json"),
        ("recovery", "recovery.md", "nothing", "expected a table"),
        ("passkey", "passkey.csv", "length,depth\n", "expected a column 'right'"),
        ("passkey", "passkey.csv", "length,depth,right\n", "at least one trial"),
        ("passkey", "passkey.csv", "length,depth,right\n1024\n", "line 2 is damaged"),
        ("passkey", "passkey.csv", "length,depth,right\ninf,0.5,1\n", "length: expected a whole"),
        ("passkey", "passkey.csv", "length,depth,right\n512,-3,1\n", "depth: expected a number"),
        ("demo", "perplexity.csv", "method,one\nPI,1\n", "expected a column for each length"),
        ("demo", "search-evolution/factors.json", "", "factors.json"),
    ],
)
def test_a_damaged_file_is_one_sentence(folders, tmp_path, undrawn, kind, name, content, message):
    run = tmp_path / "run"
    shutil.copytree(folders[kind], run)
    if content is None:
        lines = (run / name).read_bytes().split(b"\n")
        lines[2] = lines[2][:-12] + b'XX"}'
        (run / name).write_bytes(b"\n".join(lines))
    else:
        (run / name).write_text(content)
    before = text_of(run)
    with pytest.raises((ValueError, JournalError), match=message) as caught:
        report.write(run)
    assert "\n" not in str(caught.value) and str(run) in str(caught.value)
    assert text_of(run) == before
    answer = CliRunner().invoke(app, ["report", str(run)])
    assert answer.exit_code == 2 and len(answer.stderr.splitlines()) == 1


def test_a_folder_without_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "journal.jsonl").write_text('{"format": "longrope dance journal 1"}\n')
    for folder in (tmp_path, tmp_path / "other", tmp_path / "none"):
        answer = CliRunner().invoke(app, ["report", str(folder)])
        assert answer.exit_code == 2
        assert answer.stderr.startswith("longrope: DIR: expected the folder of a run of search, ")
    with pytest.raises(ValueError, match="folder: expected a path, got int"):
        report.write(3)


def test_a_report_that_cannot_be_made_does_not_fail_the_run(tmp_path, reports):
    with pytest.warns(UserWarning, match="is complete, but its report could not be written"):
        report.at_end(tmp_path)


# --- what it must not do --------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes(folders, tmp_path):
    kind = "extension"
    shutil.copytree(folders[kind], tmp_path / kind)
    answer = CliRunner().invoke(app, ["report", str(tmp_path / kind)])
    assert answer.stdout.strip() == str(tmp_path / kind / "report.html")
    names = ["results.csv", *(f"plots/{p.name}" for p in (tmp_path / kind / "plots").iterdir())]
    for name in names:
        assert (tmp_path / kind / name).read_bytes() == (folders[kind] / name).read_bytes(), name
    # The folder's own path is in commands.
    moved = text_of(tmp_path / kind).replace(times.quoted(str(tmp_path / kind)), "DIR")
    assert moved == text_of(folders[kind]).replace(times.quoted(str(folders[kind])), "DIR")


def test_what_a_user_gave_is_escaped(folders, tmp_path, undrawn):
    hostile = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    run = tmp_path / "a <b> & 'c'"
    shutil.copytree(folders["search"], run)
    config = json.loads((run / "config.json").read_text())
    config["model_name"] = hostile
    (run / "config.json").write_text(json.dumps(config))
    began = json.dumps({"began": hostile, "command": hostile, "torch": hostile})
    (run / "times.jsonl").write_text(began + "\n")
    report.write(run)
    html = text_of(run)
    assert "<script>" not in html and "<img src=x" not in html and "a <b>" not in html
    assert html.count("&lt;script&gt;alert(") >= 3


def test_no_path_of_the_home_folder_is_told(folders, tmp_path, monkeypatch, undrawn):
    home, here = tmp_path / "home" / "me", tmp_path / "here"
    shutil.copytree(folders["search"], home / "runs" / "one")
    here.mkdir()
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.chdir(here)
    monkeypatch.setattr(times._Process, "command", None)
    run = home / "runs" / "one"
    config = json.loads((run / "config.json").read_text())
    config["model_name"] = str(home / "models" / "mine")
    (run / "config.json").write_text(json.dumps(config))
    (run / "times.jsonl").unlink()
    given = [str(home / "my models" / "m"), str(here / "text"), f"--out={run}", "--seed", "1"]
    times.came_from(["search", *given])
    times.began(run)
    report.write(run)
    html = text_of(run)
    assert str(tmp_path) not in html
    assert "longrope search ~/&#39;my models/m&#39; text --out=$HOME/runs/one --seed 1" in html
    assert "~/models/mine" in html and "~/runs/one/evaluation" in html


# --- times ----------------------------------------------------------------------------------------


def test_times_are_those_of_every_process(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "_now", lambda: "2026-01-01T00:00:00+00:00")
    monkeypatch.setattr(times._Process, "command", None)
    times.began(tmp_path)  # killed
    times.came_from(["search", "m", "--out", "a b"])
    times.began(tmp_path)
    monkeypatch.setattr(times, "_now", lambda: "2026-01-01T01:02:03+00:00")
    times.ended(tmp_path)
    with (tmp_path / times.TIMES).open("a") as file:
        file.write('{"began": "2026-01')  # killed while it wrote
    killed, whole = times.read(tmp_path)
    assert times.seconds(killed) is None and killed["command"] is None
    assert times.seconds(whole) == 3723 and whole["command"] == "longrope search m --out 'a b'"
    assert {"torch", "transformers", "longrope", "python"} <= whole.keys()
    assert writing._duration(3723) == "1 h 2 min"


def test_a_run_moved_aside_takes_its_report_along(folders, tmp_path, reports):
    shutil.copytree(folders["search"], tmp_path / "run")
    before = text_of(tmp_path / "run")
    run_folders.search(tmp_path / "run", seed=1, resume=False)
    aside = tmp_path / "run" / "previous-1"
    assert text_of(aside) == before and (aside / "plots").is_dir()
    assert len(times.read(tmp_path / "run")) == 1
