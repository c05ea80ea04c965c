"""Plans: what follows from the ratio, recipes, TOML, and what is refused."""

import dataclasses
import json
import math

import pytest

from longrope import FinetuneConfig
from longrope.extension.plan import FinetuneStage, SearchStage, recorded_tables
from longrope.extension.schedules import NAMED, make_plan

SEARCH, TRAIN = {"kind": "search"}, {"kind": "finetune"}


def plan(stages=None, window=256, target=2048, finetune=None):
    return make_plan(window, target, finetune, stages, 7)


def shape(made):
    return [(s.kind, getattr(s, "length", None) or s.lengths) for s in made.stages]


def test_without_training_the_ratio_leads_to_one_search():
    assert shape(plan(target=32768)) == [("search", 32768)]


@pytest.mark.parametrize(
    "target, expected",
    [
        (2048, [("search", 2048), ("finetune", 2048)]),
        (8192, [("search", 2048), ("finetune", 2048), ("search", 8192)]),
        (
            512 * 256,
            [
                ("search", 8192),
                ("search", 16384),
                ("finetune", 8192),
                ("finetune", 16384),
                ("search", 131072),
            ],
        ),
    ],
)
def test_with_training_the_last_factor_of_eight_is_a_second_search(target, expected):
    made = plan(target=target, finetune=FinetuneConfig(steps=30, warmup_steps=3))
    assert shape(made) == [*expected, ("recover", (256, 512))]
    trained = [s for s in made.stages if isinstance(s, FinetuneStage)]
    assert {s.config.steps for s in trained} == {30}
    # Each under the factors that were searched for its own length.
    by_name = {s.name: s.length for s in made.stages if isinstance(s, SearchStage)}
    assert [by_name[s.factors] for s in trained] == [s.length for s in trained]


def test_the_recipe_of_the_paper_for_llama2():
    made = plan("longrope-llama2", 4096, 2048 * 1024)
    assert shape(made) == [
        ("search", 128 * 1024),
        ("search", 256 * 1024),
        ("finetune", 128 * 1024),
        ("finetune", 256 * 1024),
        ("search", 2048 * 1024),
        ("recover", (4096, 8192)),
    ]
    first, second = (s.config for s in made.stages[2:4])
    assert (first.steps, second.steps) == (400, 600)
    assert (first.learning_rate, first.decay, first.batch_size) == (2e-5, "linear", 32)
    assert first.tiers == "one"
    # Half the sizes above 512k alone.
    searches = [s.options["preset"] for s in made.stages if isinstance(s, SearchStage)]
    assert searches == ["paper", "paper", "paper-long"]
    shorter = plan("longrope-llama2", 4096, 128 * 1024).stages[4]
    assert (shorter.length, shorter.options["preset"]) == (128 * 1024, "paper")


def test_the_recipe_of_the_paper_for_mistral_trains_on_short_rows():
    made = plan("longrope-mistral", 4096, 2048 * 1024)
    trained = [s for s in made.stages if isinstance(s, FinetuneStage)]
    assert [s.length for s in trained] == [16384, 16384]
    assert {(s.config.learning_rate, s.config.decay, s.config.batch_size) for s in trained} == {
        (1e-6, "constant", 64)
    }


def test_longrope2_mixes_windows():
    made = plan("longrope2", 8192, 131072)
    config = made.stages[1].config
    assert (config.tiers, config.short_share) == ("row", 0.1)
    assert config.steps * config.batch_size * 131072 == pytest.approx(10e9, rel=0.01)


def test_rows_of_the_mistral_recipe_do_not_depend_on_the_window():
    def rows(window, target):
        made = plan("longrope-mistral", window, target)
        return [s.length for s in made.stages if isinstance(s, FinetuneStage)]

    assert rows(8192, 2048 * 1024) == [16384, 16384]
    assert rows(32768, 2048 * 1024) == [32768, 32768]  # never shorter than the window
    assert rows(256, 8192) == [512, 1024]  # as far as the factors reach


def test_what_was_given_wins_over_a_recipe():
    given = FinetuneConfig(steps=400, decay="cosine", seed=5)
    made = plan("longrope-llama2", 4096, 2048 * 1024, given)
    for config in (s.config for s in made.stages if isinstance(s, FinetuneStage)):
        assert (config.steps, config.decay, config.seed) == (400, "cosine", 5)
        assert (config.tiers, config.batch_size, config.warmup_steps) == ("one", 32, 20)
    # The other fields of a copy are no one's wish.
    copy = dataclasses.replace(FinetuneConfig(batch_size=8), learning_rate=1e-3)
    config = plan("longrope2", 8192, 131072, copy).stages[1].config
    assert (config.batch_size, config.learning_rate, config.tiers) == (8, 1e-3, "row")


def test_a_configuration_and_a_stage_that_say_two_things_are_refused():
    stages = [SEARCH | {"length": 2048}, TRAIN | {"length": 2048, "steps": 60, "seed": 2}]
    with pytest.raises(
        ValueError, match=r"steps: expected it in finetune or in stages\[1\], got 9"
    ):
        plan(stages, finetune=FinetuneConfig(steps=9))
    config = plan(stages, finetune=FinetuneConfig(steps=60, seed=1)).stages[1].config
    assert (config.steps, config.seed) == (60, 2)


def test_the_seed_of_the_run_is_that_of_a_configuration_without_one():
    stages = [SEARCH | {"length": 2048}, TRAIN | {"length": 2048}]
    assert plan(stages).stages[1].config.seed == 7
    assert plan(stages, finetune=FinetuneConfig(steps=30)).stages[1].config.seed == 7
    assert plan(stages, finetune=FinetuneConfig(seed=0)).stages[1].config.seed == 0


@pytest.mark.parametrize("steps, expected", [(400, 20), (100, 20), (19, 3), (3, 0)])
def test_the_warm_up_adapts_to_the_steps_unless_it_is_asked_for(steps, expected):
    stages = [SEARCH | {"length": 2048}, TRAIN | {"length": 512, "steps": steps}]
    assert plan(stages).stages[1].config.warmup_steps == expected
    asked = TRAIN | {"length": 512, "steps": steps, "warmup_steps": steps}
    assert plan([stages[0], asked]).stages[1].config.warmup_steps == steps


@pytest.mark.parametrize("name", NAMED)
def test_recipes_are_json_and_tell_plans_apart(name):
    made = plan(name, 4096, 2048 * 1024)
    assert json.loads(json.dumps(made.as_dict()))["target_length"] == 2048 * 1024
    assert make_plan(4096, 2048 * 1024, None, name, 8).as_dict() != made.as_dict()


@pytest.mark.parametrize(
    "stages, finetune",
    [
        (None, None),
        (None, FinetuneConfig(steps=9, seed=3)),
        *((name, FinetuneConfig(bos=5)) for name in NAMED),
        (
            [
                SEARCH | {"length": 1024, "name": "first", "max_lambda": math.inf, "seed": 7},
                TRAIN | {"length": 512, "steps": 50, "warmup_steps": 10, "packed": True},
                TRAIN | {"length": 1024, "steps": 30, "warmup_steps": 6, "factors": "first"},
                SEARCH | {"length": 2048, "seed": 3},
                {"kind": "recover", "lengths": [64, 128], "max_lambda": 2.0},
            ],
            None,
        ),
    ],
)
def test_the_record_of_a_plan_makes_it_again(stages, finetune):
    made = plan(stages, 64, finetune=finetune)
    recorded = json.loads(json.dumps(made.as_dict()))
    tables = recorded_tables(recorded["stages"], recorded["seed"])
    again = plan(tables, 64)
    assert json.loads(json.dumps(again.as_dict())) == recorded
    # Another seed is that of every stage that took it over.
    first = make_plan(64, 2048, None, tables, 8).stages[0]
    assert first.options["seed"] == 8


def test_a_file_has_full_control(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        '[[stages]]\nkind = "search"\nname = "first"\nlength = 1024\nsteps = 9\n'
        '[[stages]]\nkind = "finetune"\nlength = 512\nfactors = "first"\nsteps = 50\n'
        'packed = true\n[[stages]]\nkind = "search"\nlength = 2048\nseed = 3\n'
    )
    for given in (path, str(path)):
        made = plan(given)
        assert shape(made) == [("search", 1024), ("finetune", 512), ("search", 2048)]
        assert made.stages[0].options == {"seed": 7, "steps": 9}
        assert (made.stages[1].config.packed, made.stages[1].config.steps) == (True, 50)
        assert made.stages[2].options["seed"] == 3


def test_a_stage_says_what_a_configuration_does_not(tmp_path):
    stages = [SEARCH | {"length": 2048}, TRAIN | {"length": 2048, "steps": 60}]
    made = plan(stages, finetune=FinetuneConfig(learning_rate=1e-3, seed=4))
    config = made.stages[1].config
    assert (config.steps, config.learning_rate, config.seed) == (60, 1e-3, 4)


@pytest.mark.parametrize(
    "stages, message",
    [
        ([], "expected the last search to reach target_length 2048, got no search"),
        ([SEARCH | {"length": 1024}], "to reach target_length 2048, got 1024"),
        (
            [SEARCH | {"length": 2048, "name": "a"}, SEARCH | {"length": 2048}],
            "lengths of search stages that grow from the model's window of 256 tokens",
        ),
        ([SEARCH | {"length": 200}, SEARCH | {"length": 2048}], r"that grow .*\[200, 2048\]"),
        (
            [SEARCH | {"length": 2048}, TRAIN | {"length": 1024}, TRAIN | {"length": 512}],
            "lengths of finetune stages that grow",
        ),
        ([TRAIN | {"length": 512}, SEARCH | {"length": 2048}], "name of a search before it"),
        (
            [SEARCH | {"length": 2048}, TRAIN | {"length": 512, "factors": "other"}],
            r"factors: expected the name of a search before it \(search-1\), got 'other'",
        ),
        (
            [SEARCH | {"length": 512}, TRAIN | {"length": 1024}, SEARCH | {"length": 2048}],
            r"stages\[1\].length: expected at most what the factors of search-1 reach, 512 tokens",
        ),
        ([SEARCH | {"length": 2048, "stepps": 3}], r"no such key \(did you mean steps\?\)"),
        ([SEARCH | {"length": 2048, "method": "magic"}], r"stages\[0\]: method: expected one of"),
        ([{"kind": "dance"}], r"stages\[0\].kind: expected one of 'search'"),
        ([SEARCH], r"stages\[0\]: length: expected an integer"),
        (
            [SEARCH | {"length": 2048}, TRAIN | {"length": 512, "steps": 5, "warmup_steps": 20}],
            r"stages\[1\]: warmup_steps: expected at most steps \(5\), got 20",
        ),
        (
            [SEARCH | {"length": 2048}, {"kind": "recover", "lengths": [512, 256]}],
            "growing lengths below target_length 2048",
        ),
        (
            [{"kind": "recover", "lengths": [512]}, SEARCH | {"length": 2048}],
            "recovery as the last stage",
        ),
        (
            [SEARCH | {"length": 1024, "name": "a"}, SEARCH | {"length": 2048, "name": "a"}],
            "'a' is taken already",
        ),
        ([SEARCH | {"length": 2048, "name": "export"}], r"stages\[0\].name: 'export' is taken"),
        (
            [
                SEARCH | {"length": 1024, "name": "a"},
                SEARCH | {"length": 2048},
                TRAIN | {"length": 512, "factors": "a"},
                {"kind": "recover", "lengths": [256]},
            ],
            "factors that reach target_length 2048, or a search after it, got those of a, 1024",
        ),
        (
            [SEARCH | {"length": 2048}, TRAIN | {"length": 512, "short_length": 64}],
            "short_length: expected short_share above 0 beside it, got 64 without any",
        ),
        (
            [
                SEARCH | {"length": 2048},
                TRAIN | {"length": 512, "short_length": 513, "short_share": 0.5},
            ],
            "short_length: expected at most the 512 tokens of a row of finetune-2, got 513",
        ),
        ("nowhere.toml", "expected one of longrope-llama2, .* or a TOML file, got 'nowhere.toml'"),
        (3, "a list of tables, got int"),
    ],
)
def test_plans_that_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        plan(stages)


def test_short_rows_of_one_stage_are_enough_for_a_common_length():
    trained = [TRAIN | {"length": 512, "short_share": share} for share in (0.0, 0.5)]
    made = plan([SEARCH | {"length": 2048}, *trained], finetune=FinetuneConfig(short_length=512))
    assert [stage.config.short_share for stage in made.stages[1:]] == [0.0, 0.5]
    made = plan("longrope2", 8192, 131072, FinetuneConfig(short_length=64))
    assert (made.stages[1].config.short_length, made.stages[1].config.short_share) == (64, 0.1)


def test_two_stages_that_name_two_bos_are_refused():
    stages = [
        {"kind": "search", "length": 512, "bos": 3}, {"kind": "finetune", "length": 512},
        {"kind": "recover", "lengths": [256]},
    ]  # fmt: skip
    plan = make_plan(256, 512, None, stages, 0)
    assert [plan.bos, plan.stages[1].config.bos, plan.stages[2].options.bos] == [3, 3, 3]
    assert "bos" in plan.as_dict()["stages"]["recover-3"]["options"]
    unnamed = make_plan(256, 512, None, [s | {"bos": "auto"} for s in stages], 0)
    assert "bos" not in unnamed.as_dict()["stages"]["recover-3"]["options"]
    stages[2] = stages[2] | {"bos": False}
    with pytest.raises(ValueError, match="stages: expected one bos for all of them, got"):
        make_plan(256, 512, None, stages, 0)


def test_factors_by_head_are_for_the_last_search():
    last = SEARCH | {"length": 2048, "per": "head"}
    assert plan([last, TRAIN | {"length": 2048}]).stages[0].options["per"] == "head"
    for after in ({"kind": "recover", "lengths": [256]}, SEARCH | {"length": 2048}):
        first = last if after["kind"] == "recover" else last | {"length": 1024}
        with pytest.raises(ValueError, match="expected per='model' in search-1, from whose"):
            plan([first, after])


def test_an_infinite_bound_of_lambda_in_a_stage_is_a_number():
    """JSON has no infinity, and the journal keeps the plan."""
    stage = plan([SEARCH | {"length": 2048, "max_lambda": math.inf}]).stages[0]
    assert math.isfinite(stage.options["max_lambda"])


def test_a_target_within_the_window_is_refused():
    with pytest.raises(ValueError, match=r"target_length: expected more than the window .* 256"):
        plan(target=256)


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "plan.toml"
    deep = "a = " + "[" * 3000 + "]" * 3000
    for text, message in (
        ("[[stages", "expected TOML"), ("steps = 3", r"\[\[stages\]\] tables"),
        (deep, "nested too deeply"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            plan(path)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rows_per_pass": 3}, "rows_per_pass: expected a divisor of batch_size"),
        ({"tiers": "none"}, "tiers: expected one of 'position', 'row', 'one'"),
        ({"short_share": 1.0}, "short_share: expected 0 <= share < 1"),
        ({"learning_rate": 0}, "learning_rate: expected a finite number above 0"),
        ({"packed": True, "tiers": "row"}, "packed: expected False with tiers='row'"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number of at least 0"),
        ({"weight_decay": 10**400}, "weight_decay: expected a finite number above 0"),
        ({"weight_decay": 1e39}, "weight_decay: expected a number of at most 3.40282e[+]38"),
        ({"learning_rate": 1.1}, "learning_rate: expected a number of at most 1, got 1.1"),
        ({"max_grad_norm": 1e39}, "max_grad_norm: expected a number of at most 3.40282e[+]38"),
        ({"lora_alpha": 1e39}, "lora_alpha: expected a number of at most 3.40282e[+]38"),
    ],
)
def test_configurations_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**given)
