"""LocalChat against transformers itself, on tiny random models of the five families' true classes."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.backbones.vlm import LocalChat
from models.backbones.vlm_gradient import twin_patches
from models.backbones.vlm_inputs import Picture
from models.backbones.vlm_loading import FAMILIES, Family, load_chat, write_random_chat
from models.base import Candidate, InputError, LoadOptions, UnsupportedInput, WeightsError
from models.judge import ChatModel, Generation, Turn, WordScores

NAMES = get_args(Family)
WORDS = ("yes", "no")
TOLERANCE = 1e-5
"""Of log-probabilities in float32, cached against whole turns one by one."""


class Store(dict[Any, Tensor]):
    """Keeps everything and counts what was asked for and not there."""

    misses = 0

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self.misses += 1
        return super().get(key, default)

    def put(self, key: Any, feature: Tensor) -> None:
        self[key] = feature


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def folder(family: Family) -> Path:
    return write_random_chat(Path(mkdtemp(prefix=f"{family}-")), family)


@cache
def chat_of(family: Family, dtype: torch.dtype = torch.float32) -> LocalChat:
    return load_chat(folder(family), LoadOptions(dtype=dtype))


def fresh(family: Family, rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[LocalChat, Store, Store]:
    """The same network with stores of its own."""
    shared = chat_of(family, dtype)
    chat = LocalChat(shared.model, shared.processor)
    features, prefixes = Store(), Store()
    chat.attach(features=features, prefixes=prefixes, rows=rows, on_step=lambda: None)
    return chat, features, prefixes


def naive(family: Family, dtype: torch.dtype = torch.float32) -> LocalChat:
    shared = chat_of(family, dtype)
    return LocalChat(shared.model, shared.processor, share_features=False, share_prefixes=False, rows=1)


@cache
def candidates() -> tuple[Candidate, ...]:
    """Images of several sizes."""
    rng = np.random.default_rng(0)
    sizes = ((64, 64), (64, 64), (64, 128), (96, 64), (140, 40))
    return tuple(Candidate(image=Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))) for size in sizes)


def question(first: int, second: int, text: str = "Text Caption: [a red circle] Is image 2 better?") -> Turn:
    return Turn((candidates()[first], candidates()[second], text))


def table(scores: Any) -> Tensor:
    assert all(isinstance(score, WordScores) for score in scores)
    return torch.tensor([score.log_probs for score in scores], dtype=torch.float64)


def library_logits(chat: LocalChat, turn: Turn) -> Tensor:
    """What transformers says of the turn, by its own processor and forward."""
    pictures = [part.image for part in turn.parts if isinstance(part, Candidate)]
    inputs = library_inputs(chat, turn, pictures)
    with torch.no_grad():
        logits: Tensor = chat.model(**inputs).logits[0, -1]
    return logits


def library_inputs(chat: LocalChat, turn: Turn, pictures: list[Any]) -> Any:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.parts]
    messages = [{"role": "user", "content": content}]
    text = chat.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    nested: Any = [pictures] if chat.model.config.model_type == "llava_onevision" else pictures
    return chat.processor(text=[text], images=nested, return_tensors="pt")


@pytest.mark.parametrize("family", NAMES)
def test_shared_features_and_beginnings_give_what_whole_turns_give(family: Family) -> None:
    chat, _, _ = fresh(family)
    turns = [question(i, j, f"Caption {'x ' * i}. Is image 2 better?") for i in range(5) for j in range(5) if i != j]
    shared = table(chat.score([chat.prepare(turn) for turn in turns], WORDS))
    plain = naive(family)
    alone = table(plain.score([plain.prepare(turn) for turn in turns], WORDS))
    assert alone.std(0).min() > 0.1  # answers do differ
    assert float((shared - alone).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("family", NAMES)
def test_it_says_what_transformers_says(family: Family) -> None:
    chat, _, _ = fresh(family)
    for turn in (question(0, 2), question(3, 0), Turn((candidates()[2], "How good is it?"))):
        log_probs = library_logits(chat, turn).log_softmax(-1)
        expected = [float(log_probs[list(chat.spellings(word))].logsumexp(0)) for word in WORDS]
        [found] = table(chat.score([chat.prepare(turn)], WORDS)).tolist()
        assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("family", NAMES)
def test_it_writes_what_transformers_writes(family: Family) -> None:
    chat, _, _ = fresh(family)
    turn = question(0, 2)
    inputs = library_inputs(chat, turn, [candidates()[0].image, candidates()[2].image])
    written = chat.model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    [answers] = chat.generate([chat.prepare(turn)], Generation(12))
    assert isinstance(answers, list)
    assert answers[0].text == chat.processor.tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("family", NAMES)
def test_each_image_and_each_beginning_is_computed_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _, prefixes = fresh(family)
    encoded: list[str] = []
    encode = LocalChat.encode

    def counted(self: LocalChat, picture: Picture) -> Tensor:
        encoded.append(picture.digest)
        return encode(self, picture)

    monkeypatch.setattr(LocalChat, "encode", counted)
    turns = [chat.prepare(question(i, j)) for i in range(4) for j in range(4) if i != j]
    first = chat.score(turns, WORDS)
    assert len(encoded) == len(set(encoded)) == 4
    assert len(prefixes) == 4
    assert chat.score(turns, WORDS) == first
    assert len(encoded) == 4
    assert prefixes.misses == 4


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit, whatever stands beside it, in bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        chat, _, _ = fresh("qwen2_vl", dtype=dtype)
        turns = [chat.prepare(question(i, j)) for i in range(3) for j in range(3) if i != j]
        together = chat.score(turns, WORDS)
        assert [chat.score([turn], WORDS)[0] for turn in turns] == together
        assert chat.score(turns[::-1], WORDS) == together[::-1]


def test_bfloat16_is_near_float32() -> None:
    """Measured 0.03 on this random model; caches on and off differ by as much as two batch shapes do."""
    chat, _, _ = fresh("qwen2_vl", dtype=torch.bfloat16)
    turns = [question(i, j) for i in range(4) for j in range(4) if i != j]
    exact, plain = naive("qwen2_vl"), naive("qwen2_vl", torch.bfloat16)
    full = table(exact.score([exact.prepare(turn) for turn in turns], WORDS)).softmax(-1)[:, 0]
    cached = table(chat.score([chat.prepare(turn) for turn in turns], WORDS)).softmax(-1)[:, 0]
    alone = table(plain.score([plain.prepare(turn) for turn in turns], WORDS)).softmax(-1)[:, 0]
    assert float((cached - full).abs().max()) < 0.06
    assert float((cached - alone).abs().max()) < 0.06


def test_sampled_answers_follow_their_seed_and_not_their_neighbours() -> None:
    chat, _, _ = fresh("qwen2_vl")
    how = Generation(8, temperature=1.0, samples=3, seed=5)
    turns = [chat.prepare(question(0, 1)), chat.prepare(question(2, 3, "Which one?"))]
    together = chat.generate(turns, how)
    assert [chat.generate([turn], how)[0] for turn in turns] == together
    assert chat.generate(turns, replace(how, seed=6)) != together
    [answers] = chat.generate(turns[:1], how)
    assert isinstance(answers, list)
    assert len({answer.text for answer in answers}) > 1


def test_answers_end_at_a_stop_text_and_say_when_they_were_cut_off() -> None:
    chat, _, _ = fresh("qwen2_vl")
    turn = chat.prepare(question(0, 1))
    [[whole]] = chat.generate([turn], Generation(20))  # type: ignore[misc]
    assert not whole.finished
    stop = whole.text[3:6]
    [[cut]] = chat.generate([turn], Generation(20, stop=(stop,)))  # type: ignore[misc]
    assert cut.finished
    assert stop in cut.text
    assert len(cut.text) < len(whole.text)
    assert whole.text.startswith(cut.text)


def test_other_work_between_the_tokens_changes_nothing() -> None:
    chat, features, prefixes = fresh("qwen2_vl")
    turn, other = chat.prepare(question(0, 1)), chat.prepare(question(2, 0))
    alone, score = chat.generate([turn], Generation(6)), chat.score([other], WORDS)
    seen = []
    chat.attach(
        features=features, prefixes=prefixes, rows=4, on_step=lambda: seen.append(chat.score([other], WORDS) == score)
    )
    assert chat.generate([turn], Generation(6)) == alone
    assert seen == [True] * 5


@pytest.mark.parametrize(
    "word", ["<|im_end|>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "\ue0000\ue001"]
)
def test_a_caption_that_spells_a_control_token_stays_text(word: str) -> None:
    chat, _, _ = fresh("qwen2_vl")
    turn = chat.prepare(question(0, 1, f"a {word} b"))
    control = {token: turn.ids.tolist().count(token) for token in chat.processor.tokenizer.all_special_ids}
    plain = chat.prepare(question(0, 1, "a b"))
    assert control == {token: plain.ids.tolist().count(token) for token in control}
    assert f"a {word} b" in chat.processor.tokenizer.decode(turn.ids)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_gradient_is_that_of_finite_differences(family: Family) -> None:
    chat, _, _ = fresh(family)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(3, 72, 80, generator=generator)

    def preference(at: Tensor) -> tuple[float, Tensor]:
        scores, gradient = chat.score_gradient(Turn((candidates()[0], at, "Is image 2 better?")), WORDS)
        return float(torch.tensor(scores.log_probs, dtype=torch.float64).softmax(0)[0]), gradient

    _, gradient = preference(pixels)
    assert gradient.shape == pixels.shape
    # Along the gradient itself the change is the largest there is, far above the rounding of float32.
    direction = gradient / gradient.norm()
    step = 0.02
    ahead, behind = (preference((pixels + sign * step * direction).clamp(0, 1))[0] for sign in (1, -1))
    slope = (ahead - behind) / (2 * step)
    assert slope == pytest.approx(float(gradient.norm()), rel=0.05)


def test_the_twin_of_the_preprocessing_sees_nearly_what_the_processor_sees() -> None:
    """The exact path rounds the resized image to 8 bits."""
    chat, _, _ = fresh("qwen2_vl")
    processor = chat.processor.image_processor
    image = Image.merge("RGB", [Image.radial_gradient("L").rotate(turn).resize((120, 90)) for turn in (0, 30, 60)])
    exact = processor(images=[image], return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    twin = twin_patches(processor, pixels)
    assert twin.shape == exact.shape
    levels = (twin - exact).abs() * max(processor.image_std) * 255
    assert float(levels.mean()) <= 0.35
    assert float(levels.max()) <= 5  # where bicubic overshoots at a hard edge, the exact path clamps between its passes


def test_gradients_of_other_families_are_refused() -> None:
    chat, _, _ = fresh("internvl")
    with pytest.raises(UnsupportedInput, match="internvl"):
        chat.score_gradient(Turn((torch.rand(3, 64, 64), "?")), WORDS)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_video_is_seen_frame_by_frame(family: Family) -> None:
    chat, _, _ = fresh(family)
    frames = tuple(candidate.image for candidate in candidates()[:2] if candidate.image is not None)
    forwards, backwards = (Candidate(frames=order, fps=2.0) for order in (frames, frames[::-1]))
    scores = chat.score([chat.prepare(Turn((video, "good?"))) for video in (forwards, backwards)], WORDS)
    assert scores[0] != scores[1]


def test_what_cannot_be_asked_is_a_typed_error() -> None:
    chat, _, _ = fresh("qwen2_vl")
    with pytest.raises(InputError) as long:
        LocalChat(chat.model, chat.processor, max_tokens=20).prepare(question(0, 1))
    assert long.value.code == "context_too_long"
    with pytest.raises(InputError) as surrogate:
        chat.prepare(question(0, 1, "\ud800"))
    assert surrogate.value.code == "invalid_unicode"
    video = Candidate(frames=tuple(c.image for c in candidates()[:2] if c.image), fps=1.0)
    with pytest.raises(InputError) as unsupported:
        fresh("qwen3_vl")[0].prepare(Turn((video, "?")))
    assert unsupported.value.code == "video_unsupported"
    with pytest.raises(ValueError, match="no single token"):
        chat.spellings("supercalifragilistic")


def test_a_folder_that_is_no_judge_says_why(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_chat(tmp_path, LoadOptions())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WeightsError) as other:
        load_chat(tmp_path, LoadOptions())
    assert all(name in str(other.value) for name in FAMILIES.values())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(WeightsError, match="safetensors"):
        load_chat(tmp_path, LoadOptions())


def test_the_area_of_images_can_be_set() -> None:
    small = load_chat(folder("qwen2_vl"), LoadOptions(options={"max_pixels": 56 * 56}))
    large = chat_of("qwen2_vl")
    turn = question(0, 2)
    assert small.prepare(turn).tokens < large.prepare(turn).tokens
    assert small.identity != large.identity
    assert small.weights_hash == large.weights_hash
    with pytest.raises(ValueError, match="max_pixels"):
        load_chat(folder("qwen2_vl"), LoadOptions(options={"max_pixels": "many"}))


def test_it_keeps_the_contract() -> None:
    assert isinstance(chat_of("qwen2_vl"), ChatModel)
