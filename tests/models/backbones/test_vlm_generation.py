"""Answers in words against transformers' own generate()."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from models.backbones.vlm import LocalChat
from models.backbones.vlm_inputs import LocalTurn
from models.backbones.vlm_loading import Family
from models.base import Candidate, ModelError
from models.judge import Answer, Generation, Turn
from tests.models.backbones.vlm_chats import NAMES, WORDS, fresh, library_inputs, library_logits, question


def answers(chat: LocalChat, turns: Sequence[LocalTurn], how: Generation) -> list[list[Answer]]:
    found = []
    for written in chat.generate(turns, how):
        assert isinstance(written, list)
        found.append(written)
    return found


def library_answer(chat: LocalChat, turn: Turn, max_tokens: int) -> str:
    pictures = [part.image for part in turn.parts if isinstance(part, Candidate)]
    inputs = library_inputs(chat, turn, pictures)
    written = chat.model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
    text: str = chat.processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("family", NAMES)
def test_turns_of_several_lengths_are_answered_as_transformers_answers_each(family: Family) -> None:
    chat, _, _ = fresh(family)
    turns = [question(0, 1, f"Caption {'x ' * i}: which?") for i in range(6)] + [question(2, 3), question(0, 4)]
    prepared = [chat.prepare(turn) for turn in turns]
    assert max(map(len, chat.rows_of(prepared))) > 1
    written = answers(chat, prepared, Generation(12))
    assert [texts[0].text for texts in written] == [library_answer(chat, turn, 12) for turn in turns]


@pytest.mark.parametrize("family", NAMES)
def test_other_work_between_the_tokens_changes_nothing(family: Family) -> None:
    chat, features, prefixes = fresh(family)
    turn, other = chat.prepare(question(0, 1)), chat.prepare(question(2, 0))
    alone, score = chat.generate([turn], Generation(6)), chat.score([other], WORDS)
    seen = []
    chat.attach(
        features=features, prefixes=prefixes, rows=4, on_step=lambda: seen.append(chat.score([other], WORDS) == score)
    )
    assert chat.generate([turn], Generation(6)) == alone
    assert seen == [True] * 5


def test_there_is_room_for_other_work_after_every_forward_but_the_last() -> None:
    chat, features, prefixes = fresh("qwen2_vl")
    steps: list[int] = []
    chat.attach(features=features, prefixes=prefixes, rows=4, on_step=lambda: steps.append(1))
    turns = [chat.prepare(question(0, 1)), chat.prepare(question(2, 3))]
    assert chat.rows_of(turns) == [[0], [1]]
    chat.generate(turns, Generation(6))
    assert len(steps) == 5 + 1 + 5


def test_sampled_answers_follow_their_seed_and_not_their_neighbours() -> None:
    chat, _, _ = fresh("qwen2_vl")
    how = Generation(8, temperature=1.0, samples=3, seed=5)
    turns = [chat.prepare(question(0, 1, "Which" + " x" * i)) for i in range(3)] + [chat.prepare(question(2, 3))]
    together = answers(chat, turns, how)
    assert [answers(chat, [turn], how)[0] for turn in turns] == together
    assert answers(chat, turns[::-1], how) == together[::-1]
    assert answers(chat, turns, replace(how, seed=6)) != together
    assert len({answer.text for answer in together[0]}) > 1
    assert len({answer.text for written in together for answer in written}) > 4


def test_samples_are_drawn_from_the_model_at_its_temperature() -> None:
    chat, _, _ = fresh("qwen2_vl", rows=64)
    turn, draws, temperature = question(0, 1), 640, 0.5
    probs = (library_logits(chat, turn) / temperature).softmax(-1)
    likely = int(probs.argmax())
    expected = float(probs[likely])
    [written] = answers(chat, [chat.prepare(turn)], Generation(1, temperature=temperature, samples=draws))
    share = sum(answer.text == chat.processor.tokenizer.decode([likely]) for answer in written) / draws
    assert 0.02 < expected < 0.98
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_a_temperature_near_zero_is_greedy() -> None:
    chat, _, _ = fresh("qwen2_vl")
    turn = chat.prepare(question(0, 1))
    cold = answers(chat, [turn], Generation(8, temperature=1e-30))
    assert cold == answers(chat, [turn], Generation(8))


def test_answers_end_at_a_stop_text_and_say_when_they_were_cut_off() -> None:
    chat, _, _ = fresh("qwen2_vl")
    turn = chat.prepare(question(0, 1))
    [[whole]] = answers(chat, [turn], Generation(20))
    assert not whole.finished
    stop = whole.text[3:6]
    [[cut]] = answers(chat, [turn], Generation(20, stop=(stop, "never said")))
    assert cut.finished
    assert cut.text == whole.text[: whole.text.index(stop) + len(stop)]


def test_an_answer_ends_at_the_checkpoints_own_end_and_its_neighbours_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _, _ = fresh("qwen2_vl")
    turns = [chat.prepare(question(0, 1)), chat.prepare(question(2, 3))]
    whole = [written[0].text for written in answers(chat, turns, Generation(10))]
    tokens = chat.processor.tokenizer(whole[0], add_special_tokens=False).input_ids
    end = next(token for token in tokens if token not in chat.processor.tokenizer(whole[1]).input_ids)
    monkeypatch.setattr(chat.model.generation_config, "eos_token_id", [end])
    first, second = (written[0] for written in answers(chat, turns, Generation(10)))
    assert first.finished
    assert len(first.text) < len(whole[0])
    assert second == Answer(whole[1], finished=False)


def test_logits_that_are_no_numbers_fail_their_own_turn_alone() -> None:
    chat, features, _ = fresh("qwen2_vl")
    turns = [chat.prepare(question(i, j)) for i, j in ((0, 1), (0, 3), (1, 0))]
    for how in (Generation(4), Generation(4, temperature=1.0, samples=2)):
        chat, features, _ = fresh("qwen2_vl")
        healthy = chat.generate(turns, how)
        chat, features, _ = fresh("qwen2_vl")
        chat.features(turns[1:2])
        [damaged] = [key for key in features if turns[1].pictures[1].digest in key]
        features[damaged] = torch.full_like(features[damaged], float("nan"))
        written = chat.generate(turns, how)
        assert isinstance(written[1], ModelError)
        assert [written[0], written[2]] == [healthy[0], healthy[2]]
