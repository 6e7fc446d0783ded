"""Hugging Face's CLIP tokenizer, from the vocabulary that ships with open_clip: nothing is downloaded.

It differs from open_clip's own (models.backbones.clip.tokenize) where text is not plain: Unicode is composed (NFC), but
broken encodings and HTML entities are left as they are, and "<|startoftext|>" and "<|endoftext|>" in a prompt are
control tokens: the text tower pools at the first end token, so the latter ends the text there. As in the published
files the start token is matched in any case, the end token in lower case only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor

from models.backbones import bpe
from models.backbones.clip import TEXT_LENGTHS
from models.base import InputError

START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer of transformers' CLIPTokenizerFast, without padding or truncation; safe to share by threads."""
    tables = bpe.tokenizer()
    spelled = {tables.sot_token_id: START, tables.eot_token_id: END}
    vocabulary = {spelled.get(number, piece): number for piece, number in tables.encoder.items()}
    merges = sorted(tables.bpe_ranks, key=lambda pair: tables.bpe_ranks[pair])
    clip = Tokenizer(BPE(vocabulary, merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    clip.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    clip.post_processor = processors.RobertaProcessing(
        (END, tables.eot_token_id), (START, tables.sot_token_id), trim_offsets=False, add_prefix_space=False
    )
    clip.add_special_tokens([AddedToken(START, special=True, normalized=True), AddedToken(END, special=True)])
    return clip


def tokenize(prompt: str, lengths: Sequence[int] = TEXT_LENGTHS) -> tuple[Tensor, bool]:
    """Token ids int64 [L]: start, tokens, end, zeros; and whether the prompt was truncated.

    L is the smallest of ``lengths`` (ascending) that holds them all, otherwise the largest one with the end token kept
    in last place. The reference pads with end tokens and masks them; the text tower never looks past the first one.
    Raises :class:`InputError` for a prompt that is not valid Unicode (half a surrogate pair).
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise InputError("the prompt is not valid Unicode", code="invalid_prompt") from exc
    ids = tokenizer().encode(prompt).ids
    longest = lengths[-1]
    truncated = len(ids) > longest
    if truncated:
        ids = [*ids[: longest - 1], ids[-1]]
    tokens = torch.zeros(next(length for length in lengths if length >= len(ids)), dtype=torch.int64)
    tokens[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return tokens, truncated
