"""Sparsity schedules: their ends, their way, and errors."""

from __future__ import annotations

import itertools

import pytest

from deepzero.errors import MaskError
from deepzero.sparsity import Schedule
from deepzero.sparsity.schedules import SCHEDULES, sparsity_of, sparsity_state

MOVING = [name for name in SCHEDULES if name != "constant"]


@pytest.mark.parametrize("start, end", [(0.1, 0.9), (0.9, 0.1), (0.0, 0.3)])
@pytest.mark.parametrize("name", MOVING)
def test_a_schedule_keeps_to_its_ends_and_never_turns_back(name, start, end):
    schedule = Schedule(name, start, end, steps=7, begin=3)
    values = [schedule(step) for step in range(15)]
    assert values[:4] == [start] * 4
    assert values[10:] == [end] * 5
    sign = 1 if end > start else -1
    assert all(sign * (later - earlier) > 0 for earlier, later in itertools.pairwise(values[3:11]))
    assert schedule.most == max(values)


def test_the_ways_are_the_formulas():
    # halves and quarters of the way, by hand
    assert [Schedule("linear", 0.0, 0.8, 4)(step) for step in range(5)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert [Schedule("cosine", 0.0, 0.8, 4)(step) for step in (0, 2, 4)] == pytest.approx([0, 0.4, 0.8])
    assert Schedule("cosine", 0.0, 0.8, 6)(2) == pytest.approx(0.8 / 4)  # (1 - cos(60 degrees)) / 2
    # Zhu and Gupta: s_f + (s_i - s_f) (1 - t)^3
    assert [Schedule("cubic", 0.1, 0.9, 4)(step) for step in range(5)] == pytest.approx(
        [0.9 - 0.8 * left**3 for left in (1, 0.75, 0.5, 0.25, 0)]
    )


def test_constant_is_its_end_throughout():
    schedule = Schedule("constant", 0.2, 0.7, 5)
    assert {schedule(step) for step in range(9)} == {0.7}
    assert schedule.most == 0.7


def test_a_schedule_survives_its_state():
    schedule = Schedule("cubic", 0.1, 0.9, 4, 2)
    state = sparsity_state(schedule)
    assert state == {"name": "cubic", "start": 0.1, "end": 0.9, "steps": 4, "begin": 2}
    assert sparsity_of(state) == schedule
    assert sparsity_of(sparsity_state(0.5)) == 0.5


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("which", ["start", "end"])
def test_fractions_outside_the_range_are_refused(which, fraction):
    with pytest.raises(MaskError, match=rf"the {which} of the linear sparsity schedule must be the fraction left out"):
        Schedule("linear", **{"start": 0.1, "end": 0.5, which: fraction}, steps=3)


def test_errors():
    with pytest.raises(MaskError, match="one of constant, linear, cosine, cubic, got 'cubik'"):
        Schedule("cubik", 0.0, 0.5, 3)
    with pytest.raises(MaskError, match="steps >= 1 after begin >= 0 steps, got steps=0, begin=0"):
        Schedule("linear", 0.0, 0.5, 0)
    with pytest.raises(MaskError, match="got steps=3, begin=-1"):
        Schedule("linear", 0.0, 0.5, 3, -1)
