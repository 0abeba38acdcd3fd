"""Who waits and who runs, without a device."""

from types import SimpleNamespace

import pytest

from qtale_jax.engine.requests import QueueFull
from qtale_jax.engine.schedule import Schedule
from qtale_jax.engine.statistics import SECONDS, Counters


def requests(count):
    return [SimpleNamespace(number=number) for number in range(count)]


def test_the_oldest_waits_no_longer_than_it_has_to():
    schedule, everyone = Schedule(rows=2, queue=3), requests(5)
    for request in everyone:
        schedule.add(request)
    with pytest.raises(QueueFull, match="0 requests run and 5 wait; allowed: 3"):
        schedule.add(SimpleNamespace(number=9))
    schedule.admit(lambda request: request.number != 1)
    assert list(schedule.running.values()) == everyone[:1] and schedule.free == 1
    schedule.admit(lambda request: True)
    assert schedule.running == {0: everyone[0], 1: everyone[1]} and schedule.free == 0
    assert schedule.youngest() == 1 and [one.number for one in schedule.requests] == [0, 1, 2, 3, 4]


def test_who_is_put_back_waits_before_those_that_came_later():
    schedule, everyone = Schedule(rows=3, queue=9), requests(6)
    for request in everyone:
        schedule.add(request)
    schedule.admit(lambda request: True)
    schedule.put_back(1)
    schedule.put_back(2)
    assert [request.number for request in schedule.waiting] == [1, 2, 3, 4, 5] and schedule.free == 2
    assert schedule.release(0) is everyone[0] and schedule.free == 3 and not schedule.running


def test_a_rate_forgets():
    now = [100.0]
    counters = Counters(lambda: now[0])
    counters.gave(30)
    now[0] += SECONDS / 2
    counters.gave(20)
    assert counters.tokens_per_second() == 50 / SECONDS
    now[0] += SECONDS / 2
    assert counters.tokens_per_second() == 20 / SECONDS
    now[0] += SECONDS
    assert counters.tokens_per_second() == 0 and counters.new_tokens == 50
