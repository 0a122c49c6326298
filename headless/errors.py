"""What ends a run or a job. Each text is one or two sentences for the person at the terminal."""

from __future__ import annotations

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


class Refused(Exception):
    """What was asked for cannot be done. Nothing has run."""


class JobFailed(Exception):
    """A job fails by itself: a node's error. Trying again would not help."""


class WorkerLost(Exception):
    """A worker died, hangs or cannot be reached. `started`: whether the job that it had was being run."""

    def __init__(self, sentence: str, started: bool = False):
        super().__init__(sentence)
        self.started = started

    def __reduce__(self):  # Ray sends it from machine to machine
        return WorkerLost, (str(self), self.started)


class OutOfMemory(WorkerLost):
    """A job did not fit into a worker's memory. The worker lives on."""

    def __reduce__(self):
        return OutOfMemory, (str(self), self.started)


class DiskFull(Exception):
    """No more files can be written. The text says which disk, where it is not that of the results."""


def is_full(error: BaseException) -> bool:
    """Whether the disk is what an error is about."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return "disk is full" in str(error)  # sqlite has no number for it in Python 3.10


def says_full(text: str) -> bool:
    """Whether ComfyUI's error text is about a full disk."""
    return any(f"[Errno {number}]" in text or os.strerror(number) in text for number in FULL)
