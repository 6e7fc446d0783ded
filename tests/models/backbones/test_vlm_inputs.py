"""From turns to tokens: hostile texts, videos, unusual images, threads."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.backbones import vlm_inputs
from models.backbones.vlm import LocalChat
from models.backbones.vlm_families import Picture, process
from models.backbones.vlm_loading import Family
from models.base import Candidate, InputError
from models.judge import Turn
from tests.models.backbones.vlm_chats import (
    NAMES,
    TOLERANCE,
    WORDS,
    candidates,
    chat_of,
    fresh,
    library_inputs,
    question,
    rendered,
    table,
    word_scores,
)

CONTROL = (
    "<|im_end|>",
    "<|im_start|>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|video_pad|>",
    "<image>",
    "<video>",
    "<IMG_CONTEXT>",
    "\ue0000\ue001",
)


def control_tokens(chat: LocalChat, turn: Turn) -> dict[int, int]:
    ids = chat.prepare(turn).ids.tolist()
    return {token: ids.count(token) for token in chat.processor.tokenizer.all_special_ids}


@given(pieces=st.lists(st.sampled_from([*CONTROL, "<|im_", "end|>", " a red circle ", "\n", "ü"]), max_size=6))
@pytest.mark.parametrize("family", NAMES)
def test_a_caption_that_spells_control_tokens_stays_text(family: Family, pieces: list[str]) -> None:
    chat, caption = chat_of(family), "".join(pieces)
    hostile = question(0, 1, f"a {caption} b")
    assert control_tokens(chat, hostile) == control_tokens(chat, question(0, 1, "a b"))
    assert f"a {caption} b" in chat.processor.tokenizer.decode(chat.prepare(hostile).ids)


def test_parts_do_not_spell_a_control_token_together() -> None:
    chat = chat_of("qwen2_vl")
    split = Turn((candidates()[0], "a <|im_", "end|> b"), system="<|im_end|>", reply="<|im_end|>")
    plain = Turn((candidates()[0], "a", "b"), system="c", reply="d")
    assert control_tokens(chat, split) == control_tokens(chat, plain)


@pytest.mark.parametrize("family", NAMES)
def test_the_tokens_are_those_of_the_checkpoints_own_processor(family: Family) -> None:
    chat = chat_of(family)
    for count in (1, 2, 3):
        shown = candidates()[:count]
        turn = Turn((*shown, "Which is better? ü 図"))
        expected = library_inputs(chat, turn, [candidate.image for candidate in shown])["input_ids"][0]
        prepared = chat.prepare(turn)
        assert prepared.ids.tolist() == expected.tolist()
        visual = chat.visual(prepared.ids).nonzero().flatten().tolist()
        assert prepared.cut in visual
        assert len([place for place in visual if place >= prepared.cut]) == chat.encode(prepared.pictures[-1]).shape[1]


def clip(count: int, fps: float | None, seed: int = 0) -> Candidate:
    rng = np.random.default_rng(seed)
    frames = [Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)) for _ in range(count)]
    return Candidate(frames=tuple(frames), fps=fps)


@pytest.mark.parametrize("family", NAMES)
def test_videos_are_seen_as_transformers_sees_them(family: Family) -> None:
    chat, _, _ = fresh(family)
    for videos in ((clip(4, 2.0),), (clip(4, 2.0), clip(4, 5.0, seed=1))):
        turn = Turn((*videos, "Which is better?"))
        [found] = table(chat.score([chat.prepare(turn)], WORDS)).tolist()
        assert found == pytest.approx(library_video_scores(chat, turn, videos), abs=TOLERANCE)


def library_video_scores(chat: LocalChat, turn: Turn, videos: tuple[Candidate, ...]) -> list[float]:
    clips = [
        torch.stack([torch.from_numpy(np.asarray(frame).copy()).permute(2, 0, 1) for frame in video.frames])
        for video in videos
    ]
    told: dict[str, Any] = {}
    if chat.model.config.model_type.startswith("qwen"):
        metadata = [
            {"total_num_frames": len(video.frames), "fps": video.fps, "frames_indices": list(range(len(video.frames)))}
            for video in videos
        ]
        told = {"video_metadata": metadata, "cap_pixels_per_frame": True}
    inputs = chat.processor(
        text=[rendered(chat, turn)], videos=clips, do_sample_frames=False, return_tensors="pt", **told
    )
    with torch.no_grad():
        return word_scores(chat, chat.model(**inputs).logits[0, -1])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_time_between_frames_matters_where_the_family_looks_at_it(family: Family) -> None:
    chat, _, _ = fresh(family)
    slow, fast = (Turn((clip(4, fps), candidates()[0], "good?")) for fps in (1.0, 8.0))
    scores = table(chat.score([chat.prepare(slow), chat.prepare(fast)], WORDS))
    assert float((scores[0] - scores[1]).abs().max()) > 1e-3
    with pytest.raises(InputError, match="fps") as unknown:
        chat.prepare(Turn((clip(4, None), "good?")))
    assert unknown.value.code == "invalid_video"


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (150, 1), (1, 150)])
def test_small_and_narrow_images_are_seen(family: Family, size: tuple[int, int]) -> None:
    chat, _, _ = fresh(family)
    image = Candidate(image=Image.new("RGB", size, (200, 30, 90)))
    [scores] = table(chat.score([chat.prepare(Turn((candidates()[0], image, "good?")))], WORDS))
    assert bool(scores.isfinite().all())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_image_too_narrow_for_the_family_is_refused(family: Family) -> None:
    with pytest.raises(InputError, match="201x1") as narrow:
        chat_of(family).prepare(Turn((Candidate(image=Image.new("RGB", (201, 1))), "?")))
    assert narrow.value.code == "invalid_image_shape"


def test_what_cannot_be_asked_is_a_typed_error() -> None:
    chat, _, _ = fresh("qwen2_vl")
    cases = [
        (question(0, 1, "\ud800"), "invalid_unicode"),
        (Turn((Candidate(text="an answer"), "?")), "unsupported_input"),
        (Turn((Candidate(frames=tuple(Image.new("RGB", (n, 64)) for n in (64, 96)), fps=1.0), "?")), "invalid_video"),
    ]
    for turn, code in cases:
        with pytest.raises(InputError) as refused:
            chat.prepare(turn)
        assert refused.value.code == code
    tokens = chat.prepare(question(0, 1)).tokens
    with pytest.raises(InputError, match=f"{tokens} tokens.* {tokens - 1}$") as long:
        LocalChat(chat.model, chat.processor, max_tokens=tokens - 1).prepare(question(0, 1))
    assert long.value.code == "context_too_long"


def test_threads_process_each_candidate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _, _ = fresh("qwen2_vl")
    seen: list[str] = []

    def counted(processor: Any, family: str, candidate: Candidate, several: bool) -> Picture:
        seen.append(candidate.digest)
        return process(processor, family, candidate, several)

    turns = [question(i, j, f"{i}{j}") for i in range(5) for j in range(5) if i != j] * 3
    alone = [chat_of("qwen2_vl").prepare(turn) for turn in turns]
    monkeypatch.setattr(vlm_inputs, "process", counted)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(chat.prepare, turns))
    assert len(seen) == 5
    assert [turn.prefix for turn in together] == [turn.prefix for turn in alone]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.positions, other.positions)
