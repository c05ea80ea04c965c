"""`longrope.perplexity` against a loop that does what its docstring says, one window at a time."""

import copy
import math

import pytest
import torch
from support import tiny_models

import longrope
from longrope.evaluation import memory
from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import NextTokenNLL
from longrope.evaluation.perplexity import sliding_windows

VOCABULARY = 50
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_models.build(
        vocab_size=VOCABULARY, max_position_embeddings=64, num_key_value_heads=1, pad_token_id=None
    )


def documents_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def brute_force(model, documents, length, stride):
    """Score every token in every window that may, and keep the score with the most context."""
    total, count = 0.0, 0
    for document in documents:
        best = {}
        start = 0
        while True:
            window = document[start : start + length]
            with torch.no_grad():
                log_probabilities = model(window[None]).logits[0].double().log_softmax(-1)
            for context in range(1, len(window)):
                nll = -log_probabilities[context - 1, window[context]].item()
                token = start + context
                if token not in best or context > best[token][0]:
                    best[token] = (context, nll)
            if start + length >= len(document):
                break
            start += stride
        total += sum(nll for _, nll in best.values())
        count += len(best)
    return math.exp(total / count)


@pytest.mark.parametrize(
    ("length", "stride", "lengths"),
    [
        (16, 4, (50, 16, 33)),
        (16, 16, (50, 32, 17)),  # no overlap: the first token of each window stays unscored
        (16, 1, (20, 18)),
        (7, 5, (31, 7, 8)),
        (2, 1, (9,)),
        (2, 2, (9, 2)),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_equals_the_brute_force_loop(model, length, stride, lengths, batch_size):
    documents = documents_of(*lengths)
    actual = longrope.perplexity(
        model, documents, length=length, stride=stride, batch_size=batch_size
    )
    assert actual == pytest.approx(brute_force(model, documents, length, stride), rel=1e-5)


@pytest.fixture
def chunks(monkeypatch):
    """Make windows go through the model in chunks of 8 tokens; returns what the model reads."""
    monkeypatch.setattr(memory, "CPU_TOKENS_PER_BATCH", 8)
    monkeypatch.setattr(memory, "LEAST_CHUNK", 8)

    def watch(model):
        sizes = []
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        return sizes

    return watch


@pytest.mark.parametrize(
    ("length", "stride", "lengths"), [(16, 4, (50, 16, 33)), (20, 1, (21, 24)), (17, 17, (40,))]
)
def test_windows_in_chunks_equal_the_brute_force_loop(model, length, stride, lengths, chunks):
    documents = documents_of(*lengths)
    expected = brute_force(model, documents, length, stride)
    model = copy.deepcopy(model)
    sizes = chunks(model)
    assert longrope.perplexity(model, documents, length=length, stride=stride) == pytest.approx(
        expected, rel=1e-5
    )
    assert max(sizes) == 8


def test_chunks_take_the_tier_of_the_whole_window(model, chunks):
    settings = {"original_length": 8, "rotary_dim": 16}
    short = longrope.RescaleFactors.none(target_length=8, **settings)
    long = longrope.RescaleFactors.yarn(target_length=64, **settings)
    documents = documents_of(40)
    model = copy.deepcopy(model)
    longrope.apply(model, long)
    expected = brute_force(model, documents, 24, 24)
    longrope.apply(model, [short, long], "row")
    sizes = chunks(model)
    actual = longrope.perplexity(model, documents, length=24, stride=24)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert max(sizes) == 8
    longrope.apply(model, short)
    assert abs(actual - brute_force(model, documents, 24, 24)) > 0.01


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_rope_that_grows_with_the_text_reads_whole_windows(rope_type, chunks):
    scaling = {"rope_type": rope_type, "factor": 4.0}
    if rope_type == "longrope":
        scaling |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    rope = tiny_models.rope_arguments(**scaling, original_max_position_embeddings=8)
    model = tiny_models.build(rope=None, max_position_embeddings=32, **rope)
    documents = documents_of(40)
    expected = brute_force(model, documents, 24, 24)
    sizes = chunks(model)
    assert longrope.perplexity(model, documents, length=24, stride=24) == pytest.approx(
        expected, rel=1e-5
    )
    assert max(sizes) == 24


def test_a_window_whose_keys_and_values_do_not_fit(model, chunks, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"^length: .* got 1 of 24 tokens, .* where 1000 are free"):
        longrope.perplexity(model, documents_of(40), length=24, stride=24)


def test_weighs_tokens_and_not_documents(model):
    one, two = documents_of(64, 16)
    nlls = [math.log(longrope.perplexity(model, [d], length=16, stride=8)) for d in (one, two)]
    both = math.log(longrope.perplexity(model, [one, two], length=16, stride=8))
    assert both == pytest.approx((63 * nlls[0] + 15 * nlls[1]) / 78, rel=1e-5)
    assert abs(both - sum(nlls) / 2) > 1e-3


@pytest.mark.parametrize("length", [2, 5, 16])
@pytest.mark.parametrize("stride", [1, 2, 5, 16])
def test_windows_score_each_token_once_with_the_most_context(length, stride):
    if stride > length:
        pytest.skip("a stride longer than the window leaves gaps")
    for size in range(length, 40):
        scored = {}
        for start, end, count in sliding_windows(size, length, stride):
            assert start % stride == 0
            assert end == min(start + length, size)
            for token in range(end - count, end):
                assert token not in scored
                assert token > start
                scored[token] = token - start
        for token in range(1, size):
            starts = [s for s in range(0, token, stride) if s > token - length]
            # The only tokens never scored are those that begin every window they lie in.
            assert scored.get(token) == (token - starts[0] if starts else None)


def test_a_sample_is_seeded_random_documents(model):
    documents = documents_of(*[16] * 12)
    kwargs = {"length": 16, "stride": 16}
    each = [longrope.perplexity(model, [d], **kwargs) for d in documents]
    drawn = [
        longrope.perplexity(model, documents, samples=1, seed=seed, **kwargs) for seed in range(8)
    ]
    again = [
        longrope.perplexity(model, documents, samples=1, seed=seed, **kwargs) for seed in range(8)
    ]
    assert drawn == again
    nearest = [min(range(12), key=lambda i, d=d: abs(each[i] - d)) for d in drawn]
    assert len(set(nearest)) > 3  # not the first ones
    every = longrope.perplexity(model, documents, samples=12, seed=5, **kwargs)
    assert every == pytest.approx(longrope.perplexity(model, documents, **kwargs), rel=1e-6)


def test_restores_training_flags_and_needs_no_gradient(model):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    longrope.perplexity(model, documents_of(16), length=16, stride=8)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == before
    model.eval()
    assert all(p.grad is None for p in model.parameters())


def test_a_model_with_more_than_a_linear_output_layer_is_scored_by_its_own_logits(model):
    class SoftCapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = model.model
            self.inner = model

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, input_ids, use_cache=False):
            out = self.inner(input_ids=input_ids, use_cache=use_cache)
            out.logits = torch.tanh(out.logits)
            return out

    capped = SoftCapped().eval()
    documents = documents_of(24)
    actual = longrope.perplexity(capped, documents, length=16, stride=8)
    assert actual == pytest.approx(brute_force(capped, documents, 16, 8), rel=1e-5)
    plain = longrope.perplexity(model, documents, length=16, stride=8)
    assert abs(actual - plain) > 0.1


def test_only_scored_tokens_reach_the_output_layer(model):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    try:
        with evaluating(model):
            score = NextTokenNLL(model)
            seen.clear()
            nll = score(torch.stack(documents_of(16, 16)), 4)
    finally:
        hook.remove()
    assert nll.shape == (2, 4)
    assert sum(seen) <= 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"documents": []}, "documents: expected at least one document"),
        ({"documents": [[1, 2, 3]]}, r"documents\[0\]: expected at least 16 tokens, got 3"),
        ({"documents": [[VOCABULARY] * 16]}, r"documents\[0\]: token id 50 is outside"),
        ({"length": 1}, "length: expected an integer of at least 2, got 1"),
        ({"length": 16.0}, "length: expected an integer of at least 2, got 16.0"),
        ({"length": 15, "stride": 16}, "stride: expected at most the length 15, got 16"),
        ({"stride": 0}, "stride: expected an integer of at least 1, got 0"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"samples": 3}, "samples: expected at most 2 documents, got 3"),
        ({"samples": 0}, "samples: expected an integer of at least 1, got 0"),
        ({"model": "path"}, "model: expected a Hugging Face causal language model, got str"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(model, changes, sentence):
    arguments = {"documents": documents_of(20, 30), "length": 16, "stride": 8} | changes
    with pytest.raises(ValueError, match=sentence):
        longrope.perplexity(arguments.pop("model", model), **arguments)


def test_nan_names_the_window(model):
    weight = model.lm_head.weight.data
    kept = weight.clone()
    weight[7] = math.nan
    try:
        with pytest.raises(ValueError, match=r"NLL of tokens 0 to 16 of documents\[0\] is nan"):
            longrope.perplexity(model, documents_of(20), length=16, stride=8)
    finally:
        weight.copy_(kept)


def test_a_wrapped_model_keeps_its_logits_out_of_memory(model):
    """As PEFT wraps it: `base_model` is another wrapper, and the rest is delegated."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, **arguments):
            return self.model(**arguments)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = Inner()
            self.config = model.config

        def get_base_model(self):
            return model

        def get_output_embeddings(self):
            return model.get_output_embeddings()

        def forward(self, **arguments):
            return self.base_model(**arguments)

    wrapped = Wrapper().eval()
    with evaluating(wrapped):
        assert NextTokenNLL(wrapped).head is model.lm_head
    documents = documents_of(40)
    expected = longrope.perplexity(model, documents, length=16, stride=8)
    assert longrope.perplexity(wrapped, documents, length=16, stride=8) == expected


def test_progress_counts_windows_and_ends_with_the_result():
    model = tiny_models.build()
    documents = list(tiny_models.tokens(3, 100))
    seen = []
    value = longrope.perplexity(
        model, documents, length=40, stride=20, batch_size=2, progress=lambda *now: seen.append(now)
    )
    done, totals, values = zip(*seen, strict=True)
    assert done[-1] == totals[0] == 12 and list(done) == sorted(done) and len(set(totals)) == 1
    assert values[-1] == pytest.approx(value)
    assert longrope.perplexity(model, documents, length=40, stride=20, batch_size=2) == value
    with pytest.raises(ValueError, match="progress: expected True, False or a function, got 3"):
        longrope.perplexity(model, documents, length=40, stride=20, progress=3)


def test_a_loss_that_overflows_is_an_infinite_perplexity(model):
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure.lm_head.weight *= 1e5
    found = longrope.perplexity(sure, documents_of(32), length=16, stride=16, ranges=[(0, 8)])
    assert (float(found), found.by_range) == (math.inf, (math.inf,))
    shown = []
    longrope.perplexity(
        sure, documents_of(32), length=16, stride=16, progress=lambda *told: shown.append(told[2])
    )
    assert shown[-1] == math.inf
