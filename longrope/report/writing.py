"""From the folder of a run to its report: what kind it is, the figures, the HTML, the CSV."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from longrope._files import replacing
from longrope._warnings import warn
from longrope.report import (
    demo,
    evaluation,
    extension,
    figures,
    passkey,
    recovery,
    search,
    search_data,
)
from longrope.report.page import Figure, Page, Row
from longrope.runs import journal, times
from longrope.runs.folder import JOURNAL, PLOTS, REPORT, ROWS, write_table, write_text

_BY_JOURNAL: dict[str, Callable[[Path, str], Page]] = {
    search_data.KIND: search.page,
    extension.KIND: extension.page,
    evaluation.KIND: evaluation.page,
    recovery.KIND: recovery.page,
}
#: Runs in a folder of a run whose figures its report has too.
_NESTED = {"evaluation": evaluation.KIND, "passkey": "passkey"}
#: Of many processes of a run, the last so many are listed.
_SHOWN = 10
_KINDS = "search, extend, recover, evaluate, passkey or demo"


def write(folder: str | os.PathLike) -> Path:
    """Write `report.html`, `results.csv` and the plots of a run into its folder.

    Parameters
    ----------
    folder
        The folder of a run, finished or not, which no other process needs to have left alone: what
        is read are whole lines and whole files.

    Returns
    -------
    Path
        Of the HTML file.

    Raises
    ------
    ValueError
        In one sentence: the folder is not that of a run, or a file in it is damaged (`JournalError`
        is one).
    OSError
        The folder cannot be written.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"folder: expected a path, got {type(folder).__name__}")
    out = Path(folder)
    found = page_of(out)
    images = {figure.name: _drawn(out, figure) for figure in found.figures()}
    if found.cover:
        name = f"{found.cover}.png"
        with replacing(out / name) as file:
            file.write((out / PLOTS / name).read_bytes())
    write_table(out / ROWS, Row._fields, found.rows)
    write_text(out / REPORT, html(found, images, times.read(out)))
    return out / REPORT


def at_end(out: Path) -> None:
    """Write the report of a run that came to its end; what fails then is said, not raised.

    The results are on the disk by now, and a run of days must not end in an error for its pictures.
    """
    try:
        times.ended(out)
        write(out)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        warn(f"report: {out} is complete, but its report could not be written ({reason})")


def page_of(out: Path) -> Page:
    """Return what the report of a folder holds, figures of runs inside it included."""
    kind = kind_of(out)
    if kind is None:
        what = "which is no folder"
        if out.is_dir():
            what = "which holds none"
        if (out / JOURNAL).is_file():
            what = f"whose {JOURNAL} is damaged or that of something else"
        raise ValueError(
            f"folder: expected the folder of a run of {_KINDS}, got {str(out)!r}, {what}"
        )
    shown = times.quoted(str(out))
    try:
        found = _pages()[kind](out, shown)
        for name, inner in _NESTED.items():
            if kind != inner and kind_of(out / name) == inner:
                _take(found, _pages()[inner](out / name, f"{shown}/{name}"), name)
    except OSError as error:
        raise ValueError(
            f"{error.filename or out}: cannot be read ({error.strerror or error})"
        ) from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{out}: expected a run of this version of longrope, got one whose files do not hold "
            f"what its report shows ({type(error).__name__}: {error})"
        ) from error
    return found


def kind_of(out: Path) -> str | None:
    """Return the kind of a run by what its folder holds; None: none that is known."""
    if (out / JOURNAL).is_file():
        kind = journal.kind_of(out / JOURNAL)
        return kind if kind in _BY_JOURNAL else None
    if (out / passkey.TRIALS).is_file():
        return "passkey"
    return "demo" if demo.is_one(out) else None


def _pages() -> dict[str, Callable[[Path, str], Page]]:
    return _BY_JOURNAL | {"passkey": passkey.page, "demo": demo.page}


def _take(found: Page, inner: Page, name: str) -> None:
    """Put the sections of a run inside another into its report, before its last ones."""
    for section in inner.sections:
        section.title = f"{inner.title}: {section.title}"
        section.figures = [f._replace(name=f"{name}-{f.name}") for f in section.figures]
    found.sections += inner.sections
    found.rows += inner.rows


class _Image(NamedTuple):
    """A figure as HTML has it: a PNG in a URL, its size in pixels of a page, and its PDF."""

    url: str
    width: int
    height: int
    pdf: str


def _drawn(out: Path, figure: Figure) -> _Image:
    """Write a figure as PNG and PDF; returns the PNG."""
    plots = out / PLOTS
    plots.mkdir(exist_ok=True)
    name = re.sub(r"[^\w.-]+", "-", figure.name)
    paths = [plots / f"{name}.{kind}" for kind in ("png", "pdf")]
    with figures.canvas(*paths, size=figure.size) as made:
        figure.draw(made)
    width, height = (round(100 * inches) for inches in made.get_size_inches())
    encoded = base64.b64encode(paths[0].read_bytes()).decode()
    return _Image(f"data:image/png;base64,{encoded}", width, height, f"{PLOTS}/{quote(name)}.pdf")


def html(found: Page, images: Mapping[str, _Image], processes: list[dict[str, Any]]) -> str:
    """Return the report as HTML; everything that is not of the template is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("longrope.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("template.html")
    return template.render(
        page=found,
        images=images,
        plots=PLOTS,
        processes=[_process(entry) for entry in processes[-_SHOWN:]],
        left_out=max(0, len(processes) - _SHOWN),
        versions=_versions(processes),
    )


def _process(entry: dict[str, Any]) -> dict[str, str]:
    took = times.seconds(entry)
    return {
        "began": str(entry.get("began", "")).replace("T", " ").replace("+00:00", " UTC"),
        "took": "did not end by itself, or runs" if took is None else _duration(took),
        "command": str(entry.get("command") or "called from Python"),
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _versions(processes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the versions that the last process ran with, and where they differ those before."""
    names = ("longrope", "torch", "transformers", "python", "machine", "threads")
    rows = []
    for name in names:
        seen = list(dict.fromkeys(str(p[name]) for p in processes if name in p))
        if seen:
            rows.append((name, ", then ".join(seen)))
    return rows
