"""The ranks of a `torch.distributed` job that make one search together.

Every rank runs the whole search: the same random numbers, and the same measurements, of which it
makes a part and gets the others' in an exchange. So all ranks decide alike, and nothing but
measurements has to travel. An exchange is one all-gather of envelopes, which hold a value or an
error: a rank that fails anywhere puts its error into the exchange that the others come to next, and
all of them end with it.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longrope import _validation
from longrope._validation import first_difference
from longrope.errors import JournalError, LostRankError

T = TypeVar("T")

#: Environment variable: seconds that a rank waits for the others. A round of measurements must not
#: take longer. That a process has died is known without waiting.
TIMEOUT = "LONGROPE_RANK_TIMEOUT"
DEFAULT_TIMEOUT = 1800

#: The errors that travel as what they are, the most special first; others become RuntimeError.
_KINDS = (JournalError, ValueError, OSError, ImportError, NotImplementedError, RuntimeError)


class Ranks:
    """One process by itself: it is the first of one, and exchanges with nobody.

    Attributes
    ----------
    rank, size
        The number of this process, and how many there are.
    journal_path
        Where the first rank keeps the journal, for messages; None: nowhere.
    """

    rank: int = 0
    size: int = 1
    journal_path: Path | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in order.

        Raises the error of the first rank that failed since the last exchange, on all ranks.
        """
        return [value]

    def broadcast(self, value: T) -> T:
        """Return the first rank's value."""
        return value

    def share(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Return the result of every task; task `t` is done by rank `t % size`."""
        results = self.gather([task() for task in tasks[self.rank :: self.size]])
        return [results[t % self.size][t // self.size] for t in range(len(tasks))]

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raise `ValueError` where a rank has other settings than the first; JSON values."""
        everywhere = self.gather(settings)
        others = [r for r, given in enumerate(everywhere) if given != everywhere[0]]
        if others:
            difference = first_difference(
                everywhere[0], everywhere[others[0]], places=("on rank 0", f"on rank {others[0]}")
            )
            names = ", ".join(str(r) for r in others)
            raise ValueError(
                "ranks: expected the same model, documents and settings on every rank, got others "
                f"than rank 0's on rank{'s'[: len(others) - 1]} {names} ({difference})"
            )

    def can_pass_on(self, device: torch.device) -> bool:
        """Whether `pass_on` takes tensors of a device: of a CPU, or of a GPU in a job with nccl."""
        return True

    def pass_on(self, outgoing: torch.Tensor, incoming: torch.Tensor) -> Callable[[], None]:
        """Start sending a tensor to the next rank and filling one from the rank before.

        Returns a function that waits for both. The ranks form a ring.
        """
        raise RuntimeError("ranks: expected a job of 2 ranks or more, got 1")

    @contextlib.contextmanager
    def tied(self) -> Iterator[None]:
        """Say that all ranks work on one thing, by `pass_on`, inside a `with` block.

        Where a rank fails there the others do not come to another exchange: it breaks off its
        connections, and they end with `LostRankError`.
        """
        yield


class JobRanks(Ranks):
    """The ranks of the default process group, which must be initialised on all of them.

    Values travel through a gloo group of its own, whatever the backend of the job: they are Python
    objects on the CPU, and come out bit for bit as they went in.
    """

    def __init__(self):
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.journal_path = None
        self._group = None
        with self._watching():
            self._group = dist.new_group(backend="gloo", timeout=timeout())

    def gather(self, value: T) -> list[T]:
        return self._exchange(value, None)

    def broadcast(self, value: T) -> T:
        self.gather(None)
        box = [value if self.first else None]
        with self._watching():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def can_pass_on(self, device: torch.device) -> bool:
        return device.type == "cpu" or f"{device.type}:nccl" in dist.get_backend_config()

    def pass_on(self, outgoing: torch.Tensor, incoming: torch.Tensor) -> Callable[[], None]:
        group = self._group if outgoing.device.type == "cpu" else None
        onward, back = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        with self._watching():
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, outgoing, onward, group),
                    dist.P2POp(dist.irecv, incoming, back, group),
                ]
            )

        def wait() -> None:
            with self._watching():
                for work in works:
                    work.wait()

        return wait

    @contextlib.contextmanager
    def tied(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def fail(self, error: Exception) -> None:
        """Tell the others of an error in the exchange that comes next; raises what all agree on."""
        if self._group is None:
            raise error  # nobody listens any more
        self._exchange(None, error)

    def close(self) -> None:
        """Break off the connections to the other ranks."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)

    def _exchange(self, value: Any, error: Exception | None) -> list[Any]:
        envelopes: list[Any] = [None] * self.size
        with self._watching():
            dist.all_gather_object(envelopes, (value, _packed(error)), group=self._group)
        failed = [(rank, packed) for rank, (_, packed) in enumerate(envelopes) if packed]
        if failed:
            rank, (kind, message) = failed[0]
            # What rank 0 says, or all say alike, needs no name.
            alike = len(failed) == self.size and len({packed for _, packed in failed}) == 1
            told = message if rank == 0 or alike else f"rank {rank}: {message}"
            agreed = _KINDS[kind](told)
            agreed.failed_rank = rank
            raise agreed from error
        return [value for value, _ in envelopes]

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo, nccl and the store raise
            self.close()
            kept = (
                f"the journal {str(self.journal_path)!r} is complete up to its last line: start "
                "the same command again to resume"
                if self.journal_path
                else "nothing was kept, because out was None"
            )
            raise LostRankError(
                f"a rank of the job is gone or does not answer, seen by rank {self.rank}; {kept}"
            ) from error


def timeout() -> datetime.timedelta:
    """Return how long a rank waits for the others; `ValueError` where the variable is no number."""
    given = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        return datetime.timedelta(seconds=_validation.positive(TIMEOUT, float(given)))
    except ValueError:
        raise ValueError(
            f"{TIMEOUT}: expected a number of seconds above 0, got {given!r}"
        ) from None


def _packed(error: Exception | None) -> tuple[int, str] | None:
    if error is None:
        return None
    for kind, known in enumerate(_KINDS):
        if isinstance(error, known):
            return kind, str(error)
    return len(_KINDS) - 1, f"{type(error).__name__}: {error}"


_CURRENT: contextvars.ContextVar[Ranks] = contextvars.ContextVar("ranks", default=Ranks())  # noqa: B039


def current() -> Ranks:
    """Return the ranks that run the function decorated by `on_all_ranks` together."""
    return _CURRENT.get()


def on_all_ranks(function: Callable[..., T]) -> Callable[..., T]:
    """Let all ranks of a job, where there is one, run a function together.

    `current()` gives it the ranks. An error of any rank ends it on all of them.
    """

    @functools.wraps(function)
    def together(*args, **kwargs) -> T:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return function(*args, **kwargs)
        ranks = JobRanks()
        token = _CURRENT.set(ranks)
        try:
            result = function(*args, **kwargs)
            ranks.gather(None)  # no rank leaves while another may still fail
            return result
        except Exception as error:
            if isinstance(error, LostRankError) or hasattr(error, "failed_rank"):
                raise
            ranks.fail(error)
            raise
        finally:
            _CURRENT.reset(token)
            ranks.close()

    return together
