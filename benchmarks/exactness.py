"""What neighbours do to a score, and what one image waits, in both invariance modes. Through HTTP, caches off."""

from __future__ import annotations

import json
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor

import httpx

from benchmarks import samples
from benchmarks.http_throughput import SETTINGS, Bench, ms
from benchmarks.measures import largest_difference, ratio, rotations
from benchmarks.plan import Row
from benchmarks.server import Server, serve

MODES = ("exact", "fast")
# a cached feature was computed among other neighbours, and would hide what is measured here
UNCACHED = SETTINGS | {"REWARD_CACHES__TEXT_FEATURES_BYTES": "0"}


def exactness(bench: Bench) -> list[Row]:
    """max |score alone - score among others| over positions, batch sizes and concurrent requests; and latencies."""
    rows: list[Row] = []
    p50: dict[str, float] = {}
    for mode in MODES:
        with serve(UNCACHED | {"REWARD_INVARIANCE": mode}) as server:
            bench.step(f"neighbours, {mode}")
            difference, comparisons = neighbour_difference(server, bench)
            report, _ = bench.load(server, "json-jpeg", 1, 1, bench.plan.seconds, 1.0)
        if report.p50_ms is None:
            raise RuntimeError("no single image was answered within the window")
        p50[mode] = report.p50_ms
        section = "One image and its neighbours"
        rows += [
            Row(section, f"largest score difference, {mode}", difference, "score", f"{comparisons} comparisons; the "
                "score is 100 * cosine", 0.0 if mode == "exact" else None, "at most"),
            Row(section, f"latency of one image, {mode}", report.p50_ms, "ms p50", f"p99 {ms(report.p99_ms)}"),
        ]  # fmt: skip
    detail = f"{p50['exact']:.0f} over {p50['fast']:.0f} ms p50"
    return [*rows, Row(section, "latency exact over fast", ratio(p50["exact"], p50["fast"]), "ratio", detail)]


def neighbour_difference(server: Server, bench: Bench) -> tuple[float, int]:
    """Scores of each sample alone against: every rotation, every smaller batch, and concurrent single requests."""
    count = bench.plan.neighbours
    first = bench.captions.fresh()
    items = [
        {"prompt": samples.caption(first + i), "images": [b64encode(samples.encode(pixels, "json-jpeg")).decode()]}
        for i, pixels in enumerate(bench.images[:count])
    ]

    with httpx.Client(base_url=server.url, timeout=120) as client:

        def score(order: list[int]) -> dict[int, float]:
            body = {"models": {samples.MODEL: 1.0}, "items": [items[i] for i in order]}
            answer = client.post("/score", content=json.dumps(body), headers={"Content-Type": "application/json"})
            results = answer.raise_for_status().json()["results"]
            return {i: float(result["scores"][samples.MODEL][0]) for i, result in zip(order, results, strict=True)}

        alone = {i: score([i])[i] for i in range(count)}
        orders = rotations(count) + [list(range(size)) for size in range(2, count)]
        among = [score(order) for order in orders]
        with ThreadPoolExecutor(count) as pool:
            among += list(pool.map(score, [[i] for i in range(count)]))
    if len({round(value, 6) for value in alone.values()}) < count:
        raise RuntimeError("different samples have equal scores: this comparison would see nothing")
    return largest_difference(alone, among), sum(map(len, among))
