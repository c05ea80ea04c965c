"""The report of a run: one HTML file without anything outside it, plots, and `results.csv`.

`write(folder)` makes it from what the folder of a run holds, whoever made the run and however far
it is: a run writes its own at its end, `longrope report DIR` writes it again at any time. Reading
order: `writing.py`, `page.py` (what a report holds), a file for each kind of run (`search.py`,
`extension.py`, ...), `figures.py` and `plots.py` (how every plot of the project is
drawn), `template.html`.
"""

from longrope.report.writing import at_end, write

__all__ = ["at_end", "write"]
