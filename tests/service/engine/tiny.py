"""Small reward models with random weights for the engine's tests, and what is needed to run them.

They are written here, and not taken from ``models``, because the tests watch which batches reach them and make them
fail at a chosen moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor, nn

from models import registry
from models.base import (
    Calibration,
    Candidate,
    LoadOptions,
    Output,
    RewardInfo,
    RewardModel,
    Sample,
    SampleError,
)
from models.towers import (
    HeadOutput,
    TowerReward,
)
from models.weights import hash_tensors
from service.engine.batcher import Batcher
from service.engine.engine import Engine
from service.engine.features import FeatureCache
from service.engine.request import Made, Maker, SampleResult
from service.engine.worker import Worker, WorkerOptions
from service.settings import Settings
from service.telemetry import Telemetry

SIZE = 32
PATCH = 8
WIDTH = 64
TEXT_LENGTHS = (8, 24)
CPU = torch.device("cpu")
DOUBLES = {"float64": torch.float64}


def info(name: str, *, differentiable: bool = False) -> RewardInfo:
    return RewardInfo(
        name=name,
        description="random weights, for tests",
        kind="pointwise",
        inputs=("prompt", "image"),
        range=(-10.0, 10.0),
        citation="none",
        license="none",
        calibration=Calibration(1.0, "none"),
        differentiable=differentiable,
        options=("seed", "broken", "note"),
        hidden=True,
    )


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        q, k, v = self.qkv(self.norm_1(x_BLD)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x_BLD = x_BLD + self.out(attended)
        return x_BLD + self.down(F.gelu(self.up(self.norm_2(x_BLD))))


class Towers(nn.Module):
    """A vision and a text transformer of one block, and an MLP head on their features."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.tokens = nn.Embedding(256, WIDTH)
        self.vision, self.text = Block(WIDTH), Block(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))


class TinyTower(TowerReward):
    """A complete two-tower reward. ``before_image`` and ``before_text`` see each batch that reaches a tower."""

    info: ClassVar[RewardInfo] = info("tiny-tower", differentiable=True)

    def __init__(self, towers: Towers, weights_hash: str, dtype: torch.dtype, device: torch.device) -> None:
        self.towers, self.weights_hash, self.dtype, self.device = towers, weights_hash, dtype, device
        self.image_key = self.text_key = f"{weights_hash}/tiny/{self.preprocessing}"
        self.before_image: Callable[[Tensor], None] = lambda batch: None
        self.before_text: Callable[[Tensor], None] = lambda batch: None
        self.image_batches: list[int] = []
        self.text_batches: list[int] = []

    @classmethod
    def load(cls, options: LoadOptions) -> TinyTower:
        if options.options.get("broken"):
            raise OSError("the weights are on strike")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(options.options.get("seed", 0)))
            towers = Towers().requires_grad_(False).eval()
        weights_hash = hash_tensors(towers.state_dict())
        return cls(towers.to(options.device, options.dtype), weights_hash, options.dtype, options.device)

    def prepare_image(self, image: PILImage.Image) -> Tensor:
        small = image.convert("RGB").resize((SIZE, SIZE), PILImage.Resampling.BOX)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()

    def prepare_text(self, prompt: str) -> tuple[Tensor, tuple[str, ...]]:
        longest = TEXT_LENGTHS[-1]
        data = prompt.encode()[:longest]
        length = next(length for length in TEXT_LENGTHS if length >= len(data))
        tokens = torch.zeros(length, dtype=torch.int64)
        tokens[: len(data)] = torch.tensor(list(data), dtype=torch.int64)
        return tokens, ("prompt_truncated",) if len(prompt.encode()) > longest else ()

    def normalize(self, pixels_B3SS: Tensor) -> Tensor:
        pixels = pixels_B3SS.float() / 255 if pixels_B3SS.dtype == torch.uint8 else pixels_B3SS
        return ((pixels - 0.5) / 0.25).to(self.dtype)

    def encode_image(self, pixels_B3SS: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.image_batches.append(len(pixels_B3SS))
            self.before_image(pixels_B3SS)
        return self.towers.vision(self.towers.patches(pixels_B3SS).flatten(2).transpose(1, 2)).mean(1)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.text_batches.append(len(tokens_BL))
            self.before_text(tokens_BL)
        return self.towers.text(self.towers.tokens(tokens_BL)).mean(1)

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        joined = torch.cat([image_features_BD, text_features_BD], dim=-1)
        score = self.towers.mlp(joined).squeeze(-1)
        cosine = F.cosine_similarity(image_features_BD.float(), text_features_BD.float(), dim=-1)
        return HeadOutput(score if score.dtype == torch.float64 else score.float(), {"cosine": cosine})

    def preprocess_tensor(self, pixels_B3HW: Tensor) -> Tensor:
        return self.normalize(F.adaptive_avg_pool2d(pixels_B3HW, SIZE))


class TinyOther(TinyTower):
    """The same towers under another name: equal keys, so features are shared."""

    info: ClassVar[RewardInfo] = info("tiny-other", differentiable=True)


class SigmoidHead(TinyTower):
    """A tower whose head ends in a sigmoid, as many rewards do."""

    info: ClassVar[RewardInfo] = info("sigmoid-head")

    def head(self, image_features_BD: Tensor, text_features_BD: Tensor) -> HeadOutput:
        return HeadOutput(torch.sigmoid(super().head(image_features_BD, text_features_BD).score_B))


class Plain(RewardModel):
    """Not a tower: the score is a sum over the prompt's bytes; ``before_run`` sees each batch of prompts."""

    info: ClassVar[RewardInfo] = info("plain")

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.before_run: Callable[[Sequence[str]], None] = lambda batch: None
        self.before_prepare: Callable[[Sample], None] = lambda sample: None
        self.answer: Callable[[str], Any] = lambda prompt: Output(float(sum(prompt.encode())))

    @classmethod
    def load(cls, options: LoadOptions) -> Plain:
        return cls()

    def prepare(self, sample: Sample) -> str:
        self.before_prepare(sample)
        return sample.prompt

    def run(self, batch: Sequence[str]) -> Sequence[Output | SampleError]:
        self.batches.append(list(batch))
        self.before_run(batch)
        return [self.answer(prompt) for prompt in batch]


class PlainOther(Plain):
    info: ClassVar[RewardInfo] = info("plain-other")


class PlainDevice(Plain):
    """Like a VLM: not a tower, but it computes on the device, so the engine pads its batches."""

    info: ClassVar[RewardInfo] = info("plain-device")
    uses_device: ClassVar[bool] = True


class PlainDeviceOther(PlainDevice):
    info: ClassVar[RewardInfo] = info("plain-device-other")


ALL: tuple[type[RewardModel], ...] = (
    TinyTower, TinyOther, SigmoidHead, Plain, PlainOther, PlainDevice, PlainDeviceOther,
)  # fmt: skip


def register_all(monkeypatch: Any) -> None:
    """Add the models to the registry for one test."""
    for model in ALL:
        monkeypatch.setitem(registry._REGISTRY, model.info.name, model)


def picture(seed: int, height: int = SIZE, width: int = SIZE) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def sample(seed: int, prompt: str) -> Sample:
    return Sample(prompt, Candidate(image=picture(seed)))


def maker(seed: int = 0, prompt: str = "a cat") -> Maker:
    return lambda: Made(sample(seed, prompt))


def make_worker(
    name: str = "tiny-tower",
    *,
    micro_batch: int = 8,
    invariance: Literal["exact", "fast"] = "exact",
    compile: str = "off",
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    cache_bytes: int = 1 << 20,
    caches: tuple[FeatureCache, FeatureCache] | None = None,
    telemetry: Telemetry | None = None,
    load: bool = True,
    **options: Any,
) -> Worker:
    """A loaded worker without a lane: its batches run on the calling thread."""
    telemetry = telemetry or Telemetry()
    batcher = Batcher(name, max_cost=1024, max_delay_s=0.0, wakeup=threading.Condition(), telemetry=telemetry)
    caches = caches or (FeatureCache("image", cache_bytes, telemetry), FeatureCache("text", cache_bytes, telemetry))
    load_options = LoadOptions(device, dtype, None, options)
    worker = Worker(
        WorkerOptions(name, load_options, micro_batch, invariance, compile, 60.0), batcher, caches, telemetry
    )
    if load:
        worker.load()
    return worker


def scores(worker: Worker, samples: Sequence[Sample]) -> list[float]:
    """Scores of one batch, as the lane would compute them; raises the error of a sample that failed."""
    outcomes = worker._bisect("score", [worker.prepare(entry, "score") for entry in samples])
    numbers = []
    for outcome in outcomes:
        if isinstance(outcome, SampleError):
            raise outcome
        assert isinstance(outcome, Output)
        numbers.append(outcome.score)
    return numbers


def settings(*models: str, **changes: Any) -> Settings:
    return Settings(models=list(models), device="cpu", dtype="float32", **changes)


@contextlib.asynccontextmanager
async def serving(chosen: Settings, fatal: Callable[[str], None] | None = None) -> AsyncIterator[Engine]:
    """A started engine; fails the test on a fatal error that it did not ask for."""
    reasons: list[str] = []
    engine = Engine(chosen, Telemetry(), fatal or reasons.append)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()
    assert not reasons


async def ask(
    engine: Engine, models: Sequence[str], makers: Sequence[Maker], *, seconds: float = 20.0, job: Any = "score"
) -> list[SampleResult]:
    results, _ = await engine.submit(models, makers, job=job, deadline=time.monotonic() + seconds)
    return results


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition that another thread brings about; fails when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        await asyncio.sleep(0.002)


def png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
