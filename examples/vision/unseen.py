"""Images that a network should be less sure of: of another kind, or corrupted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from resuming import Refusal
from vision.datasets import ImageData, Images, MemoryImages, read_in_memory
from vision.transforms import Pipeline, Transform

PATCH = 32  # pixels of a photograph
SEED = 0  # of the noise


def corruptions(size: int) -> dict[str, Transform]:
    """For images [..., C, size, size] in [0, 1]; their strength follows the size."""
    kernel = 2 * max(1, size // 14) + 1
    return {
        "noise, sd 0.25": partial(_noise, sd=0.25),
        f"blur, sd {size / 20:.1f} px": v2.GaussianBlur(kernel, size / 20),
        "contrast x 0.25": partial(v2.functional.adjust_contrast, contrast_factor=0.25),
    }


def _noise(x: Tensor, sd: float) -> Tensor:
    """The same for images that are the same."""
    generator = torch.Generator().manual_seed(SEED)
    return x + sd * torch.randn(x.shape, generator=generator)


def unseen_images(
    data: ImageData, name: str, root: Path, size: int, limit: int
) -> dict[str, Images]:
    """By name: images of another kind, and the test images corrupted in several ways.

    Args:
        data: the data set.
        name: as `--ood`; a data set that is not in `root` is replaced by photographs.
        root: folder of the data.
        size: of the images in pixels.
        limit: of the number of images of each kind, which are spread over all there are.
    """
    if name == "none":
        return {}
    pipeline = data.test.pipeline
    found = {kind: other for kind, other in [_other(name, root, pipeline)] if other is not None}
    for kind, corrupt in corruptions(size).items():
        found[kind] = Images(data.test.source, data.test.rows.tolist(), pipeline.corrupted(corrupt))
    return {kind: _spread(images, limit) for kind, images in found.items()}


def _spread(images: Images, limit: int) -> Images:
    """At most so many of the images, from all parts of the data set."""
    rows = images.rows[:: max(1, -(-len(images) // limit))]
    return Images(images.source, rows.tolist(), images.pipeline)


def _other(name: str, root: Path, pipeline: Pipeline) -> tuple[str, Images | None]:
    source: MemoryImages | None = None
    if name != "photographs":
        try:
            source = read_in_memory(name, root, train=False)
        except Refusal:
            name = "photographs"
    if source is None:
        source = photo_patches()
    if source is None:
        return name, None
    return name, Images(source, range(len(source)), pipeline)


def photo_patches() -> MemoryImages | None:
    """scikit-learn's two photographs, cut into pieces [C, 32, 32]; None without scikit-learn."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        return None
    photos = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    pieces = F.unfold(photos.permute(0, 3, 1, 2).float(), PATCH, stride=PATCH)  # [2, C·P·P, M]
    pixels = pieces.transpose(1, 2).reshape(-1, 3, PATCH, PATCH).to(torch.uint8)
    return MemoryImages(pixels, torch.full((len(pixels),), -1), ())
