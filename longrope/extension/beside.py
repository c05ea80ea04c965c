"""What the report of an extension has beside its stages: the rules that need no search."""

from __future__ import annotations

import json
import math

from longrope import report
from longrope.checkpoints.measured import Row
from longrope.errors import NotFiniteError
from longrope.extension.stages import Work
from longrope.extension.table import row_as_json
from longrope.factors import RescaleFactors
from longrope.patching import apply, remove, rope_settings
from longrope.report.extension import BASELINES
from longrope.report.parts import json_object
from longrope.runs.folder import write_text
from longrope.runs.style import STYLES

#: The methods that are measured, by the names of their constructors and of their style.
RULES = ("pi", "ntk", "yarn")


def finish(work: Work) -> None:
    """Measure what is not measured yet, on the windows of the table, and write the report.

    For the weights as they were given, which carry no factors when this is called. No stage sees
    the figures; each is on the disk before the next is begun.
    """
    path = work.out / BASELINES
    known = json_object(path) if path.is_file() else {}
    for name in (name for name in RULES if name not in known):
        lengths = rope_settings(work.original).lengths(work.plan.target_length)
        apply(work.original, getattr(RescaleFactors, name)(**lengths))
        try:
            row = work.table_row(STYLES[name].label, work.original)
        except NotFiniteError:  # the rule fails, not the run
            missing = (math.nan,) * len(work.ranges)
            row = Row(STYLES[name].label, missing, math.nan)
        finally:
            remove(work.original)
        known[name] = {"style": name, **row_as_json(row)}
        write_text(path, json.dumps(known, indent=1) + "\n")
    report.at_end(work.out)
