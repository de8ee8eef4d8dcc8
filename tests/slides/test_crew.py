# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading

import pytest

from ssldiff_fast.slides.crew import Crew


def test_one_thread_is_the_callers() -> None:
    crew = Crew(1)
    futures = [crew.submit(threading.get_ident) for _ in range(3)]
    assert {crew.result(future) for future in futures} == {threading.get_ident()}
    crew.close()


def test_who_waits_works_on_what_nobody_has_begun() -> None:
    crew, begun, go_on = Crew(2), threading.Event(), threading.Event()

    def long() -> int:
        begun.set()
        go_on.wait(60)
        return threading.get_ident()

    first = crew.submit(long)
    begun.wait(60)
    others = [crew.submit(threading.get_ident) for _ in range(3)]
    others.append(crew.submit(lambda: go_on.set() or threading.get_ident()))
    assert crew.result(first) != threading.get_ident()
    assert {crew.result(future) for future in others} == {threading.get_ident()}
    crew.close()


def test_who_waits_for_an_event_works_until_it_is_set() -> None:
    crew, event, done = Crew(1), threading.Event(), []
    for number in range(3):
        crew.submit(lambda number=number: done.append(number))
    crew.submit(event.set)
    late = crew.submit(lambda: done.append(3))
    crew.wait(event)
    assert done == [0, 1, 2]
    crew.result(late)
    assert done == [0, 1, 2, 3]
    crew.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_is_raised_where_the_result_is_asked_for(threads: int) -> None:
    crew = Crew(threads)

    def fail() -> None:
        raise OSError("disk full")

    futures = [crew.submit(fail), crew.submit(lambda: 7)]
    with pytest.raises(OSError, match="disk full"):
        crew.result(futures[0])
    assert crew.result(futures[1]) == 7
    crew.close()


def test_an_interruption_in_a_task_stops_the_caller() -> None:
    crew = Crew(1)

    def interrupted() -> None:
        raise KeyboardInterrupt

    future = crew.submit(lambda: None)
    crew.submit(interrupted)
    event = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        crew.wait(event)
    assert future.done()
    crew.close()


def test_closing_gives_up_what_nobody_has_begun_and_ends_the_threads() -> None:
    before = threading.active_count()
    crew, begun, go_on, done = Crew(2), threading.Event(), threading.Event(), []

    def long() -> None:
        begun.set()
        go_on.wait(60)
        done.append("first")

    crew.submit(long)
    begun.wait(60)
    crew.submit(lambda: done.append("second"))
    timer = threading.Timer(0.05, go_on.set)
    timer.start()
    crew.close()
    crew.close()
    timer.join()
    assert done == ["first"]
    assert threading.active_count() == before


def test_what_follows_a_task_waits_behind_those_begun_before() -> None:
    crew, event, done = Crew(1), threading.Event(), list[str]()

    def first(number: int) -> int:
        done.append(f"first {number}")
        if number == 2:
            event.set()
        return number

    def then(number: int) -> int:
        done.append(f"then {number}")
        return 10 * number

    futures = [crew.submit(lambda number=number: first(number), then) for number in range(3)]
    crew.wait(event)
    assert done == ["first 0", "first 1", "first 2"]
    assert [crew.result(future) for future in futures] == [0, 10, 20]
    assert done[3:] == ["then 0", "then 1", "then 2"]
    crew.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_either_part_of_a_task_is_raised(threads: int) -> None:
    crew = Crew(threads)
    of_first = crew.submit(lambda: 1 // 0, lambda made: made)
    of_second = crew.submit(lambda: 1, lambda made: made // 0)
    for future in (of_first, of_second):
        with pytest.raises(ZeroDivisionError):
            crew.result(future)
    crew.close()
