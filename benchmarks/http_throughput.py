"""HTTP throughput over the offline limit, and behaviour under ten times more clients than the queue holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks import limit, samples
from benchmarks.measures import best, ratio
from benchmarks.plan import Plan, Row
from benchmarks.server import PeakMemory, Server, serve
from service.load_generator import Load, LoadReport, run_load

Step = Callable[[str], None]
SETTINGS = {
    "REWARD_MODELS": f'["{samples.MODEL}"]',
    # images repeat over a run (captions never do): a cache of their features would measure itself
    "REWARD_CACHES__IMAGE_FEATURES_BYTES": "0",
}
TARGET_SINGLE, TARGET_GROUP, TARGET_GOODPUT = 0.90, 0.95, 0.95
MIB = 1 << 20


@dataclass
class Captions:
    """Hands out numbers of captions that nobody has used."""

    used: int = 0

    def fresh(self) -> int:
        self.used += 1_000_000
        return self.used


@dataclass
class Bench:
    """What the parts of one run share: the images, the offline limit and all that was measured of it."""

    plan: Plan
    offline: limit.OfflineLimit
    step: Step
    captions: Captions = field(default_factory=Captions)
    images: list[NDArray[np.uint8]] = field(default_factory=list)
    limits: dict[tuple[samples.Wire, int], dict[limit.Strategy, list[float]]] = field(default_factory=dict)

    def measure_limit(self, wire: samples.Wire, group: int) -> None:
        """Measure the limit once more: all strategies at first, later the two that were best."""
        found = self.limits.setdefault((wire, group), {})
        order = sorted(found, key=lambda strategy: -best(found[strategy]))[:2] or limit.STRATEGIES
        self.step(f"offline limit: {wire}, {group} to a prompt")
        for strategy in order:
            work = limit.work(self.images, wire, group, self.plan.limit_images, self.captions.fresh())
            found.setdefault(strategy, []).append(self.offline.images_per_s(work, wire, strategy))

    def limit_of(self, wire: samples.Wire, group: int) -> tuple[float, limit.Strategy]:
        """The best of all measurements so far, and the strategy that gave it."""
        found = self.limits[wire, group]
        strategy = max(found, key=lambda name: best(found[name]))
        return best(found[strategy]), strategy

    def load(
        self, server: Server, wire: samples.Wire, clients: int, group: int, seconds: float, warmup_s: float
    ) -> tuple[LoadReport, float]:
        """Load a server; the report, and how many cores the server kept busy meanwhile."""
        self.step(f"{clients} clients, {wire}, {group} to a request")
        load = samples.load(self.images, wire, group, self.captions.fresh())
        before = server.cpu_s()
        report, wall_s = asyncio.run(_timed(server.url, load, clients, seconds, warmup_s))
        if report.errors:
            raise RuntimeError(f"the load met errors, so its numbers say nothing: {report.errors}")
        return report, (server.cpu_s() - before) / wall_s


async def _timed(url: str, load: Load, clients: int, seconds: float, warmup_s: float) -> tuple[LoadReport, float]:
    loop = asyncio.get_running_loop()
    started = loop.time()
    report = await run_load(url, load, clients=clients, seconds=seconds, warmup_s=warmup_s)
    return report, loop.time() - started


def throughput(bench: Bench) -> list[Row]:
    """HTTP over the limit: single images at 1, 8 and 64 clients, groups that share a prompt, and the three wires."""
    plan = bench.plan
    loads: list[tuple[samples.Wire, int, int, float | None]] = [
        ("json-jpeg", 1, 1, None),
        ("json-jpeg", 8, 1, None),
        ("json-jpeg", 64, 1, TARGET_SINGLE),
        ("json-png", 64, 1, None),
        ("safetensors", 64, 1, None),
        ("json-jpeg", plan.group_clients, plan.group, TARGET_GROUP),
        ("safetensors", plan.group_clients, plan.group, None),
    ]
    measured: list[tuple[LoadReport, float]] = []
    with serve(SETTINGS) as server:
        for i, (wire, clients, group, _) in enumerate(loads):
            bench.measure_limit(wire, group)
            measured.append(bench.load(server, wire, clients, group, plan.seconds, plan.warmup_s))
            if i + 1 == len(loads) or loads[i + 1][::2] != loads[i][::2]:
                bench.measure_limit(wire, group)
    rows = []
    for (wire, clients, group, target), (report, cores) in zip(loads, measured, strict=True):
        name = f"{clients} clients, {wire}, " + ("single images" if group == 1 else f"groups of {group}")
        limit_rate, strategy = bench.limit_of(wire, group)
        detail = (
            f"{report.images_per_s:.1f} of {limit_rate:.1f} images/s (limit: {strategy}); p50 {ms(report.p50_ms)}, "
            f"p99 {ms(report.p99_ms)}; CPU cores: server {cores:.2f}, client {report.client_cores:.2f}"
        )
        rows.append(
            Row("HTTP over offline limit", name, ratio(report.images_per_s, limit_rate), "ratio", detail, target)
        )
    return rows


def overload(bench: Bench) -> list[Row]:
    """Goodput and memory with ``overload_factor`` times the clients that fill the queue, retrying after Retry-After."""
    plan = bench.plan
    settings = SETTINGS | {
        "REWARD_QUEUE__MAX_COST": str(plan.queue_cost),
        "REWARD_LIMITS__IMAGES_PER_REQUEST": str(plan.queue_cost),
    }
    clients = plan.queue_cost * plan.overload_factor
    section = f"Overload ({clients} clients, queue of {plan.queue_cost})"
    with serve(settings) as server:
        bench.load(server, "json-jpeg", 1, 1, 2.0, 0.5)
        idle = server.rss()
        with PeakMemory(server) as at_peak:
            before, _ = bench.load(server, "json-jpeg", plan.queue_cost, 1, plan.seconds, plan.warmup_s)
        with PeakMemory(server) as overloaded:
            flood, cores = bench.load(server, "json-jpeg", clients, 1, plan.overload_s, plan.overload_warmup_s)
        after, _ = bench.load(server, "json-jpeg", plan.queue_cost, 1, plan.seconds, plan.warmup_s)
    peak = best([before.images_per_s, after.images_per_s])
    goodput = (
        f"{flood.images_per_s:.1f} of {peak:.1f} images/s; p50 {ms(flood.p50_ms)}, p99 {ms(flood.p99_ms)} with "
        f"retries; CPU cores: server {cores:.2f}, client {flood.client_cores:.2f}"
    )
    memory = f"{overloaded.peak / MIB:.0f} of {idle / MIB:.0f} MiB; a full queue alone: {at_peak.peak / MIB:.0f} MiB"
    return [
        Row(section, "goodput over peak", ratio(flood.images_per_s, peak), "ratio", goodput, TARGET_GOODPUT),
        Row(section, "peak memory over idle", ratio(overloaded.peak, idle), "ratio", memory),
        Row(
            section, "attempts answered 429", flood.rejected_fraction, "share", f"{flood.rejected} of {flood.attempts}"
        ),
    ]


def ms(value: float | None) -> str:
    """Milliseconds for people; nothing was measured where there are none."""
    return "no answer" if value is None else f"{value:.0f} ms"
