"""Measuring models: perplexity, and what every measure stands on."""

from longrope.evaluation.perplexity import perplexity

__all__ = ["perplexity"]
