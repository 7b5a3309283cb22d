"""Which steps are bad."""

from megalite.optim.bad_steps import FEWEST, BadSteps
from megalite.optim.config import OptimizerConfig

NAN = float("nan")


def judge_of(**flags) -> BadSteps:
    return BadSteps(OptimizerConfig(**flags))


def test_steps_that_are_not_finite_are_counted_until_they_are_too_many():
    judge = judge_of(max_bad_steps=2)
    reasons = [judge.judge(norm) for norm in (1e30, NAN, float("inf"), 1.0, NAN)]
    assert [bool(reason) for reason in reasons] == [False, True, True, False, True]
    assert (judge.total, judge.in_a_row) == (3, 1) and not judge.are_too_many
    judge.judge(NAN)
    assert not judge.are_too_many
    judge.judge(NAN)
    assert judge.are_too_many


def test_a_norm_is_compared_with_the_median_of_good_ones():
    judge = judge_of(max_bad_steps=5, skip_grad_norm_above=3.0)
    for i in range(FEWEST):
        assert not judge.judge(100.0 if i == 0 else 1.0)  # before there are enough, all are good
    assert "above --skip-grad-norm-above 3 times the median 1" in judge.judge(3.01)
    assert not judge.judge(3.0)
    # A bad norm does not raise the median.
    assert judge.judge(50.0) and judge.judge(50.0) and not judge.judge(2.9)


def test_a_restored_judge_continues():
    one = judge_of(max_bad_steps=5, skip_grad_norm_above=2.0)
    for i in range(150):
        one.judge(1.0 + i % 7)
    one.judge(NAN)
    other = judge_of(max_bad_steps=5, skip_grad_norm_above=2.0)
    other.restore(one.state())
    for i in range(150):
        norm = 3.0 + (i * i) % 11
        assert one.judge(norm) == other.judge(norm)
    assert one.state() == other.state() and len(one.norms) == 100


def test_older_checkpoints_have_no_count():
    judge = judge_of()
    judge.restore({})
    assert judge.state() == {"total": 0, "in_a_row": 0, "norms": []}
