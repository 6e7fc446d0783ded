"""t2_advantages: flow_grpo's tracker, Flow-Factory's and Pref-GRPO's advantages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity.comparing import (
    EXACT,
    FLOAT32,
    FLOAT64,
    Case,
    Comparisons,
    case_kind,
    register_folder,
)
from models.parity import Topic, parity_kind
from trainer_client.advantages import (
    FLOW_FACTORY,
    PREF_GRPO,
    Scale,
    Spread,
    best_and_worst,
    best_of_group,
    blended,
    check_group_sizes,
    combined_advantages,
    group_advantages,
    group_statistics,
    mean_of_top,
    standardised,
    weighted_sum,
)

_SCALES: dict[str, Scale] = {"groupstd": "group", "globalstd": "batch"}
# Pref-GRPO's rewards of two scores: the suffixes of the scores, and the variables that hold their weights.
_TWO_SCORES = {
    "unifiedreward_flex": ("_overall", "_dim_mean", "OVERALL_WEIGHT", "DIM_WEIGHT"),
    "unifiedreward_edit_pointwise_image_quality": (
        "_dim0", "_dim1", "EDIT_QUALITY_WEIGHT_NATURALNESS", "EDIT_QUALITY_WEIGHT_ARTIFACTS",
    ),
    "unifiedreward_edit_pointwise_instruction_following": (
        "_dim0", "_dim1", "EDIT_IF_WEIGHT_SUCCESS", "EDIT_IF_WEIGHT_OVEREDIT",
    ),
}  # fmt: skip

register_folder("t2_advantages")


@case_kind("per_prompt_tracker")
def per_prompt_tracker(case: Case, compare: Comparisons) -> None:
    rewards, group = case["rewards"], case["group_id"]
    spread = Spread(eps=case.cfg["eps"])
    for name in ("groupstd", "globalstd"):
        found = group_advantages(rewards, group, scale=_SCALES[name], spread=spread)
        compare.add(f"grpo, {name}", found, case[f"adv_grpo_{name}"], FLOAT64)
        compare.add("rwr", rewards, case[f"adv_rwr_{name}"], EXACT)
        if f"adv_sft_{name}" in case:
            compare.add("sft", best_of_group(rewards, group), case[f"adv_sft_{name}"], EXACT)
        if isinstance(case.arrays.get(f"adv_dpo_{name}"), Tensor):
            compare.add("dpo", best_and_worst(rewards, group), case[f"adv_dpo_{name}"], EXACT)
    alone = group_advantages(rewards.flatten(), torch.zeros(rewards.numel()), spread=spread)
    compare.add("no prompt tracking", alone.reshape(rewards.shape), case["adv_no_prompt_tracking"], FLOAT32)
    kept = (group_advantages(rewards, group, scale="batch", spread=spread) != 0).reshape(len(group), -1).any(1)
    compare.add("rows that teach", kept, case["nonzero_mask_globalstd"], EXACT)
    _statistics(case, rewards, group, compare)


def _statistics(case: Case, rewards: Tensor, group: Tensor, compare: Comparisons) -> None:
    statistics = group_statistics(rewards, group)
    compare.add("zero_std_ratio", statistics.zero_std_ratio, case["zero_std_ratio"], FLOAT64)
    compare.add("mean of group std", statistics.std_G.mean(), case["mean_of_group_std"], FLOAT32)
    compare.add("number of prompts", len(statistics.group_G), case["num_unique_prompts"], EXACT)
    compare.add("mean group size", statistics.size_G.double().mean(), case["avg_group_size"], FLOAT64)
    for percent, wanted in zip(case["mean_of_top_percent"], case["mean_of_top"], strict=True):
        compare.add("mean of top", mean_of_top(rewards, group, float(percent)), wanted, FLOAT32)


@parity_kind("t2_advantages/flow_grpo_multi_score.json")
def multi_score(file: Path) -> Sequence[Topic]:
    """The weighted sum of raw scores."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        scores = {name: torch.tensor(values, dtype=torch.float64) for name, values in case["scores"].items()}
        total, ok = weighted_sum(scores, case["weights"])
        compare.add("weighted sum", total, case["avg"], FLOAT64)
        compare.require("all known", bool(ok.all()))
    return compare.topics()


@case_kind("flow_factory_advantage")
def flow_factory_advantage(case: Case, compare: Comparisons) -> None:
    names, group = case.cfg["reward_names"], case["unique_id"]
    rewards = {name: case[f"reward_{name}"] for name in names}
    weights = dict(zip(names, case.cfg["weights"], strict=True))
    spread = Spread(eps=case.cfg["std_floor"], floor=True)
    for key, logged in case.cfg["metrics"].items():
        how, scale = key.split("_")[1], _SCALES[key.split("_")[2]]
        if isinstance(logged, str):
            compare.require("wrong group size raises", _raises(group, case.cfg["group_size"]))
        elif how == "gdpo":
            found = combined_advantages(rewards, weights, group, spread=FLOW_FACTORY)
            compare.add("gdpo", found, case[key], FLOAT32)
        else:
            total, ok = weighted_sum(rewards, weights)
            found = group_advantages(total.float(), group, ok_B=ok, scale=scale, spread=spread)
            compare.add(f"sum, {scale}", found, case[key], FLOAT32)


def _raises(group: Tensor, size: int) -> bool:
    try:
        check_group_sizes(group, size)
    except ValueError:
        return True
    return False


@case_kind("pref_grpo_advantage")
def pref_grpo_advantage(case: Case, compare: Comparisons) -> None:
    names, weights = case.cfg["reward_names"], case.cfg["weights"]
    by_prompt = torch.arange(case.cfg["num_prompts"]).repeat_interleave(case.cfg["num_generations"])
    for key in [key for key in case.arrays if key.startswith("adv_") and "__" not in key]:
        _, scale, how = key.split("_")
        # "global" takes the batch's mean too: the batch is one group.
        group = by_prompt if scale == "group" else torch.zeros_like(by_prompt)
        each = [_pref_grpo_one(case, name, group, gdpo=how == "gdpo") for name in names]
        for name, found in zip(names, each, strict=True):
            compare.add("one reward", found, case[f"{key}__{name}"], FLOAT32)
        terms = [weight * found for weight, found in zip(weights, each, strict=True)]
        total = standardised(terms, spread=PREF_GRPO) if how == "gdpo" else torch.stack(terms).sum(0)
        compare.add(f"{how}, {scale}", total, case[key], FLOAT32)
        if not any(name in _TWO_SCORES for name in names):
            rewards = {name: case[f"in_{name}"] for name in names}
            together = combined_advantages(
                rewards, dict(zip(names, weights, strict=True)), group,
                spread=PREF_GRPO, standardise=how == "gdpo",
            )  # fmt: skip
            compare.add(f"{how}, {scale}", together, case[key], FLOAT32)


def _pref_grpo_one(case: Case, name: str, group: Tensor, *, gdpo: bool) -> Tensor:
    def normalised(suffix: str) -> Tensor:
        return group_advantages(case[f"in_{name}{suffix}"], group, spread=PREF_GRPO)

    # Of these only Flex has an overall score of its own, which it takes without gdpo.
    if name not in _TWO_SCORES or (name == "unifiedreward_flex" and not gdpo):
        return normalised("")
    first, second, weight_first, weight_second = _TWO_SCORES[name]
    environment: dict[str, Any] = case.cfg["env"]
    mask = f"in_{name}_dim_mask"
    return blended(
        normalised(first),
        normalised(second),
        float(environment.get(weight_first, 1)),
        float(environment.get(weight_second, 1)),
        case[mask] if mask in case.arrays else None,
    )


@parity_kind("t2_advantages/INFORMATIONAL_pref_grpo_zero_variance_rounding.json")
def zero_variance(file: Path) -> Sequence[Topic]:
    """Constant groups: the reference divides rounding by rounding, the right answer is 0."""
    compare = Comparisons()
    for row in json.loads(file.read_text("utf-8"))["rows"]:
        rewards = torch.full((row["group_size"],), row["constant_reward"])
        found = group_advantages(rewards, torch.zeros(len(rewards)), spread=PREF_GRPO)
        compare.add("constant groups", found, torch.zeros(len(rewards)), EXACT, "reference gives up to 1, here 0")
    return compare.topics()
