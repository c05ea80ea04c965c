"""lm-eval's model type of ours, where lm-eval is installed: scores under tiers by position."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models
from support.small_tokenizers import TEXT, bpe

import longrope

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture
def exported(tmp_path):
    tokenizer = bpe()
    model = tiny_models.build(vocab_size=max(320, len(tokenizer)), pad_token_id=None)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model")
    longrope.export(model, tmp_path / "out", tiny_models.factors("yarn", target=256).ladder())
    return tmp_path / "out"


def test_scores_are_those_of_the_tiers(exported):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from longrope.evaluation.lm_eval_model import LongRoPE

    assert get_model("longrope") is LongRoPE
    lm = LongRoPE(str(exported), max_length=256, batch_size=1)
    context, answer = TEXT + "The sky is", " blue. The sun is yellow."
    request = Instance("loglikelihood", {}, (context, answer), 0)
    ((found, _),) = lm.loglikelihood([request], disable_tqdm=True)
    model, tokenizer = longrope.load(exported)
    before, whole = (tokenizer(text)["input_ids"] for text in (context, context + answer))
    assert 64 < len(before) < len(whole)  # beyond the model's own window of 32 and the first tiers
    with torch.no_grad():
        log_probabilities = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    targets = torch.tensor(whole[len(before) :])
    own = log_probabilities[len(before) - 1 : -1].gather(1, targets[:, None]).sum()
    assert found == pytest.approx(float(own), abs=1e-3)
    longrope.remove(model)
    with torch.no_grad():
        plain = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    assert abs(float(plain[len(before) - 1 : -1].gather(1, targets[:, None]).sum()) - found) > 0.01
