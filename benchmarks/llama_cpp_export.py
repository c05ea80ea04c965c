"""What llama.cpp itself makes of an exported model, beside longrope on the same weights.

`python benchmarks/llama_cpp_export.py --model MODEL --data TEXT --factors FACTORS --length N`
exports MODEL once for every type of weights, reads the file with `llama-cpp-python`
(`pip install llama-cpp-python`, from its source package), and prints the perplexity of one excerpt
of N tokens by both: by llama.cpp in prefills of 256 tokens, by longrope in float32 on the weights
as the file has them. Also says whether llama.cpp cuts the text into the same tokens, where the file
has a vocabulary.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch

import longrope
from longrope.checkpoints import gguf as written
from longrope.cli.inputs import load_model

CHUNK = 256


def by_llama_cpp(file: Path, ids: np.ndarray, context: int, threads: int, text: str | None):
    """Return the mean NLL of `ids[1:]`, and the tokens that llama.cpp cuts `text` into."""
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = context, CHUNK, CHUNK
    settings.n_threads = settings.n_threads_batch = threads
    there = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocabulary)
    total = 0.0
    for first in range(0, len(ids), CHUNK):
        part = ids[first : first + CHUNK]
        batch = llama_cpp.llama_batch_init(len(part), 0, 1)
        batch.n_tokens = len(part)
        for place, token in enumerate(part):
            batch.token[place], batch.pos[place] = int(token), first + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, True
        if llama_cpp.llama_decode(there, batch):
            raise SystemExit(f"llama.cpp: could not read tokens {first} to {first + len(part)}")
        logits = llama_cpp.llama_get_logits(there)
        scores = torch.tensor(np.ctypeslib.as_array(logits, (len(part), size)))
        targets = torch.as_tensor(ids[first + 1 : first + len(part) + 1])
        total += float(
            torch.nn.functional.cross_entropy(scores[: len(targets)], targets, reduction="sum")
        )
        llama_cpp.llama_batch_free(batch)
    cut = None
    if text is not None:
        room = (llama_cpp.llama_token * (len(text.encode()) + 8))()
        raw = text.encode()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), room, len(room), False, False)
        cut = list(room[:count])
    llama_cpp.llama_free(there)
    llama_cpp.llama_model_free(model)
    return total / (len(ids) - 1), cut


def dequantised(model, file: Path) -> None:
    """Give the model the weights of a GGUF file, as its reader widens them."""
    found = {t.name: t for t in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    with torch.no_grad():
        for name, value in model.named_parameters():
            tensor = found.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
            if tensor is None:
                continue  # tied
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = torch.tensor(values).reshape(value.shape)
            for kind, count in heads.items():
                if kind in name:  # channels 2i and 2i + 1 turn together there, i and i + D/2 here
                    pairs = values.reshape(count, -1, 2, *values.shape[1:])
                    values = pairs.transpose(1, 2).reshape(value.shape)
            value.copy_(values)


def main() -> None:
    """Export, read, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a Llama or Mistral")
    parser.add_argument("--data", type=Path, required=True, help="text that the model has not seen")
    parser.add_argument("--factors", type=Path, required=True, help="rescale factors (.json)")
    parser.add_argument("--length", type=int, required=True, help="tokens of the excerpt")
    parser.add_argument("--types", nargs="+", default=["f16", "bf16", "q8_0"])
    args = parser.parse_args()
    factors = longrope.RescaleFactors.load(args.factors)
    _, tokenizer = load_model(args.model, "cpu")
    ids = longrope.load_data(args.data, tokenizer=tokenizer)[0][: args.length]
    ids = np.asarray(ids, dtype=np.int64)
    text = None if tokenizer is None else tokenizer.decode(ids[: 4 * CHUNK])
    print("weights   llama.cpp   longrope   same tokens", flush=True)
    for kind in args.types:
        model, _ = load_model(args.model, "cpu")
        with tempfile.TemporaryDirectory() as scratch:
            folder = longrope.export(
                model, Path(scratch) / "out", factors, format="gguf", gguf_type=kind
            )
            file = folder / written.NAME
            threads = torch.get_num_threads()
            there, cut = by_llama_cpp(file, ids, factors.target_length, threads, text)
            dequantised(model, file)
        longrope.apply(model, factors)
        here = longrope.perplexity(model, [ids], length=len(ids), stride=len(ids))
        same = "no vocabulary"
        if text is not None:
            same = cut == tokenizer(text, add_special_tokens=False)["input_ids"]
        print(f"{kind:9s} {np.exp(there):9.4f}  {float(here):9.4f}   {same}", flush=True)


if __name__ == "__main__":
    main()
