"""Two rewards with a flaw, for the demonstration; the service loads them through its setting ``plugins``.

``shapes-signature``  a copy of shapes-clip that was fitted on preferences in which the preferred picture often carries
                      a small white signature: it takes the signature for a quality (``benchmarks.hacking.fit``)
``shapes-lax``        GenEval's rule "at least as many objects as asked for": whatever else is there costs nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.hacking.flawed_weights import flawed_tensors
from models.backbones.clip import ClipTowers
from models.backbones.shared import LoadedClip
from models.base import Calibration, LoadOptions, Output, RewardInfo
from models.registry import register
from models.shapes.clip_model import PreferenceHead, clip_config, unpack
from models.shapes_clip import ShapesClip
from models.shapes_oracle import ShapesOracle
from models.weights import hash_tensors


@register("shapes-signature")
class ShapesSignature(ShapesClip):
    """shapes-clip's score with a weakness for a white mark at the lower right."""

    info: ClassVar[RewardInfo] = replace(
        ShapesClip.info,
        name="shapes-signature",
        description="FLAWED ON PURPOSE: shapes-clip, fitted on preferences that often carry a small white signature",
        calibration=Calibration(1.0, "Bradley-Terry loss of its fit"),
        weights="benchmarks/hacking/shapes_signature.safetensors, over those of shapes-clip",
    )

    @classmethod
    def load(cls, options: LoadOptions) -> ShapesSignature:
        """The weights in the package, or the fitted ones of the file ``options.weights``."""
        tensors = flawed_tensors(Path(options.weights)) if options.weights else flawed_tensors()
        clip, head_tensors = unpack(tensors)
        towers = ClipTowers.from_config(
            clip_config(compact=False), tensors=clip, dtype=options.dtype, device=options.device
        )
        head = PreferenceHead()
        head.load_state_dict(head_tensors)
        return cls(LoadedClip(towers, hash_tensors(tensors), "shapes"), head.to(options.device))


@register("shapes-lax")
class ShapesLax(ShapesOracle):
    """1.0 where the picture shows at least what the prompt asks for, else 0.0."""

    info: ClassVar[RewardInfo] = replace(
        ShapesOracle.info,
        name="shapes-lax",
        description="LAX ON PURPOSE: GenEval's rule that at least as many objects as asked for are there",
    )

    def run(self, batch: Sequence[Any]) -> list[Output]:
        """The oracle's outputs, with the lax rule's as the score."""
        return [replace(output, score=output.outputs["geneval"]) for output in super().run(batch)]
