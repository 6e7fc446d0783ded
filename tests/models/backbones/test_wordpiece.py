"""BERT's tokenizer: the reference's ids, the definition of WordPiece, and where a text ends."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.backbones.wordpiece import CLS, PAD, SEP, VOCABULARY, VOCABULARY_SIZE, lengths_of, tokenize, tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures" / "pointwise"
PROMPTS = json.loads((FIXTURES / "inputs.json").read_text("utf-8"))["prompts"]
REFERENCE = json.loads((FIXTURES / "imagereward_small.json").read_text("utf-8"))["prompts"]
LENGTHS = (12, 20, 35)
PIECES = VOCABULARY.read_text("utf-8").splitlines()
UNKNOWN = 100

texts = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from(["[SEP]", "[PAD]", "[CLS]", "[ENC]", "don't", "naïve", "1,000"])),
    max_size=40,
).map(" ".join)


def pieces_of(prompt: str) -> list[int]:
    ids, truncated = tokenize(prompt, (200,))
    assert not truncated
    return ids[1 : int(lengths_of(ids[None])) - 1].tolist()


@pytest.mark.parametrize("name", REFERENCE)
def test_ids_are_the_references(name: str) -> None:
    ids, _ = tokenize(PROMPTS[name], (35,))
    assert ids.tolist() == REFERENCE[name]["input_ids"]
    assert int(lengths_of(ids[None])) == sum(REFERENCE[name]["attention_mask"])


def test_vocabulary_is_googles_and_blips_two_tokens() -> None:
    assert len(PIECES) == len(set(PIECES)) == 30_522
    assert [PIECES[i] for i in (PAD, UNKNOWN, CLS, SEP)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    assert tokenizer().get_vocab_size() == VOCABULARY_SIZE
    assert [tokenizer().token_to_id(token) for token in ("[DEC]", "[ENC]")] == [30_522, 30_523]


def longest_match(word: str) -> list[str]:
    """WordPiece by its definition: the longest known piece at the start, then the rest as continuation."""
    known, pieces, start = set(PIECES), [], 0
    while start < len(word):
        mark = "##" if start else ""
        ends = [end for end in range(len(word), start, -1) if mark + word[start:end] in known]
        if not ends:
            return ["[UNK]"]
        pieces.append(mark + word[start : ends[0]])
        start = ends[0]
    return pieces


@given(st.lists(st.text("abdegilnorstuvyzä", min_size=1, max_size=14), min_size=1, max_size=8))
def test_words_are_split_by_the_longest_match(words: list[str]) -> None:
    expected = [piece for word in words for piece in longest_match(word.replace("ä", "a"))]
    assert [PIECES[i] for i in pieces_of(" ".join(words))] == expected


@given(texts)
def test_a_bucket_holds_what_the_longest_length_begins_with(prompt: str) -> None:
    ids, truncated = tokenize(prompt, LENGTHS)
    longest, also_truncated = tokenize(prompt, LENGTHS[-1:])
    length = len(ids)
    assert truncated == also_truncated
    assert ids.tolist() == longest[:length].tolist()
    assert set(longest[length:].tolist()) <= {PAD}
    used = int(lengths_of(ids[None]))
    assert used == int(lengths_of(longest[None]))
    assert length == min(bucket for bucket in LENGTHS if bucket >= used)
    assert (ids[0], ids[used - 1]) == (CLS, SEP)


def test_truncation_keeps_the_end_token_last() -> None:
    fits, truncated = tokenize("cat " * 33, LENGTHS)
    assert not truncated
    assert fits.tolist() == [CLS, *[PIECES.index("cat")] * 33, SEP]
    cut, truncated = tokenize("cat " * 33 + "dog", LENGTHS)
    assert truncated
    assert cut.tolist() == fits.tolist()


def test_empty_prompts_have_no_pieces() -> None:
    for prompt in ("", "  \t\n", "\u200b\x00"):
        ids, truncated = tokenize(prompt, LENGTHS)
        assert ids.tolist() == [CLS, SEP, *[PAD] * 10]
        assert not truncated


def test_case_and_accents_do_not_count_and_punctuation_stands_alone() -> None:
    assert pieces_of("ÉLÉGANT Naïve İstanbul") == pieces_of("elegant naive istanbul")
    assert [PIECES[i] for i in pieces_of("it's 3.5€,ok")] == ["it", "'", "s", "3", ".", "5", "##€", ",", "ok"]
    assert pieces_of("東京") == [PIECES.index("東"), PIECES.index("京")]


def test_overlong_words_are_unknown() -> None:
    assert pieces_of("a" * 101) == [UNKNOWN]
    assert UNKNOWN not in pieces_of("a" * 100)


def test_control_tokens_are_read_in_their_exact_spelling_only() -> None:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    assert pieces_of("".join(names)) == [0, 100, 101, 102, 103, 30_522, 30_523]
    assert [PIECES[i] for i in pieces_of("[sep] [ENC ]")] == ["[", "sep", "]", "[", "en", "##c", "]"]


def test_halves_of_surrogate_pairs_are_dropped() -> None:
    assert pieces_of("a\ud83d cat\udc00") == pieces_of("a cat")


def test_the_end_is_the_last_end_token_even_behind_literal_ones() -> None:
    prompts = ["", "a [SEP] b", "[PAD] [SEP] [PAD]", "[SEP][PAD][PAD]"]
    rows = torch.stack([tokenize(prompt, (12,))[0] for prompt in prompts])
    assert lengths_of(rows).tolist() == [2, 5, 5, 5]
    assert (rows[2] == PAD).sum() == 2 + 12 - 5
