"""Work spread over processes, with results in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

J = TypeVar("J")
R = TypeVar("R")


class WorkerDied:
    """The result of a job whose process ended without one, as a crash inside a decoder does."""


def ordered(work: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[tuple[J, R | WorkerDied]]:
    """(job, work(job)) in the order of the jobs, which are taken from the iterator a few ahead of the results.

    workers: processes; 1 works in this one. work and the jobs must be picklable for more than one, and a script that
    asks for it keeps its own code under `if __name__ == "__main__"`. A job that kills its process gives WorkerDied, the
    others go on; an exception of work is raised here.
    """
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    if workers == 1:
        for job in jobs:
            yield job, work(job)
        return
    pool = _Pool(work, workers)
    waiting: deque[tuple[J, Future[R]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(job)))
            if len(waiting) >= 2 * workers:
                yield from pool.take(waiting)
        while waiting:
            yield from pool.take(waiting)
    finally:
        pool.close()


class _Pool:
    def __init__(self, work: Callable[[Any], Any], workers: int) -> None:
        self.work, self.workers = work, workers
        self._open()

    def _open(self) -> None:
        # Not forked: threads of torch or of a decoder that hold a lock would leave it locked in the copy.
        self._executor = ProcessPoolExecutor(
            self.workers, multiprocessing.get_context("spawn"), _start, (self.work, self.workers)
        )

    def submit(self, job: J) -> Future:
        try:
            return self._executor.submit(_run, job)
        except BrokenProcessPool as error:
            broken: Future = Future()
            broken.set_exception(error)
            return broken

    def take(self, waiting: deque[tuple[J, Future]]) -> Iterator[tuple[J, Any]]:
        """The first of the waiting jobs; where a process died, all of them, each alone, to learn which job it was."""
        job, future = waiting.popleft()
        try:
            result = future.result()
        except BrokenProcessPool:
            suspects = [job, *(other for other, _ in waiting)]
            waiting.clear()
            self.close()
            self._open()
            for suspect in suspects:
                yield suspect, self._alone(suspect)
            return
        yield job, result

    def _alone(self, job: J) -> Any:
        try:
            return self.submit(job).result()
        except BrokenProcessPool:
            self.close()
            self._open()
            return WorkerDied()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


_work: Callable[[Any], Any] | None = None


def _start(work: Callable[[Any], Any], workers: int) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(job: Any) -> Any:
    return _work(job)
