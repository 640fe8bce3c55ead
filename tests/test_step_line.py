"""The lines that a person reads, character by character."""

import math

import pytest

from megatron_act.step_line import duration, evaluation_line, scaled, short, step_line

RECORD = {
    "iteration": 1200,
    "loss": 2.81337,
    "learning_rate": 2.9e-4,
    "grad_norm": 0.31234,
    "tokens_per_second_per_gpu": 51_500.0,
    "tflops_per_gpu": 398.2,
    "mfu": 0.40246,
    "eta_seconds": 3 * 86400 + 4.2 * 3600,
    "skipped_steps": 0,
    "nan_steps": 0,
    "scalars": {"alpha_p": [1.9312, 0.7119, 0.8], "alpha_n": [0.65, 1.2, 0.7]},
}


def test_the_whole_line_fits_150_columns() -> None:
    line = step_line(RECORD, 48_000, 8)
    assert line == (
        "step  1,200/48,000 | loss 2.8134 | lr 2.90e-04 | 412 k tok/s | 398 TFLOP/s/GPU | MFU 40.2 % | "
        "alpha_p 0.712..1.93 alpha_n 0.650..1.20 | grad 0.312 | ETA 3 d 04 h"
    )
    assert len(line) <= 165
    assert len(step_line({**RECORD, "scalars": {}}, 48_000, 8)) < 130


def test_what_a_run_has_not_is_left_out() -> None:
    bare = {"mfu": None, "eta_seconds": None, "scalars": {}, "grad_norm": None, "learning_rate": None, "loss": None}
    assert step_line({**RECORD, **bare}, 1200, 1) == "step 1,200/1,200 | 51.5 k tok/s | 398 TFLOP/s/GPU"


@pytest.mark.parametrize(("nan", "words"), [(0, "3 skipped"), (2, "3 skipped (2 not finite)")])
def test_skipped_steps_are_said(nan: int, words: str) -> None:
    line = step_line({**RECORD, "skipped_steps": 3, "nan_steps": nan, "loss": math.nan}, 48_000, 8)
    assert f" | {words} | " in line and "loss nan" in line


def test_experts_scalars_are_one_range() -> None:
    scalars = {"alpha_p": [0.8], "shared_experts.alpha_p": [0.5], "expert_3.alpha_p": [1.5, 0.9]}
    assert " | alpha_p 0.500..1.50 | " in step_line({**RECORD, "scalars": scalars}, 48_000, 8)


def test_an_evaluation() -> None:
    record = {"iteration": 1200, "split": "validation", "loss": 2.75}
    assert evaluation_line(record) == "evaluation at step 1,200 | validation | loss 2.7500 | perplexity 15.6"
    assert evaluation_line({**record, "loss": 1000.0}).endswith("loss 1000.0000 | perplexity inf")


def test_numbers() -> None:
    shown = {0.0: "0.00", 0.012345: "0.0123", 2.134e-5: "2.13e-05", 1.0: "1.00", 41.26: "41.3", 99.96: "100"}
    shown |= {9890.4: "9890", -0.0123: "-0.0123", math.nan: "nan", math.inf: "inf"}
    assert {value: short(value) for value in shown} == shown
    assert [scaled(value) for value in (12.0, 999.6, 51_500, 3.21e6)] == ["12.0 ", "1.00 k ", "51.5 k ", "3.21 M "]


def test_durations() -> None:
    shown = {0.2: "0 s", 45: "45 s", 59.6: "1 min", 725: "12 min", 3599: "1 h 00 min", 18_420: "5 h 07 min"}
    shown |= {86_399: "1 d 00 h", 273_600: "3 d 04 h"}
    assert {seconds: duration(seconds) for seconds in shown} == shown
