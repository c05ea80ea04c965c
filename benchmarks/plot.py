"""Draw the rows of benchmarks/results/*.csv as ratios to their peer: `python benchmarks/plot.py`.

Of rows that were measured twice (device, threads, op, case, dtype, implementation) the last counts.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.ticker import NullLocator

from longrope.report import figures
from longrope.runs import style

ROOT = Path(__file__).resolve().parents[1]
#: What the names of this project's implementations hold.
OURS = ("ops.", "linear_nll", "PopulationEvaluator", "windows in chunks")


def measurements(files: list[Path]) -> dict[tuple, dict[str, float]]:
    """Return {(device, threads, op): {case and dtype: {implementation: ratio}}}."""
    found: dict[tuple, dict] = {}
    for path in files:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            if "ratio_to_baseline" not in (rows.fieldnames or []):
                continue  # of another kind: the comparison of searches
            for row in rows:
                threads = f"threads: {row['threads']}" if row["isa"] else ""  # a CPU
                panel = found.setdefault((row["device"], threads, row["op"]), {})
                group = panel.setdefault(f"{row['case']}\n{row['dtype']}", {})
                group[row["implementation"]] = float(row["ratio_to_baseline"])
    return found


def draw_panel(axis, title: str, groups: dict[str, dict[str, float]]) -> None:
    """Draw one op: a group of bars per case, ours in color, its first bar the baseline."""
    at, ticks = 0.0, []
    for group, ratios in groups.items():
        first = at
        for name, ratio in ratios.items():
            color = style.OURS if any(ours in name for ours in OURS) else style.MUTED
            axis.barh(at, ratio, color=color, height=0.85)
            axis.text(ratio, at, f" {ratio:.2f}  {name}", va="center", fontsize=7)
            at += 1
        ticks.append(((first + at - 1) / 2, group))
        at += 0.8
    axis.grid(False)
    axis.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axis.set_xscale("log")
    every = [ratio for ratios in groups.values() for ratio in ratios.values()]
    axis.set_xticks([m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5)])
    axis.set_xlim(min(every) / 2, max(every) * 10)  # room for the names
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9, loc="left")


def main() -> None:
    """Write the figure."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("files", nargs="*", type=Path, help="CSV files (default: benchmarks/results/)")
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.png")
    args = p.parse_args()
    files = args.files or sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
    panels = measurements(files)
    if not panels:
        p.error("no rows: run a benchmark with --save first")
    bars = [sum(len(g) + 0.8 for g in groups.values()) for groups in panels.values()]
    size = (9, sum(bars) * 0.2 + len(panels) * 0.6)
    with figures.canvas(args.out, size=size, dpi=110) as canvas:
        axes = canvas.subplots(len(panels), 1, squeeze=False, height_ratios=bars)[:, 0]
        for axis, ((device, threads, op), groups) in zip(axes, panels.items(), strict=True):
            draw_panel(axis, ", ".join(part for part in (op, device, threads) if part), groups)
        axes[-1].set_xlabel("times as fast as (memory: times less than) the first of its group")


if __name__ == "__main__":
    main()
