"""Joining the job of `torchrun`: one process per rank, with a device each."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from longrope.errors import TerminatedError

#: The environment variables that torchrun sets for every process that it starts.
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _terminate(*_) -> None:
    raise TerminatedError


@contextlib.contextmanager
def job(device: str) -> Iterator[str]:
    """Be a rank of torchrun's job inside a `with` block; yields this rank's device.

    The backend is nccl for `"cuda"`, where the rank takes the device of its `LOCAL_RANK`, and gloo
    for `"cpu"`. A process that torchrun did not start, or that has joined a job already, keeps the
    device that it was given. SIGTERM, by which torchrun ends the other ranks when one has failed,
    raises `TerminatedError`.

    Raises
    ------
    ValueError
        If a numbered device is given to many ranks of one machine, or the job cannot be joined.
    """
    import torch
    import torch.distributed as dist

    from longrope.distributed.ranks import timeout

    if not all(name in os.environ for name in _TOLD) or dist.is_initialized():
        yield device
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"--device: expected cuda or cpu under torchrun, whose ranks take a device each, got "
            f"{device!r}"
        )
    options = {"backend": "gloo", "timeout": timeout()}
    if device.startswith("cuda"):
        device = f"cuda:{local_rank}" if device == "cuda" else device
        if torch.device(device).index >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun: expected at most {torch.cuda.device_count()} ranks on this machine, "
                f"its number of CUDA devices, got LOCAL_RANK {local_rank}"
            )
        torch.cuda.set_device(device)
        options |= {"backend": "nccl", "device_id": torch.device(device)}
    try:
        dist.init_process_group(**options)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"torchrun: cannot join the job of {os.environ['WORLD_SIZE']} ranks at {where} "
            f"({str(error).splitlines()[0]})"
        ) from None
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield device
    except BaseException:
        # The error is still to be printed, even if torchrun ends the other ranks meanwhile. The
        # group stays: to destroy one that has lost a rank can mean to wait for it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    dist.destroy_process_group()
    signal.signal(signal.SIGTERM, before)
