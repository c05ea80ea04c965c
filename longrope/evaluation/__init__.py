"""Measuring models: perplexity, and what every measure stands on."""

from longrope.evaluation.passkey import passkey
from longrope.evaluation.passkey_result import Passkey
from longrope.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Passkey", "Perplexity", "passkey", "perplexity"]
