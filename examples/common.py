"""What the examples share: a model with a longer window, text in and out of it, and its costs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import longrope
from longrope.demo.run import load_packaged_model
from longrope.evaluation.memory import cache_bytes
from longrope.patching.tier_pass import cache_argument


class Bytes:
    """The packaged model's tokens: UTF-8 bytes."""

    chat_template = None
    eos_token_id = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


@dataclass
class Reader:
    """A model with its tiers, and its tokenizer."""

    model: Any
    tokenizer: Any
    window: int

    @property
    def chats(self) -> bool:
        """Whether the model is for chats: its tokenizer knows how their turns are written."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a request: of a user's turn where the model is for chats."""
        if not self.chats:
            return list(self.tokenizer.encode(text))
        return list(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )

    def fitted(self, document: str, request: str, new_tokens: int) -> list[int]:
        """Return the prompt of a document and a request, the document cut to fit the window."""
        room = self.window - new_tokens - len(self.prompt(f"\n\n{request}"))
        if room < 1:
            raise SystemExit(
                f"--target: expected room for a document, got a window of {self.window} tokens"
            )
        ids = self.tokenizer.encode(document, add_special_tokens=False)
        if len(ids) > room:
            print(f"The document has {len(ids)} tokens; its first {room} fit.")
            document = self.tokenizer.decode(ids[:room])
        return self.prompt(f"{document}\n\n{request}")

    @torch.no_grad()
    def complete(self, ids: list[int], new_tokens: int) -> str:
        """Return the model's greedy continuation of token ids."""
        prompt = torch.tensor([ids], device=self.model.device)
        made = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens,
            do_sample=False, pad_token_id=self.tokenizer.eos_token_id or 0,
        )  # fmt: skip
        return self.tokenizer.decode(made[0, len(ids) :].tolist(), skip_special_tokens=True)

    @torch.no_grad()
    def step(self, ids: list[int], cache: Any = None, keep: int = 1) -> tuple[torch.Tensor, Any]:
        """Run tokens behind a cache (None: a new one); return logits `[keep, V]` and the cache."""
        tokens = torch.tensor([ids], device=self.model.device)
        name = cache_argument(self.model)  # transformers has renamed it
        given = {} if cache is None else {name: cache}
        out = self.model(input_ids=tokens, use_cache=True, logits_to_keep=keep, **given)
        return out.logits[0], getattr(out, name)

    def costs(self, tokens: int) -> str:
        """Say what a prefill of so many tokens takes."""
        config = self.model.config.get_text_config()
        held = cache_bytes(self.model, tokens) / 2**30
        width = config.num_attention_heads * longrope.rope_settings(config).head_dim
        # 2 operations a weight and token; causal attention 4 a pair and channel, of half the pairs.
        linear = 2.0 * self.model.num_parameters(exclude_embeddings=True) * tokens
        flop = linear + 2.0 * config.num_hidden_layers * tokens**2 * width
        return f"{tokens} tokens: {held:.3g} GiB of keys and values, {flop:.2g} FLOP to prefill"


def parser(description: str) -> argparse.ArgumentParser:
    """Return the flags that name a model and its factors."""
    p = argparse.ArgumentParser(description=description.splitlines()[0])
    p.add_argument("--model", help="Hugging Face folder or name; default: the packaged tiny model")
    p.add_argument("--target", type=int, help="window in tokens; default: 8 times the model's own")
    p.add_argument("--factors", type=Path, help="factors or tiers (JSON); default: YaRN's")
    return p


def load(args: argparse.Namespace) -> Reader:
    """Load a model and give it its tiers by position."""
    if args.model is not None and (Path(args.model) / "longrope.json").is_file():
        model, tokenizer = longrope.load(args.model)  # with the tiers that it was exported with
        window = longrope.patching.rotary_of(model).tiers[-1].target_length
        return Reader(_on_device(model), tokenizer, window)
    if args.model is None:
        model, tokenizer = load_packaged_model(), Bytes()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    rope = longrope.rope_settings(model)
    if args.factors is None:
        target = args.target or 8 * rope.loaded_length
        if target <= rope.loaded_length:
            raise SystemExit(
                f"--target: expected more than the model's window, {rope.loaded_length}, "
                f"got {target}"
            )
        tiers = longrope.RescaleFactors.yarn(**rope.lengths(target)).ladder(loaded=rope.loaded)
    else:
        tiers = longrope.Tiers.load(args.factors)
        if len(tiers) == 1:
            tiers = tiers[0].ladder(loaded=rope.loaded)
    longrope.apply(model, tiers)
    return Reader(_on_device(model), tokenizer, args.target or tiers[-1].target_length)


def _on_device(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def run(main: Callable[[], object]) -> None:
    """Run an example; what is wrong with its arguments or files is one sentence."""
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
