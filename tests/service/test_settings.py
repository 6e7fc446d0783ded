from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import LimitSettings, ModelSettings, QueueSettings, Settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("REWARD_"):
            monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "service.yaml"
    monkeypatch.setenv("REWARD_CONFIG", str(path))
    return path


def test_the_defaults_are_safe() -> None:
    settings = Settings()
    assert settings.host == "127.0.0.1"
    assert settings.invariance == "exact"
    assert settings.bearer_keys() == []
    assert settings.limits.images_per_request <= settings.queue.max_cost
    assert set(settings.models) == {
        "jpeg-compressibility", "jpeg-incompressibility", "ocr", "shapes-clip", "shapes-oracle",
    }  # fmt: skip


def test_arguments_win_over_environment_over_yaml_over_defaults(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("port: 1000\nhost: yaml.example\ndtype: float16\nqueue: {max_cost: 300, max_delay_ms: 9}\n")
    monkeypatch.setenv("REWARD_PORT", "2000")
    monkeypatch.setenv("REWARD_HOST", "environment.example")
    monkeypatch.setenv("REWARD_QUEUE__MAX_COST", "400")
    settings = Settings(port=3000)
    assert (settings.port, settings.host, settings.dtype) == (3000, "environment.example", "float16")
    assert (settings.queue.max_cost, settings.queue.max_delay_ms) == (400, 9)
    assert settings.queue.default_deadline_ms == QueueSettings().default_deadline_ms


def test_models_in_yaml_with_and_without_settings(config: Path) -> None:
    config.write_text("models:\n  ocr:\n  shapes-clip: {dtype: bfloat16, micro_batch: 4, options: {seed: 3}}\n")
    models = Settings().models
    assert models["ocr"] == ModelSettings()
    assert (models["shapes-clip"].dtype, models["shapes-clip"].micro_batch) == ("bfloat16", 4)
    assert models["shapes-clip"].options == {"seed": 3}


def test_a_list_of_names_is_the_short_form(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("models: [ocr, shapes-clip]\n")
    assert list(Settings().models) == ["ocr", "shapes-clip"]
    monkeypatch.setenv("REWARD_MODELS", '["ocr"]')
    assert list(Settings().models) == ["ocr"]


def test_models_of_the_environment_replace_those_of_the_yaml(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment before YAML: whoever names one model in the environment does not get the file's others too."""
    config.write_text("models: {ocr: {}, shapes-clip: {}}\n")
    monkeypatch.setenv("REWARD_MODELS", '{"ocr": {"micro_batch": 2}}')
    assert list(Settings().models) == ["ocr"]


@pytest.mark.parametrize(
    "text",
    ["prot: 8000", "queue: {max_costs: 3}", "models: {ocr: {dtyp: float32}}", "models: {ocr: {micro_batch: 0}}",
     "port: 70000", "invariance: maybe", "dtype: int8", "limits: {images_per_request: 0}"],
)  # fmt: skip
def test_a_typo_or_a_value_out_of_range_is_refused(text: str, config: Path) -> None:
    config.write_text(text)
    with pytest.raises(ValidationError):
        Settings()


def test_a_request_that_never_fits_is_refused_at_start() -> None:
    with pytest.raises(ValidationError, match=r"images_per_request \(256\) is more than queue.max_cost \(100\)"):
        Settings(queue=QueueSettings(max_cost=100))
    Settings(queue=QueueSettings(max_cost=100), limits=LimitSettings(images_per_request=100))


def test_a_missing_config_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REWARD_CONFIG", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        Settings()


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text"])
def test_a_config_that_is_no_mapping_is_a_value_error(text: str, config: Path) -> None:
    config.write_text(text)
    with pytest.raises(ValueError, match=r"mapping|dictionary|dict"):
        Settings()


def test_an_empty_config_means_the_defaults(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("# nothing yet\n")
    empty = Settings()
    monkeypatch.delenv("REWARD_CONFIG")
    assert empty == Settings()


def test_keys_come_from_settings_and_from_the_mounted_secret(tmp_path: Path) -> None:
    secret = tmp_path / "keys"
    secret.write_text("# for the trainers\n  first \n\nsecond\n")
    assert Settings(api_keys=["own"], api_keys_file=secret).bearer_keys() == ["own", "first", "second"]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_a_secret_without_a_key_is_no_open_door(text: str, tmp_path: Path) -> None:
    secret = tmp_path / "keys"
    secret.write_text(text)
    with pytest.raises(ValueError, match="holds no key"):
        Settings(api_keys_file=secret).bearer_keys()


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_is_no_open_door(key: str) -> None:
    """What an unset variable in a compose file becomes: everyone who sends no key would hold this one."""
    with pytest.raises(ValueError, match="empty"):
        Settings(api_keys=[key]).bearer_keys()


def test_a_secret_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Settings(api_keys_file=tmp_path / "nowhere").bearer_keys()


def test_a_weights_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        Settings(weights_dir=file)
    assert Settings(weights_dir=tmp_path / "not yet there").weights_dir is not None


@pytest.mark.parametrize("reference", ["best:ocr", "best:shapes-judge", "best-of-0", "worst", "best:"])
def test_a_reference_is_chosen_by_a_rule_that_is_known_and_a_model_that_is_loaded(reference: str) -> None:
    models = {"shapes-judge": {"reference": reference}, "shapes-clip": {}}
    with pytest.raises(ValidationError, match="reference"):
        Settings(models=models)
    models["shapes-judge"]["reference"] = "best:shapes-clip"
    assert Settings(models=models).models["shapes-judge"].reference == "best:shapes-clip"
