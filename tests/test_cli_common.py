"""What all commands share: warnings and errors in one sentence."""

import warnings

import pytest
import typer
from support.commands import call

from longrope.cli.common import one_sentence_errors


def test_warnings_are_one_sentence_without_a_line_of_ours(capsys):
    @one_sentence_errors
    def command():
        warnings.warn("every layer\nslides", stacklevel=1)

    command()
    assert capsys.readouterr().err == "longrope: every layer slides\n"
    with warnings.catch_warnings(record=True) as said:  # elsewhere they are shown as ever
        warnings.simplefilter("always")
        warnings.warn("another", stacklevel=1)
    assert len(said) == 1


def test_errors_name_the_argument_as_it_was_typed(capsys):
    @one_sentence_errors
    def command(target_length=0):
        raise ValueError("target_length: expected more")

    with pytest.raises(typer.Exit):
        command()
    assert capsys.readouterr().err == "longrope: --target-length: expected more\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("passkey no-model --lengths 64 --tiers foo", '--tiers: expected "position" or "row"'),
        ("passkey no-model --lengths 64 --protocol foo", "--protocol: "),
        ("passkey no-model --lengths 64 --trials 0", "--trials: "),
        ("passkey no-model --lengths 64 --factors no.json", "--factors: "),
        ("evaluate no-model no-data --lengths 64 --out run --tiers foo", "--tiers: "),
        ("evaluate no-model no-data --lengths 0 --out run", "--lengths: "),
        ("evaluate no-model no-data --lengths 64 --out run --tasks guess", "--tasks: "),
        ("evaluate no-model no-data --lengths 64 --out run --samples 0", "--samples: "),
        ("evaluate no-model no-data --lengths 64 --out run --baselines guess", "--baselines: "),
        ("evaluate no-model no-data --lengths 64 --out run --factors no.json", "--factors: "),
        ("export no-model --factors no.json --out run --gguf-type q8_0", "--gguf-type: "),
        ("export no-model --factors no.json --out run --format onnx", "--format: "),
        ("perplexity no-model no-data --length 64 --stride 65", "--stride: "),
        ("perplexity no-model no-data --length 64 --ranges 64-65", "--ranges: "),
        ("perplexity no-model no-data --length 64 --tiers foo", "--tiers: "),
        ("perplexity no-model no-data --length 64 --factors no.json", "--factors: "),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(command, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = call(*command.split(), code=2).stderr
    assert refused.startswith(f"longrope: {said}") and refused.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
