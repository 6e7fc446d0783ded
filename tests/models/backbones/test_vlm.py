"""Scores of LocalChat against transformers itself, on tiny random models of the five families' true classes."""

import pytest
import torch
from torch import Tensor

from models.backbones.vlm import LocalChat
from models.backbones.vlm_families import Picture
from models.backbones.vlm_loading import Family
from models.base import ModelError
from models.judge import ChatModel, Turn, WordScores
from tests.models.backbones.vlm_chats import (
    NAMES,
    TOLERANCE,
    WORDS,
    candidates,
    chat_of,
    fresh,
    library_logits,
    naive,
    question,
    table,
    word_scores,
)


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
    first, second, third = candidates()[:3]
    turns = [
        question(0, 2),
        question(3, 0),
        Turn((third, "How good is it?")),
        Turn(("Which is better?", first, "or", second, third), system="You are a judge.", reply="Answer: "),
        Turn(("Without an image: yes or no?",)),
    ]
    together = table(chat.score([chat.prepare(turn) for turn in turns], WORDS)).tolist()
    for turn, found in zip(turns, together, strict=True):
        assert found == pytest.approx(word_scores(chat, library_logits(chat, turn)), abs=TOLERANCE)


@pytest.mark.parametrize("family", NAMES)
def test_rows_of_unlike_turns_may_share_a_forward(family: Family) -> None:
    """Whole turns, of which some have an image and some have none."""
    shared = chat_of(family)
    chat = LocalChat(shared.model, shared.processor, share_features=False, share_prefixes=False, rows=2)
    seen = chat.prepare(Turn((candidates()[0], "yes or no?")))
    words = "yes or no?"
    while (unseen := chat.prepare(Turn((words,)))).tokens < seen.tokens:
        words += " no"
    assert chat.rows_of([seen, unseen]) == [[0, 1]]
    expected = [naive(family).score([turn], WORDS)[0] for turn in (seen, unseen)]
    assert float((table(chat.score([seen, unseen], WORDS)) - table(expected)).abs().max()) <= TOLERANCE


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", NAMES)
def test_an_answer_does_not_depend_on_its_neighbours(family: Family, dtype: torch.dtype) -> None:
    """Bit for bit, whatever stands beside it."""
    chat, _, _ = fresh(family, dtype=dtype)
    turns = [chat.prepare(question(i, j, "Caption " + "x " * i)) for i in range(3) for j in range(3) if i != j]
    together = chat.score(turns, WORDS)
    assert [chat.score([turn], WORDS)[0] for turn in turns] == together
    assert chat.score(turns[::-1], WORDS) == together[::-1]


@pytest.mark.parametrize("family", NAMES)
def test_bfloat16_is_near_float32(family: Family) -> None:
    """Measured on these random models: 0.004 (Qwen2.5-VL) to 0.019 (InternVL) of a probability at most."""
    chat, _, _ = fresh(family, dtype=torch.bfloat16)
    turns = [question(i, j) for i in range(4) for j in range(4) if i != j]
    exact, plain = naive(family), naive(family, torch.bfloat16)
    full = table(exact.score([exact.prepare(turn) for turn in turns], WORDS)).softmax(-1)[:, 0]
    cached = table(chat.score([chat.prepare(turn) for turn in turns], WORDS)).softmax(-1)[:, 0]
    alone = table(plain.score([plain.prepare(turn) for turn in turns], WORDS)).softmax(-1)[:, 0]
    assert float((cached - full).abs().max()) < 0.04
    assert float((cached - alone).abs().max()) < 0.04


def test_logits_that_are_no_numbers_fail_their_own_turn_alone() -> None:
    chat, features, _ = fresh("qwen2_vl")
    turns = [chat.prepare(question(i, j)) for i, j in ((0, 1), (0, 2), (1, 0), (3, 1))]
    healthy = chat.score(turns, WORDS)
    chat, features, _ = fresh("qwen2_vl")
    chat.features(turns[1:2])
    [damaged] = [key for key in features if turns[1].pictures[1].digest in key]
    features[damaged] = torch.full_like(features[damaged], float("nan"))
    scores = chat.score(turns, WORDS)
    assert isinstance(scores[1], ModelError)
    assert scores[1].code == "not_finite"
    assert [scores[0], *scores[2:]] == [healthy[0], *healthy[2:]]


def test_a_word_is_scored_in_all_its_spellings_of_one_token() -> None:
    chat, _, _ = fresh("qwen2_vl")
    tokenizer = chat.processor.tokenizer
    assert {tokenizer.decode([token]) for token in chat.spellings("yes")} == {"yes", "Yes", " yes"}
    turn = chat.prepare(question(0, 1))
    [scores] = chat.score([turn], ("yes", "no"))
    assert isinstance(scores, WordScores)
    assert sum(torch.tensor(scores.log_probs).exp().tolist()) < 1
    with pytest.raises(ValueError, match="no single token"):
        chat.score([turn], ("supercalifragilistic",))


def test_no_turns_have_no_scores() -> None:
    assert fresh("qwen2_vl")[0].score([], WORDS) == []


def test_it_keeps_the_contract() -> None:
    assert isinstance(chat_of("qwen2_vl"), ChatModel)
