from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from numba import config

from rayvaec.kernels.threads import (
    run_all,
    single_threaded_torch,
    spans,
    thread_count,
    threads_for,
)


@pytest.mark.parametrize(("n_items", "n_pieces"), [(0, 3), (1, 4), (10, 3), (7, 7), (5, 1)])
def test_spans_cover_every_item_once(n_items, n_pieces):
    pieces = spans(n_items, n_pieces)
    assert [i for a, b in pieces for i in range(a, b)] == list(range(n_items))
    assert len(pieces) <= n_pieces
    lengths = [b - a for a, b in pieces]
    assert not lengths or max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("n_threads", [1, 3])
def test_results_come_in_the_order_of_the_tasks(n_threads):
    def late(number):
        time.sleep(0.01 * (5 - number))
        return number

    assert run_all([lambda i=i: late(i) for i in range(5)], n_threads) == list(range(5))


def test_two_threads_work_at_once():
    meet = threading.Barrier(2, timeout=10)
    assert sorted(run_all([meet.wait, meet.wait], 2)) == [0, 1]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_first_error_in_order_is_raised(n_threads):
    def fail(number):
        raise ValueError(number)

    tasks = [lambda: None, lambda: fail(1), lambda: fail(2)]
    with pytest.raises(ValueError, match="1"):
        run_all(tasks, n_threads)


def test_callers_on_several_threads_do_not_wait_for_each_other():
    found = []

    def caller():
        found.append(run_all([lambda i=i: i * i for i in range(50)], 2))

    callers = [threading.Thread(target=caller) for _ in range(8)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(20)
    assert found == [[i * i for i in range(50)]] * 8


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_gets_a_pool_of_its_own():
    run_all([lambda: None] * 4, 2)
    child = os.fork()
    if child == 0:
        good = run_all([lambda i=i: i for i in range(4)], 2) == [0, 1, 2, 3]
        os._exit(0 if good else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def seen():
    """What torch, OpenMP and MKL give the thread that asks."""
    lines = torch.__config__.parallel_info().splitlines()
    numbers = [line.split(" : ")[1] for line in lines if line.strip().startswith(("omp", "mkl"))]
    return torch.get_num_threads(), *map(int, numbers)


def in_a_new_thread(function):
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result(20)


@pytest.fixture
def three_threads():
    """torch's number is 3, with its libraries; give what a thread then sees."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield seen()
    torch.set_num_threads(before)


def test_tasks_run_torch_on_one_core(three_threads):
    meet = threading.Barrier(2, timeout=10)

    def inside():
        meet.wait()
        return seen()

    alone = (1,) * len(three_threads)
    assert set(three_threads) == {3}
    for _ in range(2):
        assert run_all([inside, inside], 2) == [alone, alone]
        assert seen() == three_threads
    with single_threaded_torch():
        assert thread_count() == min(3, config.NUMBA_NUM_THREADS)
        assert run_all([inside, inside], 2) == [alone, alone]
        assert seen() == alone
    assert seen() == three_threads


def test_a_thread_that_begins_meanwhile_has_torchs_number(three_threads):
    """torch gives a thread its number when it is first used there, and for good."""
    with single_threaded_torch():
        assert in_a_new_thread(seen) == three_threads
        assert run_all([lambda: in_a_new_thread(seen)] * 2, 2) == [three_threads] * 2
    assert in_a_new_thread(seen) == three_threads


def test_sections_that_overlap_leave_every_number_as_it_was(three_threads):
    """Whoever comes first may leave first, and a number that is set meanwhile stays."""
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def first():
        with single_threaded_torch():
            first_is_in.set()
            assert second_is_in.wait(20)
        return seen()

    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(first)
        assert first_is_in.wait(20)
        with single_threaded_torch():
            second_is_in.set()
            assert ended.result(20) == three_threads
            assert seen() == (1,) * len(three_threads)
    assert seen() == in_a_new_thread(seen) == three_threads


def test_an_error_leaves_every_number_as_it_was(three_threads):
    with pytest.raises(KeyError), single_threaded_torch():
        raise KeyError
    assert seen() == in_a_new_thread(seen) == three_threads


def test_small_work_stays_on_one_thread(monkeypatch):
    monkeypatch.setattr("rayvaec.kernels.threads.LEAST_SHARED", 1000)
    assert threads_for(999) == 1
    assert threads_for(1000) == thread_count()
