"""How many CPU threads torch and NumPy use."""

from __future__ import annotations

import os


def use_threads(count: int) -> None:
    """Let torch compute with `count` threads, which sleep rather than spin while they wait for each other.

    Spinning threads on cores that other processes want wait for a whole time slice at every barrier: on two cores with
    one other busy process, a training step of a small model took 75 times as long with two of them as with one.
    The waiting policy, and NumPy's number of threads, count only if this is called before the first import of torch
    and of NumPy.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(count))
    import torch

    torch.set_num_threads(count)
