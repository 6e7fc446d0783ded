"""Qwen2-VL's byte-level BPE tokenizer with the token ``<|Reward|>`` of a reward model, and small ones of its kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from models.base import InputError, WeightsError

IMAGE_TOKEN, REWARD_TOKEN, PAD_TOKEN = "<|image_pad|>", "<|Reward|>", "<|endoftext|>"
CONTROL_TOKENS = (
    PAD_TOKEN,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)

# How Qwen2's tokenizer cuts text into words before it merges bytes: contractions, words with the one character before
# them, single digits, runs of signs with the line breaks after them, line breaks, other white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class RewardTokenizer:
    """Text with one image placeholder and one reward token -> ids. May be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        """Adds the reward token unless the tokenizer has it; its id is the number of tokens before.

        ``name`` is named in the :class:`WeightsError` raised where a control token of Qwen2-VL is missing.
        """
        missing = [token for token in CONTROL_TOKENS if tokenizer.token_to_id(token) is None]
        if missing:
            raise WeightsError(f"the tokenizer {name} is not Qwen2-VL's: it lacks {', '.join(missing)}")
        tokenizer.add_special_tokens([AddedToken(REWARD_TOKEN, normalized=False, special=True)])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        tokens = (IMAGE_TOKEN, REWARD_TOKEN, PAD_TOKEN)
        self.image_id, self.reward_id, self.pad_id = (tokenizer.get_vocab()[token] for token in tokens)

    @classmethod
    def load(cls, path: Path) -> RewardTokenizer:
        """The tokenizer of a tokenizer.json; raises :class:`WeightsError` for a file that is missing or is none."""
        try:
            content = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise WeightsError(f"the tokenizer {path} cannot be read: give the path of a tokenizer.json") from exc
        try:
            tokenizer = Tokenizer.from_str(content)
        except Exception as exc:  # the library raises no narrower class
            raise WeightsError(f"the tokenizer {path} is damaged or not a tokenizer.json: fetch it again") from exc
        return cls(tokenizer, str(path))

    def encode(self, text: str) -> list[int]:
        """Ids up to and with the reward token; what follows it cannot matter to a causal model.

        Raises :class:`InputError`: "invalid_unicode" for text that is not Unicode (lone surrogates), "reserved_token"
        for text with more than the one placeholder and the one reward token.
        """
        ids = self.encode_all(text)
        if ids.count(self.image_id) != 1 or ids.count(self.reward_id) != 1:
            raise InputError(
                f"the prompt holds {IMAGE_TOKEN} or {REWARD_TOKEN}, which stand for the image and the score",
                code="reserved_token",
            )
        return ids[: ids.index(self.reward_id) + 1]

    def encode_all(self, text: str) -> list[int]:
        """Ids of the whole text; raises :class:`InputError` ("invalid_unicode")."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise InputError("the prompt holds characters that are not valid Unicode", code="invalid_unicode") from exc
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of Qwen2-VL's kind: at most ``vocabulary`` tokens learned from ``texts``, and its control tokens.

    Every byte is a token, so it reads any text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    return tokenizer
