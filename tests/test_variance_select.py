"""variance_select.py: which prompts are kept, and that nothing but their rewards decides it."""

import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from variance_select import classify, reward_statistics, select_top_variance

pytestmark = pytest.mark.quick
NAN = float("nan")
exact = settings(derandomize=True, deadline=None, max_examples=100)


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- reward_statistics ----------------------------------------------------------------------------


def test_statistics_by_hand():
    stats = reward_statistics(tensor([[0, 1], [1, 1], [0, 0]]))
    assert stats.mean.tolist() == [0.5, 1.0, 0.0]
    assert stats.variance.tolist() == [
        0.5,
        0.0,
        0.0,
    ]  # unbiased; the population variance of (0, 1) is 0.25
    assert stats.count.tolist() == [2, 2, 2]


@exact
@given(
    st.lists(
        st.lists(st.one_of(st.floats(-2, 2), st.just(NAN)), min_size=6, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_statistics_equal_the_python_loop_over_the_known_rewards(rows):
    stats = reward_statistics(tensor(rows))
    for row, mean, variance, count in zip(
        rows, stats.mean, stats.variance, stats.count, strict=True
    ):
        known = [reward for reward in row if not math.isnan(reward)]
        assert count == len(known)
        assert (
            mean.item() == pytest.approx(statistics.fmean(known), abs=1e-12)
            if known
            else mean.isnan()
        )
        assert variance.item() == pytest.approx(
            statistics.variance(known) if len(known) > 1 else 0.0, abs=1e-11
        )


def test_an_unknown_reward_is_left_out_and_is_not_zero():
    with_nan, without = (
        reward_statistics(tensor([[1, NAN, 0, 1]])),
        reward_statistics(tensor([[1, 0, 1]])),
    )
    assert with_nan.mean.item() == pytest.approx(
        2 / 3
    ) and with_nan.variance.item() == pytest.approx(1 / 3)
    assert (
        with_nan.mean.item() == without.mean.item()
        and with_nan.variance.item() == without.variance.item()
    )
    assert reward_statistics(tensor([[1, NAN, 1, 1]])).variance.item() == 0.0


def test_rows_with_fewer_than_two_known_rewards_have_no_variance():
    stats = reward_statistics(tensor([[NAN, NAN, NAN], [NAN, 1, NAN]]))
    assert stats.mean[0].isnan() and stats.mean[1] == 1.0
    assert stats.variance.tolist() == [0.0, 0.0] and stats.count.tolist() == [0, 1]


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1.1, 2.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_a_variance_of_exactly_zero(dtype, reward):
    """Equal rewards have a variance of exactly zero whatever their number."""
    for responses in range(1, 130):
        assert (
            reward_statistics(torch.full((1, responses), reward, dtype=dtype)).variance.item()
            == 0.0
        )
    almost = torch.full((1, 64), reward, dtype=dtype)
    almost[0, 0] += 0.1
    assert reward_statistics(almost).variance.item() == pytest.approx(0.01 / 64, rel=1e-4)


def test_rewards_must_be_a_table():
    with pytest.raises(ValueError, match="prompts, responses"):
        reward_statistics(torch.zeros(4))


# --- classify -------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [1.0, 2.0, 2.1])
def test_the_classes_are_cut_by_variance_and_by_mean(best):
    """The cuts are a quarter of the largest variance and half of the best mean."""
    cut = 0.25 * best**2 / 4
    assert classify(0.5 * best, cut * 1.001, best) == "medium"
    assert classify(0.9 * best, cut * 1.001, best) == "medium"
    assert classify(0.1 * best, cut * 1.001, best) == "medium"
    assert classify(0.501 * best, cut * 0.999, best) == "easy"
    assert classify(0.499 * best, cut * 0.999, best) == "hard"
    assert classify(best, 0.0, best) == "easy" and classify(0.0, 0.0, best) == "hard"


def test_on_the_cuts_themselves_variance_is_low_and_mean_is_high():
    assert classify(0.5, 0.0625, 1.0) == "easy"
    assert classify(0.25, 0.0625, 1.0) == "hard"
    assert classify(0.5, 0.0, 1.0) == "easy"


def test_a_binary_prompt_is_medium_between_1_in_15_and_14_in_15():
    rows = [[1.0] * k + [0.0] * (64 - k) for k in range(65)]
    stats = reward_statistics(tensor(rows))
    names = [
        classify(m, v, 1.0)
        for m, v in zip(stats.mean.tolist(), stats.variance.tolist(), strict=True)
    ]
    # 63/64 * 0.0625 = k/64 (1 - k/64) at k = 4.22
    assert names == ["hard"] * 5 + ["medium"] * 55 + ["easy"] * 5


# --- select_top_variance --------------------------------------------------------------------------


def test_the_top_half_by_variance_is_kept_in_descending_order():
    ids, variance = ["a", "b", "c", "d"], tensor([0.1, 0.4, 0.2, 0.3])
    assert select_top_variance(ids, variance) == ["b", "d"]
    assert select_top_variance(ids, variance, keep=0.75) == ["b", "d", "c"]
    assert select_top_variance(ids, variance, keep=1.0) == ["b", "d", "c", "a"]
    assert select_top_variance(ids, variance, keep=1e-9) == ["b"]


def test_ties_go_to_the_smaller_id():
    assert select_top_variance(["d", "b", "a", "c"], tensor([0.2, 0.2, 0.1, 0.2])) == ["b", "c"]
    assert select_top_variance(["10", "9"], tensor([0.2, 0.2])) == ["10"]  # ids are text


@exact
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.2, NAN]), min_size=1, max_size=12),
    st.randoms(),
    st.floats(0.01, 1),
)
def test_the_order_of_the_rows_does_not_matter(variance, random, keep):
    rows = [(f"p{i}", v) for i, v in enumerate(variance)]
    shuffled = random.sample(rows, len(rows))
    first, second = (
        select_top_variance([i for i, _ in r], tensor([v for _, v in r]), keep)
        for r in (rows, shuffled)
    )
    assert first == second


def test_prompts_without_variance_are_dropped():
    """Prompts without variance are dropped even when fewer remain."""
    ids = ["a", "b", "c", "d"]
    assert select_top_variance(ids, tensor([0.0, 0.3, 0.0, 0.0])) == ["b"]
    assert select_top_variance(ids, tensor([0.0, 0.3, 0.0, 0.2]), keep=1.0) == ["b", "d"]
    assert select_top_variance(ids, torch.zeros(4)) == []
    assert select_top_variance(ids, tensor([NAN, 0.3, NAN, 0.2]), keep=1.0) == ["b", "d"]


def test_the_share_is_of_all_prompts_and_is_rounded_up():
    ids = list("abcdefg")
    assert len(select_top_variance(ids, torch.arange(1.0, 8.0))) == 4  # 3.5
    some = tensor([0, 0, 0, 0, 1, 2, 3])
    assert select_top_variance(ids, some) == [
        "g",
        "f",
        "e",
    ]  # half of 7, not half of the 3 that have variance
    assert select_top_variance([], torch.zeros(0)) == []


@pytest.mark.parametrize("prompts", [1, 2, 7, 50, 64, 100, 300])
def test_the_number_kept_is_the_share_rounded_up(prompts):
    """The number kept is the share, rounded up in exact arithmetic."""
    ids, variance = [f"{i:03}" for i in range(prompts)], torch.ones(prompts)
    # 0.07 * 100 is 7.000000000000001 in floating point, and still 7 prompts
    for percent in range(1, 101):
        kept = select_top_variance(ids, variance, percent / 100)
        assert len(kept) == math.ceil(Fraction(percent, 100) * prompts), f"{percent} % of {prompts}"


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, NAN, float("inf")])
def test_the_share_must_lie_in_0_1(keep):
    with pytest.raises(ValueError, match="keep"):
        select_top_variance(["a"], tensor([1.0]), keep)


def test_ids_and_variances_must_match():
    with pytest.raises(ValueError, match="2 ids but 3"):
        select_top_variance(["a", "b"], tensor([1, 2, 3]))


def test_the_top_half_of_binary_rewards_is_nearest_to_one_half():
    """The top half of binary rewards are the prompts nearest to one half."""
    right = [0, 3, 30, 64, 33, 10, 60, 20]  # of 64
    rewards = tensor([[1.0] * k + [0.0] * (64 - k) for k in right])
    kept = select_top_variance([str(k) for k in right], reward_statistics(rewards).variance)
    assert kept == [str(k) for k in sorted(right, key=lambda k: abs(k - 32))[:4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prompts_with_reordered_rewards_tie(dtype):
    """Prompts with the same rewards in another order tie. The smaller id is kept."""
    torch.manual_seed(0)
    rewards = torch.tensor([0.0, 0.1, 1.0, 1.1, 2.1], dtype=dtype)[torch.randint(5, (64,))]
    rows = torch.stack([rewards[torch.randperm(64)] for _ in range(20)])
    ids = [f"{i:02}" for i in range(20)]
    assert select_top_variance(ids, reward_statistics(rows).variance) == ids[:10]


@exact
@given(
    variance=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    kinds=st.lists(st.sampled_from("abc"), min_size=20, max_size=20),
    keep=st.sampled_from([0.1, 0.3, 0.5, 1.0]),
)
def test_within_kinds_each_kind_keeps_what_it_would_alone(variance, kinds, keep):
    ids, kinds = [f"p{i:02}" for i in range(len(variance))], kinds[: len(variance)]
    values = torch.tensor(variance, dtype=torch.float64)
    kept = select_top_variance(ids, values, keep, kinds)
    alone = []
    for kind in set(kinds):
        rows = [i for i, k in enumerate(kinds) if k == kind]
        alone += select_top_variance([ids[i] for i in rows], values[rows], keep)
    assert sorted(kept) == sorted(alone)
    ranks = [(-variance[ids.index(i)], i) for i in kept]
    assert ranks == sorted(ranks)


def test_kinds_must_be_as_many_as_prompts():
    with pytest.raises(ValueError, match="2 ids but 2 variances and 1 kinds"):
        select_top_variance(["a", "b"], torch.ones(2), 0.5, ["x"])


def test_a_small_difference_is_no_tie_and_round_off_is_one():
    rewards = torch.tensor([[1.0, 1.0, 1.005], [1.0, 1.0, 1.0 + 1e-7]], dtype=torch.float64)
    variance = reward_statistics(rewards).variance
    assert variance[0].item() == pytest.approx(0.005**2 / 3) and variance[1] == 0
