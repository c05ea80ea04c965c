"""Tokens per second of `generate`: plain transformers with SDPA beside longrope's position tiers.

Greedy, one sequence, the default caches of both. The prompt is random tokens, since its length
alone counts; the first token's time (the prefill) is a row of its own, and the rate counts those
after it. In turns, so that the machine's load meets both.

    OMP_NUM_THREADS=1 python benchmarks/bench_generate.py --processor-time
    OMP_NUM_THREADS=1 python benchmarks/bench_generate.py --processor-time --model SMOLLM2

smollm2.py makes the folder of the second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from harness import save, where
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

import longrope
from longrope import _C
from longrope.demo.run import load_packaged_model


class Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self, now) -> None:
        self.now = now
        self.times = [now()]

    def __call__(self, input_ids, scores, **_):
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def measure(model, prompt, tokens, now=time.perf_counter):
    """Return the seconds of the prefill and the tokens per second after it."""
    clock = Clock(now)
    model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True,
        pad_token_id=0, attention_mask=torch.ones_like(prompt),
        stopping_criteria=StoppingCriteriaList([clock]),
    )  # fmt: skip
    start, first, *_, last = clock.times
    return first - start, (tokens - 1) / (last - first)


def main() -> None:
    """Time every context."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", type=Path, help="folder of a model; default: the packaged one")
    p.add_argument("--name", help="what to call the model in rows; default: its folder")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 16384])
    p.add_argument("--tokens", type=int, default=48, help="to generate")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--processor-time", action="store_true",
        help="count the processor's time: for one thread on a machine that others use too",
    )  # fmt: skip
    p.add_argument("--save", action="store_true", help="append rows to benchmarks/results/")
    args = p.parse_args()
    now = time.process_time if args.processor_time else time.perf_counter

    def load():
        dtype = getattr(torch, args.dtype)
        if args.model is None:
            return load_packaged_model().to(dtype).eval()
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()

    models = {"transformers, SDPA": load(), "longrope, position tiers": load()}
    name = args.name or (args.model.name if args.model else "packaged model")
    settings = longrope.rope_settings(models["transformers, SDPA"])
    reach = max(args.context) + args.tokens
    for context in args.context:
        target = max(reach, 2 * settings.original_length)
        tiers = longrope.RescaleFactors.yarn(**settings.lengths(target)).ladder()
        longrope.apply(models["longrope, position tiers"], tiers)
        vocabulary = models["transformers, SDPA"].config.vocab_size
        prompt = torch.randint(vocabulary, (1, context))
        seen = {n: [] for n in models}
        for _ in range(args.rounds):
            for n, model in models.items():
                seen[n].append(measure(model, prompt, args.tokens, now))
        longrope.remove(models["longrope, position tiers"])
        rows = []
        print(f"\n{name}, {context} tokens of context, {args.dtype}")
        plain = seen["transformers, SDPA"]
        for n, rounds in seen.items():
            prefill, rate = (statistics.median(x) for x in zip(*rounds, strict=True))
            pairs = list(zip(rounds, plain, strict=True))
            ratios = {
                "generate, first token": statistics.median(b[0] / a[0] for a, b in pairs),
                "generate": statistics.median(a[1] / b[1] for a, b in pairs),
            }
            print(f"  {n:28s} {rate:8.1f} tokens/s {ratios['generate']:6.2f}x   first token "
                  f"{prefill:8.2f} s {ratios['generate, first token']:6.2f}x")  # fmt: skip
            for op, seconds, speed in (
                ("generate, first token", prefill, context / prefill), ("generate", 1 / rate, rate)
            ):  # fmt: skip
                rows.append(
                    {
                        "op": op, "case": f"{name}, {context} tokens", "dtype": args.dtype,
                        "implementation": n, "milliseconds": f"{seconds * 1e3:.4f}",
                        "ratio_to_baseline": f"{ratios[op]:.3f}", "rate": f"{speed:.2f}",
                        "rate_unit": "tokens/s", "isa": _C.isa(), **where(),
                    }
                )  # fmt: skip
        if args.save:
            save(rows, "cpu")


if __name__ == "__main__":
    main()
