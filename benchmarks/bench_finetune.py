"""A step of fine-tuning: ours under tiers by position, beside transformers' Trainer as it comes.

Both train the same random Llama on the same rows through the same Trainer, with activation
checkpoints, on a GPU under autocast to bfloat16. The plain run has SDPA, no factors and the model's
own loss over all logits; ours turns every row by four tiers and takes `ops.linear_nll`. Each run is
a process of its own, in turns, so that its peak memory is known: that of the process, or what torch
had taken of the GPU's, less what was held when training began.

    python benchmarks/bench_finetune.py --save
    python benchmarks/bench_finetune.py --device cuda --heads 16 --lengths 8192 32768 --save
    python benchmarks/bench_finetune.py --lengths 1024 --rounds 1 --steps 2
    python benchmarks/bench_finetune.py --lengths 8192 --one ours --profile  # where a step goes
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, WHERE, append, where

WAYS = ("plain", "ours")
FIELDS = (
    "length",
    "heads",
    "vocabulary",
    "way",
    "tokens_per_second",
    "ratio_to_plain",
    "peak_bytes",
    *WHERE,
)


def build(length: int, vocabulary: int, heads: int):
    """Return a Llama of 4 layers, heads of 64 channels, with a window of `length` / 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=64 * heads, intermediate_size=172 * heads,
            num_hidden_layers=4, num_attention_heads=heads, num_key_value_heads=heads // 4,
            max_position_embeddings=length // 8, bos_token_id=None, eos_token_id=None,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def peak_bytes(device: str) -> int:
    """Return the most bytes that this process, or torch on its GPU, has held."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_one(way: str, length: int, args: argparse.Namespace) -> dict[str, float]:
    """Train in this process; returns seconds of a step, the first left out, and peak bytes."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import longrope
    from longrope.extension.data import TrainingRows
    from longrope.extension.finetune import _checkpoint_activations
    from longrope.extension.trainer import RowTrainer, giving_loss

    ends: list[float] = []
    on_gpu = args.device == "cuda"
    profile = torch.profiler.profile()  # of the last step, if asked for

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            if args.profile and len(ends) == args.steps - 1:
                profile.start()

    steps = args.steps
    model = build(length, args.vocabulary, args.heads).to(args.device)
    random = np.random.default_rng(0)
    text = torch.from_numpy(random.integers(args.vocabulary, size=2 * length))
    rows = TrainingRows([text], length, steps, 0)
    if way == "plain":
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    else:
        rope = longrope.rope_settings(model)
        longrope.apply(model, longrope.RescaleFactors.yarn(**rope.lengths(length)).ladder())
    _checkpoint_activations(model, True)
    before = peak_bytes(args.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=1,
            use_cpu=not on_gpu, bf16=on_gpu, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            logging_strategy="no",
        )  # fmt: skip
        if way == "plain":
            Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
        else:
            with giving_loss(model):
                RowTrainer(
                    model, arguments, train_dataset=rows, callbacks=[Clock()], name="bench"
                ).train()
    if args.profile:
        profile.stop()
        busiest = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        for order in dict.fromkeys((busiest, "self_cpu_time_total")):
            print(profile.key_averages().table(sort_by=order, row_limit=25))
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {"seconds": seconds, "peak_bytes": peak_bytes(args.device) - before}


def in_a_process(way: str, length: int, args: argparse.Namespace) -> dict[str, float]:
    """Return what `run_one` finds in a process of its own."""
    command = [sys.executable, __file__, "--one", way, "--lengths", str(length)]
    for name in ("vocabulary", "steps", "heads", "device"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    p.add_argument("--vocabulary", type=int, default=32000)
    p.add_argument("--heads", type=int, default=8, help="of 64 channels, on a quarter of keys")
    p.add_argument("--steps", type=int, default=3, help="of each run; the first is not timed")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--csv", type=Path, help="append rows to this file")
    p.add_argument("--save", action="store_true", help="append rows to benchmarks/results/")
    p.add_argument("--one", choices=WAYS, help="one run of this way, in this process")
    p.add_argument("--profile", action="store_true", help="of --one: what its last step did")
    args = p.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.lengths[0], args)))
        return
    rows = []
    for length in args.lengths:
        found = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                found[way].append(in_a_process(way, length, args))
        for way in WAYS:
            ratios = [
                plain["seconds"] / own["seconds"]
                for plain, own in zip(found["plain"], found[way], strict=True)
            ]
            seconds = statistics.median(run["seconds"] for run in found[way])
            rows.append({
                "length": length, "heads": args.heads, "vocabulary": args.vocabulary, "way": way,
                "tokens_per_second": round(length / seconds, 1),
                "ratio_to_plain": round(statistics.median(ratios), 3),
                "peak_bytes": int(statistics.median(run["peak_bytes"] for run in found[way])),
                **where(args.device),
            })  # fmt: skip
            last = rows[-1]
            print(
                f"{length:7} {way:6} {last['tokens_per_second']:9.1f} tokens/s "
                f"{last['ratio_to_plain']:6.2f}x  peak {last['peak_bytes'] / 2**20:7.0f} MiB"
            )
    if args.save or args.csv:
        append(rows, args.csv or RESULTS / "finetune.csv", FIELDS)


if __name__ == "__main__":
    main()
