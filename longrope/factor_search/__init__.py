"""The search for rescale factors; `run` is `longrope.search`.

Read in this order: `options` (what can be asked for), `problem` and `header` (what follows from it
and is kept), `space` and `critical` (the candidates and their moves), `evolution` (Algorithm 1 on
any loss) and `racing` (which saves measurements there), `descent` and `ramps` (where it can start),
`windows` (what is measured on), `evaluator`, `sharded` and `gradient` (how), `measurer` (all that
is measured, taken from the journal or kept there), `history` (as the result has it), `methods` (the
parts put together in three ways), `stage` (what a model has already, and candidates multiply),
`ladder` (tier after tier, each by one of the methods) and `range_evaluator` (how a tier is
measured), `heads` (layers and heads with factors of their own, from there on), `checks` (whether a
search can begin), `folder`, `plot` and `progress` (what users see).
"""
