"""Student's t against published tables and simulation, paired tests, Holm's correction, detectable differences."""

import math
import statistics

import numpy as np
import pytest

from megatron_act.experiment.comparisons import compare, spread, verdict
from megatron_act.experiment.intervals import detectable, holm, mean_interval, paired, t_cdf, t_quantile


@pytest.mark.parametrize(
    ("p", "df", "published"),  # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, to its three decimals
    [
        *((0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 7, 2.365), (0.975, 30, 2.042), (0.975, 100, 1.984)),
        *((0.95, 4, 2.132), (0.99, 9, 2.821), (0.9, 15, 1.341), (0.999, 5, 5.893)),
    ],
)
def test_quantiles_are_the_published_ones(p: float, df: int, published: float) -> None:
    assert t_quantile(p, df) == pytest.approx(published, abs=5.1e-4)
    assert t_cdf(t_quantile(p, df), df) == pytest.approx(p, abs=1e-12)


def test_one_and_two_degrees_of_freedom_have_closed_forms() -> None:
    for t in (-40.0, -2.5, -0.3, 0.0, 0.7, 3.0, 200.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_an_interval_by_hand() -> None:
    found = mean_interval([2.0, 4.0, 9.0])
    sd = math.sqrt((9 + 1 + 16) / 2)
    half = 4.302653 * sd / math.sqrt(3)
    assert (found.n, found.mean, found.sd) == (3, 5.0, pytest.approx(sd))
    assert (found.low, found.high) == (pytest.approx(5 - half, rel=1e-6), pytest.approx(5 + half, rel=1e-6))
    assert mean_interval([2.0]) == mean_interval([2.0]).__class__(1, 2.0, None, None, None)


def test_intervals_cover_the_truth_in_95_percent_of_studies() -> None:
    """8 seeds, as in the small reproduction; a normal quantile instead of Student's would cover 91 %."""
    values = np.random.default_rng(1).normal(3.0, 0.2, size=(4000, 8))
    found = [mean_interval(list(row)) for row in values]
    covered = statistics.fmean(each.low < 3.0 < each.high for each in found)  # type: ignore[operator]
    assert covered == pytest.approx(0.95, abs=0.01)


def test_the_detectable_difference_is_detected_in_80_percent_of_studies() -> None:
    """With the true standard deviation known to the formula; the sample's own is its estimate."""
    true = detectable(0.01, 8)
    differences = np.random.default_rng(2).normal(true, 0.01, size=(4000, 8))
    seen = statistics.fmean(paired([0.0] * 8, list(row)).p < 0.05 for row in differences)  # type: ignore[operator]
    assert seen == pytest.approx(0.8, abs=0.03)


def test_pairing_removes_what_runs_of_one_seed_share() -> None:
    seeds = [0.0, 5.0, -3.0, 9.0]
    first = [3.0 + seed for seed in seeds]
    second = [2.9 + seed + noise for seed, noise in zip(seeds, (0.01, -0.01, 0.01, -0.01), strict=True)]
    found = paired(first, second)
    assert found.interval.mean == pytest.approx(-0.1)
    assert found.interval.high is not None and found.interval.high < -0.08
    t = 0.1 / (found.interval.sd / 2)  # type: ignore[operator]
    assert found.p == pytest.approx(2 * (1 - t_cdf(t, 3)), rel=1e-9)
    with pytest.raises(ValueError):
        paired(first, second[:3])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def run(name: str, seed: int, loss: float | None) -> dict:
    shared = {"tokens": 100, "total_flops": 1000, "rate": None, "train_iters": 5, "diverged": loss is None}
    other = dict.fromkeys(("final_train_loss", "validation_perplexity", "bits_per_byte", "tokens_per_second"), 1.0)
    own = {"name": name, "seed": seed, "validation_loss": loss, "train_seconds": 1.0, "peak_memory_bytes": 1}
    return {**own, **shared, **other}


def test_a_winner_needs_an_interval_that_outlasts_holm() -> None:
    noise = [0.001, -0.001, 0.002, -0.002]
    runs = {
        "a": [run("a", seed, 3.0) for seed in range(4)],
        "b": [run("b", seed, 2.9 + noise[seed]) for seed in range(4)],
        "c": [run("c", seed, 3.0 + 20 * noise[seed]) for seed in range(4)],
    }
    found = compare(runs, {"a": 5, "b": 5, "c": 5})
    words = [pair["verdict"] for pair in found["pairs"]]
    assert words[0] == "b is lower than a by 0.1000 nats [-0.1029, -0.0971]"
    assert words[1].startswith(
        "no difference seen between c and a: +0.0000 nats [-0.0581, +0.0581]; the study would have"
    )
    assert [pair["p_holm"] for pair in found["pairs"]] == pytest.approx(holm([pair["p"] for pair in found["pairs"]]))
    one = compare({"a": runs["a"][:1], "b": runs["b"][:1]}, {"a": 5, "b": 5})
    assert [pair["verdict"] for pair in one["pairs"]] == ["b and a: one pair of runs, no interval, nothing claimed"]


def test_a_difference_that_holm_takes_back_is_not_claimed() -> None:
    pair = {"first": "a", "second": "b", "mean": -0.1, "low": -0.19, "high": -0.01, "p": 0.03, "p_holm": 0.09}
    assert verdict({**pair, "detectable": 0.1}).endswith("Holm's correction (p = 0.09): not claimed")


def test_runs_are_paired_by_seed_and_a_diverged_one_is_left_out() -> None:
    runs = {
        "a": [run("a", 1, 3.0), run("a", 2, 4.0), run("a", 3, 5.0)],
        "b": [run("b", 3, 5.5), run("b", 1, 3.1), run("b", 2, None)],
    }
    found = compare(runs, {"a": 5, "b": 5})
    assert found["pairs"][0]["seeds"] == [1, 3]
    assert found["pairs"][0]["mean"] == pytest.approx((0.1 + 0.5) / 2)
    assert [arm["diverged"] for arm in found["arms"]] == [[], [2]]
    assert found["arms"][1]["validation_loss"]["mean"] is None  # a mean over the others would flatter
    assert spread([1.0, 3.0])["mean"] == 2.0
