"""Draw the demo's picture: one row of digits for each variant, the same noise down every column."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from viditq_fx.demo.model import IMAGE_SIZE

COLUMNS = 12
"""Most images of a row."""
GAINS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""How often differences may be multiplied, so that small ones can be seen at all."""
_WHITE_TO_BLACK = 2.0
"""The range of an image: -1 to 1."""
_SHOWN_SHARE = 0.99
"""Of all pixels; what the few others differ by is black whatever it is."""
_GAP = 2
_INCHES_PER_IMAGE = 0.62
_LABEL_INCHES = 1.75
_TITLE_INCHES = 0.75


def draw_grid(images: Mapping[str, Tensor], labels: Tensor, seed: int) -> bytes:
    """A PNG of every variant's first images [n, 1, 32, 32], then each one's difference from the first.

    labels: [n] digits asked for, written above the columns. All differences are multiplied by one factor, which the
    labels say: rows may be compared.
    """
    names = list(images)
    base = images[names[0]][:COLUMNS]
    rows = [(name, images[name][:COLUMNS], False) for name in names]
    differences = {name: (images[name][:COLUMNS] - base).abs() for name in names[1:]}
    gain = choose_gain(list(differences.values()))
    rows += [(f"|{name} − {names[0]}| × {gain}", drawn * gain, True) for name, drawn in differences.items()]
    width = _LABEL_INCHES + max(_INCHES_PER_IMAGE * len(base), 3.0)
    height = _TITLE_INCHES + _INCHES_PER_IMAGE * 1.08 * len(rows)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    left, top = _LABEL_INCHES / width, 1.0 - _TITLE_INCHES / height
    step = (top - 0.02) / len(rows)
    for index, (name, drawn, is_difference) in enumerate(rows):
        panel = (left, top - (index + 1) * step, 1.0 - left - 0.01, step * 0.92)
        axes = figure.add_axes(panel)
        _draw_row(axes, drawn, is_difference)
        axes.text(-6, IMAGE_SIZE / 2, name, ha="right", va="center", fontsize=9)
        if index == 0:
            for column, label in enumerate(labels[: len(base)].tolist()):
                center = column * (IMAGE_SIZE + _GAP) + IMAGE_SIZE / 2
                axes.text(center, -4, str(label), ha="center", va="bottom", fontsize=9, color="#555")
    title = [f"Same noise (seed {seed}) down every column"]
    if differences:
        title.append(f"Differences × {gain}: black is {100 / gain:g}% of the range or more")
    for index, line in enumerate(title):
        figure.text(0.01, 1.0 - (0.16 + 0.19 * index) / height, line, fontsize=10 - index, va="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def choose_gain(differences: Sequence[Tensor]) -> int:
    """The largest factor of GAINS that leaves all but a few pixels of any variant below black."""
    largest = max((float(drawn.flatten().quantile(_SHOWN_SHARE)) for drawn in differences), default=0.0)
    if not largest:
        return GAINS[0]
    return max((gain for gain in GAINS if gain * largest <= _WHITE_TO_BLACK), default=GAINS[0])


def _draw_row(axes: Axes, drawn: Tensor, is_difference: bool) -> None:
    """Draw images [n, 1, 32, 32] side by side; differences black on white."""
    low, high, cmap = (0.0, _WHITE_TO_BLACK, "gray_r") if is_difference else (-1.0, 1.0, "gray")
    strip = torch.full((IMAGE_SIZE, len(drawn) * (IMAGE_SIZE + _GAP) - _GAP), float("nan"))
    for column, image in enumerate(drawn):
        start = column * (IMAGE_SIZE + _GAP)
        strip[:, start : start + IMAGE_SIZE] = image[0]
    axes.imshow(strip.numpy(), cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    for column in range(len(drawn)):  # a frame, since an image may well be all white
        corner = (column * (IMAGE_SIZE + _GAP) - 0.5, -0.5)
        axes.add_patch(Rectangle(corner, IMAGE_SIZE, IMAGE_SIZE, fill=False, edgecolor="#bbb", linewidth=0.6))
    axes.set_anchor("W")
    axes.set_xlim(-1.5, strip.shape[1] + 0.5)  # room for the outer frames
    axes.set_ylim(IMAGE_SIZE + 0.5, -1.5)
    axes.axis("off")
