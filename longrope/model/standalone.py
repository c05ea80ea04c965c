"""`LongRoPEModel`: a causal transformer whose context window grows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longrope import _validation
from longrope.evaluation.memory import CPU_TOKENS_PER_BATCH, GPU_TOKENS_PER_CHUNK
from longrope.factors import RescaleFactors, Tiers
from longrope.model import blocks, checks, extension, files, training
from longrope.patching import apply, remove, rope_settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM
    from transformers.modeling_outputs import CausalLMOutput


class LongRoPEModel(nn.Module):
    """A causal transformer on longrope's kernels, whose context window grows to millions of tokens.

    The architecture and the weights are a Llama's of transformers (`model.llama`), so that all that
    takes a Hugging Face model takes these; the forward pass is `ops.attention`, which turns queries
    and un-rotated keys by the tiers of their positions, in fixed point, and `ops.linear_nll` for
    losses. A new model has random weights and the window `base_length`: `fit` trains it,
    `extend_context` gives it its tiers.

    Parameters
    ----------
    d_model
        Channels of the hidden states.
    n_heads
        Query heads; they divide `d_model` into an even number of channels, at most 256.
    num_layers
        Layers.
    base_length
        The window to train for, in tokens: that of the first tier.
    vocab_size
        Token ids; 256 is the bytes that `longrope.load_data` gives without a tokenizer.
    n_kv_heads
        Heads of keys and values (grouped-query attention); None: as many as query heads.
    d_ff
        Channels of the gated layers; None: 8/3 of `d_model`, in whole multiples of 64.
    theta
        Base of the rotary frequencies.
    dtype, device
        Of the weights: float32, bfloat16, float16, or float64 on a CPU.

    Attributes
    ----------
    llama
        The `LlamaForCausalLM`, with the tiers applied (`longrope.apply`): for
        `longrope.perplexity`, `generate`, PEFT and so on.
    tiers
        The `longrope.Tiers` of the model, by position; of a new model one tier, without rescaling.
        A single tier holds for every position.
    trained
        Whether the weights are more than random: after `fit`, or read from a file that says so.

    Raises
    ------
    ValueError
        In one sentence, for any argument out of range.
    """

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        num_layers: int = 6,
        base_length: int = 4096,
        vocab_size: int = 256,
        n_kv_heads: int | None = None,
        d_ff: int | None = None,
        theta: float = 10000.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        from transformers import LlamaForCausalLM

        config = checks.llama_config(
            d_model, n_heads, num_layers, base_length, vocab_size, n_kv_heads, d_ff, theta
        )
        checks.dtype(dtype)
        checks.visible_device(device)
        # Made in its dtype rather than cast: a cast would round the rotary frequencies too.
        with torch.device(device):
            llama = LlamaForCausalLM._from_config(config, dtype=dtype)
        self._init_around(llama, trained=False)

    def _init_around(self, llama: LlamaForCausalLM, trained: bool) -> None:
        super().__init__()
        self.llama = llama
        self.trained = trained
        self.rope = rope_settings(llama)
        self.tiers = Tiers([self.rope.loaded])
        self.eval()

    @classmethod
    def from_llama(cls, llama: LlamaForCausalLM, trained: bool = True) -> LongRoPEModel:
        """Take a `LlamaForCausalLM` as the weights; any tiers applied to it are taken out.

        Raises
        ------
        ValueError
            Where it is another model, or its angles depend on the length of the sequence.
        """
        files.check_llama(llama)
        made = cls.__new__(cls)
        made._init_around(remove(llama), trained)
        return made

    @property
    def base_length(self) -> int:
        """The window of the model before any extension, in tokens."""
        return self.rope.loaded_length

    @property
    def context_length(self) -> int:
        """The window of the model as it is, in tokens: where its last tier ends."""
        return self.tiers[-1].target_length

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.llama.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.llama.lm_head.weight.dtype

    def extra_repr(self) -> str:
        """Say the window and the tiers, for `print(model)`."""
        tiers = "1 tier" if len(self.tiers) == 1 else f"{len(self.tiers)} tiers by position"
        trained = "" if self.trained else ", random weights"
        return f"window {self.context_length}, base {self.base_length}, {tiers}{trained}"

    def set_tiers(
        self, factors: RescaleFactors | Tiers | Sequence[RescaleFactors] | None
    ) -> LongRoPEModel:
        """Use other tiers, or one set of factors for every position; None: the base window alone.

        In place; returns the model, in eval mode. Raises `ValueError` for factors of another model
        and for those by layer or head.
        """
        base = Tiers([self.rope.loaded])
        if factors is None or factors == base:
            remove(self.llama)
            self.tiers = base
        else:
            tiers = factors if isinstance(factors, Tiers) else Tiers(factors)
            blocks.check_shared(tiers)
            apply(self.llama, tiers)
            self.tiers = tiers
        return self.eval()

    # --- the forward pass -------------------------------------------------------------------------

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        output: str | None = None,
        block: int | None = None,
    ) -> Tensor | CausalLMOutput:
        """Run the model over token ids or embeddings.

        Layer by layer, row by row and in blocks of tokens: alive are the input, the output, and the
        keys and values of one layer and one row. Gradients are recorded in training mode
        (`model.train()`), and where `inputs` asks for them; then whole rows are in a layer at a
        time, and all activations are kept.

        Parameters
        ----------
        inputs
            Token ids `[B, N]` of any integer type; or embeddings `[B, N, d_model]` of any floating
            type. They may lie on another device than the weights: one row moves at a time.
        labels
            int64 `[B, N]`: token ids, -100 to leave a token out. Token `i` is scored by the states
            before it, so the first of a row never is.
        output
            `"hidden"`: the states after the last norm; `"logits"`: the head's scores. None:
            logits for token ids, hidden states for embeddings.
        block
            Tokens in a layer at a time; None: 2048 on a CPU, 32768 on a GPU. Short rows go
            together, as many as there are in a block. Changes results by rounding at most.

        Returns
        -------
        Tensor
            Hidden states `[B, N, d_model]` or logits `[B, N, vocab_size]`, on the device of
            `inputs`, in the type of embeddings, or of the weights for token ids.
        CausalLMOutput
            With labels: its `loss` is the mean negative log-likelihood in nats, float32 `[]`; no
            logits are made.

        Raises
        ------
        ValueError
            Where a shape, a type, a token id or an argument is not as above.
        """
        checks.device(self.device)
        checks.inputs(inputs, labels, self.llama.config)
        default = GPU_TOKENS_PER_CHUNK if self.device.type == "cuda" else CPU_TOKENS_PER_BATCH
        block = default if block is None else _validation.count("block", block)
        embedded = inputs.is_floating_point()
        if output is None:
            output = "hidden" if embedded else "logits"
        _validation.choice("output", output, ("hidden", "logits"))
        records = torch.is_grad_enabled() and (self.training or inputs.requires_grad)
        with torch.set_grad_enabled(records):
            passing = blocks.Pass(self.llama, self.tiers, inputs, block)
            if labels is not None:
                from transformers.modeling_outputs import CausalLMOutput

                return CausalLMOutput(loss=passing.loss(labels))
            dtype = inputs.dtype if embedded else self.dtype
            return passing.logits(dtype) if output == "logits" else passing.hidden(dtype)

    # --- what it is trained and extended with -----------------------------------------------------

    def fit(
        self,
        data: Iterable[Any],
        steps: int = 1000,
        batch_size: int = 8,
        length: int | None = None,
        learning_rate: float = 1e-3,
        seed: int = 0,
        progress: bool = True,
        **arguments: Any,
    ) -> LongRoPEModel:
        """Train on random windows of documents, by transformers' Trainer (`longrope[train]`).

        AdamW, 5 % of the steps of warm-up, then down to 0 along a cosine. Under the tiers as they
        are: before `extend_context` this is pre-training, after it fine-tuning at the new length.

        Parameters
        ----------
        data
            1-D token ids, as `longrope.load_data` gives them; those shorter than `length` are left
            out.
        steps, batch_size
            Updates, and windows in each (on each device).
        length
            Tokens of a window; None: `base_length`.
        learning_rate
            At the end of the warm-up.
        seed
            Of the windows: equal arguments give equal weights on one machine.
        progress
            Whether to show a bar and print losses.
        **arguments
            Of transformers' `TrainingArguments`: `bf16=True`, `gradient_accumulation_steps`,
            `output_dir` and `save_strategy`, and so on.

        Returns
        -------
        LongRoPEModel
            The model itself, in eval mode.

        Raises
        ------
        ValueError
            For an argument out of range, ids outside the vocabulary, or no document long enough.
        """
        training.fit(
            self, data, steps=steps, batch_size=batch_size, length=length, seed=seed,
            learning_rate=learning_rate, progress=progress, **arguments,
        )  # fmt: skip
        self.trained = True
        return self.eval()

    def extend_context(
        self,
        data: Iterable[Any] | None,
        target_length: int,
        method: str | None = None,
        **options: Any,
    ) -> LongRoPEModel:
        """Extend the window to `target_length` tokens: a tier for every doubling of the base.

        The weights stay. The factors of the last tier are searched on documents of `data`, and the
        tiers before it lie on the way (`RescaleFactors.ladder`). A model with random weights has
        nothing to search by: it takes YaRN's factors, with a warning.

        Parameters
        ----------
        data
            1-D token ids. A search takes those of at least `target_length` tokens; YaRN needs none
            (None).
        target_length
            The window to reach, in tokens; more than `base_length`.
        method
            `"gradient"`, `"evolution"`, `"hybrid"` (see `longrope.search`), or `"yarn"`: no search.
            None: `"gradient"` for a trained model.
        **options
            Further arguments of `longrope.search`: `out`, `seed`, `steps`, `samples`, ...

        Returns
        -------
        LongRoPEModel
            The model itself, in eval mode.

        Raises
        ------
        ValueError
            For an argument out of range, or where no document is long enough for the search.
        """
        return self.set_tiers(extension.tiers_for(self, data, target_length, method, options))

    def recover_short_context(
        self, data: Iterable[Any], lengths: Sequence[int] | None = None, **options: Any
    ) -> LongRoPEModel:
        """Search tiers of their own for lengths between the base and the extended window.

        The paper's recovery of short contexts. The base window needs none: its tier is the model as
        it was. Each length gets a search, as `extend_context` for the whole window, and its tier
        takes the place of the one on the way where its perplexity is lower on `data`, over the
        positions that it serves. On a model with random weights nothing happens, with a warning.

        Parameters
        ----------
        data
            1-D token ids; those of at least a length serve its search.
        lengths
            In tokens, above `base_length` and below the extended window; None: twice the base.
        **options
            Further arguments of `longrope.search`; `out` gets a folder for each length.

        Returns
        -------
        LongRoPEModel
            The model itself, in eval mode.

        Raises
        ------
        ValueError
            Where the model is not extended, or a length or the documents are not as above.
        """
        return self.set_tiers(extension.recovered(self, data, lengths, options))

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Continue token ids `[B, N]` by transformers' `generate`, with a cache, across all tiers.

        Options are its own: `max_new_tokens`, `do_sample`, ... Returns int64 `[B, N + new]`.
        """
        checks.prompt(input_ids, self.llama.config)
        return self.llama.generate(input_ids.long().to(self.device), **options)

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> Path:
        """Write `model.safetensors`, `config.json` and `tiers.json` into a new or empty folder.

        The folder appears whole or not at all. It is also a Hugging Face folder of the model before
        its extension. Returns its path; raises `ValueError` where there is something already.
        """
        return files.save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, dtype: torch.dtype | None = None, device: Any = "cpu"
    ) -> LongRoPEModel:
        """Read what `save` wrote, or any Hugging Face folder of a Llama; `dtype` as it was saved.

        Raises
        ------
        ValueError, OSError
            In one sentence, where there is no such folder or it holds something else.
        """
        llama, tiers, trained = files.read(path, dtype, device)
        model = cls.from_llama(llama, trained)
        return model if tiers is None else model.set_tiers(tiers)

    def export(self, path: str | os.PathLike, **options: Any) -> Path:
        """Write a Hugging Face Llama that plain transformers reads; returns the folder.

        Without tiers its logits are this model's. Extended, it is what `longrope.export` writes of
        the last tier, and `options` are its own: plain transformers then turns the tokens of a
        whole sequence by one set, as this model does after `set_tiers(model.tiers[-1])`, and
        `longrope.load` gives it its tiers back (of a single set its ladder; `save` keeps the one).
        """
        return files.export(self, path, options)
