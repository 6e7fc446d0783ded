"""Prompts of the judges: texts with named fields, kept byte for byte.

A template is *verified* when its text is the published one, proved by its sha256. What the papers describe in words
(understanding, video pairs, RewardDance, OneReward) is our best reading of them and is not verified: another text can
be given in a file, and is not verified either unless it is the published one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from models.base import InputError

FOLDER = Path(__file__).parent.parent / "prompts"
_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")


class TemplateError(ValueError):
    """A template that cannot be used: unknown, unreadable, or with other fields than it must have."""


class MissingField(InputError):
    """The template has a field that the item gives nothing for."""

    code = "template_field_missing"


class UnknownField(InputError):
    """Something is given that the template has no field for: it would be lost in silence."""

    code = "template_field_unknown"


@dataclass(frozen=True)
class Template:
    """A named text; ``fields`` are the names whose ``{placeholders}`` in it :meth:`fill` replaces, each at least once.

    Braces around anything but a lower-case name are text. ``source`` says where the text comes from, ``verified``
    whether it is known to be exact. Raises :class:`TemplateError` when fields and placeholders differ.
    """

    name: str
    text: str
    fields: frozenset[str]
    source: str
    verified: bool

    def __post_init__(self) -> None:
        found = set(_PLACEHOLDER.findall(self.text))
        if found != self.fields:
            # A misspelt placeholder would be sent to the judge as it stands.
            raise TemplateError(
                f"the template {self.name} has the fields {sorted(self.fields)}, and its text {sorted(found)}"
            )

    def fill(self, **values: str) -> str:
        """The text with all fields replaced at once: a placeholder inside a value stays as it is.

        Raises :class:`MissingField` or :class:`UnknownField`, naming the template and the fields.
        """
        self._check(values)
        return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), self.text)

    def _check(self, values: Mapping[str, str]) -> None:
        missing, unknown = sorted(self.fields - set(values)), sorted(set(values) - self.fields)
        if missing:
            raise MissingField(f"the template {self.name} needs {', '.join(missing)}")
        if unknown:
            raise UnknownField(f"the template {self.name} has no {', '.join(unknown)}")


@dataclass(frozen=True)
class _Published:
    """``sha256`` is that of the published text, "" where none is known."""

    fields: tuple[str, ...]
    source: str
    sha256: str = ""


_PROMPT = ("prompt",)
_UNIFIED_REWARD = "UnifiedReward's inference scripts"
_UNDERSTANDING = "our reading of arXiv:2503.05236"
_REWARD_DANCE = "our reading of arXiv:2509.08826"
_ONE_REWARD = "our reading of arXiv:2508.21066"
_TEMPLATES = {
    "ur_point_v1": _Published(
        _PROMPT, _UNIFIED_REWARD, "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b"
    ),
    "ur_point_flowgrpo": _Published(
        _PROMPT, "flow_grpo's reward", "d68ab1dcf4dc3a39ec5dfab963d17fe30a6e5f713eb49f743ed88a4c8ce4317f"
    ),
    "ur_acs_v15": _Published(
        _PROMPT, _UNIFIED_REWARD, "88d1d1c5f0fba9dc6f112022ffbabf86f6ad64df58047a7c7293814f91c39ea9"
    ),
    "ur2_acs": _Published(_PROMPT, _UNIFIED_REWARD, "75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851"),
    "ur2_aps_video": _Published(
        _PROMPT, _UNIFIED_REWARD, "707411fb9175547e74f145ae3efa459d621f11afcca076659a5588848e91e1c7"
    ),
    "ur_pair_qwen": _Published(
        _PROMPT, _UNIFIED_REWARD, "0fd2f5c43a06516503fde3e64ffc98fff6f3a8815b5eac8dc5f0d81cee686614"
    ),
    "ur_pair_llava": _Published(
        _PROMPT, _UNIFIED_REWARD, "238e0ad4624e5d43440c58b440c624688368160c767883a5f4234a6f241ba11b"
    ),
    "ur2_pair": _Published(
        _PROMPT, _UNIFIED_REWARD, "828e9ab2f81c3b6d42fb68dd5b8ea1b7647063c4b5d79a98d003ff25de5c5ca8"
    ),
    "think_v1": _Published(
        _PROMPT, "UnifiedReward-Think's scripts", "342f6a4bd0efdae0ca754259d78404e534aae5f1c5527dd47f6062028305e3ff"
    ),
    "think_qwen3vl": _Published(
        _PROMPT, "UnifiedReward-Think's scripts", "a8a0d80818246406b783d5cca630336c5fdf1264fef13f09d09bd94d61a139d5"
    ),
    "flex_pair": _Published(
        _PROMPT, "UnifiedReward-Flex's scripts", "bd0c2d5635a7b6b3f382416789dad5c71563d9b68eeacfe75ece5795dff5ebda"
    ),
    "hpsv3": _Published(
        ("text_prompt",), "HPSv3's data collator", "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    ),
    "ur_point_video": _Published(_PROMPT, f"{_UNDERSTANDING}: ur_point_v1 said of a video"),
    "ur_pair_video": _Published(_PROMPT, f"{_UNDERSTANDING}: ur_pair_qwen said of videos"),
    "understanding_image_point": _Published(("question", "answer"), _UNDERSTANDING),
    "understanding_image_pair": _Published(("question", "answer_1", "answer_2"), _UNDERSTANDING),
    "understanding_video_point": _Published(("question", "answer"), _UNDERSTANDING),
    "understanding_video_pair": _Published(("question", "answer_1", "answer_2"), _UNDERSTANDING),
    "reward_dance": _Published(("prompt", "instruction", "candidate", "reference"), _REWARD_DANCE),
    "reward_dance_reasons_first": _Published(("prompt", "instruction", "candidate", "reference"), _REWARD_DANCE),
    "reward_dance_plain": _Published(("prompt", "instruction", "candidate", "reference"), _REWARD_DANCE),
    "reward_dance_point": _Published(("prompt", "instruction"), f"{_REWARD_DANCE}, which words none for one image"),
    "reward_dance_system": _Published((), f"{_REWARD_DANCE}: only its first sentence is known"),
    "shapes_judge": _Published(
        _PROMPT, "this project", "d21e538a4600df627c8bb024e4ef891d338e64548bc356347999cbaeca406ec8"
    ),
    "shapes_judge_yes_no": _Published(
        _PROMPT, "this project", "accc9899cb0c55468cf65330f2b85e6ee8182a6840b55b922ef025cde8c391e0"
    ),
    "shapes_judge_text_first": _Published(
        _PROMPT, "this project", "44b5cd2a975aebe2fd97f811799ac8a8c22e02fb6774c9fa8754f593851e6c30"
    ),
    "one_reward": _Published(("task", "criterion"), _ONE_REWARD),
    "one_reward_text_alignment": _Published(("task", "criterion", "prompt"), _ONE_REWARD),
}


def list_templates() -> list[str]:
    """Names for :func:`load_template`, sorted."""
    return sorted(_TEMPLATES)


def load_template(name: str, path: Path | None = None) -> Template:
    """The template ``name``, with the text of the file ``path`` in place of its own where one is given.

    Raises :class:`TemplateError` for an unknown name, a file that is not UTF-8 text, or a text with other fields.
    """
    if name not in _TEMPLATES:
        raise TemplateError(f"there is no template {name!r}; there are {', '.join(list_templates())}")
    return _load(name) if path is None else _read(name, path, f"the file {path}")


@cache
def _load(name: str) -> Template:
    return _read(name, FOLDER / f"{name}.txt", _TEMPLATES[name].source)


def _read(name: str, path: Path, source: str) -> Template:
    try:
        # Bytes: reading as text would change line ends.
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"the template {name} cannot be read from {path}: {error}") from error
    published = _TEMPLATES[name]
    exact = hashlib.sha256(content).hexdigest() == published.sha256
    return Template(name, text, frozenset(published.fields), published.source if exact else source, exact)
