"""lm-eval's model type `longrope`: a folder of `longrope.export` with its tiers in force.

`python -m longrope.evaluation.lm_eval_model --model longrope --model_args pretrained=FOLDER ...` is
lm-eval's own command with one model type more. It needs `lm_eval` (0.4; tried with 0.4.13), which
longrope itself does not.
"""

from __future__ import annotations

from typing import Any

from longrope.checkpoints import load

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    sentence = f"lm_eval: expected it to be installed (pip install lm_eval), got: {error}"
    raise (SystemExit if __name__ == "__main__" else ImportError)(sentence) from None


@register_model("longrope")
class LongRoPE(HFLM):
    """`HFLM`, for a model that `longrope.load` has loaded.

    Parameters
    ----------
    pretrained
        The folder.
    dtype, device
        Of the model; by default those of the weights and the CPU.
    **options
        As for lm-eval's `hf`: `max_length`, `batch_size`, `add_bos_token` and so on.
    """

    def __init__(
        self, pretrained: str, dtype: str = "auto", device: str = "cpu", **options: Any
    ) -> None:
        model, tokenizer = load(pretrained, dtype=dtype)
        super().__init__(pretrained=model.to(device), tokenizer=tokenizer, **options)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
