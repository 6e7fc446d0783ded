"""t7_unifiedreward_text: what the reference programs read in a judge's text, and what ours does.

The references turn what they cannot read into 0, into a tie, or into the first image; ours reports a failure. So each
number is compared twice: with the reference's rule as the fixtures' README tells it (which shows that a difference is
the one we know of), and, for answers in the form that the judge was asked for, with ours. Not compared: formats of
UnifiedReward-Think's own training, scores of two edited images, and a benchmark that asks whether the output is part of
the label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parity.comparing import EXACT, FLOAT64, Comparisons
from models.judging.flex import winner
from models.judging.json_text import find_object
from models.judging.pairs import parse_pair, parse_think, parse_understanding_pair
from models.judging.points import (
    AXES,
    parse_axis_scores,
    parse_final_score,
    parse_rubric,
    parse_score_list,
    parse_score_tag,
)
from models.judging.preferences import best_and_worst
from models.judging.yes_no import yes_probability
from models.parity import Topic, parity_kind

VOTES: Mapping[str | None, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}
_RULE = "as the reference's README has it; where ours fails instead, it gives 0, a tie or the first"
_FORM = "answers in the form asked for"


@parity_kind("t7_unifiedreward_text/text_parse_cases.json")
def text_parse_cases(file: Path) -> Sequence[Topic]:
    """Every parser on every text, also on texts of other judges."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        for check in _CHECKS:
            check(case["text"], case["results"], compare)
    return compare.topics()


def _final_score(text: str, results: dict[str, Any], compare: Comparisons) -> None:
    wanted = results["flow_grpo_final_score"]
    found = re.search(r"Final Score:\s*([1-5](?:\.\d+)?)", text)
    rule = float(found[1]) if found else 0.0
    compare.add("final score: rule", [rule, rule / 5], [wanted["score"], wanted["reward"]], EXACT, _RULE)
    asked_for = re.findall(r"final score", text, re.I) and re.search(
        r"Final Score:\s*(?:[1-4](?:\.\d+)?|5)(?:/5)?\.?[\s*]*$", text
    )
    if asked_for and len(re.findall("Final Score", text)) == 1:
        compare.add("final score", _score(parse_final_score(text).score), wanted["score"], EXACT, _FORM)
    last = re.search(r"\d+", text[text.rfind("Final Score:") :] if "Final Score:" in text else text)
    dpo = results["ur_dpo_point_score"]
    compare.add("last score, whole part: rule", int(last[0]) if last else 0, int(dpo), EXACT, _RULE)
    compare.add("last score, whole part: rule", int(dpo), results["ur_understanding_image_point"], EXACT, _RULE)
    if asked_for:
        compare.add("last score, whole part", int(_score(parse_final_score(text).score)), int(dpo), EXACT, _FORM)


def _score(score: float | None) -> float:
    return float("nan") if score is None else score


def axis_rule(text: str) -> dict[str, float]:
    """Pref-GRPO's reading of "<word> Score (1-5): x": the last of each, 0 to 5.99 accepted."""
    return {key.lower(): float(value) for key, value in re.findall(r"(\w+) Score \(1-5\):\s*([0-5](?:\.\d+)?)", text)}


def _axes(text: str, results: dict[str, Any], compare: Comparisons) -> None:
    wanted, rule = results["pref_grpo_acs_single"], axis_rule(text)
    matched = {key.lower(): value for key, value in wanted["matched_keys"].items()}
    compare.require("axes: rule", rule == matched, _RULE)
    values = [np.float32(rule.get(axis, 0.0)) for axis in AXES]
    compare.add("axes: rule", values, [np.float32(wanted[axis]) for axis in AXES], EXACT, _RULE)
    if _complete(rule):
        compare.add("axes", _listed(text), [matched[axis] for axis in AXES], EXACT, _FORM)


def _complete(scores: Mapping[str, float]) -> bool:
    return all(1 <= scores.get(axis, 0.0) <= 5 for axis in AXES)


def _listed(text: str) -> list[float]:
    outputs = parse_axis_scores(text).outputs
    return [outputs.get(axis, float("nan")) for axis in AXES]


def think_rule(text: str, noun: str) -> str:
    """Pref-GRPO's vote: the first answer tag, wherever it stands, searched for the first candidate's win first."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    said = found[1].strip() if found else ""
    return "first" if f"{noun} 1 is better" in said else "second" if f"{noun} 2 is better" in said else "tie"


def asked_of_think(text: str, noun: str) -> bool:
    """Whether a text has the form that UnifiedReward-Think is asked for, one of the two verdicts alone in one tag."""
    verdict = rf"{noun} [12] is better(?: than {noun} [12])?\.?"
    form = rf"(?:(?!<answer>).)*<answer>\s*{verdict}\s*</answer>\s*"
    return re.fullmatch(form, text, re.DOTALL) is not None


def _think(text: str, results: dict[str, Any], compare: Comparisons) -> None:
    wanted = results["pref_grpo_think"]
    for noun in ("Image", "Video"):
        vote = VOTES[wanted[noun.lower()]]
        compare.add("think: rule", VOTES[think_rule(text, noun)], vote, EXACT, _RULE)
        if asked_of_think(text, noun):
            compare.add("think", _score(parse_think(text, noun=noun).preference), vote, EXACT, _FORM)
    exact = results["ur_think_grpo"]
    for number, preference in ((1, 1.0), (2, 0.0)):
        accuracy, label = exact[f"accuracy_vs_image{number}"], f"Image {number} is better"
        compare.require("think, exact: rule", (exact["extract_answer"] == label) == bool(accuracy), _RULE)
        if accuracy and asked_of_think(text, "Image"):
            compare.add("think", _score(parse_think(text).preference), preference, EXACT, _FORM)


def edit_rule(text: str) -> str:
    """Pref-GRPO's vote of an editing judge: in the answer tag, and if that names no winner in the whole text."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    for said in ([found[1]] if found else []) + [text]:
        for number, vote in (("1", "first"), ("2", "second")):
            if f"edited image {number} is better" in said.lower():
                return vote
    return "tie"


def asked_of_edit(text: str) -> bool:
    """Whether a text has one verdict of an editing judge, and nothing before it that could be another."""
    verdicts = set(re.findall(r"edited image [12] is better", text, re.IGNORECASE))
    return len(verdicts) == 1 and not re.search(r"<answer>\s*tie", text, re.IGNORECASE)


def _edit(text: str, results: dict[str, Any], compare: Comparisons) -> None:
    vote = VOTES[results["pref_grpo_edit_pairwise"]["vote"]]
    compare.add("edit: rule", VOTES[edit_rule(text)], vote, EXACT, _RULE)
    if asked_of_edit(text):
        compare.add("edit", _score(parse_pair(text, noun="Edited image").preference), vote, EXACT, _FORM)


def _pair(text: str, results: dict[str, Any], compare: Comparisons) -> None:
    contained = results["ur_benchmark_contains"]
    for label, wanted in contained.items():
        compare.require("pair: rule", (label in text) == wanted, "substrings")
    for noun in ("Image", "Video"):
        labels = {f"{noun} 1 is better": 1.0, f"{noun} 2 is better": 0.0, "Both images are equally good": 0.5}
        said = [value for label, value in labels.items() if contained[label]]
        if len(said) == 1:
            compare.add("pair", _score(parse_pair(text, noun=noun).preference), said[0], EXACT, _FORM)
        chosen = results[f"ur_dpo_{noun.lower()}_pair_chosen"]
        second = f"{noun} 2 is better than {noun} 1"
        compare.add("pair for DPO: rule", 2 if second in text else 1, chosen, EXACT, _RULE)
        if second in text:
            compare.add("pair", _score(parse_pair(text, noun=noun).preference), 2.0 - chosen, EXACT, _FORM)


def _understanding(text: str, results: dict[str, Any], compare: Comparisons) -> None:
    sentence = text[text.rfind("Overall Judgment") :].split(".")[0]
    for name, suffix in (("image", ""), ("video", " than Answer 1")):
        chosen = results[f"ur_understanding_{name}_pair_chosen"]
        rule = 2 if f"Answer 2 is better{suffix}" in sentence else 1
        compare.add("understanding: rule", rule, chosen, EXACT, _RULE)
        if re.search(r"Overall Judgment.*Answer [12] is better", sentence):
            found = parse_understanding_pair(text).preference
            compare.add("understanding", _score(found), 2.0 - chosen, EXACT, _FORM)


def flex_rule(text: str) -> tuple[int | None, list[tuple[str, int | None]]] | None:
    """Pref-GRPO's overall winner (1, 2 or none) and those of the first categories; None without a JSON object."""
    document = find_object(text)
    if document is None:
        return None
    entries = document.get("categories") or []
    named = [((entry.get("name") or "").strip() or "category", entry.get("cat_winner")) for entry in entries[:3]]
    return _flex_winner(document.get("winner")), [(name, _flex_winner(said)) for name, said in named]


def _flex_winner(said: object) -> int | None:
    named = {int(number) for number in re.findall(r"\b(?:image|video)\s*([12])\b", str(said or ""), re.IGNORECASE)}
    return named.pop() if len(named) == 1 else None


def _flex(text: str, results: dict[str, Any], compare: Comparisons) -> None:
    wanted = results["pref_grpo_flex"]
    if isinstance(wanted, str):
        compare.require("flex: not an object", find_object(text) is None, "the reference raises, ours fails")
        return
    rule, document = flex_rule(text), find_object(text)
    compare.require("flex: JSON", (rule is not None) == wanted["json_found"])
    if rule is None or document is None:
        compare.require("flex: JSON", wanted["overall_winner"] is None and wanted["category_winners"] is None)
        return
    listed = [(name, number) for name, number in wanted["category_winners"]]
    compare.require("flex: rule", rule == (wanted["overall_winner"], listed), _RULE)
    said = [document.get("winner"), *[entry.get("cat_winner") for entry in document.get("categories", [])[:3]]]
    numbers = [wanted["overall_winner"], *[number for _, number in listed]]
    for text_of_winner, number in zip(said, numbers, strict=True):
        if number is not None and "/" not in text_of_winner:
            compare.add("flex: winners", _score(winner(text_of_winner)), 2.0 - number, EXACT, _FORM)


def _score_list(text: str, results: dict[str, Any], compare: Comparisons) -> None:
    wanted = results["pref_grpo_edit_pointwise"]
    document = find_object(text) or {}
    listed = document.get("score")
    listed = listed if isinstance(listed, list) and len(listed) >= 2 else [0.0, 0.0]
    compare.add("list of scores: rule", [float(value) for value in listed[:2]], wanted, EXACT, _RULE)
    if "score" in document and len(document["score"]) == 2:
        found = parse_score_list(text, ("first", "second")).outputs
        compare.add("list of scores", [*found.values()], wanted, EXACT, _FORM)


def _score_tag(text: str, results: dict[str, Any], compare: Comparisons) -> None:
    wanted = results["flow_grpo_qwenvl_score"]
    found = re.search(r"<Score>(\d+)</Score>", text)
    compare.add("score tag: rule", int(found[1]) / 5 if found else 0.0, wanted, EXACT, _RULE)
    if found and 1 <= int(found[1]) <= 5:
        compare.add("score tag", _score(parse_score_tag(text).score) / 5, wanted, EXACT, _FORM)


_CHECKS: tuple[Callable[[str, dict[str, Any], Comparisons], None], ...] = (
    _final_score, _axes, _think, _edit, _pair, _understanding, _flex, _score_list, _score_tag,
)  # fmt: skip


@parity_kind("t7_unifiedreward_text/acs_batches.json")
def acs_batches(file: Path) -> Sequence[Topic]:
    """Batches: the reference fills a missing axis with the batch's mean, ours fails the answer."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        if "raises" in case:
            compare.require("empty batch", not case["texts"] and case["raises"] == "ValueError", "raises there")
            continue
        rules = [axis_rule(text) for text in case["texts"]]
        for axis in AXES:
            known = [rule[axis] for rule in rules if axis in rule]
            fill = sum(known) / len(known) if known else 0.0
            compare.add("axes: rule", [rule.get(axis, fill) for rule in rules], case[axis], FLOAT64, _RULE)
        for text, rule, *values in zip(case["texts"], rules, *[case[axis] for axis in AXES], strict=True):
            if _complete(rule):
                compare.add("axes", _listed(text), values, FLOAT64, _FORM)
    return compare.topics()


@parity_kind("t7_unifiedreward_text/dpo_pair_selection.json")
def dpo_pair_selection(file: Path) -> Sequence[Topic]:
    """Best and worst by score: the reference compares digits as text, which is right for equal lengths only."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        chosen, rejected, wanted = case["chosen_scores"], case["rejected_scores"], case["result"]
        if isinstance(wanted, str):
            mixed = len({type(score) for score in [*chosen, *rejected]}) > 1
            compare.require("mixed types", mixed and wanted == "raises TypeError", "raises there, not here")
            continue
        best, worst = chosen.index(max(chosen)), rejected.index(min(rejected))
        kept = int(chosen[best]) > int(rejected[worst])
        found = (wanted["chosen_index"], wanted["rejected_index"], wanted["kept"])
        compare.require("best and worst: rule", (best, worst, kept) == found, "compared as text")
        scores = (wanted["chosen_score"], wanted["rejected_score"])
        compare.require("best and worst: rule", (chosen[best], rejected[worst]) == scores, "compared as text")
        if len({len(score) for score in [*chosen, *rejected]}) == 1:
            pair = best_and_worst([*map(float, chosen)], [*map(float, rejected)])
            compare.require("best and worst", pair == (found[:2] if wanted["kept"] else None), "scores of equal length")
    return compare.topics()


_RUBRIC = {
    "text_faithfulness": "Text Faithfulness",
    "physical_quality": "Physical and Visual Quality",
    "text_rendering": "Text Rendering",
}


@parity_kind("t7_unifiedreward_text/flow_factory_rational_rewards.json")
def rational_rewards(file: Path) -> Sequence[Topic]:
    """A rubric of 1 to 4: the reference clamps what is outside and leaves out what is missing, ours fails."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        for key, names in (("reward_all", list(_RUBRIC)), ("reward_first_two", list(_RUBRIC)[:2])):
            values = [value for name in names if isinstance(value := case["parsed"][name], float)]
            mean = sum(min(max(value, 1.0), 4.0) for value in values) / max(1, len(values))
            compare.add("rubric: rule", (mean - 1) / 3 if values else 0.0, case[key], FLOAT64, _RULE)
            found = parse_rubric(case["text"], {name: _RUBRIC[name] for name in names})
            if all(1 <= value <= 4 for value in values) and all(case["parsed"][name] is not None for name in names):
                compare.add("rubric", (_score(found.score) - 1) / 3, case[key], FLOAT64, _FORM)
                compare.add("rubric", [found.outputs.get(n, "N/A") == case["parsed"][n] for n in names],
                            [True] * len(names), EXACT, _FORM)  # fmt: skip
    return compare.topics()


@parity_kind("t7_unifiedreward_text/flow_factory_yes_prob.json")
def yes_prob(file: Path) -> Sequence[Topic]:
    """P(yes) over all spellings; the reference's plain form misses "yes" and gives 0 for no verdict at all."""
    compare = Comparisons()
    for case in json.loads(file.read_text("utf-8")):
        found = yes_probability([(token, log_prob) for token, log_prob in case["top_logprobs"]])
        exact = {token: np.exp(log_prob) for token, log_prob in case["top_logprobs"] if token in ("Yes", "No")}
        plain = exact.get("Yes", 0.0) / max(sum(exact.values()), 1e-300)
        compare.add("yes, one spelling: rule", plain, case["plain"], FLOAT64, _RULE)
        if found.status == "ok":
            compare.add("yes, all spellings", _score(found.probability), case["canonicalized"], FLOAT64)
        else:
            compare.add("no verdict", 0.0, case["canonicalized"], EXACT, "a failure here, 0 there")
    return compare.topics()
