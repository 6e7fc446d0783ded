"""What a run shows while it trains: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

QUIET_SECONDS = 10.0
"""Of training between two plain lines, at least."""
RECENT = 20
"""Steps over which speed is taken."""


class RunProgress:
    """Steps, images a second, mean reward, share of the time spent waiting for rewards, and the time left.

    Speed and time left are those of the last RECENT steps of this process. ``first_step`` is where it begins.
    """

    def __init__(
        self, title: str, total_steps: int, first_step: int, *, show: bool, console: Console | None = None
    ) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._title, self._total, self._show = title, total_steps, show
        self._recent: deque[tuple[int, float, int]] = deque(maxlen=RECENT + 1)
        self._last_line = -math.inf
        self._bar: Progress | None = None
        if show and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=total_steps, completed=max(first_step, 0), state="")
            self._bar.start()

    def train(self, step: int, numbers: Mapping[str, float | None], *, seconds: float, images: int) -> None:
        self._recent.append((step, seconds, images))
        state = "  ".join(self._state(numbers))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=state)
        elif self._show and (seconds - self._last_line >= QUIET_SECONDS or step == self._total):
            self._last_line = seconds
            self.say(f"{self._title}  step {step}/{self._total}  {state}")

    def evaluation(self, step: int, numbers: Mapping[str, float | None]) -> None:
        if self._show:
            means = {
                name: value for name, value in numbers.items() if name.startswith("eval/") and name.count("/") == 1
            }
            said = "  ".join(f"{name} {_short(value)}" for name, value in means.items())
            self.say(f"{self._title}  step {step}/{self._total}  {said}")

    def event(self, step: int, kind: str, text: str) -> None:
        self.say(f"{self._title}  step {step}/{self._total}  {kind}: {text}")

    def say(self, line: str) -> None:
        """One line above the bar, as it is: no markup, no wrapping."""
        self._console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _state(self, numbers: Mapping[str, float | None]) -> list[str]:
        parts = []
        if (reward := numbers.get("reward/total")) is not None:
            parts.append(f"reward {_short(reward)}")
        (old_step, old_seconds, old_images), (step, seconds, images) = self._recent[0], self._recent[-1]
        if seconds > old_seconds and step > old_step:
            parts.append(f"{(images - old_images) / (seconds - old_seconds):.3g} images/s")
        whole, waited = numbers.get("time/step"), numbers.get("time/reward_wait")
        if whole and waited is not None:
            parts.append(f"reward wait {waited / whole:.0%}")
        if seconds > old_seconds and step > old_step:
            left = (self._total - step) * (seconds - old_seconds) / (step - old_step)
            parts.append(f"{timedelta(seconds=round(left))} left")
        return parts


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
