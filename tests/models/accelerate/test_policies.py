"""Policies and guards: schedules that a user writes, and sums of stored tensors."""

from __future__ import annotations

import pytest
import torch

from dit_toolkit.models.accelerate.policies import COMPUTE, FORECAST, LONGEST, Guard, Interval, Listed, Moment
from dit_toolkit.models.accelerate.taylorseer import weighted_sum


def full_evaluations(policy, evaluations: int) -> list[int]:
    """Where a run of so many evaluations is computed."""
    full: list[int] = []
    for index in range(evaluations):
        choice, _ = policy.choose(Moment(index, index - full[-1] if full else 0))
        if choice is COMPUTE:
            full.append(index)
    return full


def computed(policy: Listed, evaluations: int) -> list[int]:
    return [i for i in range(evaluations) if policy.choose(Moment(i, 1))[0] is COMPUTE]


@pytest.mark.parametrize(
    ("evaluations", "every", "first", "full"),
    [
        (50, 6, 3, [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]),  # FLUX.1
        (50, 5, 1, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]),  # HunyuanVideo
        (40, 5, 1, [0, 5, 10, 15, 20, 25, 30, 35]),  # Wan 2.1, image to video
    ],
)
def test_the_published_schedules(evaluations, every, first, full):
    assert full_evaluations(Interval(every, first), evaluations) == full


@pytest.mark.parametrize(
    ("evaluations", "counts"), [(50, [26, 18, 14, 12, 10]), (28, [15, 11, 9, 8, 7]), (20, [11, 8, 7, 6, 5])]
)
def test_how_many_are_computed(evaluations, counts):
    assert [len(full_evaluations(Interval(every, 3), evaluations)) for every in (2, 3, 4, 5, 6)] == counts


def test_interval_1_computes_everything():
    assert full_evaluations(Interval(1, 1), 20) == list(range(20))
    assert Interval(1, 1).choose(Moment(7, 1))[0] is COMPUTE
    assert Interval(2, 1).choose(Moment(7, 1))[0] is FORECAST


def test_the_reason_is_said():
    assert Interval(4, 3).choose(Moment(2, 1)) == (COMPUTE, "first")
    assert Interval(4, 3).choose(Moment(6, 4)) == (COMPUTE, "interval")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interval(0), r"interval must be at least 1, got 0\."),
        (lambda: Interval(2, 0), r"first_full must be at least 1, got 0: a forecast needs a computed evaluation\."),
    ],
)
def test_an_interval_that_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "evaluations", "full"),
    [
        ("1110100", 10, [0, 1, 2, 4, 7, 8, 9]),  # a mask repeats
        ("10", 6, [0, 2, 4]),
        ("11", 5, [0, 1, 2, 3, 4]),
        (" 1000 ", 8, [0, 4]),
        ("0-3, 6, 9", 12, [0, 1, 2, 3, 6, 9]),
        ("0 1 2 8", 12, [0, 1, 2, 8]),
        ("0,5,\n10", 12, [0, 5, 10]),
        ("9,0,9,0-1", 12, [0, 1, 9]),
        ("0", 5, [0]),
        ("0-0", 5, [0]),
        (",0,,2,", 5, [0, 2]),
        ("0, 999", 1000, [0, 999]),
    ],
)
def test_a_schedule_is_a_mask_or_a_list(text, evaluations, full):
    assert computed(Listed.parse(text), evaluations) == full


def test_a_list_is_over_after_the_longest_run():
    assert computed(Listed.parse("0, 2"), LONGEST + 4) == [0, 2, LONGEST, LONGEST + 2]


def test_a_list_forecasts_what_it_does_not_name():
    assert Listed.parse("0,2").choose(Moment(1, 1)) == (FORECAST, "listed")
    assert Listed.parse("0,2").choose(Moment(2, 2)) == (COMPUTE, "listed")
    assert Listed.parse("0,2").min_full == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "schedule must name evaluation 0: there is nothing to forecast from before it"),
        ("3, 6", "must name evaluation 0"),
        ("1", "must name evaluation 0"),
        ("0110", "A schedule must begin with a computed evaluation"),
        ("0-3; 6", r"must be a mask such as 1110100, or numbers such as 0-3, 6, 9, 12; got '0-3;'"),
        ("0, -4", "got '-4'"),
        ("0, 4-", "got '4-'"),
        ("0, 1-2-3", "got '1-2-3'"),
        ("0, 2.5", r"got '2\.5'"),
        ("1e3", "got '1e3'"),
        ("every 3", "got 'every'"),
        ("0, 1000", "schedule names evaluation 1000; the highest allowed is 999"),
        ("0-99999999999999999999", "schedule names evaluation 99999999999999999999"),
        ("0, 9-6", "got '9-6'"),  # nothing would be computed of it
    ],
)
def test_a_schedule_that_means_nothing_is_answered_with_a_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        Listed.parse(text)


def test_a_list_made_by_hand_must_begin_with_a_computed_evaluation():
    for full in ((), (False, True)):
        with pytest.raises(ValueError, match="nothing to forecast from yet"):
            Listed(full)


def test_the_guard_keeps_the_last_steps():
    guard = Guard(last_full=2)
    reasons = [guard.reason(Moment(i, 1, left=9 - i)) for i in range(10)]
    assert reasons == [None] * 8 + ["last"] * 2
    assert Guard(last_full=2).reason(Moment(9, 1)) is None  # no schedule to tell
    assert Guard().reason(Moment(9, 1, left=0)) is None


def test_the_guard_counts_forecasts_in_a_row():
    guard = Guard(max_consecutive=2)
    assert [guard.reason(Moment(5, since)) for since in (0, 1, 2, 3, 9)] == [None, None, None, "gap", "gap"]
    assert Guard().reason(Moment(5, 100)) is None


def test_a_guard_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="last_full must not be negative, got -1"):
        Guard(last_full=-1)
    with pytest.raises(ValueError, match="max_consecutive must be at least 1, got 0"):
        Guard(max_consecutive=0)


def random_tensors(count: int, dtype=torch.float32, scale=1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [(scale * torch.randn(3, 5, 7, generator=generator)).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_sum_is_rounded_once(dtype):
    """Against the sum in float64: half an ulp of the dtype, and what float32 loses on terms of order 15."""
    tensors, weights = random_tensors(4, dtype), [4.0, -6.0, 4.0, -1.0]
    exact = sum(x.double() * w for x, w in zip(tensors, weights, strict=True))
    got = weighted_sum(tensors, weights)
    assert got.dtype == dtype
    half_ulp = exact.abs() * torch.finfo(dtype).eps / 2
    assert bool(((got.double() - exact).abs() <= half_ulp + 50 * 2**-24 * (dtype != torch.float64)).all())
    if dtype == torch.bfloat16:  # summed in bfloat16 it would not pass
        naive = sum(x * w for x, w in zip(tensors, weights, strict=True))
        assert not bool(((naive.double() - exact).abs() <= half_ulp + 50 * 2**-24).all())


def test_float16_stays_within_its_range():
    high = torch.full((4,), 6e4, dtype=torch.float16)
    got = weighted_sum([high, high / 2, high], [3.0, -2.0, 0.0])
    assert torch.equal(got, torch.full((4,), 65504.0, dtype=torch.float16))
    assert torch.equal(weighted_sum([-high, high], [2.0, -1.0]), torch.full((4,), -65504.0, dtype=torch.float16))
    passed_on_the_way = weighted_sum([high, high, high], [3.0, -3.0, 0.5])
    assert torch.equal(passed_on_the_way, high / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_tensor_comes_back_bit_for_bit_and_as_a_tensor_of_its_own(dtype):
    tensors = random_tensors(3, dtype)
    got = weighted_sum(tensors, [1.0, 0.0, 0.0])
    assert torch.equal(got, tensors[0])
    got.fill_(0)
    assert torch.equal(tensors[0], random_tensors(3, dtype)[0])


def test_a_tensor_of_weight_0_does_not_show_whatever_it_holds():
    (x,) = random_tensors(1)
    assert torch.equal(weighted_sum([x, torch.full_like(x, float("nan"))], [1.0, 0.0]), x)
    assert torch.equal(weighted_sum([x], [0.0]), torch.zeros_like(x))


def test_the_inputs_are_read_only():
    tensors = random_tensors(4)
    before = [x.clone() for x in tensors]
    weighted_sum(tensors, [2.0, -1.0, 0.5, -0.5])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_as_many_weights_as_tensors():
    with pytest.raises(ValueError, match="argument"):
        weighted_sum(random_tensors(2), [1.0])
