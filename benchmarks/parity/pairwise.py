"""t5_pairwise_reward: win rates of Pref-GRPO from judges' texts, and Flow-Factory's ranks.

The reference counts what it cannot read as a tie. Answers in the form that the judge was asked for vote by our parsers;
the others vote by the reference's rule (:mod:`benchmarks.parity.judge_text`), which shows that nothing else differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity.comparing import EXACT, FLOAT32, FLOAT64, Comparisons, numbers
from benchmarks.parity.judge_text import (
    VOTES,
    asked_of_edit,
    asked_of_think,
    edit_rule,
    flex_rule,
    think_rule,
)
from models.judging.answers import Category, FlexAnswer
from models.judging.flex import parse_flex
from models.judging.pairs import parse_pair, parse_think
from models.judging.preferences import Vote, flex_rates, rank_rewards, win_rates
from models.parity import Topic, parity_kind
from service import tournament
from trainer_client.advantages import PREF_GRPO, blended, group_advantages
from trainer_client.advantages import win_rates as win_rates_of_matrix

_DECIMALS = 3
_NEVER = 0.0
"""What the reference gives a candidate that was never compared; here it has no rate."""


@parity_kind("t5_pairwise_reward/pref_grpo_win_rate.json")
def pref_grpo_win_rate(file: Path) -> Sequence[Topic]:
    """Rewards and advantages of groups, from the texts."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        mode = case["mode"].removesuffix("_partial").replace("edit_pairwise", "edit")
        compare.prefix = f"{mode}: "
        if "raises" in case:
            _failed_request(case, compare)
        elif mode == "flex":
            _flex(case, compare)
        else:
            _verdicts(case, mode, compare)
    return compare.topics()


def _failed_request(case: dict[str, Any], compare: Comparisons) -> None:
    answered = [response for response in case["responses"] if "model_output" in response]
    compare.require("raises there, a failed comparison here", case["raises"] == "KeyError" and not answered)
    compare.require("no rate without an answer", win_rates([(0, 1, None)], case["num_items"]) == [None, None])


def _verdicts(case: dict[str, Any], mode: str, compare: Comparisons) -> None:
    votes: list[Vote] = []
    for response in case["responses"]:
        text = response.get("model_output", "")
        votes.append((response["first_index"], response["second_index"], _vote(text, mode, case, compare)))
    rates = _rates(votes, case["num_items"], compare)
    compare.add("win rate", rates, case["overall_reward"], FLOAT64)
    compare.add("win rate", rates.float(), case["reward"], FLOAT32)
    _advantages(rates, case, compare)


def _vote(text: str, mode: str, case: dict[str, Any], compare: Comparisons) -> float:
    if mode == "edit":
        asked, rule, found = asked_of_edit(text), edit_rule(text), parse_pair(text, noun="Edited image")
    else:
        noun = case.get("modality", "image").capitalize()
        asked, rule, found = asked_of_think(text, noun), think_rule(text, noun), parse_think(text, noun=noun)
    if not asked:
        return VOTES[rule]
    compare.require("answers in the form asked for are read", found.preference is not None)
    return math.nan if found.preference is None else found.preference


def _rates(votes: Sequence[Vote], count: int, compare: Comparisons) -> Tensor:
    """The rates by the three parts of the project that count them, rounded as the reference does."""
    ours = win_rates(votes, count)
    preferences = {(first, second): vote for first, second, vote in votes if vote is not None}
    matrix = tournament.probability_matrix(preferences, count)
    compare.require("service and models agree", _close(ours, tournament.win_rate(matrix)))
    known = torch.tensor([[math.nan if value is None else value for value in row] for row in matrix])
    rate_N, ok_N = win_rates_of_matrix(known.reshape(count, count).double(), decimals=_DECIMALS)
    compare.require("trainer and models agree", ok_N.tolist() == [rate is not None for rate in ours])
    rounded = [_NEVER if rate is None else round(rate, _DECIMALS) for rate in ours]
    compare.add("trainer and models agree", torch.where(ok_N, rate_N, _NEVER), rounded, FLOAT64)
    return torch.tensor(rounded, dtype=torch.float64)


def _close(a: Sequence[float | None], b: Sequence[float | None]) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and abs(x - y) < 1e-12)
        for x, y in zip(a, b, strict=True)
    )


def _advantages(rates: Tensor, case: dict[str, Any], compare: Comparisons) -> None:
    if "group_advantage" not in case:
        return
    wanted = numbers(case["group_advantage"])
    found = group_advantages(rates.float(), torch.zeros(len(rates)), spread=PREF_GRPO)
    if len(rates) == 1:
        compare.require("advantage of one", bool(wanted.isnan().all()) and found.item() == 0, "NaN there, 0 here")
    else:
        # The reference's mean and spread are of float32 win rates near each other.
        compare.add("advantage", found, wanted, FLOAT32)


def _flex(case: dict[str, Any], compare: Comparisons) -> None:
    comparisons = []
    for response in case["responses"]:
        answer = _flex_answer(response["model_output"], compare)
        comparisons.append((response["first_index"], response["second_index"], answer))
    rates = flex_rates(comparisons, case["num_items"], case["category_weights"] or ())
    details = dict(case["details"])
    overall, mean = _rounded(rates.overall), _rounded(rates.dimension_mean)
    compare.add("overall win rate", overall, details.pop("overall_reward"), FLOAT64)
    compare.add("mean over categories", mean, details.pop("dim_mean_reward"), FLOAT64)
    flags = [rate is not None for rate in rates.dimension_mean]
    compare.require("candidates with categories", flags == details.pop("dim_rate_flags"))
    compare.require("categories", set(rates.by_category) == set(details))
    for name, wanted in details.items():
        compare.add("win rate of a category", _rounded(rates.by_category[name]), wanted, FLOAT64)
    weights = case["overall_weight"], case["dim_weight"]
    reward = blended(overall, mean, *weights, torch.tensor(flags))
    note = "the reference loses the weight of the dimensions"
    compare.add("reward", reward, case["reward_if_dim_weight_were_respected"], FLOAT64, note)
    if weights[1] == 1:  # the weight that the reference puts in its place
        compare.add("reward", reward.float(), case["reward"], FLOAT32)
    else:
        # The reference overwrites it with that of the last category.
        places = [*(case["category_weights"] or ()), *[1.0] * len(rates.by_category)]
        lost = blended(overall, mean, weights[0], places[len(rates.by_category) - 1], torch.tensor(flags))
        compare.add("reward, another weight", lost.float(), case["reward"], FLOAT32, note)
    wanted_reward = torch.tensor(case["reward"])
    found = group_advantages(wanted_reward, torch.zeros(len(overall)), spread=PREF_GRPO)
    compare.add("advantage", found, numbers(case["group_advantage"]), FLOAT32)


def _flex_answer(text: str, compare: Comparisons) -> FlexAnswer:
    """Our answer where a winner is named as asked for, the reference's reading elsewhere."""
    found, rule = parse_flex(text), flex_rule(text)
    if rule is None:
        compare.require("no JSON object, no verdict", found.preference is None)
        return FlexAnswer(0.5, "ok")
    overall, listed = rule
    compare.require("names of categories", [name for name, _ in listed] == [c.name for c in found.categories])
    categories = tuple(
        Category(category.name, _merged(category.preference, number))
        for category, (_, number) in zip(found.categories, listed, strict=True)
    )
    return FlexAnswer(_merged(found.preference, overall), "ok", categories)


def _merged(ours: float | None, reference: int | None) -> float:
    if ours is not None:
        return ours
    return 0.5 if reference is None else 2.0 - reference


def _rounded(rates: Sequence[float | None]) -> Tensor:
    values = [_NEVER if rate is None else round(rate, _DECIMALS) for rate in rates]
    return torch.tensor(values, dtype=torch.float64)


@parity_kind("t5_pairwise_reward/flow_factory_pickscore_rank.json")
def flow_factory_pickscore_rank(file: Path) -> Sequence[Topic]:
    """Ranks of groups of images, and of videos by their mean frame score."""
    compare = Comparisons()
    document = json.loads(file.read_text("utf-8"))
    for case in document["image"]:
        compare.add("rank", rank_rewards(case["raw_scores"]), case["reward"], FLOAT32)
    for case in document["video"]:
        frames = torch.split(torch.tensor(case["frame_scores"]), case["frame_counts"])
        means = [scores.mean().item() for scores in frames]
        compare.add("rank of videos", rank_rewards(means), case["reward"], FLOAT32)
        compare.add("rank of videos", len(means), len(case["reward"]), EXACT)
    return compare.topics()
