"""Random crops, flips and the normalisation, on whole batches and on the device that holds them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, padding: int = 4) -> Tensor:
    """Pad each image with zeros, cut its own window of the old size out, and mirror it where asked.

        images  [B, C, H, W] uint8      dy, dx  [B] int64, top and left edge in 0 .. 2 * padding
        flip    [B], mirrored where it is not 0       result  [B, C, H, W] uint8, contiguous

    What RandomCrop(H, padding) and RandomHorizontalFlip do to one image at a time. The zeros are
    black pixels: the padding comes before the normalisation.
    """
    b, c, h, w = images.shape
    device = images.device
    x = torch.arange(w, device=device)
    x = torch.where(flip[:, None].bool(), w - 1 - x, x) + dx[:, None]  # [B, W]
    y = torch.arange(h, device=device) + dy[:, None]  # [B, H]
    padded = F.pad(images, (padding, padding, padding, padding)).flatten(2)
    # One gather over flattened planes: indexing with (y, x) pairs is five times slower on a CPU.
    index = y[:, :, None] * (w + 2 * padding) + x[:, None, :]
    return padded.gather(2, index.view(b, 1, h * w).expand(b, c, h * w)).view(b, c, h, w)


def draw_crops(num_images: int, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Rows dy, dx and flip [3, num_images] (int64, on the CPU) for `crop_and_flip`, all uniform."""
    offsets = torch.randint(0, 2 * padding + 1, (2, num_images), generator=generator)
    flips = torch.randint(0, 2, (1, num_images), generator=generator)
    return torch.cat((offsets, flips))


def draw_resized_crop(
    height: int,
    width: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part of an image, as RandomResizedCrop draws them.

    The area is uniform in `scale` and the aspect ratio log-uniform in `ratio` (Szegedy et al.,
    "Going Deeper with Convolutions", 2015). Ten draws that do not fit leave the largest centred
    part with an allowed ratio. Drawn here, and not by torchvision's transform, because that one
    draws from the process's global stream.
    """
    low, high = torch.log(torch.tensor(ratio)).tolist()
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
        aspect = torch.empty(1).uniform_(low, high, generator=generator).exp().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
            return top, left, h, w
    w, h = width, height
    if width < ratio[0] * height:
        h = round(width / ratio[0])
    elif width > ratio[1] * height:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


class Normalise:
    """Bytes [B, 3, H, W] to (value / 255 - mean) / std per channel, in `dtype` and channels_last memory."""

    def __init__(
        self,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        mean64, std64 = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
        self.scale = (1 / (255 * std64)).to(device, dtype)
        self.shift = (mean64 / std64).to(device, dtype)

    def __call__(self, images: Tensor) -> Tensor:
        # The layout is changed last: on a CPU, per-channel arithmetic is ten times slower in the other.
        normalised = images.to(self.scale.dtype).mul_(self.scale).sub_(self.shift)
        return normalised.contiguous(memory_format=torch.channels_last)
