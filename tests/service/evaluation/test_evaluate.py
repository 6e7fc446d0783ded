"""``reward-service evaluate`` with real models on files of rendered pictures: the numbers are those of the scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy.special import expit
from scipy.stats import kendalltau

from models.base import Candidate, Context
from models.judge import Comparison, Judge, Preference
from models.registry import get_model, load_model
from models.shapes.preferences import TRAINING_SPLIT, admitted_prompt, draw, group
from models.shapes_clip import ShapesClip
from tests.models.fitting.preference_fixtures import (
    STRUCT,
    encoded,
    picture,
    write_images,
    write_json,
    write_lines,
    write_parquet,
    write_tar,
)
from tests.service.evaluation.cases import (
    Pairs,
    Run,
    labelled_by_oracle,
    own_lines,
    pickapic,
    results,
    scores_of,
)
from tests.service.plugins.judges import SHARPNESS


@pytest.fixture(scope="module")
def groups() -> list[tuple[str, list[Image.Image]]]:
    rng = np.random.default_rng(12)
    prompts = [admitted_prompt(rng, TRAINING_SPLIT) for _ in range(6)]
    return [(prompt.text, draw(group(prompt, rng, 4, TRAINING_SPLIT), rng)) for prompt in prompts]


def test_the_oracle_agrees_with_itself_through_every_kind_of_file(run: Run, tmp_path: Path, pairs: Pairs) -> None:
    turned = [(p, b, a) if i % 2 else (p, a, b) for i, (p, a, b) in enumerate(pairs)]
    labels = labelled_by_oracle(turned)
    assert {0.0, 0.5, 1.0} == set(labels)
    members: dict[str, bytes] = {}
    for i, ((prompt, first, second), label) in enumerate(zip(turned, labels, strict=True)):
        fields = {"prompt": prompt, "images": ["0.png", "1.png"], "preference": label}
        members |= {f"{i:03}.json": json.dumps(fields).encode(), f"{i:03}.0.png": encoded(first)}
        members |= {f"{i:03}.1.png": encoded(second)}
    files = [
        own_lines(tmp_path, turned, labels),
        pickapic(tmp_path / "rows.parquet", turned, labels),
        write_tar(tmp_path / "rows.tar", members),
    ]
    for file, headline in zip(files, ("pair_accuracy", "accuracy_with_ties", "pair_accuracy"), strict=True):
        found = results(run("shapes-oracle", "--data", file, "--json"))
        measures = found["measures"]
        assert found["headline"] == headline
        assert (measures["pairs"], measures["ties"]) == (24, labels.count(0.5))
        for name in ("pair_accuracy", "pair_accuracy_by_prompt", "accuracy_with_ties", "accuracy_with_exact_ties"):
            assert (measures[name]["value"], measures[name]["low"], measures[name]["high"]) == (1.0, 1.0, 1.0)
        assert found["data"]["failures"] == found["data"]["unreadable"] == {}


def test_shapes_clip_has_the_accuracy_of_its_scores(run: Run, tmp_path: Path, pairs: Pairs) -> None:
    labels = [1.0, 0.0, 0.5] * 8
    path = own_lines(tmp_path, pairs, labels)
    out = tmp_path / "out"
    found = results(run("shapes-clip", "--data", path, "--out", out, "--json", "--ties-threshold", "0.4"))
    prompts = [prompt for prompt, _, _ in pairs]
    first = np.array(scores_of("shapes-clip", prompts, [image for _, image, _ in pairs]))
    second = np.array(scores_of("shapes-clip", prompts, [image for _, _, image in pairs]))
    probability = expit((first - second) / ShapesClip.info.calibration.temperature)

    right = half = exact = 0.0
    for label, p in zip(labels, probability.tolist(), strict=True):
        right += label != 0.5 and (p > 0.5) == (label > 0.5)
        verdict = 0.5 if abs(2 * p - 1) <= 0.4 else float(p > 0.5)
        exact += verdict == label
        half += 1 if verdict == label else 0.5 if 0.5 in (verdict, label) else 0
    measures = found["measures"]
    assert 0 < right < 16
    assert measures["pair_accuracy"]["value"] == pytest.approx(right / 16)
    assert measures["accuracy_with_ties"]["value"] == pytest.approx(half / 24)
    assert measures["accuracy_with_exact_ties"]["value"] == pytest.approx(exact / 24)
    assert measures["tie_threshold"] == {"value": 0.4, "source": "given"}

    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [line["scores"] for line in lines] == [
        pytest.approx(row, abs=1e-4) for row in zip(first, second, strict=True)
    ]
    assert json.loads((out / "results.json").read_text()) == found


def test_rankings_have_the_agreement_and_tau_of_the_scores(
    run: Run, tmp_path: Path, groups: list[tuple[str, list[Image.Image]]]
) -> None:
    ranks = [4, 1, 2, 3]
    rows = []
    for g, (prompt, images) in enumerate(groups):
        write_images(tmp_path, {f"{g}-{k}.png": image for k, image in enumerate(images)})
        rows.append({"prompt": prompt, "image_path": [f"{g}-{k}.png" for k in range(4)], "rank": ranks})
    path = write_json(tmp_path / "test.json", rows)
    taus, agreements = [], []
    for prompt, images in groups:
        scores = scores_of("shapes-clip", [prompt] * 4, images)
        taus.append(kendalltau(scores, [-rank for rank in ranks]).statistic)
        agreements.append((taus[-1] + 1) / 2)
    for route in ("score", "compare"):
        found = results(run("shapes-clip", "--data", path, "--json", "--route", route))
        measures = found["measures"]
        assert (found["data"]["schema"], found["headline"], found["model"]["route"]) == (
            "hpdv2",
            "ranking_agreement",
            route,
        )
        assert measures["kendall_tau_b"]["value"] == pytest.approx(np.mean(taus))
        assert measures["ranking_agreement"]["value"] == pytest.approx(np.mean(agreements))
        assert (measures["pairs"], measures["ranking_agreement"]["count"]) == (36, 6)
        if route == "compare":
            assert measures["position_bias"]["value"] == pytest.approx(0)
            assert (measures["order_flips"]["value"], measures["order_flips"]["count"]) == (0, 36)


def test_both_routes_of_a_pointwise_model_agree(run: Run, tmp_path: Path, pairs: Pairs) -> None:
    path = pickapic(tmp_path / "rows.parquet", pairs, [1.0, 0.5] * 12)
    by_score = results(run("shapes-clip", "--data", path, "--json"))["measures"]
    by_compare = results(run("shapes-clip", "--data", path, "--json", "--route", "compare"))["measures"]
    for name in ("pair_accuracy", "accuracy_with_ties", "calibration_error"):
        assert by_compare[name] == pytest.approx(by_score[name])


def test_a_judge_of_pairs_is_asked_both_ways_and_its_bias_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias, rng = 1.5, np.random.default_rng(13)
    brightness = rng.integers(60, 190, (12, 2))
    grey = [[Image.new("RGB", (32, 32), (int(v),) * 3) for v in pair] for pair in brightness]
    labels = [1.0, 0.0, 0.5] * 4
    config = tmp_path / "service.yaml"
    config.write_text(
        f"plugins: [tests.service.plugins.judges]\nmodels: {{bright-judge: {{options: {{bias: {bias}}}}}}}\n"
    )
    monkeypatch.setenv("REWARD_CONFIG", str(config))
    path = own_lines(tmp_path, [(f"prompt {i}", *pair) for i, pair in enumerate(grey)], labels)  # type: ignore[arg-type]
    found = results(run("bright-judge", "--data", path, "--json"))
    measures = found["measures"]
    logits = SHARPNESS * (brightness[:, 0] - brightness[:, 1]) / 255
    first_shown, second_shown = expit(logits + bias), expit(logits - bias)
    flips = (np.abs(logits) < bias).mean()
    assert found["model"]["route"] == "compare"
    assert 0 < flips < 1
    assert measures["position_bias"]["value"] == pytest.approx(np.mean(first_shown - second_shown) / 2, abs=1e-5)
    assert measures["order_flips"]["value"] == pytest.approx(flips)
    verdict = first_shown + second_shown > 1
    right = [bool(v) == (label == 1) for v, label in zip(verdict, labels, strict=True) if label != 0.5]
    assert measures["pair_accuracy"]["value"] == pytest.approx(np.mean(right))


def test_a_judge_that_gives_no_verdict_has_no_number_for_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "service.yaml"
    config.write_text("plugins: [tests.service.plugins.judges]\n")
    monkeypatch.setenv("REWARD_CONFIG", str(config))
    light, dark = (Image.new("RGB", (32, 32), (v, v, v)) for v in (200, 50))
    pairs = [("one", light, dark), ("impossible", light, dark), ("three", light, dark)]
    path = own_lines(tmp_path, pairs, [1.0, 1.0, 0.0])
    found = results(run("bright-judge", "--data", path, "--json"))
    assert (found["measures"]["pairs"], found["data"]["without_verdict"]) == (2, 1)
    assert found["measures"]["pair_accuracy"]["value"] == 0.5
    assert sum(found["data"]["failures"].values()) >= 1


def test_a_judge_of_edits_is_asked_with_the_task_of_each_row(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """one-reward cannot be asked without a task; its random network's verdicts are those it gives when asked alone."""
    options = get_model("one-reward").random_checkpoint(tmp_path)
    config = tmp_path / "service.yaml"
    own = {"weights": options.weights, "options": {**options.options, "show_source": True}, "dtype": "float32"}
    config.write_text(json.dumps({"models": {"one-reward": own}}))
    monkeypatch.setenv("REWARD_CONFIG", str(config))
    colors = ("red", "blue", "green")
    write_images(tmp_path, {f"{color}.png": picture(color, size=56) for color in colors})
    contexts: list[dict[str, str] | None] = [
        {"task": "remove", "image": "green.png"},
        {"task": "fill", "criterion": "structure", "image": "green.png", "mask": "blue.png"},
        {"task": "fill", "image": "blue.png", "criterion": "structure"},
        None,
    ]
    rows = [
        {"key": f"row {i}", "prompt": f"prompt {i}", "images": ["red.png", "blue.png"], "preference": float(i != 2)}
        | ({} if context is None else {"context": context})
        for i, context in enumerate(contexts)
    ]
    path, out = write_lines(tmp_path / "edits.jsonl", rows), tmp_path / "out"
    found = results(run("one-reward", "--data", path, "--out", out, "--json"))
    assert (found["measures"]["pairs"], found["data"]["without_verdict"]) == (3, 1)
    assert found["data"]["failures"] == {"template_field_missing": 1}
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [line.get("context") for line in lines] == contexts
    # Of the second and the third row, which differ in their labels, one is a disagreement.
    assert "fill · structure" in (out / "report.html").read_text(encoding="utf-8")
    judge = load_model("one-reward", replace(options, options={**options.options, "show_source": True}))
    assert isinstance(judge, Judge)
    first, second = (Candidate(image=picture(color, size=56)) for color in ("red", "blue"))
    sources = {f"{color}.png": picture(color, size=56) for color in colors}
    for i, context in enumerate(contexts[:3]):
        assert context is not None
        seen = Context(**{name: sources.get(value, value) for name, value in context.items()})  # type: ignore[arg-type]
        orders = []
        for pair in ((first, second), (second, first)):
            (answer,) = judge.compare([judge.prepare_comparison(Comparison(f"prompt {i}", *pair, seen))])
            assert isinstance(answer, Preference)
            orders.append(answer.probability)
        assert lines[i]["pairs"][0]["orders"] == pytest.approx([orders[0], 1 - orders[1]], abs=1e-6)


def test_imagerewarddb_and_hpdv3_end_to_end(run: Run, tmp_path: Path, pairs: Pairs) -> None:
    labels = labelled_by_oracle(pairs)
    decided = [pair for pair, label in zip(pairs, labels, strict=True) if label == 1.0]
    cells, ids, prompts, ranks = [], [], [], []
    for i, (prompt, better, worse) in enumerate(decided):
        cells += [{"bytes": encoded(worse), "path": None}, {"bytes": encoded(better), "path": None}]
        ids, prompts, ranks = [*ids, f"{i}", f"{i}"], [*prompts, prompt, prompt], [*ranks, 2, 1]
        write_images(tmp_path, {f"{i}a.png": better, f"{i}b.png": worse})
    columns = {"image": pa.array(cells, STRUCT), "prompt_id": ids, "prompt": prompts, "rank": ranks}
    image_reward = write_parquet(tmp_path / "reward.parquet", columns)
    rows = [{"prompt": p, "path1": f"{i}a.png", "path2": f"{i}b.png"} for i, (p, _, _) in enumerate(decided)]
    hpdv3 = write_json(tmp_path / "hpdv3.json", rows)
    for file, schema in ((image_reward, "imagerewarddb"), (hpdv3, "hpdv3")):
        found = results(run("shapes-oracle", "--data", file, "--json"))
        assert found["data"]["schema"] == schema
        assert found["measures"]["pair_accuracy"]["value"] == 1.0
        assert found["measures"]["pair_accuracy"]["count"] == len(decided)


def test_the_tie_threshold_is_tuned_on_another_file(run: Run, tmp_path: Path, pairs: Pairs) -> None:
    data = pickapic(tmp_path / "test.parquet", pairs[:12], [1.0] * 12)
    tied = pickapic(tmp_path / "valid.parquet", pairs[12:], [0.5] * 12)
    found = results(run("shapes-clip", "--data", data, "--validation", tied, "--json"))
    threshold = found["measures"]["tie_threshold"]
    prompts, better, worse = (list(column) for column in zip(*pairs[12:], strict=True))
    differences = np.subtract(scores_of("shapes-clip", prompts, better), scores_of("shapes-clip", prompts, worse))
    gap = np.abs(2 * expit(differences / ShapesClip.info.calibration.temperature) - 1)
    credit = [np.mean(np.where(gap <= k / 10, 1.0, 0.5)) for k in range(11)]
    assert threshold == {"value": pytest.approx(int(np.argmax(credit)) / 10), "source": "tuned on valid.parquet"}
    assert threshold["value"] > 0


def test_a_limit_draws_the_same_rows_again(run: Run, tmp_path: Path, pairs: Pairs) -> None:
    path = own_lines(tmp_path, pairs, [1.0] * 24)
    keys = []
    for seed in ("1", "1", "2"):
        out = tmp_path / f"out{len(keys)}"
        found = results(run("shapes-oracle", "--data", path, "--limit", "7", "--seed", seed, "--out", out, "--json"))
        assert (found["data"]["asked"], found["data"]["rows"]) == (7, 24)
        keys.append([json.loads(line)["key"] for line in (out / "rows.jsonl").read_text().splitlines()])
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] == sorted(keys[0], key=int)
