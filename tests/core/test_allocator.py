"""Budget, due steps, ties and model order, by hand-computed numbers."""

import itertools
import random

import pytest

from increlora.allocator import Allocator
from increlora.errors import UserError


def allocator(**changes) -> Allocator:
    given = dict(matrices=72, init_rank=1, target_rank=2, rank_step=1, top_h=5, interval=100, init_warmup=100)
    return Allocator(**(given | changes))


def test_first_growth_is_at_twice_the_interval_when_warmup_equals_it():
    due = [step for step in range(501) if allocator().due(step, 72)]
    assert due == [200, 300, 400, 500]


def test_next_growth_by_hand():
    assert [allocator().next_growth(step) for step in (0, 1, 100, 199, 200, 201, 300)] == [200] * 5 + [300, 300]
    assert [allocator(init_warmup=0).next_growth(step) for step in (0, 1, 100, 101)] == [100, 100, 100, 200]
    for changes in ({}, {"init_warmup": 0}, {"init_warmup": 250}, {"interval": 7}):
        it = allocator(**changes)
        for step in range(600):
            assert it.next_growth(step) == next(t for t in range(step, 2000) if it.due(t, 72))


def test_growth_steps_of_rte_r2():
    # 72 ranks to add, 5 per growth: 15 growths
    assert allocator().growth_steps() == list(range(200, 1700, 100))


@pytest.mark.parametrize(
    ("rank_step", "top_h", "rounds"),
    [(4, 9, 14), (4, 10, 13), (1, 18, 28), (4, 22, 6)],  # RTE, MRPC, MNLI, QNLI at r8: 504 ranks to add
)
def test_growth_steps_at_r8(rank_step, top_h, rounds):
    assert len(allocator(target_rank=8, rank_step=rank_step, top_h=top_h).growth_steps()) == rounds


def test_nothing_is_due_once_the_budget_is_spent():
    assert not allocator().due(200, 144)


def test_the_highest_scores_win_and_grow_in_model_order():
    small = allocator(matrices=4, target_rank=3, top_h=2)
    ranks = dict.fromkeys("abcd", 1)
    assert small.choose(ranks, {"a": 0.1, "b": 0.4, "c": 0.2, "d": 0.9}) == {"b": 1, "d": 1}


def test_a_tie_goes_to_the_earlier_matrix():
    small = allocator(matrices=4, target_rank=3, top_h=2)
    assert small.choose(dict.fromkeys("abcd", 1), {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.9}) == {"a": 1, "d": 1}


def test_the_last_round_takes_only_what_there_is_room_for():
    # r8 MRPC of the authors' script: 10 matrices x 4 ranks per growth run over 576; 72 + 12 * 40 = 552, room for 6
    mrpc = allocator(target_rank=8, rank_step=4, top_h=10)
    names = [f"m{i:02d}" for i in range(72)]
    scores = {name: float(i) for i, name in enumerate(names)}
    ranks = {name: 552 if name == "m00" else 0 for name in names}
    chosen = mrpc.choose(ranks, scores)
    assert list(chosen) == names[-6:]
    assert 552 + sum(chosen.values()) == mrpc.budget == 576


def test_the_lowest_of_the_chosen_takes_what_is_left_of_the_budget():
    # 3 matrices, 1 to 8: 21 ranks by steps of 4; after 3 + 12 ranks there is room for 9
    small = allocator(matrices=3, target_rank=8, rank_step=4, top_h=3)
    assert small.choose(dict.fromkeys("abc", 5), {"a": 0.2, "b": 0.1, "c": 0.9}) == {"a": 4, "b": 1, "c": 4}
    assert small.growths() == [12, 9]


def test_budget_is_hit_exactly_from_any_top_h():
    for top_h, rank_step in itertools.product(range(1, 80), (4, 5)):
        it = allocator(target_rank=8, rank_step=rank_step, top_h=top_h)
        ranks = {str(i): 1 for i in range(72)}
        for step, gained in zip(it.growth_steps(), it.growths(), strict=True):
            assert it.due(step, sum(ranks.values()))
            found = it.choose(ranks, dict.fromkeys(ranks, 0.0))
            assert sum(found.values()) == gained
            ranks = {name: rank + found.get(name, 0) for name, rank in ranks.items()}
        assert sum(ranks.values()) == it.budget and not it.due(step + 100, it.budget)


def test_no_matrix_grows_above_max_rank():
    # 4 matrices, 1 to 3, one at a time: a has the highest score and stops at 4, then b does
    small, ranks = allocator(matrices=4, target_rank=3, top_h=1, max_rank=4), dict.fromkeys("abcd", 1)
    chosen = []
    for _ in small.growths():
        gains = small.choose(ranks, {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6})
        ranks = {name: rank + gains.get(name, 0) for name, rank in ranks.items()}
        chosen += gains
    assert chosen == list("aaabbbcc") and ranks == {"a": 4, "b": 4, "c": 3, "d": 1}


def test_a_matrix_whose_room_would_be_lost_comes_first():
    # 3 matrices, 1 to 3, two at a time, up to 3: three growths choose 6 times, and the room is 6. After a and b had
    # two growths each there would be room for c alone, and two must grow.
    small, ranks, chosen = allocator(matrices=3, target_rank=3, top_h=2, max_rank=3), dict.fromkeys("abc", 1), []
    for _ in small.growths():
        gains = small.choose(ranks, {"a": 0.9, "b": 0.8, "c": 0.7})
        ranks = {name: rank + gains.get(name, 0) for name, rank in ranks.items()}
        chosen.append("".join(gains))
    assert chosen == ["ab", "ac", "bc"] and set(ranks.values()) == {3}


def test_the_budget_is_hit_exactly_below_any_max_rank_or_refused():
    """Against scores that change at random and against ones that never do."""
    dice, refused, done = random.Random(0), 0, 0
    for _ in range(600):
        given = {"matrices": dice.randint(1, 12), "target_rank": dice.randint(2, 12), "rank_step": dice.randint(1, 5)}
        limit = given["target_rank"] + dice.randint(0, 8)
        it = allocator(**given, top_h=dice.randint(1, 12), max_rank=limit)
        try:
            it.check(10**6)
        except UserError:
            refused += 1
            continue
        ranks, steady = {str(i): 1 for i in range(it.matrices)}, dice.random() < 0.5
        for gained in it.growths():
            gains = it.choose(ranks, {name: float(name) if steady else dice.random() for name in ranks})
            assert sum(gains.values()) == gained and len(gains) <= it.top_h and max(gains.values()) <= it.rank_step
            ranks = {name: rank + gains.get(name, 0) for name, rank in ranks.items()}
        assert sum(ranks.values()) == it.budget and max(ranks.values()) <= limit, it
        done += 1
    assert refused > 50 and done > 50


def test_a_max_rank_without_room_is_refused_with_one_that_has_it():
    tight = allocator(target_rank=8, rank_step=4, top_h=9, max_rank=8)  # at most 5 each: 360 of 576
    with pytest.raises(UserError, match="below max_rank 8 there is no room for the budget 576: 14 growths of 9"):
        tight.check(10**6)
    allocator(target_rank=8, rank_step=4, top_h=9, max_rank=9).check(10**6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_rank": 1, "init_rank": 2}, "below the start"),
        ({"top_h": 0}, "`top_h` must be at least 1"),
        ({"interval": 0}, "`interval` must be at least 1"),
        ({"init_warmup": -1}, "`init_warmup` must not be negative"),
    ],
)
def test_impossible_values_are_refused_with_their_numbers(changes, said):
    with pytest.raises(UserError) as error:
        allocator(**changes)
    assert said in str(error.value)


def test_a_last_growth_after_the_last_step_is_refused():
    allocator().check(1602)  # growth at 1600, one step (1601) left to train it
    with pytest.raises(UserError, match="15 growths, at steps 200 to 1600, but step 1599 is the last"):
        allocator().check(1601)


def test_the_default_top_h_ends_growth_in_the_first_half():
    # 1000 steps, interval 100: growths at 200, 300, 400, 500 -> 18 matrices each
    assert allocator(matrices=72, target_rank=2, rank_step=1, interval=100, init_warmup=100).smallest_top_h(1000) == 18
