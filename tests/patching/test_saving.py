"""`save_pretrained` says that applied factors stay behind."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
from support import tiny_models

import longrope


@pytest.fixture
def model():
    return longrope.apply(tiny_models.build(), tiny_models.factors())


def said(model, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    return [w for w in caught if "rescale factors" in str(w.message)]


def test_saving_under_factors_warns_from_the_users_line(model, tmp_path):
    (warning,) = said(model, tmp_path / "a")
    assert "longrope.export" in str(warning.message) and warning.filename == __file__
    assert (tmp_path / "a" / "config.json").is_file()
    tiers = longrope.apply(model, tiny_models.factors().ladder())
    assert len(said(tiers, tmp_path / "b")) == 1


def test_copies_warn_and_others_do_not(model, tmp_path):
    assert len(said(copy.deepcopy(model), tmp_path / "a")) == 1
    assert len(said(pickle.loads(pickle.dumps(model)), tmp_path / "b")) == 1
    assert said(tiny_models.build(), tmp_path / "c") == []
    assert said(longrope.remove(model), tmp_path / "d") == []


def test_an_export_does_not_warn(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longrope.export(model, tmp_path / "exported", tiny_models.factors())
    assert (tmp_path / "exported" / "longrope.json").is_file()
