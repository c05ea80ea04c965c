"""What all commands share: warnings and errors in one sentence."""

import warnings

import pytest
import typer

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
