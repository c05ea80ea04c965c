"""How a model is fine-tuned, `FinetuneConfig`, and how its short texts are recovered."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from longrope._validation import checked_bos, choice, count, integer, natural, positive, switch
from longrope.runs.options import Options, about

#: Steps of LongRoPE's warm-up (400 to 1,000 steps in all), and the share of the steps that it takes
#: at most where nothing was asked for.
_WARMUP, _WARMUP_SHARE = 20, 5
#: Which factors a row of training text is turned by.
TIERS = ("position", "row", "one")
#: Learning rates after the warm-up, by the names of transformers.
DECAYS = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "fp32", "bf16")
#: AdamW moves a weight by about the rate in a step: above 1, which no one trains with, by more than
#: weights are large.
_LARGEST_RATE = 1.0
#: What torch takes beside float32 weights: their largest number.
_FLOAT32 = 3.4028234663852886e38


def _share(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected 0 <= share < 1, got {value!r}")
    return float(value)


def _above_zero(name: str, value: Any, most: float = _FLOAT32) -> float:
    number = positive(name, value)
    if number > most:
        raise ValueError(f"{name}: expected a number of at most {most:g}, got {value!r}")
    return number


def _weight_decay(name: str, value: Any) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    return _above_zero(name, value) if value else 0.0


def _option(default: Any, check: Any, help: str) -> Any:
    return field(default=default, metadata=about(check, help, "Fine-tuning"))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Options):
    """How a stage of fine-tuning trains; the defaults are LongRoPE's for LLaMA2, with tiers.

    What is given here wins over a recipe of `longrope.extend`, also where it is the default.

    Attributes
    ----------
    steps, batch_size
        Optimizer steps, and rows of text in each (all devices together).
    rows_per_pass
        Rows of one forward pass on one device; the gradients of as many passes as a batch needs
        are added up.
    learning_rate, decay, warmup_steps
        The rate after the warm-up, which rises from 0 along a line, and what it does then. None:
        20 steps of warm-up, at most a fifth of `steps`.
    weight_decay, adam_beta2, max_grad_norm
        AdamW, and the norm to which the gradients of a step are clipped.
    tiers
        `"position"`: each token by the tier of its position, so that a long row trains every tier
        at once, its first window under the original RoPE. `"row"`: short rows under the original
        RoPE, long ones under the last set of factors (LongRoPE2's mixed windows). `"one"`: all rows
        under the last set (the paper).
    packed
        Fill rows with whole documents one after another: positions start again at each, and
        attention does not cross. Else a row is a random window of one document.
    short_share, short_length
        The share of rows that hold windows of `short_length` tokens, at most those of a row, packed
        the same way; None: the window of the model as loaded. OLMo 3 trains with 0.66.
    bos, eos
        The token in front of each window and document, and behind each whole document: `"auto"`
        (what the tokenizer adds; for `eos` what the config names), True, False or a token id. A
        BOS that is named here or in any stage is that of all stages and of the table.
    precision
        `"bf16"`: autocast to bfloat16; `"fp32"`; `"auto"`: bfloat16 on a GPU. Weights are trained
        in float32 and given back in the model's own type.
    activation_checkpointing
        Compute the activations of a layer again in the backward pass; None: where those of a pass
        would take more than half of the free memory that gradients and Adam's moments leave.
    lora_rank, lora_alpha
        Train adapters of this rank on all linear layers but the head (needs `peft`), and merge them
        at the end; 0: train all weights.
    save_steps, keep
        Steps between checkpoints, and how many complete ones stay.
    seed
        Seed of rows and of the order of everything; None: that of the run. A stage takes the rows
        behind those of the stages before it.
    """

    steps: int = _option(400, count, "Optimizer steps.")
    batch_size: int = _option(32, count, "Rows of text in a step.")
    rows_per_pass: int = _option(1, count, "Rows of one forward pass.")
    learning_rate: float = _option(
        2e-5, partial(_above_zero, most=_LARGEST_RATE), "Learning rate after the warm-up."
    )
    decay: str = _option("linear", partial(choice, choices=DECAYS), "constant, linear or cosine.")
    warmup_steps: int | None = _option(
        None, natural, "Steps in which the learning rate rises; default: 20, at most a fifth."
    )
    weight_decay: float = _option(0.0, _weight_decay, "AdamW's weight decay.")
    adam_beta2: float = _option(0.95, _share, "AdamW's second decay rate.")
    max_grad_norm: float = _option(1.0, _above_zero, "Clip the gradients of a step to this norm.")
    tiers: str = _option(
        "position", partial(choice, choices=TIERS), "position, row (mixed windows) or one."
    )
    packed: bool = _option(False, switch, "Fill rows with whole documents.")
    short_share: float = _option(0.0, _share, "Share of rows of short windows.")
    short_length: int | None = _option(None, partial(integer, least=2), "Their length, in tokens.")
    bos: str | bool | int = _option("auto", checked_bos, "BOS: auto, true, false or a token id.")
    eos: str | bool | int = _option("auto", checked_bos, "EOS: auto, true, false or a token id.")
    precision: str = _option("auto", partial(choice, choices=PRECISIONS), "auto, fp32 or bf16.")
    activation_checkpointing: bool | None = _option(None, switch, "Compute activations again.")
    lora_rank: int = _option(0, natural, "Rank of adapters; 0: train all weights.")
    lora_alpha: float = _option(16.0, _above_zero, "Scale of the adapters.")
    save_steps: int = _option(50, count, "Steps between checkpoints.")
    keep: int = _option(1, count, "Complete checkpoints that stay.")
    seed: int | None = _option(None, natural, "Seed of every random choice; default: 0.")

    def __new__(cls, **given: Any) -> FinetuneConfig:
        """Note which fields are given, which no value can tell where it is the default."""
        made = super().__new__(cls)
        object.__setattr__(made, "_given", frozenset(given))  # the way into a frozen dataclass
        return made

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size % self.rows_per_pass:
            raise ValueError(
                f"rows_per_pass: expected a divisor of batch_size ({self.batch_size}), got "
                f"{self.rows_per_pass}"
            )
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps: expected at most steps ({self.steps}), got {self.warmup_steps}"
            )
        if self.packed and self.tiers == "row":
            raise ValueError(
                "packed: expected False with tiers='row', whose rows have one length, got True"
            )

    def given(self) -> dict[str, Any]:
        """Return the fields that were given; of a copy by `dataclasses.replace` those that differ.

        Such a copy names all fields, and the values that it took over were no one's wish.
        """
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        all_named = len(self._given) == len(fields)
        values = {name: getattr(self, name) for name in fields if name in self._given}
        return {n: v for n, v in values.items() if not all_named or v != fields[n]}

    def resolved(self, seed: int = 0) -> FinetuneConfig:
        """Return this with a number for every None that stands for one; `seed` is the run's."""
        warmup = min(_WARMUP, self.steps // _WARMUP_SHARE)
        return dataclasses.replace(
            self,
            warmup_steps=warmup if self.warmup_steps is None else self.warmup_steps,
            seed=seed if self.seed is None else self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(Options):
    """What `longrope.recover`, which explains them, can be asked for beside its lengths."""

    steps: int = field(default=40, metadata=about(count, "Steps of the descent at each length."))
    samples: int = field(default=5, metadata=about(count, "Search windows of each length."))
    max_lambda: float | None = field(
        default=None,
        metadata=about(
            partial(positive, above=1), "Upper bound of the factors; default: that of the long set."
        ),
    )
    seed: int = field(default=0, metadata=about(natural, "Seed of every random choice."))
    bos: str | bool | int = field(
        default="auto",
        metadata=about(
            checked_bos,
            "BOS before every window: auto (where the tokenizer adds it), true, false or a token "
            "id.",
        ),
    )
