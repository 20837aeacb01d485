"""The scheduler decides by kind and age alone, loses nobody, and lets nobody wait for ever."""

import random
from dataclasses import dataclass

import pytest

from hybridk2.errors import QueueFullError
from hybridk2.scheduler import Priority, Scheduler


@dataclass(eq=False)
class Request:
    """All that a scheduler sees of a request."""

    priority: Priority = "interactive"
    reading: bool = True
    number: int = -1
    queue_position: int | None = None
    holds_memory: bool = True


def submit(scheduler: Scheduler[Request], count: int, priority: Priority) -> list[Request]:
    requests = [Request(priority) for _ in range(count)]
    for request in requests:
        scheduler.submit(request)
    return requests


def start(scheduler: Scheduler[Request]) -> Request | None:
    candidate = scheduler.candidate()
    if candidate is not None:
        scheduler.start(candidate)
    return candidate


def test_interactive_requests_start_first_and_each_kind_by_age() -> None:
    scheduler: Scheduler[Request] = Scheduler(max_running=8, max_queued=8)
    background = submit(scheduler, 2, "background")
    interactive = submit(scheduler, 2, "interactive")
    expected = [*interactive, *background]
    assert [request.queue_position for request in expected] == [0, 1, 2, 3]
    assert [start(scheduler) for _ in range(5)] == [*expected, None]
    assert {request.queue_position for request in expected} == {None}


def test_no_more_run_than_may_and_no_more_wait_than_may() -> None:
    scheduler: Scheduler[Request] = Scheduler(max_running=3, max_queued=2)
    requests = submit(scheduler, 5, "interactive")
    with pytest.raises(QueueFullError, match="0 requests run and 5 wait"):
        scheduler.submit(Request())
    assert [start(scheduler) for _ in range(4)] == [*requests[:3], None]
    with pytest.raises(QueueFullError, match="3 requests run and 2 wait"):
        scheduler.submit(Request("background"))
    scheduler.remove(requests[0])
    scheduler.submit(Request())
    assert (len(scheduler.running), scheduler.waiting("interactive")) == (2, 3)


def test_asking_for_the_candidate_is_not_yet_its_turn() -> None:
    scheduler: Scheduler[Request] = Scheduler(max_running=1, max_queued=8)
    (background,) = submit(scheduler, 1, "background")
    (first, *_) = submit(scheduler, 3, "interactive")
    for _ in range(100):  # it does not fit, step after step
        assert scheduler.candidate() is first
    assert background.queue_position == 3


def test_a_background_request_starts_however_many_interactive_ones_come() -> None:
    scheduler: Scheduler[Request] = Scheduler(max_running=1, max_queued=8)
    (background,) = submit(scheduler, 1, "background")
    passed_over = 0
    while background.queue_position is not None:
        submit(scheduler, 1, "interactive")
        started = start(scheduler)
        assert started is not None
        scheduler.remove(started)
        passed_over += started is not background
    assert passed_over == 8


def test_prompts_are_read_one_after_the_other_and_background_ones_now_and_then() -> None:
    scheduler: Scheduler[Request] = Scheduler(max_running=8, max_queued=8)
    (background,) = submit(scheduler, 1, "background")
    first, second = submit(scheduler, 2, "interactive")
    while start(scheduler):
        pass
    turns = [scheduler.next_to_read() for _ in range(18)]
    assert turns == [*[first] * 8, background, *[first] * 8, background]
    first.reading = False
    assert scheduler.next_to_read() is second
    assert scheduler.decoding() == [first]
    second.reading = background.reading = False
    assert scheduler.next_to_read() is None
    assert scheduler.decoding() == [background, first, second], "oldest first"


def test_a_preempted_request_goes_in_front_of_all_that_came_after_it() -> None:
    scheduler: Scheduler[Request] = Scheduler(max_running=3, max_queued=8)
    requests = submit(scheduler, 5, "interactive")
    while start(scheduler):
        pass
    scheduler.preempt(requests[2])
    scheduler.preempt(requests[1])
    assert [request.queue_position for request in requests] == [None, 0, 1, 2, 3]
    assert start(scheduler) is requests[1]


def test_memory_is_given_up_by_background_requests_then_by_the_latest() -> None:
    scheduler: Scheduler[Request] = Scheduler(max_running=8, max_queued=8)
    background = submit(scheduler, 2, "background")
    interactive = submit(scheduler, 2, "interactive")
    while start(scheduler):
        pass
    background[1].holds_memory = False
    victims = []
    for _ in range(3):
        victims.append(scheduler.youngest(lambda request: request.holds_memory))
        scheduler.remove(victims[-1])
    assert victims == [background[0], interactive[1], interactive[0]]


def test_random_lives_lose_nobody_and_number_the_queue_without_gaps() -> None:
    draw = random.Random(1)
    scheduler: Scheduler[Request] = Scheduler(max_running=4, max_queued=12)
    inside: set[int] = set()
    by_id: dict[int, Request] = {}
    for _ in range(5000):
        action = draw.choice(("submit", "submit", "start", "preempt", "remove"))
        if action == "submit" and len(inside) < 16:
            (request,) = submit(scheduler, 1, draw.choice(("interactive", "background")))
            inside.add(id(request))
            by_id[id(request)] = request
        elif action == "start":
            start(scheduler)
        elif action == "preempt" and scheduler.running:
            scheduler.preempt(draw.choice(scheduler.running))
        elif action == "remove" and inside:
            chosen = by_id.pop(draw.choice(sorted(inside)))
            inside.remove(id(chosen))
            scheduler.remove(chosen)
        assert {id(request) for request in scheduler.requests()} == inside
        assert len(scheduler.running) <= 4
        positions = [request.queue_position for request in by_id.values()]
        waiting = sorted(position for position in positions if position is not None)
        assert waiting == list(range(len(inside) - len(scheduler.running)))
