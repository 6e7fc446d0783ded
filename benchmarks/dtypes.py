"""bfloat16 against float32, and torch.compile against plain torch: speed of the towers and agreement of the ranking."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from PIL import Image as PILImage

from benchmarks import limit, samples
from benchmarks.http_throughput import Bench
from benchmarks.measures import kendall_tau, ratio, top1_agreement
from benchmarks.plan import Row
from models.base import LoadOptions
from models.registry import list_models, load_model
from models.towers import TowerReward

SECTION = "dtype and compilation on this device"


def load_tower(name: str, dtype: torch.dtype) -> TowerReward:
    """A tower model; raises TypeError for another kind."""
    model = load_model(name, LoadOptions(dtype=dtype))
    if not isinstance(model, TowerReward):
        raise TypeError(f"{name} has no towers")
    return model


def dtypes(bench: Bench) -> list[Row]:
    """Images per second of both towers in bf16 over fp32, each at its best batch; rank agreement on photographs."""
    rows: list[Row] = []
    bench.step("fp32 and bf16 towers")
    full = bench.offline
    half = limit.OfflineLimit(load_tower(samples.MODEL, torch.bfloat16))
    full.calibrate()
    half.calibrate()
    for tower in ("image", "text"):
        fast = {name: 1 / min(o.seconds_per_row[tower].values()) for name, o in (("fp32", full), ("bf16", half))}
        detail = ", ".join(
            f"{name} {fast[name]:.1f}/s best, {1000 * offline.seconds_per_row[tower][1]:.0f} ms alone"
            for name, offline in (("fp32", full), ("bf16", half))
        )
        rows.append(Row(SECTION, f"{tower} tower, bf16 over fp32", ratio(fast["bf16"], fast["fp32"]), "ratio", detail))
    photos = samples.crops(bench.plan.rank_images, seed=1)
    prompts = [samples.caption(i) for i in range(bench.plan.rank_prompts)]
    for name in [samples.MODEL, *(["shapes-clip"] if "shapes-clip" in list_models() else [])]:
        bench.step(f"rank agreement: {name}")
        tables = [
            score_table(load_tower(name, dtype), [PILImage.fromarray(pixels) for pixels in photos], prompts)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        taus = [kendall_tau(a, b) for a, b in zip(*tables, strict=True)]
        detail = f"{len(photos)} photographs under {len(prompts)} prompts; worst prompt {min(taus):.3f}"
        rows.append(Row(SECTION, f"Kendall tau of bf16 and fp32, {name}", statistics.fmean(taus), "mean", detail))
        agreement = top1_agreement(*tables)
        rows.append(Row(SECTION, f"same best image in bf16 and fp32, {name}", agreement, "share", "of the prompts"))
    return rows


@torch.inference_mode()
def score_table(
    model: TowerReward, photos: Sequence[PILImage.Image], prompts: Sequence[str], batch: int = 8
) -> list[list[float]]:
    """Scores of all photos (columns) under all prompts (rows)."""
    prepared = [model.prepare_image(photo) for photo in photos]
    images = torch.cat(
        [model.encode_image(model.normalize(torch.stack(list(part)))) for part in limit.chunks(prepared, batch)]
    )
    texts = [model.encode_text(model.prepare_text(prompt)[0][None]) for prompt in prompts]
    return [model.head(images, text.expand(len(images), -1)).score_B.tolist() for text in texts]


@torch.inference_mode()
def compilation(bench: Bench) -> list[Row]:
    """torch.compile over plain torch for the image tower, in batches of 8."""
    bench.step("torch.compile (minutes)")
    model = bench.offline.model
    side = limit.input_side(model)
    pixels = torch.rand(8, 3, side, side)
    plain_s = limit.seconds(model.encode_image, pixels, repeats=5)
    compiled_s = limit.seconds(torch.compile(model.encode_image, dynamic=False), pixels, repeats=5)
    plain_s = min(plain_s, limit.seconds(model.encode_image, pixels, repeats=5))
    detail = f"{8 / compiled_s:.1f} over {8 / plain_s:.1f} images/s, float32, batch 8"
    return [Row(SECTION, "image tower, compiled over plain", ratio(plain_s, compiled_s), "ratio", detail)]
