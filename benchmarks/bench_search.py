"""The search's evaluator beside one Hugging Face forward and loss per candidate; its peak memory.

The packaged model, and a model of its depth and width with a vocabulary of 32,000 and random
weights (as real ones have, and the packaged one has not). Both sides measure the same candidates of
a population of 64, a few of them in a call, on the same windows in the same dtype; the baseline has
the model's own attention, and the factors in the model's own rotary module. Rates are tokens of
windows.

A step of the descent is timed with the gradient of the loss computed with it, and apart; and the
evaluator and a step in bfloat16 and float32 beside each other, which says what a processor is to
compute a 16-bit model in.

The peak memory is that of one candidate on one window, and of one step of the descent, whole and in
chunks, above the model; each is measured in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from harness import compare, parser, save, where
from populations import losses_of_hugging_face, population
from transformers import AutoModelForCausalLM

from longrope import ops
from longrope._native import _C
from longrope.demo import run as demo
from longrope.evaluation.memory import BackwardPlan, cache_bytes, plan_backward, plan_batches
from longrope.factor_search.descent import Point
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.gradient import GradientEvaluator

#: What the peak memory is measured of.
EVALUATION, STEP, CHECKPOINTED = "evaluation", "step", "step, checkpointed layers"
VOCABULARIES = {"packaged model": None, "its depth and width, V 32000": 32000}
POPULATION, WINDOWS = 64, 2


def load(vocabulary, dtype, device):
    """Return the packaged model, or one like it with another vocabulary and random weights."""
    model = demo.load_packaged_model()
    if vocabulary:
        torch.manual_seed(0)
        model.config.vocab_size = vocabulary
        model = AutoModelForCausalLM.from_config(model.config).eval()
    return model.to(device, dtype)


def setup(model, length, candidates):
    """Return named implementations, the first the baseline, and the tokens of a call."""
    vocabulary = model.config.vocab_size
    windows = torch.randint(0, vocabulary, (WINDOWS, length))
    if vocabulary == 256:
        windows = torch.stack(
            [torch.from_numpy(e[:length]).long() for e in demo.excerpts("test", WINDOWS, 0)]
        )
    problem, every = population(model, length, POPULATION)
    some = every[:: POPULATION // candidates]
    factors = [problem.factors(candidate) for candidate in some]
    rows, chunk = plan_batches(model, length)
    evaluator = PopulationEvaluator(model, problem.factors, rows, chunk=chunk)
    here = windows.to(next(model.parameters()).device)
    named = {
        "Hugging Face forward and loss": lambda: losses_of_hugging_face(model, factors, here),
        "PopulationEvaluator": lambda: evaluator(some, windows),
    }
    theirs, ours = (torch.tensor(f()) for f in named.values())
    print(
        f"\nlargest difference: {(theirs - ours).abs().max():.1e} nats; {rows} rows, chunk {chunk}"
    )
    assert (theirs - ours).abs().max() < 0.02  # what bfloat16 cosines and float32 angles lose
    return named, len(some) * windows.numel()


def one_step(model, length):
    """Return a step of the descent on one window, all of it."""
    problem, (candidate,) = population(model, length, 1)
    window = torch.randint(0, model.config.vocab_size, (1, length))
    point = Point(np.log(candidate.lambdas), problem.attention_factor)
    base = problem.factors(candidate).base_inv_freq()
    evaluator = GradientEvaluator(model, base, BackwardPlan(False, None))
    return lambda: evaluator(point, candidate.start_tokens, window)


def two_ways_to_the_gradient(model, length):
    """Return a step whose head has a backward pass, and one whose gradient comes with the loss."""
    step, with_loss = one_step(model, length), ops.linear_nll

    def in_two_passes():
        ops.linear_nll = lambda *a: torch.ops.longrope.linear_nll(*a)[0]
        try:
            return step()
        finally:
            ops.linear_nll = with_loss

    return {"step, logits computed twice": in_two_passes, "step, gradient with the loss": step}


def by_dtype(vocabulary, length, candidates):
    """Return the evaluator, and a step of the descent, in either dtype on the same model."""
    work = {"evaluation": {}, "step": {}}
    for dtype in (torch.bfloat16, torch.float32):
        model, name = load(vocabulary, dtype, "cpu"), str(dtype).removeprefix("torch.")
        named, _ = setup(model, length, candidates)
        work["evaluation"][name] = named["PopulationEvaluator"]
        work["step"][name] = one_step(model, length)
    return work


def peak_memory(work, length, chunk):
    """Return MiB above the model, from a fresh process (called below as a script)."""
    command = [sys.executable, __file__, "--peak", work, str(length), str(chunk)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(work, length, chunk):
    """Measure one window and print by how much the process's peak rose, in MiB."""
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    model, chunk = load(None, torch.bfloat16, "cpu"), int(chunk) or None

    def measure(length):
        problem, (candidate,) = population(model, length, 1)
        window = torch.randint(0, 256, (1, length))
        if work == EVALUATION:
            PopulationEvaluator(model, problem.factors, 1, chunk=chunk)([candidate], window)
            return
        plan = BackwardPlan(work == CHECKPOINTED, chunk)
        point = Point(np.log(candidate.lambdas), problem.attention_factor)
        base = problem.factors(candidate).base_inv_freq()
        GradientEvaluator(model, base, plan)(point, candidate.start_tokens, window)

    measure(257)  # what libraries allocate once; two chunks of the smallest size
    before = peak()
    measure(int(length))
    print(peak() - before)


def memory(lengths, args):
    """Print and, if asked, save the peaks by length."""
    model = load(None, torch.bfloat16, "cpu")
    rows = []
    for length in lengths:
        cache = cache_bytes(model, length) / 2**20
        print(f"\npeak memory, one window of {length} tokens; its keys and values: {cache:.0f} MiB")
        chunk = plan_batches(model, length).chunk
        backward = plan_backward(model, length, True).chunk
        cases = [(EVALUATION, 0), (EVALUATION, chunk or 0), (STEP, 0), (CHECKPOINTED, 0),
                 (STEP, backward)]  # fmt: skip
        whole = {}
        for work, tokens in dict.fromkeys(cases):
            peak = peak_memory(work, length, tokens)
            first = whole.setdefault(EVALUATION if work == EVALUATION else STEP, peak)
            name = f"{work}, chunks of {tokens}" if tokens else f"{work}, whole window"
            print(f"  {name:45s}{peak:8.0f} MiB{first / peak:8.1f}x less")
            rows.append({
                "op": "search peak memory", "case": f"packaged model, {length} tokens",
                "dtype": "bfloat16", "implementation": name, "milliseconds": "",
                "ratio_to_baseline": f"{first / peak:.3f}", "rate": f"{peak:.1f}",
                "rate_unit": "MiB", "isa": _C.isa(), **where(),
            })  # fmt: skip
    if args.save:
        save(rows, args.device)


def main():
    """Time every model and dtype, then measure the peaks."""
    p = parser(__doc__)
    p.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--candidates", type=int, default=4, help="of the 64, in one call")
    p.add_argument("--only", choices=["speed", "step", "dtype", "memory"])
    args = p.parse_args()
    length = 512 if args.quick else args.length
    for name, vocabulary in VOCABULARIES.items():
        for dtype in args.dtype or ["float32", "bfloat16"]:
            if args.only in (None, "speed"):
                model = load(vocabulary, getattr(torch, dtype), args.device)
                named, tokens = setup(model, length, args.candidates)
                case = f"{name}, {WINDOWS} windows of {length}"
                compare("population", case, dtype, named, args, tokens, "tokens/s")
            if args.only in (None, "step"):
                model = load(vocabulary, getattr(torch, dtype), args.device)
                ways = two_ways_to_the_gradient(model, length)
                compare("step of the descent", f"{name}, {length}", dtype, ways, args)
        if args.only in (None, "dtype") and args.device == "cpu":
            for work, named in by_dtype(vocabulary, length, args.candidates).items():
                compare(f"dtypes, {work}", f"{name}, windows of {length}", "both", named, args)
    # Short windows stay below what a process's peak shows.
    if args.only in (None, "memory") and args.device == "cpu" and not args.quick:
        memory((4096, 8192, 16384, 32768), args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*sys.argv[2:])
    else:
        main()
