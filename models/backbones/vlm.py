"""Vision-language models that answer turns: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, InternVL.

:class:`LocalChat` computes nothing twice. An image passes the vision tower once; the beginning of a turn up to its last
image (instruction and first image, or whatever the template has there) once, its keys and values are kept; each turn
then costs its own end. Both are exact: image tokens do not see the text, and attention is causal. Forwards have a fixed
number of rows, so that the bits of an answer do not depend on its neighbours; ends are padded on the right to a few
lengths, which a causal model does not see.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from models.backbones.vlm_families import Picture, deeper_layers, encode, only_at
from models.backbones.vlm_independent import additive, visible
from models.backbones.vlm_inputs import LocalTurn, Preparation
from models.base import LoadOptions, ModelError, SampleError
from models.judge import Answer, FeatureStore, Generation, Turn, WordScores
from models.towers import alike

LENGTH_STEP = 8
"""Ends of turns are padded to multiples of it."""


class NoStore:
    """Keeps nothing."""

    def get(self, key: Hashable) -> Tensor | None:
        return None

    def put(self, key: Hashable, feature: Tensor) -> None:
        pass


class LocalChat:
    """A chat model on this machine; see :class:`models.judge.ChatModel`. Only ``prepare`` is for several threads."""

    uses_device = True

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        weights_hash: str = "",
        identity: str = "",
        max_tokens: int = 32768,
        share_features: bool = True,
        share_prefixes: bool = True,
        rows: int = 8,
    ) -> None:
        """``model``: a transformers model for image-text-to-text in evaluation mode. With ``share_features`` and
        ``share_prefixes`` off and one row it computes every turn whole and alone: the naive way, for comparison."""
        self.model, self.processor = model, processor
        self.weights_hash, self.identity = weights_hash, f"{identity}|{model.config.model_type}"
        self.share_features, self.share_prefixes, self.rows = share_features, share_prefixes, rows
        self.on_step: Callable[[], None] = lambda: None
        self.preparation = Preparation(model, processor, max_tokens)
        self._features: FeatureStore = NoStore()
        self._prefixes: FeatureStore = NoStore()
        self._spellings: dict[str, tuple[int, ...]] = {}
        self._deep = deeper_layers(model)
        self._float32: LocalChat | None = None

    @classmethod
    def load(cls, folder: Path, options: LoadOptions) -> LocalChat:
        """The model of a folder; see :func:`models.backbones.vlm_loading.load_chat`."""
        from models.backbones.vlm_loading import load_chat

        return load_chat(folder, options)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def attach(self, *, features: FeatureStore, prefixes: FeatureStore, rows: int, on_step: Callable[[], None]) -> None:
        self._features, self._prefixes, self.rows, self.on_step = features, prefixes, rows, on_step

    def prepare(self, turn: Turn) -> LocalTurn:
        return self.preparation.prepare(turn)

    def spellings(self, word: str) -> tuple[int, ...]:
        """Tokens that say ``word``: in lower case, capitalised and in capitals, with and without a blank before it.

        Raises ValueError for a word that is no single token in any spelling.
        """
        if word not in self._spellings:
            forms = {
                blank + form for form in (word, word.lower(), word.capitalize(), word.upper()) for blank in ("", " ")
            }
            tokens = [self.preparation.encode(form) for form in sorted(forms)]
            single = tuple(sorted({ids[0] for ids in tokens if len(ids) == 1}))
            if not single:
                raise ValueError(f"{word!r} is no single token of this judge: it cannot be scored by its first token")
            self._spellings[word] = single
        return self._spellings[word]

    @torch.inference_mode()
    def score(self, turns: Sequence[LocalTurn], words: Sequence[str]) -> list[WordScores | SampleError]:
        """Log-probabilities over the whole vocabulary, in float32.

        A turn whose logits are no numbers is a :class:`ModelError` with code "not_finite". Raises ValueError as
        :meth:`spellings`.
        """
        spellings = [self.spellings(word) for word in words]
        scores: list[WordScores | SampleError | None] = [None] * len(turns)
        for places, logits_RV in self._last_logits(turns):
            log_probs = logits_RV.float().log_softmax(-1)
            columns = torch.stack([log_probs[:, list(ids)].logsumexp(-1) for ids in spellings], dim=-1).tolist()
            for place, row in zip(places, columns, strict=False):
                scores[place] = _word_scores(row)
        return [score for score in scores if score is not None]

    def generate(self, turns: Sequence[LocalTurn], how: Generation) -> list[list[Answer] | SampleError]:
        from models.backbones.vlm_generation import generate

        return generate(self, turns, how)

    def score_gradient(self, turn: Turn, words: Sequence[str]) -> tuple[WordScores, Tensor]:
        from models.backbones.vlm_gradient import score_gradient

        return score_gradient(self, turn, words)

    def in_float32(self) -> LocalChat:
        """The same network in float32 (a copy that is made once where it computes in another), which shares nothing:
        for gradients."""
        if self._float32 is None:
            model = self.model if self.dtype == torch.float32 else copy.deepcopy(self.model).float()
            self._float32 = LocalChat(model, self.processor, share_features=False, share_prefixes=False, rows=1)
        return self._float32

    # -- vision -------------------------------------------------------------------------------------------------------

    def features(self, turns: Sequence[LocalTurn]) -> dict[str, Tensor]:
        """Tokens of every picture of the turns, [K, N, D] by digest: K - 1 is the number of deeper layers that the
        language model is given them too (Qwen3-VL), else K is 1."""
        wanted = {picture.digest: picture for turn in turns for picture in turn.pictures}
        found: dict[str, Tensor] = {}
        for digest, picture in wanted.items():
            kept = self._features.get(self._key(digest)) if self.share_features else None
            if kept is None:
                kept = self.encode(picture)
                if self.share_features:
                    self._features.put(self._key(digest), kept)
            found[digest] = kept
        return found

    def _key(self, digest: str) -> Hashable:
        return ("picture", self.weights_hash, self.identity, self.dtype, digest)

    def encode(self, picture: Picture) -> Tensor:
        """One picture through the vision tower: alone, since in bfloat16 its bits move with the batch."""
        return encode(self.model, picture.pixels.to(self.device), picture)

    # -- language -----------------------------------------------------------------------------------------------------

    def embed(
        self, turn: LocalTurn, features: dict[str, Tensor], start: int, stop: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the tokens start to stop: embeddings [L, D], which of them are of pictures [L], and the deeper features of
        those [K - 1, n, D]."""
        ids = turn.ids.to(self.device)
        visual_L = self.visual(turn.ids).to(self.device)
        embeddings: Tensor = self.model.get_input_embeddings()(ids[start:stop])
        before, inside = int(visual_L[:start].sum()), int(visual_L[start:stop].sum())
        if not inside:
            return embeddings, visual_L[start:stop], embeddings.new_zeros(self._deep, 0, embeddings.shape[-1])
        tokens = torch.cat([features[picture.digest] for picture in turn.pictures], dim=1)[:, before : before + inside]
        embeddings = embeddings.masked_scatter(visual_L[start:stop, None], tokens[0].to(embeddings.dtype))
        return embeddings, visual_L[start:stop], tokens[1:]

    def visual(self, ids_L: Tensor) -> Tensor:
        """Which tokens stand for pictures."""
        video = getattr(self.processor, "video_token_id", None)
        image: Tensor = ids_L == self.processor.image_token_id
        return image if video is None else image | (ids_L == video)

    def forward(
        self,
        embeddings_BLD: Tensor,
        positions_BPL: Tensor,
        cache: Any,
        *,
        seen: Tensor | None = None,
        visual: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Rows of equal length through the language model: states [B, L, D].

        ``cache`` holds what comes before, of which a row sees ``seen`` bool [B, K], or each of its tokens [B, L, K],
        itself included (None: all, in causal order). ``visual``: which tokens are of pictures [B, L], and their deeper
        features [K - 1, n, D].
        """
        positions = positions_BPL.to(self.device)
        given: dict[str, Any] = {
            "position_ids": positions.transpose(0, 1) if positions.shape[1] == 3 else positions[:, 0]
        }
        if seen is not None:
            hidden = additive(seen, embeddings_BLD.dtype)
            given["attention_mask"] = hidden[:, None] if seen.ndim == 3 else hidden[:, None, None]
        if visual is not None and self._deep and visual[1].numel():
            given["visual_pos_masks"], given["deepstack_visual_embeds"] = visual[0], list(visual[1].unbind(0))
        out = self.model.model.language_model(
            inputs_embeds=embeddings_BLD, past_key_values=cache, use_cache=cache is not None, **given
        )
        states: Tensor = out.last_hidden_state
        return states

    def new_cache(self) -> Any:
        """An empty cache of keys and values; the library's types fit no use of it."""
        return DynamicCache(config=self.model.config.get_text_config())

    def prefixes(
        self, turns: Sequence[LocalTurn], features: dict[str, Tensor], known: dict[Hashable, Tensor]
    ) -> dict[Hashable, Tensor]:
        """Keys and values of the turns' beginnings, [layers, 2, heads, cut, D]. ``known``, those of the rows before,
        are used and let go of: only the store keeps more than one forward needs."""
        found: dict[Hashable, Tensor] = {}
        for turn in turns:
            if self.cut(turn) and turn.prefix not in found:
                kept = known.get(turn.prefix)
                found[turn.prefix] = self._prefix(turn, features) if kept is None else kept
        return found

    def _prefix(self, turn: LocalTurn, features: dict[str, Tensor]) -> Tensor:
        if not turn.blocks:
            return self._piece(turn, features, turn.prefix, 0, turn.cut)
        head = self._piece(turn, features, turn.blocks[0].head, 0, turn.blocks[0].start)
        own = [self._piece(turn, features, each.name, each.start, each.stop, head) for each in turn.blocks]
        return torch.cat([head, *own], dim=3)

    def _piece(
        self,
        turn: LocalTurn,
        features: dict[str, Tensor],
        name: Hashable,
        start: int,
        stop: int,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Keys and values of the tokens start to stop, kept under ``name``; ``seen`` are those of what they see."""
        key = ("prefix", self.weights_hash, self.identity, self.dtype, name)
        kept = self._prefixes.get(key)
        if kept is None:
            cache = self.new_cache() if seen is None else self.cache_of([seen])
            embeddings, visual, deeper = self.embed(turn, features, start, stop)
            place = turn.positions[None, :, start:stop]
            with only_at(self.model.model.language_model.layers[-1], None):
                self.forward(embeddings[None], place, cache, visual=(visual[None], deeper))
            before = 0 if seen is None else seen.shape[3]
            layers = [torch.stack([layer.keys[0], layer.values[0]])[:, :, before:] for layer in cache.layers]
            kept = torch.stack(layers)
            self._prefixes.put(key, kept)
        return kept

    def cut(self, turn: LocalTurn) -> int:
        """Tokens of the turn that are computed apart and shared."""
        return turn.cut if self.share_prefixes else 0

    def cache_of(self, prefixes: Sequence[Tensor]) -> Any:
        """Beginnings of equal length, a row each."""
        cache = self.new_cache()
        if all(prefix is prefixes[0] for prefix in prefixes):
            stacked = prefixes[0][:, :, None].expand(-1, -1, len(prefixes), -1, -1, -1)
        else:
            stacked = torch.stack(list(prefixes), dim=2)
        for place, layer in enumerate(stacked):
            cache.update(layer[0], layer[1], place)
        return cache

    @property
    def _step(self) -> int:
        return LENGTH_STEP if self.share_prefixes else 1

    def rows_of(self, turns: Sequence[LocalTurn]) -> list[list[int]]:
        """Places of turns that share a forward: equal beginnings' lengths, and ends of one padded length."""
        keys = {i: (self.cut(turn), -(-(turn.tokens - self.cut(turn)) // self._step)) for i, turn in enumerate(turns)}
        return [same[start : start + self.rows] for same in alike(keys) for start in range(0, len(same), self.rows)]

    def _last_logits(self, turns: Sequence[LocalTurn]) -> Iterator[tuple[list[int], Tensor]]:
        """(places, logits [rows, V] at the last token), the rows beyond the places being padding."""
        features = self.features(turns) if self.share_features else {}
        prefixes: dict[Hashable, Tensor] = {}
        for places in self.rows_of(turns):
            chosen = [turns[place] for place in places]
            own = features if self.share_features else self.features(chosen)
            prefixes = self.prefixes(chosen, own, prefixes)
            padded = [*chosen, *[chosen[-1]] * (self.rows - len(chosen))]
            states_BD, _, _ = self.read(padded, own, prefixes, keep=False)
            yield places, self.model.lm_head(states_BD)

    def read(
        self, turns: Sequence[LocalTurn], features: dict[str, Tensor], prefixes: dict[Hashable, Tensor], *, keep: bool
    ) -> tuple[Tensor, Any, int]:
        """Turns that share a forward: the states [B, D] at their last tokens, the cache of all their keys and values
        (with ``keep``), and its length; a row's own tokens are the first in it, padding follows."""
        cut = self.cut(turns[0])
        cache = self.cache_of([prefixes[turn.prefix] for turn in turns]) if cut else self.new_cache() if keep else None
        length = -(-(turns[0].tokens - cut) // self._step) * self._step
        embeddings, visual, deeper, positions, last = [], [], [], [], []
        for turn in turns:
            own, which, deep = self.embed(turn, features, cut, turn.tokens)
            short = length - len(own)
            place = turn.positions[:, cut:]
            embeddings.append(F.pad(own, (0, 0, 0, short)))
            visual.append(F.pad(which, (0, short)))
            deeper.append(deep)
            positions.append(torch.cat([place, place[:, -1:].expand(-1, short)], dim=1))
            last.append(len(own) - 1)
        rows = torch.arange(len(turns), device=self.device), torch.tensor(last, device=self.device)
        # With a cut the blocks are in the cache already, and what follows them sees all of it.
        apart = not cut and any(turn.blocks for turn in turns)
        seen = torch.stack([visible(length, turn.blocks) for turn in turns]) if apart else None
        with only_at(self.model.model.language_model.layers[-1], rows):
            states = self.forward(
                torch.stack(embeddings),
                torch.stack(positions),
                cache,
                seen=None if seen is None else seen.to(self.device),
                visual=(torch.stack(visual), torch.cat(deeper, dim=1)),
            )
        return states[rows], cache, cut + length


def _word_scores(log_probs: list[float]) -> WordScores | SampleError:
    if any(math.isnan(value) for value in log_probs):
        return ModelError("the judge's logits are not finite numbers", code="not_finite")
    return WordScores(tuple(log_probs))
