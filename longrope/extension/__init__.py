"""The whole paper in one run: search, fine-tuning, second search, recovery; `run` is the way in.

Read in this order: `config` (how a model is fine-tuned) and `plan` (what can be asked for),
`schedules` (the plans with names, and the one that follows from the ratio), `folder` (what is kept,
and when a stage counts as done), `run` (`longrope.extend`), `stages` (a function for each kind of
stage), `checks` (whether each of them can begin), `data` (rows of training text), `checkpoint`
(what survives a kill), `trainer` and `finetune` (transformers' Trainer with our loss), `sharding`
(weights in shards, FSDP2), `recover` and `short_search` (`longrope.recover`), `table` (perplexity
by range of positions) and `estimate` (what a plan costs, before it runs).
"""
