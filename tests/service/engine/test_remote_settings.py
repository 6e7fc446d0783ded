"""Settings of a judge behind a server, and what the engine makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models.catalog  # noqa: F401
from models.registry import load_model
from service.engine.plan import worker_options
from service.engine.remote import RemoteChat
from service.settings import ModelSettings, RemoteSettings, Settings, SettingsProblem, load_settings

KEY = "sk-do-not-show-me"
SERVER = {"base_url": "http://judges:8000/v1/", "model": "judge-7b"}


def test_the_connection_of_a_judge_is_made_from_its_settings() -> None:
    settings = Settings(models={"unified-reward-think": ModelSettings(remote=RemoteSettings(**SERVER, concurrency=24))})
    made = worker_options(
        "unified-reward-think", settings.models["unified-reward-think"], settings, torch.device("cpu")
    )
    assert isinstance(made.load.chat, RemoteChat)
    assert made.load.chat.settings.base_url == "http://judges:8000/v1"
    assert made.gradients is False
    assert made.token_budget >= 24 * 4096
    judge: Any = load_model("unified-reward-think", made.load)
    assert judge.chat is made.load.chat
    assert judge.uses_device is False


def test_a_model_that_asks_nobody_has_no_server() -> None:
    settings = Settings(models={"ocr": ModelSettings(remote=RemoteSettings(**SERVER))})
    with pytest.raises(ValueError, match=r"models\.ocr\.remote: ocr is no judge"):
        worker_options("ocr", settings.models["ocr"], settings, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_url": "ftp://judges/v1"}, "http://HOST"),
        ({"base_url": "judges:8000"}, "http://HOST"),
        ({"base_url": "http://:8000/v1"}, "http://HOST"),
        ({"base_url": "http://judges:port/v1"}, "no URL"),
        ({"base_url": f"http://me:{KEY}@judges/v1"}, "no user or password"),
        ({"base_url": f"http://{KEY}@judges/v1"}, "no user or password"),
        ({"base_url": f"http://judges/v1?key={KEY}"}, "no query"),
        ({"model": ""}, "remote.model"),
        ({"api_key": KEY, "api_key_env": "JUDGE_KEY"}, "not both"),
        ({"api_key": ""}, "empty"),
        ({"api_key": f"{KEY}\n"}, "no header has"),
        ({"api_key_env": "NO_SUCH_VARIABLE_HERE"}, "NO_SUCH_VARIABLE_HERE, which is not set"),
        ({"extra_body": {"temperature": 1, "n": 2}}, "extra_body cannot set n, temperature"),
        ({"timeout_s": 0}, "remote.timeout_s"),
        ({"surprise": KEY}, "remote.surprise"),
    ],
)
def test_settings_that_cannot_be_are_refused_without_showing_a_key(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsProblem) as caught:
        load_settings(models={"unified-reward": {"remote": {**SERVER, **given}}})
    assert message in str(caught.value)
    assert KEY not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("beside", [{"weights": "hf:ORG/NAME"}, {"sha256": "0" * 64}, {"gradients": True}])
def test_a_server_takes_the_place_of_weights(beside: dict[str, Any]) -> None:
    with pytest.raises(SettingsProblem, match=r"not both|no gradients"):
        load_settings(models={"unified-reward": {"remote": SERVER, **beside}})


def test_the_key_comes_from_the_settings_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    named, given = RemoteSettings(**SERVER, api_key_env="JUDGE_KEY"), RemoteSettings(**SERVER, api_key=KEY)
    for settings in (named, given):
        secret = settings.secret()
        assert secret is not None
        assert secret.get_secret_value() == KEY
        assert KEY not in f"{settings!r} {settings.model_dump()} {RemoteChat(settings)!r}"
    assert RemoteSettings(**SERVER).secret() is None
