"""Many processes as one: ranks, the ring that shares a sequence, the job of torchrun."""
