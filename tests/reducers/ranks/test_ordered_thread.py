"""The thread that keeps the ranks' exchanges in order."""

import gc
import subprocess
import sys
import threading

import pytest
import torch

from evenkeel.errors import ReducerError
from evenkeel.reducers.ranks.ordered_thread import OrderedThread

CPU = torch.device("cpu")


def test_jobs_run_in_order_and_in_one_thread() -> None:
    thread, ran = OrderedThread("ordered", lambda: None), []

    def job(number: int) -> torch.Tensor:
        ran.append((number, threading.current_thread().name))
        return torch.tensor(number)

    futures = [thread.submit(lambda number=number: job(number), CPU) for number in range(50)]
    assert [int(future.wait()) for future in futures] == list(range(50))
    assert ran == [(number, "ordered") for number in range(50)]
    thread.close()


def test_nothing_is_begun_after_a_failure() -> None:
    failures, begun, go_on = [], [], threading.Event()
    thread = OrderedThread("ordered", lambda: failures.append("told"))

    def fails() -> torch.Tensor:
        go_on.wait(10)
        raise ValueError("what went wrong")

    first = thread.submit(fails, CPU)
    second = thread.submit(lambda: begun.append(1) or torch.empty(0), CPU)
    go_on.set()
    with pytest.raises(ValueError, match="what went wrong"):
        first.wait()
    with pytest.raises(ReducerError, match="earlier failure: what went wrong") as error:
        second.wait()
    assert isinstance(error.value.__cause__, ValueError)
    thread.close()
    assert (failures, begun) == (["told"], [])


def test_what_is_under_way_is_finished_before_the_end() -> None:
    thread = OrderedThread("ordered", lambda: None)
    future = thread.submit(lambda: torch.tensor(7), CPU)
    thread.close()
    assert future.done()
    assert int(future.wait()) == 7
    with pytest.raises(ReducerError, match="was closed"):
        thread.submit(lambda: torch.tensor(8), CPU)
    assert not [each for each in threading.enumerate() if each.name == "ordered"]


def test_what_it_held_is_let_go_once_with_the_thread_or_with_the_object() -> None:
    let_go = []
    thread = OrderedThread("ordered", lambda: None, lambda: let_go.append(threading.active_count()))
    before = threading.active_count()
    thread.close()
    thread.close()
    assert let_go == [before - 1]
    OrderedThread("ordered", lambda: None, lambda: let_go.append(0))
    gc.collect()
    assert let_go == [before - 1, 0]


LAST_REFERENCE = """
import threading
import torch
from evenkeel.reducers.ranks.ordered_thread import OrderedThread

go_on, ending = threading.Event(), threading.Event()
thread = OrderedThread("late", lambda: None, lambda: (ending.set(), print(sum(range(60_000_000)), flush=True)))
thread.submit(lambda kept=thread: torch.ones(int(go_on.wait())), torch.device("cpu"))
del thread
go_on.set()
ending.wait()
"""


def test_the_interpreter_waits_for_a_thread_whose_job_held_the_last_reference() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LAST_REFERENCE], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(ended.stdout) == sum(range(60_000_000))


FORKED = """
import os
import torch
from evenkeel.reducers.ranks.ordered_thread import OrderedThread

thread = OrderedThread("forked", lambda: None, lambda: os.write(1, b"ended\\n"))
ours = thread.submit(lambda: torch.ones(1), torch.device("cpu")).wait()
child = os.fork()
os.write(1, b"%d\\n" % thread.submit(lambda: 2 * ours, torch.device("cpu")).wait())
if child:
    os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
thread.close()
"""


def test_a_forked_process_gets_a_thread_of_its_own() -> None:
    ended = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=True)
    assert sorted(ended.stdout.split()) == ["0", "2", "2", "ended", "ended"]
