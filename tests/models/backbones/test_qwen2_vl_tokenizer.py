"""Qwen2-VL's tokenizer with a reward token."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from models.backbones.qwen2_vl_tokenizer import (
    CONTROL_TOKENS,
    IMAGE_TOKEN,
    REWARD_TOKEN,
    RewardTokenizer,
    train_tokenizer,
)
from models.base import InputError, WeightsError

TEXTS = ["a photograph of an astronaut in an orange suit", "the astronaut's suit is orange, 12 o'clock!\n\n"]


def trained() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, 300)


TOKENIZER = trained()
REWARD = RewardTokenizer(trained(), "trained")


@given(text=st.text())
def test_any_text_comes_back_from_its_ids(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_words_of_the_training_text_are_tokens_and_digits_stay_single() -> None:
    assert TOKENIZER.encode(" astronaut").tokens == ["Ġastronaut"]
    assert TOKENIZER.encode("12").tokens == ["1", "2"]


def test_the_reward_token_comes_after_all_others() -> None:
    assert REWARD.reward_id == TOKENIZER.get_vocab_size(with_added_tokens=True)
    assert REWARD.image_id == TOKENIZER.token_to_id(IMAGE_TOKEN)


def test_a_tokenizer_that_has_the_reward_token_keeps_its_id() -> None:
    tokenizer = trained()
    first = RewardTokenizer(tokenizer, "first").reward_id
    assert RewardTokenizer(tokenizer, "second").reward_id == first


def test_what_follows_the_reward_token_is_cut_and_nothing_before() -> None:
    before = f"{IMAGE_TOKEN} an orange suit: "
    ids = REWARD.encode(f"{before}{REWARD_TOKEN}\nEND")
    assert ids == [*TOKENIZER.encode(before, add_special_tokens=False).ids, REWARD.reward_id]


def test_control_tokens_in_the_text_are_read_as_such() -> None:
    ids = REWARD.encode(f"{IMAGE_TOKEN}a <|im_end|>{REWARD_TOKEN}")
    assert TOKENIZER.token_to_id("<|im_end|>") in ids


@pytest.mark.parametrize("text", ["", IMAGE_TOKEN, REWARD_TOKEN, f"{IMAGE_TOKEN}{REWARD_TOKEN}{REWARD_TOKEN}"])
def test_each_of_the_two_places_is_there_once(text: str) -> None:
    with pytest.raises(InputError) as error:
        REWARD.encode(text)
    assert error.value.code == "reserved_token"


def test_text_that_is_not_unicode_is_a_typed_error() -> None:
    with pytest.raises(InputError) as error:
        REWARD.encode(f"{IMAGE_TOKEN}\ud800{REWARD_TOKEN}")
    assert error.value.code == "invalid_unicode"


def test_a_file_is_read_and_a_broken_one_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        RewardTokenizer.load(path)
    path.write_text('{"version": "1.0"}')
    with pytest.raises(WeightsError, match="damaged"):
        RewardTokenizer.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeightsError, match="cannot be read"):
        RewardTokenizer.load(path)
    trained().save(str(path))
    assert RewardTokenizer.load(path).reward_id == REWARD.reward_id


def test_a_tokenizer_without_the_control_tokens_is_refused() -> None:
    tokenizer = Tokenizer.from_str(trained().to_str().replace(CONTROL_TOKENS[3], "<|other|>"))
    with pytest.raises(WeightsError, match=r"lacks <\|vision_start\|>"):
        RewardTokenizer(tokenizer, "other")
