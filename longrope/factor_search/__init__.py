"""The search for rescale factors.

`space` holds the search space and its moves, `critical` that of LongRoPE2; `evolution` Algorithm 1
on any loss and `racing` what saves measurements there, `gradient` the descent and `ramps` where it
can start; `objective` the windows that are measured, `evaluator` and `differentiation` the
measuring, `ledger`, `journal` and `history` what was measured; `methods` puts the parts together in
three ways, and `run` is `longrope.search`. `ranks` lets the processes of a job share the
measurements, `ring` and `sharded` let them share one sequence.
"""

from longrope.factor_search.history import Evaluation, SearchResult
from longrope.factor_search.ranks import LostRankError
from longrope.factor_search.run import search

__all__ = ["Evaluation", "LostRankError", "SearchResult", "search"]
