"""A source names one place, is found there without a network, and is missed with a message that helps."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from models.base import LoadOptions, WeightsError, WeightSource
from models.hub import git_sha1, remote_files
from models.sources import (
    HubSource,
    LocalSource,
    UrlSource,
    is_complete,
    list_files,
    locate,
    parse,
    place,
    setting,
    shards,
)
from models.weights import obtain
from tests.service.hub import COMMIT, Hub, point_library_at, serving

WEIGHTS = b"weights of the reward" * 100


@pytest.fixture
def use_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda url: point_library_at(url, tmp_path / "home", monkeypatch)


@pytest.fixture
def hub(use_hub: Callable[[str], None]) -> Iterator[Hub]:
    files = {"reward.pt": WEIGHTS, "config.json": b"{}", "parts/a.bin": b"a", "README.md": b"words"}
    with serving(Hub({"acme/reward": files, "acme/other": {}}, gated={"acme/gated"})) as running:
        use_hub(running.url)
        yield running


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:acme/reward", HubSource("acme/reward")),
        ("hf:acme/reward@v1.0", HubSource("acme/reward", "v1.0")),
        ("hf:acme/reward/sub/w.pt", HubSource("acme/reward", None, "sub/w.pt")),
        (f"hf:a-b/c_d.e@{COMMIT}/w.pt", HubSource("a-b/c_d.e", COMMIT, "w.pt")),
        ("https://example.org/a/w.pth?raw=true", UrlSource("https://example.org/a/w.pth?raw=true")),
        ("weights/w.pt", LocalSource(Path("weights/w.pt"))),
        ("acme/reward", LocalSource(Path("acme/reward"))),
        ("~/w.pt", LocalSource(Path.home() / "w.pt")),
    ],
)
def test_texts_and_what_they_name(text: str, expected: object) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "hf:", "hf:reward", "hf:acme/", "hf:acme/reward/", "hf:acme/reward@", "hf:acme/reward@/w.pt",
        "hf:acme/reward/../w.pt", "hf:acme/reward//w.pt", "hf:../reward", "hf:acme/..", "hf:acme/reward/a\\b",
        "hf:acme/reward@a@b", "hf: acme/reward", " hf:acme/reward", "hf:acme/reward@../w", "a\0b",
        "https://", "https:///w.pt", "https://example.org", "https://example.org/", "https://example.org/a/",
        "https://example.org/../w.pt", "https://example.org/%2e%2e/w.pt", "https://me:secret@example.org/w.pt",
        "https://example.org/w.pt#part", "https://example.org:port/w.pt", "https://[/w.pt",
        "http://example.org/w.pt", "s3://bucket/w.pt", "file:///w.pt",
    ],
)  # fmt: skip
def test_texts_that_name_nothing_are_refused_at_once(text: str) -> None:
    with pytest.raises(WeightsError) as caught:
        parse(text)
    assert "secret" not in str(caught.value)
    with pytest.raises(WeightsError):
        locate(text, Path("/nowhere"))


@given(st.text(st.sampled_from("ab/.@-_\\ %"), max_size=12))
def test_no_source_leaves_the_weights_folder(rest: str) -> None:
    for text in (f"hf:{rest}", f"https://h/{rest}"):
        try:
            path = place(parse(text), Path("/weights"))
        except WeightsError:
            continue
        assert path.is_relative_to("/weights")
        assert ".." not in path.parts


def test_the_layout_below_the_weights_folder() -> None:
    folder = Path("/weights")
    assert place(parse("hf:acme/reward@v1/sub/w.pt"), folder) == folder / "acme" / "reward@v1" / "sub" / "w.pt"
    assert place(parse("hf:acme/reward"), folder) == folder / "acme" / "reward"
    assert place(parse("https://h.org/a/x%2By.pth?raw=1"), folder) == folder / "h.org" / "a" / "x+y.pth"
    assert place(parse("some/w.pt"), folder) == Path("some/w.pt")
    with pytest.raises(ValueError, match="weights_dir"):
        place(parse("hf:acme/reward"), None)


def test_without_a_weights_folder_files_of_urls_lie_beside_the_hub_cache(
    tmp_path: Path, use_hub: Callable[[str], None]
) -> None:
    use_hub("http://unused")
    assert place(parse("https://h.org/w.pth"), None) == tmp_path / "home" / "reward-service" / "h.org" / "w.pth"


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("text", ["hf:acme/reward@v1/w.pt", "https://h.org/w.pt"])
def test_a_file_placed_by_hand_is_found(text: str, tmp_path: Path) -> None:
    assert locate(text, tmp_path) is None
    put(place(parse(text), tmp_path))
    assert locate(text, tmp_path) == place(parse(text), tmp_path)
    assert locate(text.replace("w.pt", "v.pt"), tmp_path) is None


def test_a_place_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot look for weights at .*: File name too long"):
        locate("x" * 5000, None)
    with pytest.raises(WeightsError, match="File name too long"):
        locate(f"hf:acme/reward/{'x' * 5000}", tmp_path)


def test_a_folder_in_the_place_of_a_file_is_not_the_file(tmp_path: Path) -> None:
    put(tmp_path / "acme" / "reward" / "w.pt" / "inner")
    assert locate("hf:acme/reward/w.pt", tmp_path) is None


def test_a_folder_is_present_with_all_its_patterns_and_shards(tmp_path: Path) -> None:
    folder = tmp_path / "acme" / "reward"
    files = ("*.safetensors", "*.json")
    put(folder / ".cache" / "note.safetensors")
    assert locate("hf:acme/reward", tmp_path, files) is None
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    put(folder / "model.safetensors.index.json", json.dumps(index).encode())
    put(folder / "model-1.safetensors")
    assert not is_complete(folder, files)
    put(folder / "model-2.safetensors")
    assert locate("hf:acme/reward", tmp_path, files) == folder
    assert locate(str(folder), None, files) == folder
    assert locate(str(folder), None, ("*.txt",)) is None
    assert list_files(folder) == ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert shards(folder / "model.safetensors.index.json") == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": "../w"}}'])
def test_a_damaged_index_is_named(content: bytes, tmp_path: Path) -> None:
    index = put(tmp_path / "model.safetensors.index.json", content)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
        shards(index)


def test_settings_are_named_as_the_user_writes_them() -> None:
    assert setting("weights", "pickscore") == "models.pickscore.weights"
    assert setting("detector", "geneval") == "models.geneval.options.detector"
    assert setting("weights") == "models.NAME.weights"


def options(weights_dir: Path | None, **given: str) -> LoadOptions:
    return LoadOptions(weights=given.pop("weights", None), options=given, weights_dir=weights_dir)


@pytest.mark.parametrize("in_cache", [True, False])
def test_what_is_not_here_is_downloaded_once(in_cache: bool, hub: Hub, tmp_path: Path) -> None:
    weights_dir = None if in_cache else tmp_path / "weights"
    source = WeightSource("hf:acme/reward@v1/reward.pt")
    path = obtain(source, options(weights_dir))
    assert path.read_bytes() == WEIGHTS
    assert in_cache or path == tmp_path / "weights" / "acme" / "reward@v1" / "reward.pt"
    requests = len(hub.seen)
    assert obtain(source, options(weights_dir)) == path == locate(source.source, weights_dir)
    assert len(hub.seen) == requests


@pytest.mark.parametrize("in_cache", [True, False])
def test_of_a_repository_the_files_that_matter_are_downloaded(in_cache: bool, hub: Hub, tmp_path: Path) -> None:
    weights_dir = None if in_cache else tmp_path / "weights"
    source = WeightSource("hf:acme/reward", files=("*.json", "parts/*"))
    assert locate(source.source, weights_dir, source.files) is None
    folder = obtain(source, options(weights_dir))
    assert list_files(folder) == ["config.json", "parts/a.bin"]
    assert locate(source.source, weights_dir, source.files) == folder
    assert locate(source.source, weights_dir, ("*.pt",)) is None


@pytest.mark.parametrize("in_cache", [True, False])
def test_a_repository_fetched_halfway_is_not_taken_for_complete(in_cache: bool, hub: Hub, tmp_path: Path) -> None:
    weights_dir = None if in_cache else tmp_path / "weights"
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    hub.repos["acme/sharded"] = {
        "model-00001-of-00002.safetensors": b"1" * 2000,
        "model-00002-of-00002.safetensors": b"2" * 2000,
        "model.safetensors.index.json": index.encode(),
    }
    hub.stated["model-00002-of-00002.safetensors"] = b"3" * 2000
    source = WeightSource("hf:acme/sharded")
    with pytest.raises(WeightsError, match="was removed"):
        obtain(source, options(weights_dir))
    assert locate(source.source, weights_dir) is None
    del hub.stated["model-00002-of-00002.safetensors"]
    assert len(list_files(obtain(source, options(weights_dir)))) == 3


def test_the_settings_override_each_role(tmp_path: Path) -> None:
    mine = put(tmp_path / "mine.pt")
    given = options(tmp_path, weights=str(mine), tower="hf:acme/mine/tower.pt")
    assert obtain(WeightSource("hf:acme/reward/w.pt"), given) == mine
    put(tmp_path / "acme" / "mine" / "tower.pt")
    assert obtain(WeightSource("hf:acme/reward/t.pt", role="tower"), given).parts[-2:] == ("mine", "tower.pt")


@pytest.mark.parametrize(
    ("text", "files", "words"),
    [
        ("hf:acme/nothing@v1/w.pt", (), ["acme/nothing", "w.pt", "revision v1", "no such repository"]),
        ("hf:acme/nothing", (), ["acme/nothing", "no such repository"]),
        ("hf:acme/reward/absent.pt", (), ["acme/reward", "absent.pt", "no such file"]),
        ("hf:acme/reward", ("*.json", "*.txt"), ["acme/reward", "has no file *.txt"]),
        ("hf:acme/other", (), ["acme/other", "has no file"]),
        ("hf:acme/reward@v9/reward.pt", (), ["acme/reward", "reward.pt", "no revision v9"]),
        ("hf:acme/reward@v9", (), ["acme/reward", "no revision v9"]),
        ("hf:acme/gated/w.pt", (), ["acme/gated", "w.pt", "gated", "HF_TOKEN"]),
        ("hf:acme/gated", (), ["acme/gated", "gated", "HF_TOKEN"]),
    ],
)
def test_what_the_hub_refuses_is_named_with_the_remedy(
    text: str, files: tuple[str, ...], words: list[str], hub: Hub, tmp_path: Path
) -> None:
    source = WeightSource("hf:default/default/w.pt", files=files)
    with pytest.raises(WeightsError) as caught:
        obtain(source, options(tmp_path / "weights", weights=text), "pickscore")
    for word in (*words, "models.pickscore.weights", str(place(parse(text), tmp_path / "weights"))):
        assert word in str(caught.value)
    assert not (tmp_path / "weights").exists()
    with pytest.raises(WeightsError, match=r"models\.geneval\.options\.detector, or set weights_dir"):
        obtain(WeightSource(text, role="detector", files=files), options(None), "geneval")


@pytest.mark.parametrize("in_cache", [True, False])
def test_a_download_that_is_not_what_the_hub_states_is_removed(in_cache: bool, hub: Hub, tmp_path: Path) -> None:
    hub.stated["reward.pt"] = WEIGHTS[::-1]
    weights_dir = None if in_cache else tmp_path / "weights"
    for source in (WeightSource("hf:acme/reward/reward.pt"), WeightSource("hf:acme/reward", files=("*.pt",))):
        with pytest.raises(
            WeightsError, match=r"reward\.pt was removed: .* sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"
        ):
            obtain(source, options(weights_dir))
        assert locate(source.source, weights_dir, source.files) is None
    left = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert WEIGHTS not in [path.read_bytes() for path in left]


def test_offline_is_named(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for text in ("hf:acme/reward/reward.pt", "hf:acme/reward"):
        with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE is set.*models\.NAME\.weights"):
            obtain(WeightSource(text), options(tmp_path))
    assert hub.seen == []


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path, use_hub: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    use_hub(f"http://127.0.0.1:{port}")
    with pytest.raises(WeightsError, match=r"cannot be reached.*refused.*acme/reward/w\.pt, or give another path"):
        obtain(WeightSource("hf:acme/reward/w.pt"), options(tmp_path))


def test_a_url_is_fetched_by_the_command_alone(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"`reward-service fetch aesthetic`.*h\.org/w\.pth.*models\.aesthetic\.we"):
        obtain(WeightSource("https://h.org/w.pth"), options(tmp_path), "aesthetic")


def test_a_token_in_a_url_is_not_shown(tmp_path: Path) -> None:
    source = WeightSource("https://example.org/w.pt?token=SECRET")
    with pytest.raises(WeightsError, match=r"https://example\.org/w\.pt are not here") as caught:
        obtain(source, LoadOptions(weights_dir=tmp_path))
    assert "SECRET" not in str(caught.value)
    with pytest.raises(WeightsError, match="does not name a file") as caught:
        parse("https://example.org/?token=SECRET")
    assert "SECRET" not in str(caught.value)


def test_an_unknown_home_is_named() -> None:
    with pytest.raises(WeightsError, match="~nobody-of-this-name"):
        parse("~nobody-of-this-name/w.pt")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"models\.a\.weights: no weights at \S*absent\.pt; give the path"):
        obtain(WeightSource("hf:a/b/c"), options(None, weights=str(tmp_path / "absent.pt")), "a")
    with pytest.raises(WeightsError, match="or hf:yours/mine for the hub's"):
        obtain(WeightSource("hf:a/b/c"), options(None, weights="yours/mine"), "a")


def test_what_the_hub_states_is_compared_with_the_bytes(hub: Hub, tmp_path: Path) -> None:
    (large,) = remote_files(HubSource("acme/reward", None, "reward.pt"), tmp_path, (), "s")
    (small,) = remote_files(HubSource("acme/reward"), tmp_path, ("*.json",), "s")
    assert (large.checked_by, small.checked_by) == ("size and sha256", "size and git sha1")
    path = put(tmp_path / "w.pt", WEIGHTS)
    assert large.mismatch(path) == ""
    path.write_bytes(WEIGHTS[:-1])
    assert large.mismatch(path) == f"{len(WEIGHTS) - 1} bytes, expected {len(WEIGHTS)}"
    path.write_bytes(WEIGHTS[:-1] + b"!")
    assert f"expected {large.sha256}" in large.mismatch(path)
    assert small.mismatch(put(path, b"{}")) == ""
    assert "expected 9e26dfee" in small.mismatch(put(path, b"[]"))
    assert git_sha1(put(path, b"{}")) == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object
