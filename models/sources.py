"""Where a model's files come from, and where they lie: ``hf:OWNER/NAME[@REVISION][/FILE]``, ``https://...``, a path.

Below ``weights_dir`` files lie plainly, so that a person can place them by hand:
``weights_dir/OWNER/NAME[@REVISION]/FILE`` and ``weights_dir/HOST/PATH`` of a URL. Without it they lie in the hub
library's own cache, those of a URL beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from models.base import WeightsError

_OWNER = r"[A-Za-z0-9][\w.-]*"
_HUB = re.compile(rf"({_OWNER}/{_OWNER})(?:@([A-Za-z0-9][\w.-]*))?(?:/(.+))?", re.ASCII)
_FORMS = "a source is hf:OWNER/NAME[@REVISION][/FILE], https://HOST/FILE, or the path of a file or folder"


@dataclass(frozen=True)
class HubSource:
    """A file of a hub repository, or the whole repository where ``file`` is None."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def folder(self) -> str:
        """The repository's folder below ``weights_dir``."""
        return self.repo + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class UrlSource:
    """A file at an https URL."""

    url: str

    @property
    def place(self) -> str:
        """The file's place below ``weights_dir``."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}/{unquote(parts.path).lstrip('/')}"


@dataclass(frozen=True)
class LocalSource:
    """A file or folder of this machine."""

    path: Path


Source = HubSource | UrlSource | LocalSource


def parse(text: str) -> Source:
    """The source that ``text`` names; :class:`WeightsError` says what is wrong with a text that names none."""
    scheme, colon, rest = text.partition(":")
    if not text.strip() or text != text.strip() or "\0" in text:
        raise WeightsError(f"{text!r} names no weights: {_FORMS}")
    if scheme == "hf" and colon:
        return _hub(text, rest)
    if scheme == "https" and colon:
        return _url(text)
    if "://" in text:
        raise WeightsError(f"{text!r} is not a source of weights: only hf: and https:// are fetched; {_FORMS}")
    try:
        return LocalSource(Path(text).expanduser())
    except RuntimeError as exc:
        raise WeightsError(f"{text!r} names no weights: this machine knows no such home") from exc


def shown(text: str) -> str:
    """A source as logs, messages and /models may show it: without the query of a URL, which may hold a token."""
    return text.partition("?")[0] if text.startswith(("https:", "http:")) else text


def _hub(text: str, rest: str) -> HubSource:
    found = _HUB.fullmatch(rest)
    if found is None or not looks_like_hub(rest):
        raise WeightsError(f"{text!r} does not name a hub repository; {_FORMS}")
    repo, revision, file = found.groups()
    return HubSource(repo, revision, file)


def _url(text: str) -> UrlSource:
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        raise WeightsError(f"{shown(text)!r} is not a URL: {exc}") from exc
    if "@" in parts.netloc:
        raise WeightsError("a URL of weights holds no user name or password: it would be shown in logs and in /models")
    file = unquote(parts.path).lstrip("/")
    if not host or parts.fragment or not file or file.endswith("/") or not _is_plain(file):
        raise WeightsError(f"{shown(text)!r} does not name a file at a URL; {_FORMS}")
    return UrlSource(text)


def looks_like_hub(text: str) -> bool:
    """Whether ``text`` would name a hub repository or file if it began with ``hf:``."""
    return _HUB.fullmatch(text) is not None and _is_plain(text)


def _is_plain(path: str) -> bool:
    """Whether a path of somebody else's stays below the folder that it is joined to."""
    return "\\" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def setting(role: str, model: str = "") -> str:
    """The setting that overrides a source: ``models.NAME.weights`` or ``models.NAME.options.ROLE``."""
    return f"models.{model or 'NAME'}.{'weights' if role == 'weights' else f'options.{role}'}"


def place(source: Source, weights_dir: Path | None) -> Path:
    """Where the file or folder of ``source`` lies, or is put by hand, below ``weights_dir`` (a local one: where it is).

    Without ``weights_dir`` this holds for URLs; hub files lie in the hub library's cache, which nobody fills by hand,
    and ValueError is raised.
    """
    if isinstance(source, LocalSource):
        return source.path
    if isinstance(source, UrlSource):
        return (weights_dir or _url_cache()) / source.place
    if weights_dir is None:
        raise ValueError("without weights_dir hub files have no place of their own")
    return weights_dir / source.folder / (source.file or "")


def _url_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "reward-service"


def locate(source: str, weights_dir: Path | None, files: Sequence[str] = ()) -> Path | None:
    """The file or folder of ``source`` where it is already present, else None; never asks the network.

    A folder is present when every pattern of ``files`` (all of it: when any file) is there, and every shard that an
    index in it names. Raises :class:`WeightsError` for a text that names no source, a damaged index, and a place that
    may not be looked at.
    """
    parsed = parse(source)
    if isinstance(parsed, HubSource) and weights_dir is None:
        return _in_cache(parsed, files)
    path = place(parsed, weights_dir)
    try:
        return path if _is_present(path, files, one_file=_names_a_file(parsed)) else None
    except OSError as exc:
        raise WeightsError(f"cannot look for weights at {path}: {exc.strerror or 'input/output error'}") from exc


def _names_a_file(source: Source) -> bool:
    return isinstance(source, UrlSource) or (isinstance(source, HubSource) and source.file is not None)


def _is_present(path: Path, files: Sequence[str], *, one_file: bool) -> bool:
    if path.is_file():
        return True
    return not one_file and path.is_dir() and is_complete(path, files)


def is_complete(folder: Path, files: Sequence[str]) -> bool:
    """Whether ``folder`` has a file for every pattern (without patterns: any file) and all shards of its indices."""
    present = list_files(folder)
    if not all(any(fnmatch(name, pattern) for name in present) for pattern in files or ("*",)):
        return False
    wanted = {name for name in present if name.endswith(".index.json") and is_wanted(name, files)}
    return all((folder / name).parent.joinpath(shard).is_file() for name in wanted for shard in shards(folder / name))


def is_wanted(name: str, files: Sequence[str]) -> bool:
    """Whether the file ``name`` of a repository is one of ``files`` (no patterns: all are)."""
    return not files or any(fnmatch(name, pattern) for pattern in files)


def list_files(folder: Path) -> list[str]:
    """Relative names of the files in ``folder``, sorted, without hidden ones (the hub library keeps notes there)."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def shards(index: Path) -> list[str]:
    """The files that a ``*.index.json`` spreads its tensors over, sorted; :class:`WeightsError` if it is damaged."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(f"the index {index} is damaged or not one of shards: fetch or copy the file again") from exc
    if not names or not all(isinstance(name, str) and PurePosixPath(name).name == name for name in names):
        raise WeightsError(f"the index {index} does not name its shards by plain file names")
    return names


def _in_cache(source: HubSource, files: Sequence[str]) -> Path | None:
    """The file or snapshot in the hub library's cache."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    if source.file is not None:
        found = try_to_load_from_cache(source.repo, source.file, revision=source.revision)
        return Path(found) if isinstance(found, str) else None
    try:
        folder = Path(
            snapshot_download(
                source.repo, revision=source.revision, allow_patterns=list(files) or None, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None
    return folder if is_complete(folder, files) else None
