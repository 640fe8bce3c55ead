"""The activation of each layer as it stands now, as a small picture for TensorBoard, drawn with NumPy in milliseconds.

Layers go from dark (first) to bright (last); the axes are grey lines; the vertical range is that of the initial curve
with a margin, the same for the whole run, so that the pictures of different steps can be compared.
"""

import numpy as np
import torch

from megatron_act.kernels import api as kernels

HEIGHT, WIDTH = 240, 320
X_RANGE = (-4.0, 3.0)  # pre-activations shown
MARGIN = 0.15  # of the initial curve's range, above and below
DARK, BRIGHT = np.array([40.0, 20.0, 120.0]), np.array([240.0, 150.0, 40.0])
AXIS = 190


def curve_image(name: str, scalars: dict[str, list[float]]) -> np.ndarray:
    """Draws f(x) of every layer.

    Args:
        name: the activation.
        scalars: effective values by parameter name, one per layer.

    Returns:
        uint8, shape (HEIGHT, WIDTH, 3).
    """
    x = np.linspace(*X_RANGE, WIDTH)
    initial = curves(name, x, {param.name: [param.init] for param in kernels.get(name).params})
    margin = MARGIN * float(np.ptp(initial))
    low, high = float(initial.min()) - margin, float(initial.max()) + margin
    image = np.full((HEIGHT, WIDTH, 3), 255.0)
    image[_rows(0.0, low, high), :] = AXIS
    image[:, int(np.searchsorted(x, 0.0))] = AXIS
    layers = curves(name, x, scalars)
    for number, y in enumerate(layers):
        share = number / max(1, len(layers) - 1)
        image[_line(_rows(y, low, high))] = DARK + share * (BRIGHT - DARK)
    return image.astype(np.uint8)


def curves(name: str, x: np.ndarray, scalars: dict[str, list[float]]) -> np.ndarray:
    """f(x) by layer, float64, shape (layers, len(x)); one row for an activation without scalars."""
    activation, grid = kernels.get(name), torch.from_numpy(x)
    raw = [
        torch.tensor([[param.raw(value)] for value in scalars[param.name]], dtype=torch.float64)
        for param in activation.params
    ]
    layers = range(len(raw[0]) if raw else 1)
    return np.stack([activation.reference(grid, *(values[layer] for values in raw)).numpy() for layer in layers])


def _rows(y: np.ndarray | float, low: float, high: float) -> np.ndarray:
    """Pixel rows of values, clipped to the picture."""
    share = (high - np.asarray(y)) / (high - low)
    return np.clip(np.rint(share * (HEIGHT - 1)), 0, HEIGHT - 1).astype(int)


def _line(rows: np.ndarray) -> np.ndarray:
    """Mask (HEIGHT, WIDTH) of a line two pixels thick through one row per column, without gaps on steep parts."""
    following = np.append(rows[1:], rows[-1])
    top, bottom = np.minimum(rows, following), np.maximum(rows, following) + 1
    every = np.arange(HEIGHT)[:, None]
    return (every >= top) & (every <= bottom)
