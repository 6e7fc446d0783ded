"""``reward-service fetch``: brings what a model needs to this machine, and checks it against what its source states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from models.base import LoadOptions, WeightsError, WeightSource
from models.hub import RemoteFile, download, remote_files, remove
from models.registry import get_info
from models.sources import HubSource, UrlSource, locate, parse, place, setting, shown
from models.weights import HASH_PREFIX, checkpoint_file, file_sha256, obtain, verify_sha256
from service.download import download_file
from service.settings import Settings
from service.weights import load_options

Tell = Callable[[str], None]


def fetch_model(name: str, settings: Settings, tell: Tell, console: Console) -> None:
    """Fetch every source of the model ``name`` and verify it; ``tell`` gets a text about each, ``console`` the bars.

    Files that were downloaded and do not match what their source states are removed; files that were here before stay.
    Raises :class:`WeightsError` for the first source that cannot be had or does not match, and ValueError for an option
    that should name a source and does not.
    """
    options = load_options(name, settings)
    sources = get_info(name).sources
    if not sources:
        tell(f"{name}: nothing to fetch: it needs no weights, or they ship with a package")
    for source in sources:
        expected = settings.models[name].sha256 if name in settings.models and source.role == "weights" else None
        sha256 = expected.removeprefix(HASH_PREFIX).lower() if expected else None
        job = _Job(name, source, options, sha256, tell, console)
        path, state = _fetch(job)
        tell(f"{job.label}: {state}\n  from {shown(job.text)}\n  at {path}")


@dataclass(frozen=True)
class _Job:
    """One source of a model; ``sha256`` is what the settings expect of it."""

    model: str
    source: WeightSource
    options: LoadOptions
    sha256: str | None
    tell: Tell
    console: Console

    @property
    def text(self) -> str:
        return self.options.source(self.source)

    @property
    def label(self) -> str:
        return f"{self.model} {self.source.role}"

    @property
    def setting(self) -> str:
        return setting(self.source.role, self.model)


def _fetch(job: _Job) -> tuple[Path, str]:
    """Where the files of a source now lie, and a word on their state."""
    parsed = parse(job.text)
    if isinstance(parsed, HubSource):
        return _fetch_hub(job, parsed)
    if isinstance(parsed, UrlSource):
        return _fetch_url(job, parsed)
    path = obtain(job.source, job.options, job.model)
    if job.sha256 is None:
        return path, "present, a path of this machine"
    verify_sha256(path, job.sha256)
    return path, "present, a path of this machine, verified by sha256"


def _fetch_hub(job: _Job, parsed: HubSource) -> tuple[Path, str]:
    weights_dir, files = job.options.weights_dir, job.source.files
    found = locate(job.text, weights_dir, files)
    try:
        remote = remote_files(parsed, weights_dir, files, job.setting)
    except WeightsError as problem:
        if found is None:
            raise
        if job.sha256 is None:
            return found, f"present, NOT VERIFIED ({problem})"
        verify_sha256(found, job.sha256)
        return found, "present, verified by sha256"
    here = found or (place(parsed, weights_dir) if weights_dir else None)
    missing = [file for file in remote if here is None or not _member(here, parsed, file).is_file()]
    if missing or here is None:
        job.tell(f"{job.label}: fetching {_summary(missing)} of {job.text}")
        here = download(parsed, weights_dir, missing, job.setting)
    for file in remote:
        member = _member(here, parsed, file)
        difference = "" if file in missing else file.mismatch(member)
        if difference:
            _refuse(member, f"what the hub states: {difference}", fresh=False, named=job.setting)
    if job.sha256 not in (None, *(file.sha256 for file in remote if parsed.file)):
        _verify_expected(here, job.sha256 or "", bool(missing), job.setting)
    return here, f"{'fetched' if missing else 'present'}, verified by {_checks(remote, job.sha256)}"


def _member(path: Path, source: HubSource, file: RemoteFile) -> Path:
    return path if source.file is not None else path / file.name


def _summary(files: list[RemoteFile]) -> str:
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return f"{count}, {decimal(sum(file.size or 0 for file in files))},"


def _checks(files: list[RemoteFile], sha256: str | None) -> str:
    by_hub = sorted({file.checked_by for file in files})
    return "; ".join([*by_hub, "the settings' sha256"] if sha256 else by_hub)


def _fetch_url(job: _Job, parsed: UrlSource) -> tuple[Path, str]:
    """Nothing but the settings vouches for the content of a URL; the published one has a size."""
    size = job.source.bytes if parsed.url == job.source.source else 0

    def check(path: Path) -> None:
        found_size, found = path.stat().st_size, file_sha256(path)
        if size and found_size != size:
            raise WeightsError(f"{shown(parsed.url)} is not the expected file: {found_size} bytes, expected {size}")
        if job.sha256 not in (None, found):
            raise WeightsError(f"{shown(parsed.url)} is not the expected file: sha256 {found}, expected {job.sha256}")

    target = place(parsed, job.options.weights_dir)
    present = target.is_file()
    if present:
        check(target)
    else:
        job.tell(f"{job.label}: fetching {shown(parsed.url)}")
        download_file(parsed.url, target, check, job.console)
    checks = [name for name, is_checked in (("size", size), ("sha256", job.sha256)) if is_checked]
    verified = f"verified by {' and '.join(checks)}" if checks else "NOT VERIFIED"
    pin = "" if job.sha256 else f"; its sha256 is {file_sha256(target)}"
    return target, f"{'present' if present else 'fetched'}, {verified}{pin}"


def _verify_expected(path: Path, sha256: str, fresh: bool, named: str) -> None:
    try:
        verify_sha256(path, sha256)
    except WeightsError as exc:
        _refuse(checkpoint_file(path), f"the settings: {exc}", fresh, named)


def _refuse(path: Path, problem: str, fresh: bool, named: str) -> None:
    """Remove a file that was downloaded and does not match; one that was here before is for its owner to remove."""
    if not fresh:
        raise WeightsError(
            f"{path} does not match {problem}. It was here before and was left as it is: remove it to fetch it again, "
            f"or name the revision that it belongs to in {named}"
        )
    remove(path)
    raise WeightsError(f"{path} was removed: it does not match {problem}")
