from __future__ import annotations

import os
import threading
import time

import pytest
import torch

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


def test_tasks_run_torch_on_one_core_and_leave_its_number_as_it_was():
    meet = threading.Barrier(2, timeout=10)

    def inside():
        meet.wait()
        return torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert run_all([inside, inside], 2) == [1, 1]
        assert torch.get_num_threads() == 2
        with single_threaded_torch():
            assert torch.get_num_threads() == 1
            assert thread_count() == 2
            assert run_all([inside, inside]) == [1, 1]
        assert torch.get_num_threads() == 2
        fresh = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join(10)
        assert fresh == [2]
    finally:
        torch.set_num_threads(before)


def test_small_work_stays_on_one_thread(monkeypatch):
    monkeypatch.setattr("rayvaec.kernels.threads.LEAST_SHARED", 1000)
    assert threads_for(999) == 1
    assert threads_for(1000) == thread_count()
