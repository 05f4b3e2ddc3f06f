"""Random changes of training images, a batch at a time, on the device the images are on: crop, flip, colours.

Every sample has its own numbers; they are drawn first, for the whole batch on the CPU, and applied afterwards, so that what
happens to a sample depends neither on the device nor on how a batch is shared out among processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidParameterError, ShapeError
from .documents import AugmentConfig

# ITU-R 601-2 luma, as Pillow and torchvision take it
LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Draws:
    """The numbers of a batch, each (B,), on the CPU.

    ``down``, ``right``: where the crop begins, in the padded image; ``flip``: bool; factors of brightness, contrast and
    saturation; ``hue``: the shift. ``order``: in which brightness, contrast, saturation and hue (0 to 3) are changed.
    """

    down: Tensor
    right: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: tuple[int, ...]

    def __getitem__(self, samples: slice) -> Draws:
        parts = (self.down, self.right, self.flip, self.brightness, self.contrast, self.saturation, self.hue)
        return Draws(*(part[samples] for part in parts), order=self.order)


class Augmentation:
    """What an `AugmentConfig` asks for, of images (C, H, W) of one shape.

    ``draw`` the numbers of a batch, then call it: (B, C, H, W) with entries in [0, 1] → the same. Colours are changed in a
    random order that a batch shares, as torchvision's ``ColorJitter`` does for each image, of RGB images.
    Raises `ShapeError` and `InvalidParameterError` where the images are not of that kind.
    """

    def __init__(self, config: AugmentConfig, shape: tuple[int, ...]) -> None:
        self.config, self.shape = config, shape
        if config == AugmentConfig():
            return
        if len(shape) != 3:
            raise ShapeError("the samples to augment", "(C, H, W)", shape, "Only images can be cropped and flipped.")
        if config.colours and shape[0] != 3:
            raise ShapeError("the images to change colours of", "(3, H, W)", shape)
        if config.padding == "reflect" and config.crop >= min(shape[1:]):
            most = min(shape[1:]) - 1
            raise InvalidParameterError("augment.crop", config.crop, f"images of {shape} reflect {most} pixels at most")

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """The numbers of ``count`` samples, always as many of them, whatever is asked for."""
        c = self.config
        uniform = torch.rand(7, count, generator=generator, dtype=torch.float64, device="cpu")
        order = tuple(torch.randperm(4, generator=generator, device="cpu").tolist())

        def within(row: int, low: float, high: float) -> Tensor:
            return low + (high - low) * uniform[row]

        down, right = ((uniform[k] * (2 * c.crop + 1)).long() for k in (0, 1))
        flip = (uniform[2] < 0.5) & c.flip
        return Draws(
            down,
            right,
            flip,
            within(3, *c.brightness),
            within(4, *c.contrast),
            within(5, *c.saturation),
            within(6, -c.hue, c.hue),
            order,
        )

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        c = self.config
        if tuple(x.shape[1:]) != self.shape:
            raise ShapeError("the images to augment", ("B", *self.shape), tuple(x.shape))
        if c.crop or c.flip:
            x = self._moved(x, draws)
        if not c.colours:
            return x
        for which in draws.order:
            if which == 3:
                x = shift_hue(x, draws.hue.to(x)) if c.hue else x
                continue
            factor = (draws.brightness, draws.contrast, draws.saturation)[which].to(x).reshape(-1, 1, 1, 1)
            if which == 0:
                x = (factor * x).clamp(0.0, 1.0)
            else:
                grey = luma(x)
                x = torch.lerp(grey.mean((2, 3), keepdim=True) if which == 1 else grey, x, factor).clamp(0.0, 1.0)
        return x

    def _moved(self, x: Tensor, draws: Draws) -> Tensor:
        """Crop and flip in one pass: each sample picks rows and columns, mirrored where they lie outside."""
        batch, _, height, width = x.shape
        inside = None
        picked = []
        for size, start in ((height, draws.down), (width, draws.right)):
            index = torch.arange(size, device=start.device) - self.config.crop + start.unsqueeze(1)
            if picked:  # the columns
                index = torch.where(draws.flip.unsqueeze(1), index.flip(1), index)
            if self.config.padding == "zeros":
                valid = (index >= 0) & (index < size)
                inside = valid.unsqueeze(2) if inside is None else inside & valid.unsqueeze(1)
            index = index.abs()
            picked.append((size - 1 - (size - 1 - index).abs()).clamp_(0, size - 1).to(x.device))
        rows, columns = picked
        samples = torch.arange(batch, device=x.device)[:, None, None, None]
        channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        x = x[samples, channels, rows[:, None, :, None], columns[:, None, None, :]]
        return x if inside is None else x * inside.unsqueeze(1).to(x)


def luma(x: Tensor) -> Tensor:
    """Grey of RGB images, (B, 3, H, W) → (B, 1, H, W)."""
    return (x * x.new_tensor(LUMA).reshape(1, 3, 1, 1)).sum(1, keepdim=True)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """RGB images with their hue moved by ``shift`` (B,) parts of the colour circle: value and saturation stay."""
    value, least = x.amax(1), x.amin(1)
    chroma = value - least
    r, g, b = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, 2.0 + (b - r) / safe, 4.0 + (r - g) / safe)
    )
    sector = sector + 6.0 * shift.reshape(-1, 1, 1)
    # Each channel as a trapezoid of the hue, the others' moved by a third of the circle.
    offset = x.new_tensor([5.0, 3.0, 1.0]).reshape(1, 3, 1, 1)
    k = torch.remainder(sector.unsqueeze(1) + offset, 6.0)
    moved = value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)
    return moved.clamp(0.0, 1.0)
