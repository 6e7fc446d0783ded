"""Token ids are those of transformers' CLIP tokenizer, in the smallest bucket."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from models.backbones import bpe
from models.backbones.clip import TEXT_LENGTHS
from models.backbones.clip import tokenize as tokenize_open_clip
from models.backbones.clip_tokenizer import END, START, tokenize
from models.base import InputError
from tests.models.clip_checkpoints import prompt, read

START_ID, END_ID = 49406, 49407
PROMPTS = sorted(read("inputs.json")["prompts"])


@pytest.fixture(scope="module")
def reference() -> CLIPTokenizer:
    tables = bpe.tokenizer()
    spelled = {START_ID: START, END_ID: END}
    vocabulary = {spelled.get(number, piece): number for piece, number in tables.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(tables.bpe_ranks), model_max_length=77)


@pytest.mark.parametrize("oracle", ["pickscore_small.json", "clipscore_small.json"])
@pytest.mark.parametrize("key", PROMPTS)
def test_ids_are_the_references(key: str, oracle: str) -> None:
    expected = read(oracle)["prompts"][key]
    ids = [number for number, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True) if mask]
    tokens, truncated = tokenize(prompt(key))
    assert tokens[: len(ids)].tolist() == ids
    assert not tokens[len(ids) :].any()
    assert len(tokens) == min(length for length in TEXT_LENGTHS if length >= len(ids))
    assert truncated == (key == "long")


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=150))
def test_ids_are_those_of_transformers_for_any_text(reference: CLIPTokenizer, text: str) -> None:
    assume("<|" not in text)  # transformers 5 splits control tokens of upper case otherwise than the published file
    tokens, truncated = tokenize(text)
    expected = reference(text, truncation=True, max_length=77)["input_ids"]
    assert tokens[: len(expected)].tolist() == expected
    assert truncated == (len(reference(text)["input_ids"]) > 77)


def test_it_is_not_open_clips_where_text_is_not_plain() -> None:
    for text in ("caf\u00e9 \uff21\uff22\uff23", "&amp;"):
        assert tokenize(text)[0].tolist() != tokenize_open_clip(text)[0].tolist()
    plain = "A red circle, left of 3 squares!"
    assert tokenize(plain)[0].tolist() == tokenize_open_clip(plain)[0].tolist()


def test_composed_and_decomposed_accents_are_the_same_text() -> None:
    assert tokenize("caf\u00e9")[0].tolist() == tokenize("cafe\u0301")[0].tolist()


def test_control_tokens_are_literal() -> None:
    tokens, _ = tokenize(f"a cat {END} a dog {START}")
    assert tokens.tolist().count(END_ID) == 2
    assert tokens.tolist().count(START_ID) == 2


@pytest.mark.parametrize("words", [75, 76, 5000])
def test_truncation_keeps_the_end_token_last(words: int) -> None:
    tokens, truncated = tokenize("cat " * words)
    assert len(tokens) == 77
    assert tokens[0] == START_ID
    assert tokens[-1] == END_ID
    assert tokens.tolist().count(END_ID) == 1
    assert truncated == (words > 75)


@pytest.mark.parametrize(("words", "length"), [(0, 16), (14, 16), (15, 32), (30, 32), (31, 77)])
def test_bucket_holds_start_and_end(words: int, length: int) -> None:
    tokens, truncated = tokenize("cat " * words)
    assert len(tokens) == length
    assert tokens[words + 1] == END_ID
    assert not truncated


def test_half_a_surrogate_pair_is_a_typed_error() -> None:
    with pytest.raises(InputError, match="Unicode") as error:
        tokenize("a \ud800 cat")
    assert error.value.code == "invalid_prompt"


def test_a_word_of_16000_letters_is_cut_like_open_clips() -> None:
    word = "qzabc" * 3200
    tokens, truncated = tokenize(word)
    assert truncated
    assert tokens.tolist() == tokenize_open_clip(word)[0].tolist()
