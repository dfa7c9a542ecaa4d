"""A tensor read in the background while the one before it is quantized and placed."""

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Job(NamedTuple, Generic[T]):
    """``read`` needs ``nbytes`` of host memory; ``use`` is what is then done with what it gave."""

    nbytes: int
    read: Callable[[], T]
    use: Callable[[T], None]


def read_ahead(jobs: Sequence[Job]) -> None:
    """Do all jobs in order. One thread reads; the caller's uses what was read.

    One job is read ahead, if it and the one in use fit into the memory that the largest needs
    alone: so no peak is raised, temporaries of use included. Whatever ``read`` raises is raised
    here, in the job's turn.
    """
    limit = max((job.nbytes for job in jobs), default=0)
    waiting = collections.deque(jobs)
    begun: collections.deque[tuple[Job, Future]] = collections.deque()
    held = 0
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        while waiting or begun:
            while waiting and len(begun) < 2 and held + waiting[0].nbytes <= limit:
                job = waiting.popleft()
                begun.append((job, pool.submit(job.read)))
                held += job.nbytes
            held -= _finish(*begun.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(job: Job, future: Future) -> int:
    """Use what the future brings; no name here or above keeps it any longer."""
    job.use(future.result())
    return job.nbytes
