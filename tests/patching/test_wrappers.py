"""Models as people have them: compiled, in parallel engines, adapted, offloaded, quantised."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.tiny_search import SMALL, build_documents, build_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import longrope
from longrope.evaluation.identity import fingerprint
from longrope.patching import rope_settings, rotary_of
from longrope.patching.wrappers import called_model, device_of, dtype_of, language_model

pytestmark = pytest.mark.usefixtures("one_thread")
EVOLUTION = SMALL | {"iterations": 1}
DESCENT = {"method": "gradient", "target_length": 32, "steps": 2, "samples": 2, "progress": False}
DEVICE_MAP = {
    "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


class Reward(nn.Module):
    """A wrapper of somebody's own."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def compiled_parts(model):
    model.model = torch.compile(model.model, backend="eager")
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    return peft.get_peft_model(model, config).eval()


def fsdp(model, by_layer=False):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.model), type(model.model.layers[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy if by_layer else None, device_id=torch.device("cpu")
    )


def fully_sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def cpu_offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def mapped(folder, **changes):
    pytest.importorskip("accelerate")
    build_model().save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=DEVICE_MAP | changes, offload_folder=str(folder / "offload")
    ).eval()


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled parts": compiled_parts,
    "DataParallel": nn.DataParallel,
    "somebody's own": Reward,
    "LoRA": lora,
    "CPU offload": cpu_offloaded,
}
PARALLEL = {
    "DDP": ddp,
    "compiled DDP of LoRA": lambda model: torch.compile(ddp(lora(model)), backend="eager"),
    "FSDP": fsdp,
    "FSDP by layer": lambda model: fsdp(model, by_layer=True),
    "FSDP 2": fully_sharded,
}


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A job of one process, which all of torch's parallel engines ask for."""
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def documents():
    return build_documents()


def measured(model, documents):
    """Return the perplexity with YaRN and without, and what two small searches find."""
    factors = longrope.RescaleFactors.yarn(**rope_settings(model).lengths(32))
    options = {"length": 32, "stride": 32}
    assert longrope.apply(model, factors) is model
    assert rotary_of(model).tiers == (factors,)
    values = [longrope.perplexity(model, documents, **options)]
    longrope.remove(model)
    values.append(longrope.perplexity(model, documents, **options))
    longrope.apply(model, factors.ladder())
    values.append(longrope.perplexity(model, documents, **options))
    longrope.remove(model)
    found = [longrope.search(model, documents, **how).factors for how in (EVOLUTION, DESCENT)]
    return values, found


@pytest.fixture(scope="module")
def plain(documents):
    return measured(build_model(), documents)


def check(model, documents, plain, same_weights=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own engines
        values, found = measured(model, documents)
        known_as = fingerprint(model)
    assert values == pytest.approx(plain[0], rel=1e-5)
    assert values[0] != pytest.approx(values[1], rel=1e-3)  # the factors bite
    assert found == plain[1]
    assert (known_as == fingerprint(build_model())) is same_weights
    assert device_of(model) == torch.device("cpu") and dtype_of(model) == torch.float32


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_measured_and_searched_as_it_is(name, documents, plain):
    check(WRAPPERS[name](build_model()), documents, plain, same_weights=name != "LoRA")


@pytest.mark.parametrize("name", PARALLEL)
def test_a_parallel_model_is_measured_and_searched_as_it_is(name, documents, plain, process_group):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PARALLEL[name](build_model())
    check(model, documents, plain, same_weights="LoRA" not in name)


@pytest.mark.parametrize("place", ["lm_head", "model.embed_tokens"])
def test_an_offloaded_model_is_measured_and_searched_as_it_is(place, documents, plain, tmp_path):
    check(mapped(tmp_path, **{place: "disk"}), documents, plain)


def test_an_adapter_counts(documents):
    model = lora(build_model())
    before = fingerprint(model), longrope.perplexity(model, documents, length=32, stride=32)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.fill_(0.1)
    after = fingerprint(model), longrope.perplexity(model, documents, length=32, stride=32)
    assert after[0] != before[0] and after[1] != pytest.approx(before[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch means to move these layers elsewhere
def test_layers_that_torch_has_quantised(documents):
    def build():
        return torch.ao.quantization.quantize_dynamic(build_model(), {nn.Linear}, torch.qint8)

    model = build()
    ids = documents[0][None, :32]
    logits = model(ids).logits[0, :-1].float()
    expected = nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item()
    assert longrope.perplexity(model, [ids[0]], length=32, stride=32) == pytest.approx(
        expected, rel=1e-5
    )
    assert fingerprint(model) == fingerprint(build()) != fingerprint(build_model())
    longrope.search(model, documents, **EVOLUTION)
    with pytest.raises(ValueError, match="model: expected layers that gradients pass through, got"):
        longrope.search(model, documents, **DESCENT)


class Packed(torch.Tensor):
    """A weight of two parts, as quantising libraries have them."""

    @staticmethod
    def __new__(cls, values, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
        made.values, made.scale = values, scale
        return made

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"no {function} of packed weights")


def test_the_fingerprint_reads_the_parts_of_a_packed_weight():
    def build(scale):
        model = build_model()
        packed = Packed(torch.arange(32 * 32, dtype=torch.int8).view(32, 32), torch.tensor(scale))
        model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(packed, requires_grad=False)
        return model

    assert fingerprint(build(0.5)) == fingerprint(build(0.5)) != fingerprint(build(0.25))


def test_the_fingerprint_knows_which_adapters_are_in_force():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build_model(), settings)
    model.add_adapter("other", settings)
    known_as = {fingerprint(model)}
    model.set_adapter("other")
    known_as.add(fingerprint(model))
    with model.disable_adapter():
        known_as.add(fingerprint(model))
    for layer in model.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling["other"] *= 2
    known_as.add(fingerprint(model))
    assert len(known_as) == 4


def test_the_fingerprint_of_weights_that_are_not_there_is_of_their_sizes():
    with torch.device("meta"):
        model = build_model()
    assert fingerprint(model) != fingerprint(build_model())


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_without_a_head_is_refused_in_one_sentence(kind, documents):
    model = kind.from_config(build_model().config)
    factors = longrope.RescaleFactors.yarn(**rope_settings(model).lengths(32))
    assert longrope.apply(model, factors) is model  # a decoder can be extended
    name = type(model).__name__
    expected = (
        rf"model: expected a .* language model, got {name} without a head that predicts tokens"
    )
    with pytest.raises(ValueError, match=expected):
        longrope.perplexity(model, documents, length=32, stride=32)
    with pytest.raises(ValueError, match=expected):
        longrope.search(nn.DataParallel(model), documents, **EVOLUTION)


def test_what_is_read_and_what_is_called():
    model = build_model()
    compiled = torch.compile(nn.DataParallel(Reward(model)), backend="eager")
    assert language_model(compiled) is model is called_model(compiled)
    assert language_model(model.config) is model.config
    adapted = lora(model)
    assert called_model(nn.DataParallel(adapted)) is adapted
    assert language_model(nn.DataParallel(adapted)) is model


def test_what_compiled_layers_read_of_tiers_is_no_number_of_numpy():
    # torch.compile takes numpy's bool for a tensor, and its guards fail in inference mode.
    model = build_model()
    tiers = longrope.RescaleFactors.yarn(**rope_settings(model).lengths(32)).ladder()
    assert rotary_of(longrope.apply(model, tiers)).first_by_model is True
