"""Pieces of telemetry without training: what is counted of a pre-activation, and the picture of the curves."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_act import curve_images
from megatron_act.compat import install_typing_override

install_typing_override()  # before Megatron is imported, where this file's tests run alone
from megatron_act.preactivations import SAMPLED_TOKENS, _count  # noqa: E402
from megatron_act.telemetry import Telemetry  # noqa: E402


def mlp(gated: bool, activation: object) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(gated_linear_unit=gated, activation_func=activation))


def test_counts_with_bias_of_the_gate_only() -> None:
    x = torch.tensor([[[-1.0, 0.5, 0.0, 9.0], [2.0, -3.0, -9.0, -9.0]]])  # (1, 2 tokens, gate 2 | up 2)
    assert _count(mlp(True, torch.relu), x, None).tolist() == [2.0, 2.0, 4.0]
    bias = torch.tensor([1.5, -1.0, 0.0, 0.0])
    assert _count(mlp(True, torch.relu), x, bias).tolist() == [2.0, 2.0, 4.0]  # 0.5 -0.5 | 3.5 -4
    assert _count(mlp(False, torch.relu), x, None).tolist() == [4.0, 5.0, 8.0]  # the 0 is no negative, but gives a 0
    assert _count(mlp(False, torch.nn.functional.silu), x, None).tolist() == [4.0, 1.0, 8.0]


def test_a_sample_of_tokens_spread_over_the_batch() -> None:
    rows = 10 * SAMPLED_TOKENS
    x = torch.where(torch.arange(rows) < rows // 2, -1.0, 1.0).view(rows // 5, 5, 1)
    assert _count(mlp(False, torch.relu), x, None).tolist() == [SAMPLED_TOKENS / 2, SAMPLED_TOKENS / 2, SAMPLED_TOKENS]
    assert _count(mlp(False, torch.relu), x[:0], None).tolist() == [0.0, 0.0, 0.0]  # an expert without tokens


def test_the_picture_has_each_layers_curve_where_it_belongs() -> None:
    image = curve_images.curve_image("crrelu", {"eps": [0.01, 1.5]})
    assert image.shape == (240, 320, 3) and image.dtype == np.uint8
    low, high = curve_images.curves("crrelu", np.array([-4.0, 3.0]), {"eps": [0.01]}).ravel()
    assert (low, high) == (pytest.approx(-0.01 * 4 * np.exp(-8)), pytest.approx(3 + 0.03 * np.exp(-4.5)))
    grid = np.linspace(-4, 3, 320)
    initial = np.where(grid > 0, grid, 0) + 0.01 * grid * np.exp(-(grid**2) / 2)
    bottom, top = initial.min() - 0.15 * np.ptp(initial), initial.max() + 0.15 * np.ptp(initial)
    for layer, eps in enumerate((0.01, 1.5)):
        colour = curve_images.BRIGHT if layer else curve_images.DARK
        for column in (70, 250):
            y = max(grid[column], 0) + eps * grid[column] * np.exp(-(grid[column] ** 2) / 2)
            row = round((top - y) / (top - bottom) * 239)
            near = image[max(0, row - 2) : row + 3, column]
            assert (near == colour.astype(np.uint8)).all(axis=1).any(), (layer, column, row)


def test_an_activation_without_scalars_has_one_curve() -> None:
    assert curve_images.curves("relu2", np.array([-1.0, 2.0]), {}).tolist() == [[0.0, 4.0]]


def test_a_metrics_file_that_cannot_be_written_is_named() -> None:
    telemetry = Telemetry(Namespace(metrics_jsonl="/dev/full", tensorboard_dir=None, wandb_project=""))
    with pytest.raises(
        RuntimeError, match=r"^/dev/full: --metrics-jsonl cannot be written \(No space left on device\)"
    ):
        telemetry._write({"event": "step"})
