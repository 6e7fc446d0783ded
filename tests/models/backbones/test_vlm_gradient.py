"""Gradients through whole vision-language models, and the twin of their preprocessing."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.backbones.vlm import LocalChat
from models.backbones.vlm_gradient import twin_patches
from models.backbones.vlm_loading import Family
from models.base import Candidate, ModelError, UnsupportedInput
from models.judge import Turn, WordScores
from tests.models.backbones.vlm_chats import WORDS, candidates, chat_of, fresh

QWEN: tuple[Family, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT = "Is image 2 better?"


def preference(scores: object) -> float:
    assert isinstance(scores, WordScores)
    return float(torch.tensor(scores.log_probs, dtype=torch.float64).softmax(0)[0])


def exact_preference(chat: LocalChat, image: Image.Image) -> float:
    turn = Turn((candidates()[0], Candidate(image=image), TEXT))
    return preference(chat.score([chat.prepare(turn)], WORDS)[0])


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("place", [0, 1])
def test_the_gradient_is_that_of_finite_differences(family: Family, place: int) -> None:
    chat, _, _ = fresh(family)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(3, 72, 80, generator=generator)

    def at(pixels: Tensor) -> tuple[float, Tensor]:
        both = (candidates()[0], pixels) if place else (pixels, candidates()[0])
        scores, gradient = chat.score_gradient(Turn((*both, TEXT)), WORDS)
        return preference(scores), gradient

    _, gradient = at(pixels)
    assert gradient.shape == pixels.shape
    # Along the gradient itself the change is the largest there is, far above the rounding of float32.
    direction = gradient / gradient.norm()
    step = 0.02
    ahead, behind = (at((pixels + sign * step * direction).clamp(0, 1))[0] for sign in (1, -1))
    assert (ahead - behind) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("family", QWEN)
def test_pixels_of_a_size_that_is_kept_score_as_the_image_itself(family: Family) -> None:
    """64 x 64 and 56 x 56 are whole patches, so that nothing is resized; elsewhere the twin is near."""
    chat, _, _ = fresh(family)
    side = 64 if family == "qwen3_vl" else 56
    rng = np.random.default_rng(3)
    kept = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    found, _ = chat.score_gradient(Turn((candidates()[0], tensor_of(kept), TEXT)), WORDS)
    assert preference(found) == pytest.approx(exact_preference(chat, kept), abs=1e-5)
    resized = kept.resize((120, 90), Image.Resampling.BICUBIC)
    found, _ = chat.score_gradient(Turn((candidates()[0], tensor_of(resized), TEXT)), WORDS)
    assert preference(found) == pytest.approx(exact_preference(chat, resized), abs=0.02)


def test_a_network_in_bfloat16_has_its_gradient_in_float32() -> None:
    chat, _, _ = fresh("qwen2_vl", dtype=torch.bfloat16)
    turn = Turn((candidates()[0], torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(2)), TEXT))
    scores, gradient = chat.score_gradient(turn, WORDS)
    assert gradient.dtype == torch.float32
    assert float(gradient.norm()) > 0
    full, exact = fresh("qwen2_vl")[0].score_gradient(turn, WORDS)
    assert preference(scores) == pytest.approx(preference(full), abs=0.02)
    # The weights are those of bfloat16, the arithmetic is not.
    assert float(torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)) > 0.98
    assert chat.in_float32() is chat.in_float32()
    assert chat.dtype == torch.bfloat16


@pytest.mark.parametrize("family", QWEN)
def test_the_twin_of_the_preprocessing_sees_nearly_what_the_processor_sees(family: Family) -> None:
    """The exact path rounds the resized image to 8 bits, twice."""
    processor = chat_of(family).processor.image_processor
    smooth = Image.merge("RGB", [Image.radial_gradient("L").rotate(turn).resize((120, 90)) for turn in (0, 30, 60)])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    for image in (smooth, noise):
        exact = processor(images=[image], return_tensors="pt")["pixel_values"]
        twin = twin_patches(processor, tensor_of(image))
        assert twin.shape == exact.shape
        levels = (twin - exact).abs() * max(processor.image_std) * 255
        assert float(levels.mean()) <= 0.35
        assert float(levels.max()) <= 1.2


def test_pixels_that_are_no_numbers_are_an_error_and_no_gradient() -> None:
    pixels = torch.rand(3, 56, 56)
    pixels[1, 20, 30] = float("nan")
    with pytest.raises(ModelError) as failed:
        fresh("qwen2_vl")[0].score_gradient(Turn((candidates()[0], pixels, TEXT)), WORDS)
    assert failed.value.code == "not_finite"


def test_what_has_no_gradient_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="internvl"):
        fresh("internvl")[0].score_gradient(Turn((torch.rand(3, 64, 64), "?")), WORDS)
    chat, _, _ = fresh("qwen2_vl")
    with pytest.raises(ValueError, match="0 are"):
        chat.score_gradient(Turn((candidates()[0], "?")), WORDS)
