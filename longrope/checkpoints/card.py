"""The model card of an export: what it is, how it was made, and what its readers lose."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from longrope.checkpoints import source
from longrope.checkpoints.measured import Measured
from longrope.checkpoints.plan import Plan, set_for_readers
from longrope.factors import RescaleFactors
from longrope.factors.heads import span

_RULES = {
    "long": "They are the same for every length, so nothing changes when a sequence grows.",
    "none": "Up to {window} tokens a sequence is turned as by the model before the export. **A "
    "sequence that grows beyond that changes the factors of all its tokens, and keys cached before "
    "are wrong then.**",
    "factors": "Up to {window} tokens a sequence takes a set of its own. **A sequence that grows "
    "beyond that changes the factors of all its tokens, and keys cached before are wrong then.**",
}


def text(
    model: Any,
    plan: Plan,
    format: str,
    licences: Sequence[str],
    measured: Measured | None,
    found: Mapping[str, Any] | None,
    notes: Sequence[str],
) -> str:
    """Return the card as Markdown with front matter."""
    name = source.source_name(model)
    origin = source.source_folder(model)
    terms = source.terms(origin)
    parts = [
        _front_matter(getattr(model.config, "_name_or_path", ""), format, terms),
        f"# {name or 'A model'}, extended to {plan.long.target_length} tokens",
        _what(name, plan, format),
        "\n".join(f"- {note[0].upper()}{note[1:]}." for note in notes),
        "## Factors",
        _factors(plan, found),
        "## Perplexity by range of positions",
        _perplexity(plan, measured),
        "## Use",
        _use(plan, format),
        "## Licence",
        _licence(terms, licences),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def on_top_of(stage: RescaleFactors, target_length: int) -> str:
    """Say what factors are the product of: `stage`, and another one that reaches the target."""
    ratio = target_length / stage.target_length
    return (
        f"factors for {stage.target_length} tokens (lambdas {span(stage.lambdas)}, attention "
        f"factor {span(stage.attention_factor, 6)}), and a stage "
        f"of {ratio:.4g}x on top"
    )


def _front_matter(base: str, format: str, terms: Mapping[str, str]) -> str:
    lines = [f"{key}: {json.dumps(value)}" for key, value in terms.items()]
    if base and source.is_hub_name(base):
        lines.append(f"base_model: {json.dumps(base)}")
    lines += [
        f"library_name: {'transformers' if format == 'hf' else 'gguf'}",
        "pipeline_tag: text-generation",
        "tags: [longrope, long-context]",
    ]
    return "\n".join(["---", *lines, "---"])


def _what(name: str, plan: Plan, format: str) -> str:
    settings, long = plan.settings, plan.long
    place = "`config.json`" if format == "hf" else "the file's keys and two tensors"
    ours = (
        " `longrope.json` holds tiers by position beside it, which `longrope.load` applies."
        if format == "hf"
        else ""
    )
    rule = _RULES[plan.choice].format(window=plan.window)
    return (
        f"The weights of {name or 'the source'} with [LongRoPE](https://arxiv.org/abs/2402.13753) "
        f"rescale factors in {place}: a window of {long.target_length} tokens instead of "
        f"{settings.loaded_length}. {rule}{ours}"
    )


def _of_their_own(plan: Plan) -> dict[str, str]:
    if not plan.tiers[-1].per_head:
        return {}
    layers, heads = plan.tiers[-1].heads
    what = f"of {layers} layers" + f" and {heads} heads each" * (heads > 1)
    readers = set_for_readers(plan.tiers[-1])
    return {"factors of their own": f"{what}, in `longrope.json` alone; readers get {readers}"}


def _factors(plan: Plan, found: Mapping[str, Any] | None) -> str:
    long = plan.long
    dropped = f"{plan.start_tokens}, left out here: no reader knows them"
    rows = {
        "original length": plan.settings.original_length,
        "window of the source": plan.settings.loaded_length,
        "scaling of the source": plan.settings.rope_type,
        "target length": long.target_length,
        "sequences that readers turn by the short factors": f"up to {plan.window} tokens",
        "lambdas": f"{long.lambdas.min():.4g} to {long.lambdas.max():.4g}, {len(long.lambdas)} "
        "pairs",
        "attention factor": f"{long.attention_factor:.6g}",
        "start tokens": dropped if plan.start_tokens else 0,
        "tiers by position": len(plan.tiers),
        **_of_their_own(plan),
        **_versions(),
        **_flat(found or {}),
    }
    lines = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    if found is None:
        lines += ["", "How the factors were found was not said."]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {
        "longrope": sys.modules["longrope"].__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _flat(found: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested settings as rows of a table; what is None is left out."""
    rows: dict[str, Any] = {}
    for name, value in found.items():
        label = f"{above}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows |= _flat(value, f"{label}: ")
        elif value is not None:
            rows[label] = str(value).replace("|", "\\|").replace("\n", " ")
    return rows


def _perplexity(plan: Plan, measured: Measured | None) -> str:
    if measured is None:
        return (
            "It was not measured. Give `longrope export` documents of at least "
            f"{plan.long.target_length} tokens (`--data`) for a table here."
        )
    data = f" of {measured.data}" if measured.data else ""
    return (
        f"{measured.documents} documents{data}, {measured.tokens} scored tokens, windows of "
        f"{measured.length} tokens that do not overlap.\n\n{measured.table()}"
    )


def _use(plan: Plan, format: str) -> str:
    length = plan.long.target_length
    if format == "gguf":
        return (
            f"```bash\nllama-cli -m model.gguf -c {length}\n```\n\nllama.cpp takes the long "
            f"factors where its context (`-c`) exceeds {plan.window} tokens, else the short ones."
        )
    return f"""```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")  # the rule above

import longrope

model, tokenizer = longrope.load("this folder")  # tiers by position
```

```bash
vllm serve "this folder" --max-model-len {length}
```

vLLM takes the long factors where `--max-model-len` exceeds {plan.window}, and that is its default
length."""


def _licence(terms: Mapping[str, str], licences: Sequence[str]) -> str:
    said = ", ".join(f"{key}: {value}" for key, value in terms.items())
    if not said and not licences:
        return "That of the source, whose folder states none."
    files = f" Its files: {', '.join(f'`{name}`' for name in licences)}." if licences else ""
    return f"That of the source{f' ({said})' if said else ''}.{files}"
