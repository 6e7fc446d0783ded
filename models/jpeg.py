"""Rewards for images that JPEG compresses well, or badly (Black et al. 2023, DDPO).

The size is that of Pillow's JPEG at quality 95 with its default subsampling, in kB of 1000 bytes. It depends on the
image alone; how many bytes come out depends a little on the build of libjpeg.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from PIL import Image as PILImage

from models.base import Calibration, InputError, LoadOptions, Output, RewardInfo, RewardModel, Sample, SampleError
from models.registry import register

QUALITY = 95
COMPRESSIBILITY_DIVISOR = 500.0
"""Flow-GRPO divides the size in kB by it; DDPO does not divide."""

_CITATION = "Black et al., Training Diffusion Models with Reinforcement Learning, 2023 (arXiv:2305.13301)"
_DIRECT_MODES = frozenset({"RGB", "L"})
_CONVERTED_MODES = frozenset({"1", "P", "CMYK", "YCbCr", "HSV", "LAB"})


def jpeg_kilobytes(image: PILImage.Image) -> float:
    """Size of the image as a JPEG of quality 95, in kB (1000 bytes). Grey images (mode L) are stored as grey.

    Raises :class:`InputError` with the code ``alpha_not_supported`` for transparency, which JPEG does not have (the
    service lays images over white before), and ``mode_not_supported`` for pixels that are not 8-bit colours.
    """
    if image.has_transparency_data:
        raise InputError("JPEG has no transparency: lay the image over a background", code="alpha_not_supported")
    if image.mode in _CONVERTED_MODES:
        image = image.convert("RGB")
    elif image.mode not in _DIRECT_MODES:
        raise InputError("only 8-bit images can be stored as JPEG", code="mode_not_supported")
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=QUALITY, comment=b"")  # a source file's comment is not the picture
    return buffer.tell() / 1000


class _JpegReward(RewardModel):
    """prepare() encodes, in the thread pool (Pillow releases Python's lock); run() only turns sizes into scores."""

    def prepare(self, sample: Sample) -> float:
        return jpeg_kilobytes(sample.image(self.info.name))

    def run(self, batch: Sequence[float]) -> Sequence[Output | SampleError]:
        return [Output(self.score(kilobytes), {"kilobytes": kilobytes}) for kilobytes in batch]

    @staticmethod
    @abstractmethod
    def score(kilobytes: float) -> float:
        """The reward of a file of this size."""


@register("jpeg-incompressibility")
class JpegIncompressibility(_JpegReward):
    """The size in kB: more detail scores higher."""

    info: ClassVar[RewardInfo] = RewardInfo(
        name="jpeg-incompressibility",
        description="Size of the image as a JPEG of quality 95 in kB; the prompt does not count",
        kind="pointwise",
        inputs=("image",),
        range=(0.0, 300.0),
        citation=_CITATION,
        license="none needed: a formula",
        calibration=Calibration(10.0, "a convention: 10 kB of difference are 73 %"),
        outputs=("kilobytes",),
    )

    @classmethod
    def load(cls, options: LoadOptions) -> JpegIncompressibility:
        return cls()

    @staticmethod
    def score(kilobytes: float) -> float:
        return kilobytes


@register("jpeg-compressibility")
class JpegCompressibility(_JpegReward):
    """Minus the size in kB over 500: smoother images score higher, at most 0."""

    info: ClassVar[RewardInfo] = RewardInfo(
        name="jpeg-compressibility",
        description="Minus the size of the image as a JPEG of quality 95 over 500 kB; the prompt does not count",
        kind="pointwise",
        inputs=("image",),
        range=(-0.6, 0.0),
        citation=_CITATION + "; divided by 500 as in Flow-GRPO (arXiv:2505.05470)",
        license="none needed: a formula",
        calibration=Calibration(0.02, "a convention: 10 kB of difference are 73 %"),
        outputs=("kilobytes",),
    )

    @classmethod
    def load(cls, options: LoadOptions) -> JpegCompressibility:
        return cls()

    @staticmethod
    def score(kilobytes: float) -> float:
        return -kilobytes / COMPRESSIBILITY_DIVISOR
