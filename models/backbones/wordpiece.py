"""The tokenizer of BERT (bert-base-uncased) with BLIP's two extra tokens: text to WordPiece ids.

The vocabulary file is Google's, released with BERT (Devlin et al. 2018) under Apache-2.0: 30,522 pieces, one a line.
BLIP adds ``[DEC]`` and ``[ENC]`` behind it. Like the published tokenizer this one reads "[SEP]" or "[ENC]" in a prompt
as that very token, in exactly this spelling.

Compared with the Python BertTokenizer of transformers 4.45, which the published model used: 20,000 random mixtures of
words, accents, emoji and special tokens gave equal ids. Of single characters 759 differ, all of rare scripts, most of
them younger than the Unicode tables of one of the two libraries; so do code points that Unicode has not assigned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from torch import Tensor

VOCABULARY = Path(__file__).with_name("bert_vocab.txt")
BLIP_TOKENS = ("[DEC]", "[ENC]")
VOCABULARY_SIZE = 30_524
CLS, SEP, PAD = 101, 102, 0

_CONTROL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *BLIP_TOKENS)


@cache
def tokenizer() -> Tokenizer:
    """BERT's uncased WordPiece; of words over 100 characters it makes ``[UNK]``."""
    pieces = WordPiece.read_file(str(VOCABULARY))
    made = Tokenizer(WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(list(_CONTROL_TOKENS))  # those that the file lacks get the next ids: 30522 and 30523
    return made


def tokenize(prompt: str, lengths: Sequence[int]) -> tuple[Tensor, bool]:
    """Token ids int64 [L]: ``[CLS]``, pieces, ``[SEP]``, pads; and whether the prompt was truncated.

    L is the smallest of ``lengths`` (ascending) that holds them all, otherwise the largest one with ``[SEP]`` kept in
    last place. Where the text ends tells only :func:`lengths_of`: a prompt may hold "[SEP]" and "[PAD]" itself.
    """
    # Halves of surrogate pairs cannot be encoded; the published tokenizer drops them too.
    text = prompt.encode("utf-8", "ignore").decode("utf-8")
    pieces: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    ids = [CLS, *pieces[: lengths[-1] - 2], SEP]
    length = next(length for length in lengths if length >= len(ids))
    padded = torch.full((length,), PAD, dtype=torch.int64)
    padded[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded, len(pieces) > lengths[-1] - 2


def lengths_of(tokens_BL: Tensor) -> Tensor:
    """Number of tokens [B] up to and with the last ``[SEP]`` of each row, which ends it; behind it are pads alone."""
    places_L = torch.arange(1, tokens_BL.shape[-1] + 1, device=tokens_BL.device)
    return torch.where(tokens_BL == SEP, places_L, 0).amax(dim=-1)
