"""Run the README's example: `LongRoPEModel` over 2,097,152 tokens, where the hardware allows it.

`python benchmarks/readme_example.py`. Before it starts it says what the whole takes: memory by
count, floating point operations by count, and time from one layer that it measures at two lengths.
Where memory or `--seconds` do not suffice it runs the largest length that fits, and says so.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

import longrope
from longrope.demo import corpus
from longrope.evaluation.memory import CPU_TOKENS_PER_BATCH, GPU_TOKENS_PER_CHUNK, free_memory

#: Of the free memory: the rest is for what torch and the system need beside.
USABLE = 0.9


class Cost(NamedTuple):
    """What a forward pass takes: bytes alive at once, and floating point operations."""

    bytes: int
    flop: float


class Pace(NamedTuple):
    """Seconds of one layer and row of `n` tokens: `linear * n + square * n^2`."""

    linear: float
    square: float

    def seconds(self, length: int, layers_and_rows: int) -> float:
        """Return the seconds of a pass."""
        return layers_and_rows * (self.linear * length + self.square * length**2)


def parser() -> argparse.ArgumentParser:
    """Return the flags; without any it is the README's example."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--length", type=int, default=2048 * 1024, help="tokens to reach")
    p.add_argument("--seconds", type=float, default=300, help="budget of the forward pass")
    p.add_argument("--batch", type=int, default=2, help="rows")
    p.add_argument("--data", type=Path, help="text; default: Python's standard library")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; default: bfloat16 on CUDA"
    )
    p.add_argument("--block", type=int, help="tokens in a layer at a time; default: by device")
    p.add_argument("--d-model", type=int, default=512)
    p.add_argument("--n-heads", type=int, default=8)
    p.add_argument("--num-layers", type=int, default=6)
    p.add_argument("--base-length", type=int, default=4096)
    return p


def cost(model: longrope.LongRoPEModel, batch: int, length: int, block: int) -> Cost:
    """Count a forward pass over float32 embeddings that lie on the device of the weights."""
    config = model.llama.config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    held = model.dtype.itemsize
    input_and_output = 2 * 4 * batch * length * width
    row = 0 if model.dtype == torch.float32 else held * length * width  # its states, cast
    keys_and_values = 2 * held * length * config.num_key_value_heads * config.head_dim
    activations = held * block * (8 * width + 3 * inner)
    linear = sum(p.numel() for p in model.llama.model.layers.parameters())
    # A product with a weight is 2 operations; causal attention 4 per pair and channel, of which
    # half the pairs are seen.
    flop = batch * (2 * length * linear + layers * 2 * length**2 * width)
    return Cost(input_and_output + row + keys_and_values + activations, float(flop))


def measured(args: argparse.Namespace, dtype: torch.dtype, block: int) -> Pace:
    """Time one layer over one row of 1 and 4 blocks, after a pass that warms up."""
    model = longrope.LongRoPEModel(
        args.d_model, args.n_heads, 1, args.base_length, dtype=dtype, device=args.device
    )
    if args.length > args.base_length:
        model.extend_context(None, args.length, method="yarn")
    lengths, seconds = (block, 4 * block), []
    for length in (block, *lengths):
        seconds.append(timed(model, 1, length, block)[1])
    (short, long), (few, many) = lengths, seconds[1:]
    square = max(0.0, (many / long - few / short) / (long - short))
    return Pace(max(0.0, few / short - square * short), square)


def timed(
    model: longrope.LongRoPEModel, batch: int, length: int, block: int
) -> tuple[torch.Tensor, float]:
    """Return the model's output for random embeddings, and the seconds of its forward pass."""
    inputs = torch.randn(batch, length, model.llama.config.hidden_size, device=model.device)
    synchronise = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronise()
    began = time.perf_counter()
    output = model(inputs, block=block)
    synchronise()
    return output, time.perf_counter() - began


def largest(model: longrope.LongRoPEModel, args: argparse.Namespace, pace: Pace, block: int) -> int:
    """Return the largest length, in whole blocks, that fits the memory and the budget; or all."""
    free = free_memory(model.device)
    passes = args.batch * args.num_layers

    def fits(length: int) -> bool:
        room = free is None or cost(model, args.batch, length, block).bytes <= USABLE * free
        return room and pace.seconds(length, passes) <= args.seconds

    if fits(args.length):
        return args.length
    low, high = 1, math.ceil(args.length / block)  # fits in blocks, does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * block) else (low, middle)
    return min(args.length, low * block)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that was in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str] | None = None) -> tuple[int, ...]:
    """Estimate, run, and return the shape of the output."""
    args = parser().parse_args(argv)
    for name in ("length", "batch", "seconds"):
        if getattr(args, name) <= 0:
            parser().error(f"--{name}: expected more than 0, got {getattr(args, name)}")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    default = GPU_TOKENS_PER_CHUNK if args.device == "cuda" else CPU_TOKENS_PER_BATCH
    block = args.block or default

    data = longrope.load_data(args.data) if args.data else corpus.documents("search")
    model = longrope.LongRoPEModel(
        args.d_model, args.n_heads, args.num_layers, args.base_length, dtype=dtype,
        device=args.device,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if args.length > args.base_length:
            model = model.extend_context(data, args.length)
    for warning in caught:
        print(warning.message)
    print(model.tiers)

    pace = measured(args, dtype, block)
    passes = args.batch * args.num_layers
    length = largest(model, args, pace, block)
    free = free_memory(model.device)
    for tokens in sorted({args.length, length}, reverse=True):
        needs = cost(model, args.batch, tokens, block)
        print(
            f"{args.batch} x {tokens} tokens would take {needs.bytes / 2**30:.1f} GiB"
            + (f" of {free / 2**30:.1f} free" if free is not None else "")
            + f", {needs.flop:.2g} FLOP, {pace.seconds(tokens, passes):.0f} s on this {args.device}"
        )
    if length < args.length:
        print(f"The largest length that fits memory and {args.seconds:g} s: {length}")
    before = peak_bytes(model.device)
    output, seconds = timed(model, args.batch, length, block)
    needs = cost(model, args.batch, length, block)
    finite = all(torch.isfinite(row).all() for row in output)
    print(
        f"model(torch.randn({args.batch}, {length}, {args.d_model})) -> {list(output.shape)}, "
        f"{'finite' if finite else 'NOT FINITE'}: {seconds:.1f} s, "
        f"{needs.flop / seconds / 1e12:.3g} TFLOP/s; "
        f"peak memory {before / 2**30:.2f} GiB before, {peak_bytes(model.device) / 2**30:.2f} after"
    )
    if not finite:
        raise SystemExit("output: expected finite numbers")
    return tuple(output.shape)


if __name__ == "__main__":
    main()
