"""Turns whose pictures do not see each other: cached against whole, against the meaning of the words, and the laws."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.backbones.vlm import LocalChat
from models.backbones.vlm_families import Picture
from models.backbones.vlm_independent import Block, place_blocks, split_blocks, visible
from models.backbones.vlm_loading import Family
from models.judge import Generation, Turn
from tests.models.backbones.vlm_chats import NAMES, TOLERANCE, WORDS, candidates, fresh, naive, table

TEXT = "Text Caption: [a red circle] Is image 2 better? Image 1: "


def apart(first: int, second: int, text: str = TEXT) -> Turn:
    pictures = candidates()
    return Turn((text, pictures[first], " Image 2: ", pictures[second], " Answer yes or no."), independent=True)


def pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(count) if i != j]


@pytest.mark.parametrize("family", NAMES)
def test_cached_blocks_give_what_one_masked_forward_gives(family: Family) -> None:
    chat, _, _ = fresh(family)
    turns = [apart(i, j, f"Caption {'x ' * i}. {TEXT}") for i, j in pairs(5)]
    cached = table(chat.score([chat.prepare(turn) for turn in turns], WORDS))
    plain = naive(family)
    alone = table(plain.score([plain.prepare(turn) for turn in turns], WORDS))
    assert alone.std(0).min() > 0.1  # answers do differ
    assert float((cached - alone).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("family", NAMES)
def test_images_that_see_each_other_get_another_answer(family: Family) -> None:
    """Else the tests above would hold for a flag that does nothing."""
    chat, _, _ = fresh(family)
    turns = [apart(i, j) for i, j in pairs(3)]
    independent = table(chat.score([chat.prepare(turn) for turn in turns], WORDS))
    usual = table(chat.score([chat.prepare(replace(turn, independent=False)) for turn in turns], WORDS))
    assert float((independent - usual).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("family", NAMES)
def test_each_image_is_read_once_in_each_place(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _, prefixes = fresh(family)
    encoded: list[str] = []
    encode = LocalChat.encode

    def counted(self: LocalChat, picture: Picture) -> torch.Tensor:
        encoded.append(picture.digest)
        return encode(self, picture)

    monkeypatch.setattr(LocalChat, "encode", counted)
    turns = [chat.prepare(apart(i, j)) for i, j in pairs(4)]
    chat.score(turns, WORDS)
    # The head, and four images in two places; images 0 to 3 are different ones.
    assert len(prefixes) == 1 + 2 * 4
    assert sorted(encoded) == sorted({picture.digest for turn in turns for picture in turn.pictures})
    before = prefixes.misses
    chat.score(turns, WORDS)
    assert prefixes.misses == before


@pytest.mark.parametrize("family", NAMES)
def test_a_block_does_not_depend_on_the_other_picture(family: Family) -> None:
    chat, _, _ = fresh(family)
    small, large = chat.prepare(apart(0, 1)), chat.prepare(apart(0, 2))
    assert small.blocks[0].name == large.blocks[0].name
    one, other = chat.prepare(apart(0, 3)), chat.prepare(apart(2, 3))
    assert one.blocks[1].name == other.blocks[1].name
    columns = [turn.positions[:, b.start : b.stop] for turn, b in ((one, one.blocks[1]), (other, other.blocks[1]))]
    assert columns[0].equal(columns[1])


@pytest.mark.parametrize("family", NAMES)
def test_written_answers_go_on_from_cached_blocks_as_from_whole_turns(family: Family) -> None:
    chat, _, _ = fresh(family)
    plain = naive(family)
    turns, how = [apart(i, j) for i, j in pairs(3)], Generation(max_tokens=6)
    cached = chat.generate([chat.prepare(turn) for turn in turns], how)
    alone = plain.generate([plain.prepare(turn) for turn in turns], how)
    assert cached == alone
    assert len({answers[0].text for answers in cached if isinstance(answers, list)}) > 1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_gradient_is_that_of_the_masked_turn(family: Family) -> None:
    chat, _, _ = fresh(family)
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3))
    turn = apart(0, 2)
    parts = tuple(pixels if part is candidates()[0] else part for part in turn.parts)
    independent, gradient = chat.score_gradient(replace(turn, parts=parts), WORDS)
    usual, _ = chat.score_gradient(replace(turn, parts=parts, independent=False), WORDS)
    assert gradient.abs().max() > 0
    assert abs(independent.log_probs[0] - usual.log_probs[0]) > 100 * TOLERANCE
    step = 1e-2 * gradient / gradient.norm()
    higher, lower = (
        chat.score_gradient(
            replace(turn, parts=tuple(pixels + sign * step if part is pixels else part for part in parts)), WORDS
        )[0]
        for sign in (1, -1)
    )
    found = [torch.tensor(scores.log_probs, dtype=torch.float64).softmax(0)[0].item() for scores in (higher, lower)]
    assert (found[0] - found[1]) / 2 == pytest.approx(float((gradient * step).sum()), rel=0.1)


@given(
    head=st.integers(1, 5),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    between=st.integers(0, 3),
    tail=st.integers(1, 4),
)
def test_blocks_cover_all_between_head_and_tail(head: int, counts: list[int], between: int, tail: int) -> None:
    places, at = [], head
    for count in counts:
        places += range(at, at + count)
        at += count + between
    length = places[-1] + 1 + tail
    blocks = split_blocks(places, counts)
    assert blocks[0].start == head
    assert blocks[-1].stop == places[-1] + 1
    assert all(one.stop == other.start for one, other in itertools.pairwise(blocks))
    seen = visible(length, blocks)
    for token in range(length):
        own = next((block for block in blocks if block.start <= token < block.stop), None)
        first = own.start if own else head
        expected = [*range(head), *range(first, token + 1)] if token >= head else list(range(token + 1))
        assert seen[token].nonzero().flatten().tolist() == expected


def test_every_block_goes_on_from_the_head_and_the_tail_from_the_largest() -> None:
    blocks = (Block(2, 5), Block(5, 10))
    found = place_blocks(torch.arange(12), blocks, lambda ids, _: torch.arange(len(ids))[None])
    assert found.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8]]
