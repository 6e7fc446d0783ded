"""The runs of ``make bench-rl``: which algorithm, reward and settings; equal budgets of images from one start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.server import ROOT

POLICY = ROOT / "models" / "shapes" / "weights" / "policy"
EXACT, LEARNED = "shapes-oracle", "shapes-clip"


@dataclass(frozen=True)
class Plan:
    """One kind of run: ``reward`` is trained on, by its score or (``judged``) by its comparisons; ``heldout`` are only
    watched; ``settings`` are the algorithm's own."""

    name: str
    algorithm: str
    reward: str
    heldout: tuple[str, ...]
    judged: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name for files."""
        return self.name.replace(", ", "-").replace(" ", "-")

    def configuration(self, url: str, steps: int, seed: int) -> dict[str, Any]:
        """The values of the run's TOML file."""
        common: dict[str, Any] = {
            "prompts": "shapes:train",
            "steps": steps,
            "seed": seed,
            "prompts_per_step": 12,
            "train_batch_size": 64,
            "policy": {"source": str(POLICY), "weights": "full", "max_sequence_length": 0},
            "sampling": {"steps": 10, "batch_size": 96},
            "rewards": {"services": [url], "models": {} if self.judged else {self.reward: 1.0}},
            "optimizer": {"lr": 1e-4},
            "ema": {"decay": 0.0},
            "evaluation": {
                "prompts": "shapes:heldout", "count": 240, "seeds": 2, "every": max(steps // 3, 1),
                "heldout": list(self.heldout),
            },
            "checkpoints": {"every": steps},
            "logging": {"tensorboard": False},
        }  # fmt: skip
        return merged(common, self.settings)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``, section by section."""
    found = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else value
    return found


GRPO: dict[str, Any] = {"group_size": 16, "window": "fast", "window_size": 3, "shared_noise": True}
"""A group starts from one noise: its rewards then differ by the drawn steps alone, which are what is trained."""
NFT: dict[str, Any] = {"group_size": 16, "timestep_fraction": 0.4, "kl_beta": 0.0, "optimizer": {"lr": 2e-4}}
PREF: dict[str, Any] = {**GRPO, "judge": LEARNED}
REFL: dict[str, Any] = {
    "prompts_per_step": 192, "updates_per_step": 2, "train_batch_size": 32, "step_range": [4, 8], "target": 12.0,
    "optimizer": {"lr": 3e-5},
}  # fmt: skip
PLANS = (
    Plan("DiffusionNFT, exact reward", "nft", EXACT, (LEARNED,), settings=NFT),
    Plan("Flow-GRPO, exact reward", "flow-grpo", EXACT, (LEARNED,), settings=GRPO),
    Plan("DiffusionNFT", "nft", LEARNED, (EXACT,), settings=NFT),
    Plan("Flow-GRPO", "flow-grpo", LEARNED, (EXACT,), settings=GRPO),
    Plan("Pref-GRPO", "pref-grpo", LEARNED, (EXACT,), judged=True, settings=PREF),
    Plan("ReFL", "refl", LEARNED, (EXACT,), settings=REFL),
)
