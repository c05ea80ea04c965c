"""Errors that more than one part of the package raises or catches."""

from __future__ import annotations


class JournalError(ValueError):
    """A journal that cannot be resumed: it is damaged, or that of another run."""


class NotFiniteError(ValueError):
    """A loss, or a gradient, is infinite or NaN where it must not be."""


class LostRankError(RuntimeError):
    """A rank of the job has died, or does not answer in time."""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""
