"""Jobs of a few gloo ranks on this machine, and what each rank of them came to.

`python -m support.jobs FOLDER` (with `tests` on the path) imports
everything once and forks the ranks of one scenario after the other. Each rank leaves a JSON file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from support import shards, tiny_search
from support.processes import environment

#: In batches of two candidates.
SMALL = {**tiny_search.SMALL, "batch_size": 4}
RACED = {**SMALL, "samples": 4, "population": 10, "race": True, "critical_dimension": True}
#: A descent with more windows in a step than two ranks.
DESCENT = {
    "target_length": 32,
    "samples": 2,
    "method": "gradient",
    "attention_factor": "search",
    "steps": 5,
    "windows_per_step": 3,
    "progress": False,
}
#: Call of the evaluator in which a rank is killed or stopped.
CALLS = 3
#: Seconds that ranks wait for one that is stopped.
PATIENCE = 5


def summary(result) -> dict:
    """Return all that a search found, through JSON, which keeps every bit."""
    return {
        "lambdas": result.factors.lambdas.tolist(),
        "start_tokens": result.factors.start_tokens,
        "attention_factor": result.factors.attention_factor,
        "perplexities": [result.perplexity, result.validation_perplexity],
        "history": json.loads(json.dumps([dataclasses.asdict(e) for e in result.history])),
    }


def search(documents=None, model=None, **options) -> dict:
    """Search on the tiny model of `tiny_search`; returns a summary or the error."""
    import longrope

    model = model or tiny_search.build_model()
    documents = documents or tiny_search.build_documents()
    try:
        return summary(longrope.search(model, documents, **options))
    except Exception as error:
        return {"error": str(error), "kind": type(error).__name__}


# --- scenarios: what one rank does and returns ------------------------------------------------


def searches(rank: int, size: int, folder: Path) -> dict:
    """Many searches in one job, good and bad; after a bad one the next must work."""
    import torch

    from longrope.report import writing

    documents = tiny_search.build_documents()
    others = [d + (d == 0).long() for d in documents] if rank else documents
    broken, changed = tiny_search.build_model(), tiny_search.build_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
        changed.lm_head.weight[0] += float(rank)
    seed = int(rank == size - 1)
    population = -3 if rank == 1 else 6
    found = {"evolution": search(**SMALL, out=folder / "out")}
    writing.write = lambda folder: None  # one is enough: a second each
    found |= {
        "resumed": search(**SMALL, out=folder / "cut"),
        "gradient": search(**DESCENT, out=folder / "descent"),
        "one window": search(**DESCENT | {"windows_per_step": 1}),
        "race": search(**RACED, out=folder / "race"),
        "another seed": search(**SMALL, out=folder / "none", seed=seed),
        "another per": search(**DESCENT, per="head" if rank == size - 1 else "model"),
        "other documents": search(others, **SMALL),
        "another model": search(model=changed, **SMALL),
        "bad on one": search(**SMALL | {"population": population}),
        "bad on all": search(**SMALL | {"population": -3}),
        "not finite": search(model=broken, **SMALL),
        "another journal": search(**SMALL | {"population": 7}, out=folder / "out"),
        "no folder": search(**SMALL, out=folder / "file" / "below"),
        "sharded": search(**SMALL, shard_sequence=True, out=folder / "sharded"),
        "sharded on whole": search(**SMALL, shard_sequence=True, out=folder / "out"),
        "sharded gradient": search(**DESCENT, shard_sequence=True),
        "too short to shard": search(
            **SMALL | {"target_length": 2 * size - 1}, original_length=2, shard_sequence=True
        ),
    }
    return found


def rings(rank: int, size: int, folder: Path) -> dict:
    """Ring attention and sharded evaluation beside the whole."""
    from support import ring_checks

    return ring_checks.run()


def killed(rank: int, size: int, folder: Path) -> dict:
    """Rank 1 dies while it measures."""
    if rank == 1:
        _after_calls(CALLS, signal.SIGKILL)
    return search(**SMALL, out=folder / "out")


def stopped(rank: int, size: int, folder: Path) -> dict:
    """Rank 1 stands still while it measures."""
    os.environ["LONGROPE_RANK_TIMEOUT"] = str(PATIENCE)
    if rank == 1:
        _after_calls(CALLS, signal.SIGSTOP)
    return search(**SMALL)


def extension(rank: int, size: int, folder: Path) -> dict:
    """`longrope.extend`: without interruption, stopped in a step and again, and what is refused."""
    from longrope import report
    from longrope.extension import trainer
    from longrope.extension.folder import weights_hash
    from support import extension_runs

    report.at_end = lambda out: None  # seconds each
    own_step, own_loss = trainer.RowTrainer.training_step, trainer.RowTrainer.compute_loss

    def stopping(self, *args):
        if self.state.global_step == 2:
            raise ValueError("stopped")
        return own_step(self, *args)

    def broken(self, *args, **kwargs):
        return own_loss(self, *args, **kwargs) * (math.nan if rank == 1 else 1)

    def run(out, **changes):
        try:
            result = extension_runs.run(folder / out, **changes)
            return [weights_hash(result.model), result.measured.table()]
        except Exception as error:
            return str(error)

    stages = [extension_runs.STAGES[0], extension_runs.STAGES[1] | {"batch_size": 3}]
    found = {
        "whole": run("whole"),
        "batch": run("none", stages=stages, target_length=32),
    }
    trainer.RowTrainer.training_step = stopping
    found["stopped"] = run("cut")
    trainer.RowTrainer.training_step = own_step
    found["resumed"] = run("cut")
    trainer.RowTrainer.compute_loss = broken
    found["not finite"] = run("broken", stages=[stages[0], stages[1] | {"batch_size": 2}],
                              target_length=32)  # fmt: skip
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    found["sharded"] = run("none")
    del os.environ["ACCELERATE_USE_FSDP"]
    return found


def extension_broken(rank: int, size: int, folder: Path) -> dict:
    """Rank 1 fails in a step of fine-tuning, while the other waits for its gradients."""
    from longrope.extension import trainer
    from support import extension_runs

    own_loss = trainer.RowTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if rank == 1 and self.state.global_step == 1:
            raise ValueError("batch: broken on one rank")
        return own_loss(self, *args, **kwargs)

    trainer.RowTrainer.compute_loss = broken
    try:
        extension_runs.run(folder / "run", stages=extension_runs.STAGES[:2], target_length=32)
    except Exception as error:
        return {"error": str(error), "kind": type(error).__name__}
    return {}


def command(rank: int, size: int, folder: Path) -> dict:
    """`longrope search` as torchrun starts it."""
    return _command(folder)


def command_refused(rank: int, size: int, folder: Path) -> dict:
    """The same with bad input."""
    return _command(folder, "--samples", "0")


def command_killed(rank: int, size: int, folder: Path) -> dict:
    """The same with a rank that dies."""
    if rank == 1:
        _after_calls(1, signal.SIGKILL)
    return _command(folder)


def _command(folder: Path, *change: str) -> dict:
    from longrope.cli import main as cli

    sys.argv = [
        "longrope", "search", str(folder.parent / "model"), str(folder.parent / "text.txt"),
        "--target-length", "256", "--samples", "1", "--method", "evolution", "--iterations", "2",
        "--device", "cpu",
        "--out", str(folder / "run"), *change,
    ]  # fmt: skip
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


#: `(scenario, number of ranks)`, each in a folder of its own.
SCENARIOS = [
    (searches, 2),
    (searches, 4),
    (rings, 2),
    (rings, 4),
    (killed, 2),
    (killed, 4),
    (stopped, 2),
    (extension, 2),
    (extension_broken, 2),
    (shards.sharded, 2),
    (command, 2),
    (command_refused, 2),
    (command_killed, 2),
]


def _after_calls(count: int, number: int) -> None:
    """Send a signal to this process in its evaluator's call of that number."""
    from longrope.factor_search import run

    measure, calls = run.PopulationEvaluator.block_sums, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return measure(*args, **kwargs)

    run.PopulationEvaluator.block_sums = counted


class Jobs:
    """The jobs of all scenarios, run under a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.log = ""

    def folder(self, scenario: str, size: int) -> Path:
        """Return the folder of one job."""
        return self._folder / f"{scenario}-{size}"

    def run(self) -> None:
        """Run all scenarios in a process of its own."""
        process = subprocess.Popen(
            [sys.executable, "-m", "support.jobs", str(self._folder)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            self.log, _ = process.communicate(timeout=360)
        except subprocess.TimeoutExpired:  # a rank that waits for ever
            os.killpg(process.pid, signal.SIGKILL)
            self.log = process.communicate()[0] + "\ntoo slow: ended"

    def __call__(self, scenario: str, size: int) -> list[dict | None]:
        """Return what each rank of a job left."""
        files = [self.folder(scenario, size) / f"rank-{rank}.json" for rank in range(size)]
        assert files[0].exists(), self.log
        return [json.loads(file.read_text()) if file.exists() else None for file in files]


# --- the launcher -----------------------------------------------------------------------------


def _be_rank(scenario, rank: int, size: int, folder: Path, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if not scenario.__name__.startswith("command"):  # which joins by itself
        dist.init_process_group("gloo")
    found = scenario(rank, size, folder)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(scenario, size: int, folder: Path) -> None:
    """Fork the ranks of a scenario and wait for them; a stopped one is ended last."""
    folder.mkdir(exist_ok=True)
    port, children = _free_port(), {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                _be_rank(scenario, rank, size, folder, port)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children[child] = rank
    first, _ = os.waitpid(next(iter(children)), 0)
    del children[first]
    for child in children:
        while True:
            _, status = os.waitpid(child, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                break
            os.kill(child, signal.SIGKILL)


def main(folder: Path) -> None:
    # Once, for all ranks.
    import matplotlib.pyplot  # noqa: F401
    import rich.progress  # noqa: F401

    from longrope.distributed import torchrun  # noqa: F401
    from support import ring_checks  # noqa: F401

    for scenario, size in SCENARIOS:
        run(scenario, size, folder / f"{scenario.__name__}-{size}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
