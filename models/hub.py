"""Downloads from the hub, and one clear error for each way in which they fail."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from models.base import WeightsError
from models.sources import HubSource, is_wanted, place
from models.weights import file_sha256

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """What the hub states of a file: large ones have a sha256, small ones the hash that git gives them."""

    name: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None

    def mismatch(self, path: Path) -> str:
        """In which the file at ``path`` differs from what the hub states, or "" where it does not."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"{size} bytes, expected {self.size}"
        if self.sha256 is not None:
            found = file_sha256(path)
            return "" if found == self.sha256 else f"sha256 {found}, expected {self.sha256}"
        if self.git_sha1 is not None:
            found = git_sha1(path)
            return "" if found == self.git_sha1 else f"git sha1 {found}, expected {self.git_sha1}"
        return ""

    @property
    def checked_by(self) -> str:
        """By what :meth:`mismatch` compares."""
        hashed = "sha256" if self.sha256 else "git sha1" if self.git_sha1 else ""
        return " and ".join(part for part in ("size" if self.size is not None else "", hashed) if part) or "nothing"


def git_sha1(path: Path) -> str:
    """Hex hash of a file's content as git names it; for small files, read at once."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def remote_files(source: HubSource, weights_dir: Path | None, files: Sequence[str], setting: str) -> list[RemoteFile]:
    """What the hub states of the files of ``source``; :class:`WeightsError` where it cannot be asked or has none."""
    try:
        if source.file is not None:
            stated = get_hf_file_metadata(hf_hub_url(source.repo, source.file, revision=source.revision))
            return [_of_etag(source.file, stated.size, stated.etag or "")]
        tree = HfApi().list_repo_tree(source.repo, recursive=True, revision=source.revision)
        found = [_of_entry(entry) for entry in tree if isinstance(entry, RepoFile) and is_wanted(entry.path, files)]
    except Exception as exc:  # the library raises its HTTP client's errors too, and changes its clients
        raise WeightsError(explain(source, weights_dir, files, setting, exc)) from exc
    lacking = [pattern for pattern in files or ("*",) if not any(fnmatch(file.name, pattern) for file in found)]
    if lacking:
        raise WeightsError(
            f"{describe(source)} has no file {', '.join(lacking)}; {remedy(source, weights_dir, files, setting)}"
        )
    return found


def _of_etag(name: str, size: int | None, etag: str) -> RemoteFile:
    sha256, sha1 = (etag if pattern.fullmatch(etag) else None for pattern in (_SHA256, _GIT_SHA1))
    return RemoteFile(name, size, sha256, sha1)


def _of_entry(entry: RepoFile) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.path, entry.lfs.size, sha256=entry.lfs.sha256)
    return RemoteFile(entry.path, entry.size, git_sha1=entry.blob_id)


def download(source: HubSource, weights_dir: Path | None, files: Sequence[RemoteFile], setting: str) -> Path:
    """Download ``files`` of a repository with the hub library's progress bars and verify them; the file or folder.

    They lie below ``weights_dir`` as :func:`models.sources.place` says, or in the library's cache. Raises
    :class:`WeightsError`, which names ``setting``, when the transfer fails or a file is not what the hub states; such a
    file is removed.
    """
    local_dir = weights_dir / source.folder if weights_dir else None
    path = Path()
    # Indices first: a folder of which a fetch was ended halfway must not look complete.
    for file in sorted(files, key=lambda file: not file.name.endswith(".index.json")):
        try:
            member = Path(hf_hub_download(source.repo, file.name, revision=source.revision, local_dir=local_dir))
        except Exception as exc:  # as in remote_files()
            names = [file.name for file in files]
            raise WeightsError(explain(source, weights_dir, names, setting, exc)) from exc
        problem = file.mismatch(member)
        if problem:
            remove(member)
            raise WeightsError(f"{member} was removed: it does not match what the hub states: {problem}")
        path = member if source.file is not None else member.parents[file.name.count("/")]
    return path


def remove(path: Path) -> None:
    """Remove a downloaded file; in the library's cache its name is a link to the content."""
    path.resolve().unlink()
    path.unlink(missing_ok=True)


def describe(source: HubSource) -> str:
    """The file, repository and revision in words."""
    file = f"the file {source.file} of " if source.file else ""
    return f"{file}the hub repository {source.repo} at revision {source.revision or 'main'}"


def explain(source: HubSource, weights_dir: Path | None, files: Sequence[str], setting: str, error: Exception) -> str:
    """What could not be had, why, and what to do about it."""
    return f"cannot fetch {describe(source)}: {_reason(source, error)}; {remedy(source, weights_dir, files, setting)}"


def remedy(source: HubSource, weights_dir: Path | None, files: Sequence[str], setting: str) -> str:
    """How to get the files to this machine by hand."""
    what = "the file" if source.file else f"the files {', '.join(files)}" if files else "the repository's files"
    if weights_dir is None:
        layout = place(source, Path("WEIGHTS_DIR")).as_posix()
        return (
            f"to place it by hand, give the path of {what} in {setting}, or set weights_dir and put {what} at {layout}"
        )
    return f"to place it by hand, put {what} at {place(source, weights_dir)}, or give another path in {setting}"


def _reason(source: HubSource, error: Exception) -> str:
    cause = _first_cause(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and nothing of it is on this machine"
    if isinstance(cause, GatedRepoError):
        return "access is gated (HTTP 401 or 403): accept the licence on the repository's page and set HF_TOKEN"
    if isinstance(cause, RepositoryNotFoundError):
        return "there is no such repository, or it is private (HTTP 401 or 404): check the name, or set HF_TOKEN"
    if isinstance(cause, RevisionNotFoundError):
        return f"there is no revision {source.revision} (HTTP 404)"
    if isinstance(cause, RemoteEntryNotFoundError):
        return "there is no such file (HTTP 404)"
    if isinstance(cause, HfHubHTTPError):
        return f"the hub answered HTTP {cause.response.status_code}"
    return f"the hub cannot be reached or the transfer failed ({type(cause).__name__}: {cause})"


def _first_cause(error: BaseException) -> BaseException:
    """The library wraps what happened in "not found locally" errors; the cause says more."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError | OfflineModeIsEnabled):
        error = error.__cause__
    return error
