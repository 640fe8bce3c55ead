"""The report's figures by name, each with its caption, as PNG files and as SVG for the page."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from megatron_act.experiment import activation_figures, loss_figures, run_figures
from megatron_act.experiment.panels import Results
from megatron_act.experiment.style import house_style, save_png, to_svg

FIGURES: dict[str, tuple[str, Callable[[Results], Figure | None]]] = {
    "differences": (
        "Differences in loss between arms, paired by seed, with 95 % intervals; filled: p below 0.05 after Holm's "
        "correction.",
        run_figures.differences,
    ),
    "loss_tokens": (
        "Training loss against tokens: moving average, mean over seeds in its 95 % interval (one seed: the raw loss).",
        loss_figures.loss_against_tokens,
    ),
    "loss_flops": ("Training loss against matmul FLOPs spent.", loss_figures.loss_against_flops),
    "loss_seconds": (
        "Training loss against the time spent on training steps; each arm on its own schedule.",
        loss_figures.loss_against_seconds,
    ),
    "validation": (
        "Loss on the held-out set while training; band: 95 % interval.",
        loss_figures.validation_against_tokens,
    ),
    "learning_rates": ("Tuning runs: the learning rate of each arm.", run_figures.learning_rates),
    "scalars": (
        "The trainable scalars of each layer while training, means over seeds; dotted: initial value.",
        activation_figures.scalars_over_time,
    ),
    "scalars_depth": (
        "The same by depth, at a quarter, half and end of the run; dots: the seeds at the end.",
        activation_figures.scalars_by_depth,
    ),
    "activations": ("The activations after training, by layer; dotted: before.", activation_figures.activation_curves),
    "activation_changes": (
        "What training changed: learned less initial curve, by layer.",
        activation_figures.activation_changes,
    ),
    "preactivations": (
        "What reaches the activations at the end (a gated MLP: its gate), and how much of their result is exactly 0.",
        activation_figures.preactivations,
    ),
    "gradient_norms": ("Norm of all gradients, moving average, mean over seeds.", run_figures.gradient_norms),
    "scalar_gradients": (
        "Gradients of the raw scalars by layer before clipping: absolute value, moving average, mean over seeds.",
        run_figures.scalar_gradients,
    ),
    "speed_memory": ("Speed and peak memory: a dot for each run.", run_figures.speed_and_memory),
}


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Writes every figure as ``folder/NAME.png`` and returns the same as SVG for the page, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    with house_style():
        for name, (_, make) in FIGURES.items():
            figure = make(results)
            if figure is not None:
                save_png(figure, folder / f"{name}.png")
                pictures[name] = to_svg(figure, name.replace("_", "-"))
    return pictures
