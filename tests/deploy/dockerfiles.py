"""Dockerfiles as data: instructions, stages, and what a stage is built from."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"

FILES = {"service": "Dockerfile", "trainer": "Dockerfile.trainer"}
"""The file of each image, by the name of its final stage."""


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, with comments dropped and continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines()]


def stages(dockerfile: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name -> (what it is built from, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for name, arguments in instructions(dockerfile):
        if name == "FROM":
            parent, _, stage = arguments.partition(" AS ")
            current = []
            found[stage] = (parent, current)
        else:
            current.append((name, arguments))
    return found


def lineage(dockerfile: str, stage: str) -> list[str]:
    """The stage and the stages below it, down to the base image."""
    found = [stage]
    while (parent := stages(dockerfile)[found[-1]][0]) in stages(dockerfile):
        found.append(parent)
    return found


def copied(dockerfile: str, stage: str) -> list[str]:
    """The arguments of a stage's COPY and ADD."""
    return [arguments for name, arguments in stages(dockerfile)[stage][1] if name in ("COPY", "ADD")]


def environment(dockerfile: str, stage: str) -> dict[str, str]:
    """What a stage's ENV sets."""
    return dict(
        pair.split("=", 1)
        for name, arguments in stages(dockerfile)[stage][1]
        if name == "ENV"
        for pair in arguments.split()
    )
