"""Logits of exported folders by plain transformers: run as a script, without longrope.

`python plain_reader.py JOB` reads JSON: `{"folders": [...], "inputs": [[token ids], ...]}`, and
writes `FOLDER.logits.safetensors` beside each folder, one tensor `[N, V]` for each input.
"""

import json
import sys


def main():
    """Run every folder on every input."""
    sys.modules["longrope"] = None  # an import of it fails from here on

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        job = json.load(file)
    for folder in job["folders"]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.no_grad():
            logits = {
                str(number): model(torch.tensor([ids]), use_cache=False).logits[0].contiguous()
                for number, ids in enumerate(job["inputs"])
            }
        save_file(logits, f"{folder}.logits.safetensors")


if __name__ == "__main__":
    main()
