"""The search for rescale factors.

`space` holds the search space and its moves, `evolution` Algorithm 1 on any loss, `gradient` the
descent and `ramps` where it can start; `objective` the windows that are measured, `evaluator` and
`differentiation` the measuring, `ledger` and `journal` what was measured; `methods` puts the parts
together in three ways, and `run` is `longrope.search`. `ranks` lets the processes of a job share
the measurements, `ring` and `sharded` let them share one sequence.
"""

from longrope.factor_search.ledger import Evaluation
from longrope.factor_search.ranks import LostRankError
from longrope.factor_search.run import SearchResult, search

__all__ = ["Evaluation", "LostRankError", "SearchResult", "search"]
