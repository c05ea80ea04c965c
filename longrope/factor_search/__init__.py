"""The search for rescale factors.

`space` holds the search space and its moves, `evolution` Algorithm 1 on any loss, `objective` the
windows that are measured, `evaluator` the measuring, `ledger` and `journal` what was measured, and
`run` puts them together as `longrope.search`.
"""

from longrope.factor_search.ledger import Evaluation
from longrope.factor_search.run import SearchResult, search

__all__ = ["Evaluation", "SearchResult", "search"]
