"""``reward-service bench``: what it sends, and the table that it prints."""

from __future__ import annotations

import asyncio
import io
import json
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.load_generator import Load, LoadReport, run_load

JSON = "application/json"
GENERATED_IMAGES = 64
GENERATED_SIDE = 512


def file_load(model: str, prompt: str, files: Sequence[bytes], group: int) -> Load:
    """Requests of ``group`` images each, taken in turn from encoded ``files``, as JSON with base64."""
    encoded = [b64encode(data).decode() for data in files]

    def body(number: int) -> bytes:
        images = [encoded[(number * group + i) % len(encoded)] for i in range(group)]
        return json.dumps({"models": {model: 1.0}, "items": [{"prompt": prompt, "images": images}]}).encode()

    return Load(JSON, group, body)


def generated_images(count: int, side: int = GENERATED_SIDE, seed: int = 0) -> list[NDArray[np.uint8]]:
    """``count`` smooth colour fields with some noise, uint8 [side, side, 3]: they compress about as photographs do."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = PILImage.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), PILImage.Resampling.BICUBIC), dtype=np.int16)
        noise = generator.normal(0, 6, (side, side, 1))
        images.append(np.clip(smooth + noise, 0, 255).astype(np.uint8))
    return images


def generated_files(count: int) -> list[bytes]:
    """``count`` generated images as JPEG files of quality 90."""
    files = []
    for pixels in generated_images(count):
        buffer = io.BytesIO()
        PILImage.fromarray(pixels).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def run_and_print(
    console: Console,
    url: str,
    key: str | None,
    model: str,
    images: Sequence[Path],
    concurrency: Sequence[int],
    group: int,
    seconds: float,
    prompt: str,
) -> None:
    """Load a service at each concurrency and print a table of :class:`LoadReport`."""
    files = [path.read_bytes() for path in images] or generated_files(GENERATED_IMAGES)
    load = file_load(model, prompt, files, group)
    warmup_s = min(2.0, seconds / 4)
    table = Table("clients", "images/s", "requests/s", "p50 ms", "p99 ms", "429", "errors", "client CPU cores",
                  title=f"{model} at {url}, {group} image(s) a request", caption="")  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for clients in concurrency:
            task = progress.add_task(f"{clients} clients", total=warmup_s + seconds)

            def tick(elapsed: float, task: Any = task) -> None:
                progress.update(task, completed=elapsed)

            report = asyncio.run(
                run_load(url, load, clients=clients, seconds=seconds, warmup_s=warmup_s, key=key, on_tick=tick)
            )
            table.add_row(*row(report))
    table.caption = (
        f"{len(files)} different images sent in turn with one prompt: the service's feature caches may answer. "
        "A rejected request (429) is sent again after Retry-After."
    )
    console.print(table)


def row(report: LoadReport) -> list[str]:
    """A report as the cells of a table."""
    latencies = ["-" if value is None else f"{value:.1f}" for value in (report.p50_ms, report.p99_ms)]
    errors = ", ".join(f"{code}: {count}" for code, count in sorted(report.errors.items()))
    return [
        str(report.clients), f"{report.images_per_s:.2f}", f"{report.requests_per_s:.2f}", *latencies,
        f"{report.rejected_fraction:.0%}", errors, f"{report.client_cores:.2f}",
    ]  # fmt: skip
