"""The search for rescale factors.

`space` holds the search space and its moves, `critical` that of LongRoPE2; `evolution` Algorithm 1
on any loss and `racing` what saves measurements there, `descent` the descent and `ramps` where it
can start; `windows` what is measured on, `evaluator` and `gradient` the measuring, `ledger` and
`history` what was measured; `methods` puts the parts together in three ways, `folder` is the run
directory, and `run` is `longrope.search`. `sharded` measures windows that the ranks of a job
share.
"""

from longrope.errors import LostRankError
from longrope.factor_search.history import Evaluation, SearchResult
from longrope.factor_search.run import search

__all__ = ["Evaluation", "LostRankError", "SearchResult", "search"]
