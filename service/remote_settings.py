"""Settings of a server that a judge asks in place of weights of its own."""

from __future__ import annotations

import os
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RemoteSettings(Section):
    """The server that a judge asks in place of its own weights: vLLM, SGLang, or another with OpenAI's chat API."""

    base_url: str = Field(description="http(s)://HOST[:PORT]/v1, without a key")
    model: str = Field(min_length=1, description="name under which the server serves it")
    api_key: SecretStr | None = Field(None, description="sent as a bearer key")
    api_key_env: str | None = Field(None, min_length=1, description="environment variable that holds the key")
    timeout_s: float = Field(60.0, gt=0, le=3600, description="for one whole answer; it is not asked for again")
    connect_timeout_s: float = Field(5.0, gt=0, le=600)
    max_retries: int = Field(3, ge=0, le=20, description="after lost connections, 429, 502, 503, 504")
    concurrency: int = Field(16, ge=1, le=1024, description="requests of one batch at the same time")
    image_format: Literal["png", "jpeg"] = Field("png", description="png is lossless")
    jpeg_quality: int = Field(95, ge=1, le=100)
    videos: Literal["refuse", "frames"] = Field("refuse", description="frames: a video is sent as its frames")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="further fields of every request")

    @field_validator("base_url")
    @classmethod
    def _address_alone(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise ValueError("base_url is no URL") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("base_url is http://HOST/v1 or https://HOST/v1")
        if "@" in parts.netloc:
            raise ValueError("base_url holds no user or password; set api_key or api_key_env")
        if parts.query or parts.fragment:
            raise ValueError("base_url has no query and no fragment")
        return value.rstrip("/")

    @field_validator("extra_body")
    @classmethod
    def _leaves_the_question_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(set(value) & REQUEST_FIELDS):
            raise ValueError(f"extra_body cannot set {', '.join(taken)}: the judge does")
        return value

    @model_validator(mode="after")
    def _one_key(self) -> RemoteSettings:
        if self.api_key is not None and self.api_key_env is not None:
            raise ValueError("api_key or api_key_env, not both")
        self.secret()
        return self

    def secret(self) -> SecretStr | None:
        """The key; raises ValueError where it is empty, no header's text, or its variable is not set."""
        key = self.api_key
        if self.api_key_env is not None:
            if self.api_key_env not in os.environ:
                raise ValueError(f"api_key_env names {self.api_key_env}, which is not set")
            key = SecretStr(os.environ[self.api_key_env].strip())
        if key is not None and not (key.get_secret_value().isascii() and key.get_secret_value().isprintable()):
            raise ValueError("the key holds characters that no header has")
        if key is not None and not key.get_secret_value().strip():
            raise ValueError("the key is empty")
        return key


REQUEST_FIELDS = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "n", "stream",
     "logprobs", "top_logprobs", "echo", "continue_final_message", "add_generation_prompt"}
)  # fmt: skip
"""Of a chat completion: what the judge decides, or what its answer's shape depends on."""
