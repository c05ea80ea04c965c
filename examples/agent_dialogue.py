"""An agent's long dialogue with one cache, across every crossing of tiers.

`python examples/agent_dialogue.py [--model FOLDER]`

A tool's output comes in, the model answers, until the window is full. Under tiers by position no
token is ever computed again: the example counts the tokens that go through the model, checks that
it is every token once, and compares the logits of the last answer with one prefill of the whole
dialogue. Where the factors follow the length of the sequence, each crossing makes the cache
worthless, and everything before it goes through the model again: the example says how much.

What a real model needs: an instruction-tuned model that calls tools, and its chat template around
the turns. For an 8B Llama the cache of 128k tokens takes 16 GiB in bfloat16; the dialogue costs
what one prefill of it costs, 7e15 FLOP, and reads the cache once for each generated token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import common
import torch

from longrope.demo import corpus
from longrope.patching import rotary_of


@dataclass
class Outcome:
    """What the dialogue came to, in tokens, and the largest difference of logits to one prefill."""

    length: int
    computed: int
    crossings: list[int]
    difference: float


def dialogue(
    reader: common.Reader, text: list[int], tool_tokens: int, reply_tokens: int
) -> Outcome:
    """Let a tool and the model speak in turns until the window is full."""
    model, computed = reader.model, 0

    def count(_module, _args, given):
        nonlocal computed
        computed += given["input_ids"].shape[1]

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    cache, said, answer = None, [], []
    while len(said) + tool_tokens + reply_tokens <= reader.window:
        turn, text = text[:tool_tokens], text[tool_tokens:]
        answer = []
        for _ in range(reply_tokens):
            logits, cache = reader.step(turn, cache)
            said += turn
            answer.append(logits[-1])
            turn = [int(logits[-1].argmax())]
        text = turn + text  # the last token of the answer goes in with the tool's next output
    hook.remove()
    whole, _ = reader.step(said, keep=reply_tokens)
    difference = float((torch.stack(answer) - whole).abs().max())
    limits = rotary_of(model).tiers.limits[:-1]  # the last tier has no end
    return Outcome(len(said), computed, [x for x in limits if x < len(said)], difference)


def main(argv: list[str] | None = None) -> Outcome:
    """Print and return what the dialogue came to."""
    p = common.parser(__doc__)
    p.add_argument("--text", type=Path, help="what the tool says; default: Python source")
    p.add_argument("--tool-tokens", type=int, default=100, help="of each output of the tool")
    p.add_argument("--reply-tokens", type=int, default=20, help="of each answer")
    args = p.parse_args(argv)
    reader = common.load(args)
    if args.tool_tokens < 2 or args.reply_tokens < 1:
        raise SystemExit("--tool-tokens, --reply-tokens: expected at least 2 and 1")
    if args.tool_tokens + args.reply_tokens > reader.window:
        raise SystemExit(f"--target: expected room for a turn, got {reader.window} tokens")
    if args.text is None:
        sources = corpus.documents("test")
        text = b"".join(bytes(s.astype("uint8")) for s in sources)[: 8 * reader.window]
        text = text.decode(errors="replace")
    else:
        text = args.text.read_text(encoding="utf-8", errors="replace")
    ids = reader.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < reader.window:
        raise SystemExit(f"--text: expected at least {reader.window} tokens, got {len(ids)}")
    print(reader.costs(reader.window))
    found = dialogue(reader, ids, args.tool_tokens, args.reply_tokens)
    assert found.computed == found.length, "tokens went through the model twice"
    print(
        f"{found.length} tokens of dialogue, {found.computed} through the model, crossings at "
        f"{', '.join(map(str, found.crossings)) or 'none'}"
    )
    again = sum(found.crossings)
    print(f"Factors by length would compute {again} tokens again, {again / found.length:.0%} more")
    print(f"Largest difference of a logit to one prefill of the whole: {found.difference:.2g}")
    return found


if __name__ == "__main__":
    common.run(main)
