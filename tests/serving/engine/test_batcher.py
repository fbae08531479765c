from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from rayvaec.errors import RequestError
from rayvaec.serving.engine.batcher import DynamicBatcher


@dataclass(frozen=True)
class Part:
    name: str
    n_rows: int = 1


class Recorder:
    """Work that waits for a signal and notes what it was given."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.threads: set[str] = set()
        self.go = threading.Event()

    def __call__(self, parts: list[Part]) -> list[object]:
        self.calls.append([part.name for part in parts])
        self.threads.add(threading.current_thread().name)
        assert self.go.wait(60)
        if any(part.name == "crash" for part in parts):
            raise OSError("crash")
        return [ValueError(p.name) if p.name == "bad" else p.name.upper() for p in parts]


async def submit_all(
    recorder: Recorder, parts: list[Part], max_rows: int = 10, cancel: int | None = None
) -> list[object]:
    """Submit the first part, and the others while it is in work."""
    executor = ThreadPoolExecutor(1, "rayvaec-sampler")
    merger = DynamicBatcher(recorder, max_rows, executor)
    tasks = [asyncio.create_task(merger.submit(parts[0]))]
    while not recorder.calls:
        await asyncio.sleep(0.001)
    tasks += [asyncio.create_task(merger.submit(part)) for part in parts[1:]]
    await asyncio.sleep(0)  # every task submits its part
    if cancel is not None:
        tasks[cancel].cancel()
        await asyncio.sleep(0)
    recorder.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    executor.shutdown()
    return results


def test_what_waits_is_taken_together():
    recorder = Recorder()
    results = asyncio.run(submit_all(recorder, [Part(name) for name in "abcd"]))
    assert results == ["A", "B", "C", "D"]
    assert recorder.calls == [["a"], ["b", "c", "d"]]
    assert recorder.threads == {"rayvaec-sampler_0"}


def blocked_until_called(recorder: Recorder, times: int) -> None:
    """Let the worker go, and the event loop do nothing until it was called so often."""
    recorder.go.set()
    until = time.monotonic() + 60
    while len(recorder.calls) < times and time.monotonic() < until:
        time.sleep(0.001)


def test_the_worker_goes_on_while_the_event_loop_is_busy():
    recorder = Recorder()

    async def go() -> list[object]:
        with ThreadPoolExecutor(1) as executor:
            merger = DynamicBatcher(recorder, 1, executor)
            tasks = [asyncio.create_task(merger.submit(Part(name))) for name in "abc"]
            await asyncio.sleep(0)
            blocked_until_called(recorder, 3)
            assert recorder.calls == [["a"], ["b"], ["c"]]
            return await asyncio.gather(*tasks)

    assert asyncio.run(go()) == ["A", "B", "C"]


def test_mergers_take_turns_with_one_thread():
    recorder = Recorder()

    async def go() -> None:
        with ThreadPoolExecutor(1) as executor:
            one, other = (DynamicBatcher(recorder, 1, executor) for _ in range(2))
            submitted = [(one, "a"), (one, "b"), (one, "c"), (other, "x"), (other, "y")]
            tasks = [asyncio.create_task(m.submit(Part(name))) for m, name in submitted]
            await asyncio.sleep(0)
            blocked_until_called(recorder, 5)
            await asyncio.gather(*tasks)

    asyncio.run(go())
    assert recorder.calls == [["a"], ["x"], ["b"], ["y"], ["c"]]


def test_no_more_rows_are_taken_than_fit_and_none_is_overtaken():
    recorder = Recorder()
    parts = [Part("a"), Part("b", 6), Part("c", 6), Part("d", 4), Part("e", 99), Part("f")]
    results = asyncio.run(submit_all(recorder, parts, max_rows=10))
    assert results == ["A", "B", "C", "D", "E", "F"]
    assert recorder.calls == [["a"], ["b"], ["c", "d"], ["e"], ["f"]]


def test_an_error_reaches_only_its_own_request():
    recorder = Recorder()
    a, b, bad, c = asyncio.run(submit_all(recorder, [Part(n) for n in ("a", "b", "bad", "c")]))
    assert (a, b, c) == ("A", "B", "C")
    assert isinstance(bad, ValueError)


def test_a_crash_reaches_all_and_the_next_work_goes_on():
    recorder = Recorder()
    recorder.go.set()

    async def go() -> None:
        executor = ThreadPoolExecutor(1)
        merger = DynamicBatcher(recorder, 10, executor)
        with pytest.raises(OSError, match="crash"):
            await merger.submit(Part("crash"))
        assert await merger.submit(Part("a")) == "A"
        executor.shutdown()

    asyncio.run(go())


def test_cancelled_requests_are_not_worked_on():
    recorder = Recorder()
    results = asyncio.run(submit_all(recorder, [Part(name) for name in "abcd"], cancel=2))
    assert isinstance(results[2], asyncio.CancelledError)
    assert recorder.calls == [["a"], ["b", "d"]]


@pytest.mark.parametrize("cancel", [True, False])
def test_what_waits_when_the_worker_is_shut_down_is_refused(cancel):
    recorder = Recorder()

    async def go() -> None:
        executor = ThreadPoolExecutor(1)
        one, other = (DynamicBatcher(recorder, 1, executor) for _ in range(2))
        submitted = [(one, "a"), (one, "b"), (other, "x")]
        tasks = [asyncio.create_task(m.submit(Part(name))) for m, name in submitted]
        while not recorder.calls:
            await asyncio.sleep(0.001)
        executor.shutdown(wait=False, cancel_futures=cancel)
        recorder.go.set()
        _, waiting = await asyncio.wait(tasks, timeout=60)
        assert not waiting
        outcomes = [task.exception() or task.result() for task in tasks]
        refused = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
        assert [error.status for error in refused] == [503] * (2 if cancel else 1)
        assert outcomes[0] == "A"
        assert isinstance(outcomes[1], RequestError)
        for _ in range(2):  # nor does what comes later wait for ever
            with pytest.raises(RequestError, match="stopping"):
                await asyncio.wait_for(one.submit(Part("c")), 10)

    asyncio.run(go())


def test_a_request_cancelled_in_work_does_no_harm():
    recorder = Recorder()
    results = asyncio.run(submit_all(recorder, [Part(name) for name in "abc"], cancel=0))
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == ["B", "C"]
