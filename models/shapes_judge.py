"""A small Qwen2-VL that was trained to compare pictures of coloured shapes, in words or by yes and no.

``python -m models.shapes.train_judge`` rebuilds its folder, which transformers' Auto classes read like any published
judge's; what was measured of it is in the JSON file beside the folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch

from models.base import (
    Calibration,
    Candidate,
    CheckpointSize,
    LoadOptions,
    RewardInfo,
    Sample,
    WeightsError,
)
from models.judge import ChatModel
from models.judging.chat_judge import COMMON_OPTIONS, WRITING_OPTIONS, YES_NO
from models.judging.image_pair import ImagePairJudge
from models.judging.pairs import parse_think
from models.judging.readings import pair_reader
from models.registry import register
from models.shapes.world import Scene, SceneObject, render

DIRECTORY = Path(__file__).parent / "shapes" / "weights" / "judge"
TEMPLATES = {"yes_no": "shapes_judge_yes_no", "think": "shapes_judge", "text_first": "shapes_judge_text_first"}


@register("shapes-judge")
class ShapesJudge(ImagePairJudge):
    """P(the first picture shows better what the prompt asks for).

    The option ``mode`` is "yes_no" (the default: graded, one forward, differentiable; "yes" is said of the second
    picture), "think" (reasons and a verdict in words, as UnifiedReward-Think answers), or "text_first": as yes_no, but
    the prompt stands before the pictures, and these do not see each other: N pictures are read 2 N times in all.
    """

    info: ClassVar[RewardInfo] = RewardInfo(
        name="shapes-judge",
        description="Which of two pictures of coloured shapes shows better what the prompt asks for: a small "
        "vision-language model, with reasons or by the probability of a word",
        kind="pairwise",
        inputs=("prompt", "image"),
        range=(0.0, 1.0),
        citation="this project; architecture: Wang et al., 2024 (arXiv:2409.12191); forms of answer: Wang et al., 2025 "
        "(arXiv:2505.03318), Wu et al., 2025 (arXiv:2509.08826)",
        license="project",
        calibration=Calibration(0.25, "a convention: 1 against 0 is 98 %; comparisons are asked for instead"),
        weights="models/shapes/weights/judge",
        weights_bytes=2_904_544,
        differentiable=True,
        outputs=("mass",),
        options=("mode", *COMMON_OPTIONS, *WRITING_OPTIONS),
    )
    writes: ClassVar[bool] = False
    max_tokens: ClassVar[int] = 240
    _read = staticmethod(pair_reader(parse_think))

    def __init__(self, options: LoadOptions) -> None:
        own = self.read_options(options)
        mode = own.choice("mode", "yes_no", tuple(TEMPLATES))
        self.template = own.template("template", TEMPLATES[mode])
        if mode != "think":
            yes, no = YES_NO
            self.words = (no, yes)
        self.independent_images = mode == "text_first"
        super().__init__(options)

    def local_chat(self, options: LoadOptions) -> ChatModel:
        """The network in the package, or that of the folder ``options.weights``."""
        from models.backbones.vlm import LocalChat

        folder = Path(options.weights) if options.weights else DIRECTORY
        if not folder.is_dir():
            raise WeightsError(
                f"no weights of shapes-judge at {folder}: python -m models.shapes.train_judge builds them; "
                "models.shapes-judge.weights names another folder"
            )
        # It is so small that bfloat16 saves nothing, and so unsure where both are near that it would show.
        return LocalChat.load(folder, replace(options, dtype=torch.float32))

    @classmethod
    def random_checkpoint(cls, folder: Path, size: CheckpointSize = "tiny") -> LoadOptions:
        """A folder as the trained one, with random weights in both sizes."""
        from models.shapes.judge import build_model, build_processor, save

        processor = build_processor()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save(build_model(processor.tokenizer), processor, folder / "judge")
        return LoadOptions(weights=str(folder / "judge"))

    def canary(self) -> Sample:
        circle, square = SceneObject("circle", "red", (1, 0)), SceneObject("square", "blue", (1, 2))
        return Sample("a red circle left of a blue square", Candidate(image=render(Scene((circle, square)))))
