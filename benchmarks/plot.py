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
    """Return {(device and threads, op): {case and dtype: {implementation: ratio}}}."""
    found: dict[tuple, dict] = {}
    for path in files:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            if "ratio_to_baseline" not in (rows.fieldnames or []):
                continue  # of another kind: the comparison of searches
            for row in rows:
                threads = f", threads: {row['threads']}" if row["isa"] else ""  # a CPU
                panel = found.setdefault((row["device"] + threads, row["op"]), {})
                group = panel.setdefault(f"{row['case']} {row['dtype']}", {})
                group[row["implementation"]] = float(row["ratio_to_baseline"])
    return found


def draw_panel(axis, title: str, groups: dict[str, dict[str, float]]) -> None:
    """Draw one op: a line of dots per case, ours in color, the first of each at 1."""
    for at, ratios in enumerate(groups.values()):
        for name, ratio in ratios.items():
            ours = any(part in name for part in OURS)
            axis.plot(
                ratio, at, "o", ms=5, color=style.OURS if ours else style.MUTED, zorder=2 + ours
            )
    every = [ratio for ratios in groups.values() for ratio in ratios.values()]
    axis.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axis.set_xscale("log")
    axis.set_xticks([m * 10.0**e for e in range(-3, 4) for m in (1, 3)])
    axis.set_xlim(min(every) / 1.3, max(every) * 1.3)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(groups)), groups, fontsize=7)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.tick_params(labelsize=7)
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
    machines = {machine for machine, _ in panels}
    alone = len(machines) == 1
    lines = [len(groups) + 1.5 for groups in panels.values()]
    size = (9, sum(lines) * 0.17 + len(panels) * 0.45)
    with figures.canvas(args.out, size=size, dpi=110) as canvas:
        axes = canvas.subplots(len(panels), 1, squeeze=False, height_ratios=lines)[:, 0]
        for axis, ((machine, op), groups) in zip(axes, panels.items(), strict=True):
            first = {next(iter(ratios)) for ratios in groups.values()}
            beside = f" beside {first.pop()}" if len(first) == 1 else ""
            draw_panel(axis, op + beside + ("" if alone else f" ({machine})"), groups)
        said = "times as fast as (memory: times less than) the first, at 1; ours in color"
        axes[-1].set_xlabel("\n".join([said, *machines]) if alone else said)


if __name__ == "__main__":
    main()
