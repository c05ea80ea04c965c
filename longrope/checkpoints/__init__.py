"""Checkpoints that other programs read: `export`, and `load`, which gives the tiers back."""

from longrope.checkpoints.export import export
from longrope.checkpoints.load import load
from longrope.checkpoints.measured import Measured
from longrope.checkpoints.plan import Plan, plan_export

__all__ = ["Measured", "Plan", "export", "load", "plan_export"]
