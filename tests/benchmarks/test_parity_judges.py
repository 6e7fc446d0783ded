"""make parity for judges' texts, win rates and preference losses: it agrees, and every number that it reads matters."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.parity.__main__ import main
from benchmarks.parity.comparing import topics_of_npz
from models import parity

RL = Path(__file__).parents[2] / "tests" / "fixtures" / "rl"
FOLDERS = ("t5_pairwise_reward", "t7_unifiedreward_text", "t8_preference_losses")
# Arrays that a reference is given and does not read.
UNREAD = {
    "hpsv3": {"choice_dist"},
    "hpsv3_bt_tied_threshold": set(),
    "hpsv3_btt_tied_threshold": set(),
    "videoalign": {"scores_A", "scores_B"},
    "videoalign_margin": set(),
    "videoalign_scaled": set(),
    "videoalign_reg": {"chosen_label"},
}


def run(folder: Path) -> tuple[int, str]:
    text = io.StringIO()
    return main([str(folder)], Console(file=text, width=200)), text.getvalue()


def changed(name: str, array: Any) -> Any:
    """Numbers a little off and by different amounts: a common one would leave differences of scores as they are."""
    if name == "choice_dist":  # votes matter by their majority alone
        return array * np.array([0, 1], array.dtype)
    if array.dtype.kind in "iu":
        return np.roll(array, 1, axis=-1) if array.size > 1 and len(np.unique(array)) > 1 else array + 1
    wave = np.cos(np.arange(array.size)).reshape(array.shape)
    return (array + 0.05 * wave * (1 + np.abs(array))).astype(array.dtype)


@pytest.mark.parametrize("folder", FOLDERS)
def test_they_agree(folder: str) -> None:
    status, text = run(RL / folder)
    assert status == 0
    assert "nobody handles yet" not in text


@pytest.mark.parametrize("file", sorted((RL / "t8_preference_losses").glob("*.npz")), ids=lambda file: file.stem)
def test_every_array_that_is_changed_is_noticed(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / file.parent.name
    folder.mkdir()
    shutil.copy(file.parent / "index.json", folder)
    with np.load(file) as stored:
        arrays = {key: stored[key] for key in stored.files}
    unnoticed = set()
    for key in arrays:
        np.savez(folder / file.name, **(arrays | {key: changed(key, arrays[key])}))
        try:
            noticed = not all(topic.ok for topic in topics_of_npz(folder / file.name))
        except (ValueError, IndexError, RuntimeError):  # lists that no longer fit are noticed too
            noticed = True
        if not noticed:
            unnoticed.add(key)
    assert unnoticed == UNREAD.get(file.stem, UNREAD.get(file.stem.split("_")[0], set()))


def case_of(cases: Any, name: str) -> Any:
    return next(case for case in cases if case["id"] == name)


def result(name: str, parser: str, *path: Any, value: Any) -> Callable[[Any], None]:
    """A change of one number of one parser's results."""

    def change(document: Any) -> None:
        place = case_of(document, name)["results"]
        for step in (parser, *path)[:-1]:
            place = place[step]
        assert place[(parser, *path)[-1]] != value
        place[(parser, *path)[-1]] = value

    return change


def text(name: str, old: str, new: str) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        case = case_of(document, name)
        assert old in case["text"]
        case["text"] = case["text"].replace(old, new)

    return change


def entry(*path: Any, value: Any) -> Callable[[Any], None]:
    """A change of what stands at a path of the document."""

    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        assert document[path[-1]] != value
        document[path[-1]] = value

    return change


CASES = "t7_unifiedreward_text/text_parse_cases.json"
RATES = "t5_pairwise_reward/pref_grpo_win_rate.json"
CHANGES: list[tuple[str, Callable[[Any], None]]] = [
    (CASES, result("point_ok_int", "flow_grpo_final_score", "score", value=3.0)),
    (CASES, result("point_ten", "flow_grpo_final_score", "reward", value=0.0)),
    (CASES, result("point_ok_dec", "ur_dpo_point_score", value="4")),
    (CASES, result("point_missing", "ur_understanding_image_point", value=0)),
    (CASES, result("acs_ok", "pref_grpo_acs_single", "matched_keys", "Style", value=2.8)),
    (CASES, result("acs_missing_style", "pref_grpo_acs_single", "style", value=3.0)),
    (CASES, result("think_ok_1", "pref_grpo_think", "image", value="second")),
    (CASES, result("answer_both", "pref_grpo_think", "image", value="second")),
    (CASES, result("answer_unclosed", "pref_grpo_think", "video", value="first")),
    (CASES, result("edit_cap", "pref_grpo_edit_pairwise", "vote", value="tie")),
    (CASES, result("answer_tie", "ur_benchmark_contains", "Both images are equally good", value=False)),
    (CASES, result("answer_than", "ur_dpo_image_pair_chosen", value=1)),
    (CASES, result("understanding_overall", "ur_understanding_video_pair_chosen", value=1)),
    (CASES, result("flex_ok", "pref_grpo_flex", "category_winners", 1, 1, value=1)),
    (CASES, result("flex_template_echo", "pref_grpo_flex", "overall_winner", value=None)),
    (CASES, result("flex_truncated", "pref_grpo_flex", "json_found", value=True)),
    (CASES, result("pointwise_strings", "pref_grpo_edit_pointwise", 1, value=8.0)),
    (CASES, result("qwenvl_ok", "flow_grpo_qwenvl_score", value=0.6)),
    (CASES, text("point_ok_int", "Final Score: 4", "Final Score: 3")),
    (CASES, text("think_ok_2", "Image 2 is better", "Image 1 is better")),
    ("t7_unifiedreward_text/acs_batches.json", entry(0, "style", 2, value=3.5)),
    ("t7_unifiedreward_text/acs_batches.json", entry(0, "alignment", 0, value=3.4)),
    ("t7_unifiedreward_text/dpo_pair_selection.json", entry(0, "result", "chosen_index", value=3)),
    ("t7_unifiedreward_text/dpo_pair_selection.json", entry(1, "result", "kept", value=True)),
    ("t7_unifiedreward_text/dpo_pair_selection.json", entry(2, "result", value="raises KeyError")),
    ("t7_unifiedreward_text/flow_factory_rational_rewards.json", entry(0, "reward_all", value=0.7)),
    ("t7_unifiedreward_text/flow_factory_rational_rewards.json", entry(0, "parsed", "text_rendering", value=1.0)),
    ("t7_unifiedreward_text/flow_factory_rational_rewards.json", entry(1, "reward_first_two", value=0.9)),
    ("t7_unifiedreward_text/flow_factory_yes_prob.json", entry(1, "canonicalized", value=0.94)),
    ("t7_unifiedreward_text/flow_factory_yes_prob.json", entry(0, "plain", value=0.83)),
    ("t7_unifiedreward_text/flow_factory_yes_prob.json", entry(3, "canonicalized", value=0.5)),
    (RATES, entry(0, "responses", 0, "model_output", value="<answer>Image 2 is better</answer>")),
    (RATES, entry(0, "overall_reward", 1, value=0.668)),
    (RATES, entry(2, "reward", 7, value=0.072)),
    (RATES, entry(1, "group_advantage", 2, value=0.37)),
    (RATES, entry(8, "responses", 1, "model_output", value="Edited image 1 is better")),
    (RATES, entry(11, "details", "dim_mean_reward", 1, value=0.445)),
    (RATES, entry(11, "details", "overall_reward", 1, value=0.334)),
    (RATES, entry(11, "details", "A. Semantic Alignment & Accuracy", 0, value=0.334)),
    (RATES, entry(12, "details", "dim_rate_flags", 4, value=False)),
    (RATES, entry(14, "reward", 0, value=0.405)),
    (RATES, entry(14, "reward_if_dim_weight_were_respected", 0, value=0.495)),
    (RATES, entry(14, "category_weights", 0, value=1.0)),
    (RATES, entry(15, "overall_weight", value=1.0)),
    (RATES, entry(16, "dim_weight", value=2.0)),
    (RATES, entry(11, "group_advantage", 0, value=1.389)),
    (RATES, entry(17, "reward", 2, value=1.0)),
    (RATES, entry(18, "raises", value="ValueError")),
    (RATES, entry(19, "overall_reward", 0, value=0.0)),
    ("t5_pairwise_reward/flow_factory_pickscore_rank.json", entry("image", 0, "reward", 1, value=0.51)),
    ("t5_pairwise_reward/flow_factory_pickscore_rank.json", entry("video", 0, "frame_scores", 8, value=1.0)),
    ("t8_preference_losses/hpsv2_rank_metrics.json", entry(0, "inversion_score", value=0.51)),
    ("t8_preference_losses/hpsv2_rank_metrics.json", entry(2, "pair_accuracy", value=0.5)),
    ("t8_preference_losses/imagereward_rank_to_pairs.json", entry(1, "pairs_better_worse", 0, value=[0, 1])),
]  # fmt: skip


@pytest.mark.parametrize("name", sorted({name for name, _ in CHANGES}))
def test_a_changed_number_of_a_document_is_off(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    unchanged = (RL / name).read_text("utf-8")
    file.write_text(unchanged, "utf-8")
    assert all(topic.ok for _, topic in parity.run(tmp_path).topics)
    for place, change in [(place, change) for place, (other, change) in enumerate(CHANGES) if other == name]:
        document = json.loads(unchanged)
        change(document)
        file.write_text(json.dumps(document), "utf-8")
        assert parity.run(tmp_path).exit_status == 1, f"change {place} of {name} is not noticed"


def test_losses_that_nobody_knows_are_errors(tmp_path: Path) -> None:
    folder = tmp_path / "t8_preference_losses"
    shutil.copytree(RL / folder.name, folder)
    index = json.loads((folder / "index.json").read_text("utf-8"))
    for name in ("hpsv3_bt", "videoalign_bt"):
        other = {**index, name: {**index[name], "cfg": {**index[name]["cfg"], "loss_type": "new"}}}
        (folder / "index.json").write_text(json.dumps(other), "utf-8")
        with pytest.raises(ValueError, match="unknown loss"):
            topics_of_npz(folder / f"{name}.npz")
