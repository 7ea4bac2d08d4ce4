import asyncio
import threading
import weakref

import pytest

from ldm.errors import InputError
from ldm.web import queue as module
from ldm.web.queue import Queue, State, Stopped


@pytest.fixture
def gate():
    return threading.Event()


@pytest.fixture
def queue(gate):
    """Jobs that wait for the gate, and then do as their task says."""
    done = []

    def work(job):
        job.report.append("begun")
        gate.wait(30)
        if job.stop.is_set():
            raise Stopped
        if isinstance(job.task, type) and issubclass(job.task, BaseException):
            raise job.task("what happened")
        done.append(job.task)

    made = Queue(work)
    made.done = done
    yield made
    gate.set()
    made.close()


def test_asked_0_to_9_it_finishes_0_to_9(queue, gate):
    jobs = [queue.add(number, []) for number in range(10)]
    gate.set()
    queue.wait(jobs[-1], 30)
    assert queue.done == list(range(10))
    assert {job.state for job in jobs} == {State.DONE}


def test_jobs_that_wait_take_no_thread_and_change_nothing(queue):
    queue.add(0, [])
    jobs = [queue.add(number, []) for number in range(50)]
    while queue.running is None:
        pass
    version = queue.version
    assert [t.name for t in threading.enumerate()].count("drawing") == 1
    assert [job.state for job in queue.jobs()[1:]] == [State.WAITING] * 50
    assert queue.version == version
    assert queue.jobs()[1:] == jobs


def test_a_job_can_be_cancelled_while_it_waits_and_stopped_while_it_runs(queue, gate):
    first, second, third = (queue.add(number, []) for number in range(3))
    while not first.report:
        pass
    queue.stop(second.number)
    assert second.state is State.STOPPED
    queue.stop()
    assert first.stop.is_set()
    assert first.state is State.RUNNING
    gate.set()
    queue.wait(third, 30)
    assert (first.state, third.state) == (State.STOPPED, State.DONE)
    assert queue.done == [2]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, RecursionError])
def test_whatever_a_job_raises_ends_that_job_alone(queue, gate, kind):
    gate.set()
    bad, good = queue.add(kind, []), queue.add("good", [])
    queue.wait(good, 30)
    assert bad.state is State.FAILED
    assert kind.__name__ in str(bad.error)
    assert queue.done == ["good"]


def test_errors_for_the_user_are_their_own_words(queue, gate):
    gate.set()
    wrong, much = queue.add(InputError, []), queue.add(MemoryError, [])
    queue.wait(much, 30)
    assert str(wrong.error) == "what happened"
    assert "not enough memory" in str(much.error)


def test_there_is_room_for_so_many(queue, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    running = queue.add(0, [])
    while not running.report:
        pass
    queue.add(1, [])
    queue.add(2, [])
    with pytest.raises(InputError, match="2 jobs wait already"):
        queue.add(3, [])


def test_who_waits_for_a_change_is_told_from_another_thread(queue, gate):
    async def watch():
        job = queue.add("x", [])
        threading.Timer(0.05, gate.set).start()
        await asyncio.wait_for(queue.end_of(job), 30)
        return job.state

    assert asyncio.run(watch()) is State.DONE


def test_who_waits_for_a_job_leaves_the_loop_to_others_while_the_server_ends(queue, gate):
    async def watch():
        job = queue.add("x", [])
        waiting = asyncio.create_task(queue.end_of(job))
        await asyncio.sleep(0)
        while not job.report:
            await asyncio.sleep(0)
        closing = threading.Thread(target=queue.close)
        closing.start()
        while not job.stop.is_set():
            await asyncio.sleep(0)
        for _ in range(10):  # others have their turn
            await asyncio.sleep(0)
        assert job.state is State.RUNNING
        gate.set()
        await asyncio.wait_for(waiting, 30)
        closing.join(30)
        return job.state

    assert asyncio.run(watch()) is State.STOPPED


def test_a_job_that_failed_keeps_nothing_of_what_it_had():
    """The model above all: another one could not be loaded beside it."""
    had = []

    def work(job):
        model = threading.Event()
        had.append(weakref.ref(model))
        try:
            model.wait(job.task)
        except TypeError:
            raise InputError("what happened") from None

    queue = Queue(work)
    job = queue.add("x", [])
    queue.wait(job, 30)
    queue.close()
    assert str(job.error) == "what happened"
    assert had[0]() is None


def test_after_the_end_nothing_is_accepted(queue, gate):
    job = queue.add(0, [])
    waiting = queue.add(1, [])
    while not job.report:
        pass
    threading.Timer(0.05, gate.set).start()
    queue.close(30)
    assert (job.state, waiting.state) == (State.STOPPED, State.STOPPED)
    with pytest.raises(InputError, match="about to end"):
        queue.add(2, [])
