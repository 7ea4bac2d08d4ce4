"""Jobs of the server: first come, first served, one at a time. They outlive whoever asked."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Generic, TypeVar

from ldm.errors import InputError, OutOfMemory, is_out_of_memory

MOST = 200  # jobs that may wait
KEPT = 20  # jobs that are over and still listed

Task = TypeVar("Task")
Report = TypeVar("Report")
logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The user has stopped a job."""


class Broken(Exception):
    """A job met a fault of the program; the terminal has its traceback."""


class State(str, Enum):
    """What has become of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


class Job(Generic[Task, Report]):
    """One thing to do, and what is known of it.

    Attributes:
        number: counts up from 1.
        task: what to do.
        report: what is told of it; whoever changes it calls `tell`.
        state: see State.
        error: why it failed, of one line: InputError, OutOfMemory or Broken; else None.
        stop: set when the user wants it to end.
        skip: set when the user wants its picture under way to end.
    """

    def __init__(self, number: int, task: Task, report: Report, tell: Callable[[], None]) -> None:
        self.number = number
        self.task = task
        self.report = report
        self.tell = tell
        self.state = State.WAITING
        self.error: Exception | None = None
        self.stop = threading.Event()
        self.skip = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state not in (State.WAITING, State.RUNNING)


class Queue(Generic[Task, Report]):
    """Jobs in the order in which they came, done by a single thread.

    A job that waits is an entry of a list: no thread of its own, nothing that asks again.

    Args:
        work: does a job; raises Stopped where it saw that the user has stopped it.

    Attributes:
        version: grows with every change.
    """

    def __init__(self, work: Callable[[Job[Task, Report]], None]) -> None:
        self.version = 0
        self._work = work
        self._lock = threading.Condition()
        self._waiting: deque[Job[Task, Report]] = deque()
        self._running: Job[Task, Report] | None = None
        self._over: deque[Job[Task, Report]] = deque(maxlen=KEPT)
        self._n_jobs = 0
        self._is_closed = False
        self._listeners: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._thread = threading.Thread(target=self._run, daemon=True, name="drawing")
        self._thread.start()

    def add(self, task: Task, report: Report) -> Job[Task, Report]:
        """Put a job at the end.

        Raises:
            InputError: too many wait, or the server is about to end.
        """
        with self._lock:
            if self._is_closed:
                raise InputError("the server is about to end")
            if len(self._waiting) >= MOST:
                raise InputError(f"{MOST} jobs wait already: wait, or cancel some of them")
            self._n_jobs += 1
            job = Job(self._n_jobs, task, report, self.tell)
            self._waiting.append(job)
            self._lock.notify_all()
        self.tell()
        return job

    def jobs(self) -> list[Job[Task, Report]]:
        """All that are known: those that are over, the one under way, those that wait in line."""
        with self._lock:
            running = [self._running] if self._running is not None else []
            return [*self._over, *running, *self._waiting]

    @property
    def running(self) -> Job[Task, Report] | None:
        """The job under way."""
        return self._running

    def stop(self, number: int | None = None) -> None:
        """Stop a job, by default the one under way; one that waits is over at once."""
        with self._lock:
            job = next((job for job in self._waiting if job.number == number), None)
            if job is not None:
                self._waiting.remove(job)
                self._end(job, State.STOPPED)
            elif self._running is not None and number in (None, self._running.number):
                self._running.stop.set()
        self.tell()

    def skip(self) -> None:
        """End the picture under way; the job goes on with its next one."""
        with self._lock:
            if self._running is not None:
                self._running.skip.set()
        self.tell()

    def tell(self) -> None:
        """Let everybody who waits for a change look again."""
        with self._lock:
            self.version += 1
            for loop, changed in self._listeners:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(changed.set)
            self._lock.notify_all()

    async def changed(self, since: int, timeout: float) -> None:
        """Wait, in an event loop, until the version is another one, at most so many seconds."""
        listener = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            if self.version != since:
                return
            self._listeners.add(listener)
        try:
            await asyncio.wait_for(listener[1].wait(), timeout)
        except (TimeoutError, asyncio.TimeoutError):
            pass
        finally:
            with self._lock:
                self._listeners.discard(listener)

    async def end_of(self, job: Job[Task, Report]) -> None:
        """Wait, in an event loop, until a job is over."""
        while not job.is_over:
            since = self.version
            if not job.is_over:
                await self.changed(since, timeout=60.0)

    def wait(self, job: Job[Task, Report], timeout: float | None = None) -> None:
        """Wait, in a thread, until a job is over, at most so many seconds."""
        with self._lock:
            self._lock.wait_for(lambda: job.is_over, timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Stop all jobs, and wait for the one under way: seconds at most."""
        with self._lock:
            self._is_closed = True
            while self._waiting:
                self._end(self._waiting.popleft(), State.STOPPED)
            if self._running is not None:
                self._running.stop.set()
        self.tell()
        self._thread.join(timeout)

    # --- in the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
                job.state = State.RUNNING
            self.tell()
            state, error = _outcome(self._work, job)
            with self._lock:
                self._running = None
                self._end(job, state, error)
            self.tell()

    def _end(self, job: Job[Task, Report], state: State, error: Exception | None = None) -> None:
        job.state, job.error = state, error
        self._over.append(job)


def _bare(error: InputError) -> InputError:
    """The error alone: its traceback would keep what the job had, a whole model, in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _outcome(
    work: Callable[[Job[Task, Report]], None], job: Job[Task, Report]
) -> tuple[State, Exception | None]:
    """Do a job; whatever it raises, SystemExit included, is its own end and nobody else's."""
    try:
        work(job)
    except Stopped:
        return State.STOPPED, None
    except InputError as error:
        return State.FAILED, _bare(error)
    except BaseException as error:
        if is_out_of_memory(error):
            return State.FAILED, OutOfMemory()
        logger.exception("a job failed")
        return State.FAILED, Broken(f"{type(error).__name__}: {error} (the terminal has more)")
    return State.DONE, None
