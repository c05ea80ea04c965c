"""The ranks of a `torch.distributed` job that run one function together.

Every rank runs the whole function with the same random numbers. The expensive results are shared:
each rank computes a part of them and receives the others in an exchange, so all ranks decide alike
and nothing else has to travel. An exchange is one all-gather of envelopes, which hold a value or an
error: a rank that fails anywhere puts its error into the next exchange, and all ranks end with it.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from longrope import _validation
from longrope._validation import first_difference
from longrope.errors import JournalError, LostRankError

P = ParamSpec("P")
T = TypeVar("T")

#: Environment variable: the seconds that a rank waits for the others. A round of shared work must
#: not take longer. The death of a process is noticed without waiting.
TIMEOUT = "LONGROPE_RANK_TIMEOUT"
DEFAULT_TIMEOUT = 1800

#: The errors that keep their type when they travel, the most special first; others become
#: RuntimeError.
_KINDS = (JournalError, ValueError, OSError, ImportError, NotImplementedError, RuntimeError)


class Ranks:
    """One process by itself: it is the first of one, and exchanges with nobody.

    Attributes
    ----------
    rank, size
        The number of this process, and how many there are.
    when_lost
        What `LostRankError` adds to its message: what is kept, and how to go on.
    """

    rank: int = 0
    size: int = 1
    when_lost: str = "nothing was kept"

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

    def by_first(self, function: Callable[[], T]) -> T:
        """Return what the first rank's call of a function returns, on all ranks."""
        return self.broadcast(function() if self.first else None)

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
        """Declare that inside a `with` block all ranks work on one thing, and wait for one another.

        The others reach no further exchange if a rank fails there: it closes its connections, and
        they end with `LostRankError`, at the latest when its process does.
        """
        yield


class JobRanks(Ranks):
    """The ranks of the default process group, which must be initialised on all of them.

    Values travel through a separate gloo group, whatever the backend of the job: they are Python
    objects on the CPU, and arrive bit for bit as they were sent.
    """

    def __init__(self):
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
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
        except BaseException as error:
            if not _of_another_rank(error):  # or the next exchange finds out which one is gone
                self.close()
            raise

    def fail(self, error: Exception) -> None:
        """Send the others an error in the next exchange; raises the error that all agree on."""
        if self._group is None:
            raise error  # the connections are closed
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
            # An error of rank 0, or the same of all ranks, needs no number.
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
            raise LostRankError(
                "a rank of the job is gone or does not answer, seen by rank "
                f"{self.rank}; {self.when_lost}"
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


def _of_another_rank(error: BaseException) -> bool:
    """Say whether an error of a collective means that another rank has left it."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)  # which has no kind of its own


def _packed(error: Exception | None) -> tuple[int, str] | None:
    if error is None:
        return None
    for kind, known in enumerate(_KINDS):
        if isinstance(error, known):
            return kind, str(error)
    return len(_KINDS) - 1, f"{type(error).__name__}: {error}"


_CURRENT: contextvars.ContextVar[Ranks] = contextvars.ContextVar("ranks", default=Ranks())  # noqa: B039


def current() -> Ranks:
    """Return the ranks that run the current function together, see `on_all_ranks`."""
    return _CURRENT.get()


def processes() -> int:
    """Return how many processes the job of this one has; 1: there is no job."""
    joined = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if joined else 1


def on_all_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """Let all ranks of the job run a function together, if there is a job.

    Inside the function `current()` returns the ranks. An error of any rank ends it on all of them.
    """

    @functools.wraps(function)
    def together(*args: P.args, **kwargs: P.kwargs) -> T:
        if processes() == 1:
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
