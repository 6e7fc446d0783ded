"""shapes-judge before and beside its weights: tokenizer, data with known truth, reasons, and that training teaches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.backbones.qwen2_vl import encode_patches
from models.backbones.vlm import LocalChat
from models.base import Candidate, LoadOptions
from models.judge import Comparison, Preference
from models.judging.pairs import parse_think
from models.judging.templates import load_template
from models.shapes.judge import (
    END_TOKEN,
    IMAGE_SIZE,
    PATCH_SIZE,
    build_model,
    build_processor,
    build_tokenizer,
    load,
    save,
)
from models.shapes.judge_data import (
    IGNORED,
    Examples,
    ScenePair,
    deciding_examples,
    describe_examples,
    examples,
    random_pair,
    reasoning_examples,
    text_first_examples,
    think_examples,
    yes_no_examples,
)
from models.shapes.judge_evaluation import draw_pairs, held_out_pairs, text_first_probabilities, yes_probabilities
from models.shapes.judge_text import BEST, WORDS, check_reasons, describe, findings, points, reasons, think_answer
from models.shapes.oracle import examine
from models.shapes.preferences import TRAINING_SPLIT
from models.shapes.rules import explain
from models.shapes.scenes import random_scene, truth
from models.shapes.train_judge import JudgeConfig, answer_loss, optimizers, rate
from models.shapes.world import render
from models.shapes_judge import ShapesJudge

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def some_pairs(count: int, seed: int = 5) -> list[ScenePair]:
    rng = np.random.default_rng(seed)
    return [random_pair(rng, TRAINING_SPLIT) for _ in range(count)]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=80))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_each_word_is_one_token() -> None:
    # The end of a line is cut off before words are looked up.
    assert [word for word in WORDS if len(TOKENIZER(word).input_ids) != 1] == [".\n"]


def test_prompts_and_answers_need_no_bytes() -> None:
    for pair in some_pairs(50):
        ids = TOKENIZER(pair.prompt.text).input_ids + TOKENIZER(think_answer(pair.prompt, pair.scenes)).input_ids
        pieces = [TOKENIZER.decode([entry]) for entry in ids]
        assert not [piece for piece in pieces if len(piece) == 1 and piece.isalpha() and piece != "a"]


def test_labels_are_those_of_the_oracle_that_sees_only_pixels() -> None:
    for pair in some_pairs(40):
        seen = [points(pair.prompt, examine(pair.prompt, render(scene, 96))[1]) for scene in pair.scenes]
        assert (seen[0] > seen[1]) == pair.first_is_better
        assert seen[0] != seen[1]
        assert pair.swapped().first_is_better != pair.first_is_better


def test_the_better_picture_stands_at_either_place_equally_often() -> None:
    first = [pair.first_is_better for pair in some_pairs(400, seed=8)]
    # Four standard deviations of a fair coin.
    assert abs(sum(first) - 200) < 40


def test_held_out_prompts_out_of_domain_are_never_trained() -> None:
    assert not any(TRAINING_SPLIT.admits(pair.prompt) for pair in held_out_pairs(40, out_of_domain=True))
    assert all(TRAINING_SPLIT.admits(pair.prompt) for pair in held_out_pairs(40))


def test_the_answer_is_read_as_written_and_its_reasons_are_true() -> None:
    for pair in some_pairs(60):
        answer = parse_think(think_answer(pair.prompt, pair.scenes))
        assert answer.preference == float(pair.first_is_better)
        checks = check_reasons(answer.reasons or "", pair.prompt, pair.scenes)
        assert len(checks) >= 6
        assert all(checks)


def test_reasons_about_other_pictures_are_found_false() -> None:
    for pair in some_pairs(60):
        swapped = pair.swapped()
        assert not all(check_reasons(reasons(pair.prompt, pair.scenes), pair.prompt, swapped.scenes))


def test_each_kind_of_false_statement_counts_as_one() -> None:
    pair = next(pair for pair in some_pairs(50) if all(scene.objects for scene in pair.scenes))
    said = reasons(pair.prompt, pair.scenes)
    first, second = said.splitlines()
    assert check_reasons(first, pair.prompt, pair.scenes).count(False) == 1
    assert check_reasons(f"{said}\nBoth are fine.", pair.prompt, pair.scenes).count(False) == 1
    true_points = int(first.rsplit(" ", 1)[1].split("/")[0])
    other = (true_points + 1) % (BEST + 1)
    lied = f"{first.rsplit(' ', 1)[0]} {other}/{BEST}\n{second}"
    assert check_reasons(lied, pair.prompt, pair.scenes).count(False) == 1
    assert check_reasons("", pair.prompt, pair.scenes) == [False, False]


def test_only_the_answer_is_learned(processor: Any) -> None:
    pairs, question = some_pairs(4), load_template("shapes_judge").text
    batch = think_examples(processor, pairs, question, np.random.default_rng(0))
    for row, pair in zip(batch.targets, pairs, strict=True):
        learned = processor.tokenizer.decode(row[row != IGNORED])
        assert learned == think_answer(pair.prompt, pair.scenes) + "<|im_end|>"
    assert torch.equal(batch.weights > 0, batch.targets != IGNORED)


def test_yes_is_said_of_a_better_second_picture(processor: Any) -> None:
    pairs, question = some_pairs(8), load_template("shapes_judge_yes_no").text
    batch = yes_no_examples(processor, pairs, question, np.random.default_rng(0))
    said = [processor.tokenizer.decode(row[row != IGNORED][:1]) for row in batch.targets]
    assert said == ["no" if pair.first_is_better else "yes" for pair in pairs]
    assert len(set(said)) == 2


def test_the_folder_answers_as_the_trained_network_did(processor: Any, tmp_path: Path) -> None:
    """Training's own short path to the logits, and transformers' with left padding and its own positions."""
    torch.manual_seed(3)
    model = build_model(processor.tokenizer).eval()
    save(model, processor, tmp_path)
    read, read_processor = load(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000_000
    pairs = held_out_pairs(6)
    images = draw_pairs(pairs)
    asked = yes_probabilities(read, read_processor, [pair.prompt.text for pair in pairs], images)
    batch = yes_no_examples_of(processor, pairs, images)
    side = IMAGE_SIZE // PATCH_SIZE
    with torch.inference_mode():
        embeddings = read.get_input_embeddings()(batch.ids)
        tokens = encode_patches(read.model.visual, batch.patches, side, side).flatten(0, 1)
        embeddings = embeddings.masked_scatter((batch.ids == read.config.image_token_id)[..., None], tokens)
        hidden = read.model.language_model(inputs_embeds=embeddings, position_ids=batch.positions).last_hidden_state
        starts = (batch.targets != IGNORED).int().argmax(1)
        yes, no = (processor.tokenizer(word).input_ids[0] for word in ("yes", "no"))
        logits = read.lm_head(hidden)[torch.arange(len(pairs)), starts][:, [yes, no]]
    torch.testing.assert_close(torch.tensor(asked), logits.softmax(-1)[:, 0], atol=1e-5, rtol=0)
    assert len({len(pair.prompt.text.split()) for pair in pairs}) > 1
    assert torch.tensor(asked).std() > 1e-4


def yes_no_examples_of(processor: Any, pairs: list[ScenePair], images: list[Any]) -> Examples:
    """Rows of given pictures."""
    question = load_template("shapes_judge_yes_no")
    asked = [question.fill(prompt=pair.prompt.text) for pair in pairs]
    return examples(processor, asked, ["yes"] * len(pairs), [image for both in images for image in both], 2)


def test_a_few_steps_teach(processor: Any) -> None:
    torch.manual_seed(0)
    config, rng = JudgeConfig(), np.random.default_rng(1)
    scenes = [random_scene(rng, int(rng.integers(1, 5)), TRAINING_SPLIT) for _ in range(24)]
    learned = describe_examples(processor, scenes[:16], rng)
    unseen = describe_examples(processor, scenes[16:], rng)
    model = build_model(processor.tokenizer).train()
    chosen = optimizers(model, config)
    with torch.no_grad():
        before = answer_loss(model, unseen).item()
    for _ in range(12):
        for optimizer in chosen:
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(answer_loss(model, learned))
        for optimizer in chosen:
            optimizer.step()
    with torch.no_grad():
        assert answer_loss(model, unseen).item() < 0.7 * before


def test_every_parameter_has_one_optimizer(processor: Any) -> None:
    model = build_model(processor.tokenizer)
    held = [
        id(p) for optimizer in optimizers(model, JudgeConfig()) for g in optimizer.param_groups for p in g["params"]
    ]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_the_rate_rises_holds_and_falls_to_nothing() -> None:
    rates = [rate(step, 100, 10, 0.5) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0.0


def test_the_last_stage_learns_what_follows_from_descriptions() -> None:
    """Its pieces are the answer, token for token; in words alone, what only pictures tell counts for nothing."""
    processor = build_processor()
    pairs = some_pairs(8)
    question = load_template("shapes_judge").text
    shown = reasoning_examples(processor, pairs, question, np.random.default_rng(0), with_images=True)
    told = reasoning_examples(processor, pairs, question, np.random.default_rng(0), with_images=False)
    assert told.patches.numel() == 0
    assert shown.patches.shape[0] == 2 * len(pairs)
    for i, pair in enumerate(pairs):
        whole = processor.tokenizer(think_answer(pair.prompt, pair.scenes) + END_TOKEN).input_ids
        for batch in (shown, told):
            assert batch.targets[i][batch.targets[i] != IGNORED].tolist() == whole
        counted = told.targets[i][told.weights[i] > 0.1].tolist()
        text = processor.tokenizer.decode(counted)
        assert explain(pair.prompt, truth(pair.scenes[0])) in text
        assert describe(pair.scenes[0]) not in text
        winner = processor.tokenizer(" 1" if pair.first_is_better else " 2").input_ids[0]
        heaviest = told.targets[i][told.weights[i] == told.weights[i].max()].tolist()
        assert heaviest == [winner]


def test_the_one_word_of_a_decision_counts_most() -> None:
    processor = build_processor()
    pairs = some_pairs(8)
    question = load_template("shapes_judge_yes_no").text
    batch = deciding_examples(processor, pairs, question, np.random.default_rng(0))
    for i, pair in enumerate(pairs):
        place = int(batch.weights[i].argmax())
        assert processor.tokenizer.decode([int(batch.targets[i][place])]) == ("no" if pair.first_is_better else "yes")


def test_text_first_says_one_word_and_then_why() -> None:
    processor = build_processor()
    pairs = some_pairs(8)
    question = load_template("shapes_judge_text_first").text
    batch = text_first_examples(processor, pairs, question, np.random.default_rng(0))
    for i, pair in enumerate(pairs):
        learned = processor.tokenizer.decode(batch.targets[i][batch.targets[i] != IGNORED])
        word = "no" if pair.first_is_better else "yes"
        assert learned == f"{word}.\n{findings(pair.prompt, pair.scenes)}<|im_end|>"
        assert processor.tokenizer.decode([int(batch.targets[i][int(batch.weights[i].argmax())])]) == word


def test_text_first_is_trained_as_the_product_asks_it(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the training and evaluation against the judge itself, whose blocks are cached."""
    torch.manual_seed(3)
    save(build_model(processor.tokenizer).eval(), processor, tmp_path)
    model, read_processor = load(tmp_path)
    pairs = held_out_pairs(12)
    images = draw_pairs(pairs)
    prompts = [pair.prompt.text for pair in pairs]
    expected = text_first_probabilities(model, read_processor, prompts, images)
    # The judge sums the spellings of a word; training knows one.
    monkeypatch.setattr(LocalChat, "spellings", lambda self, word: tuple(processor.tokenizer(word).input_ids))
    judge = ShapesJudge.load(LoadOptions(weights=str(tmp_path), options={"mode": "text_first"}))
    asked = [
        Comparison(prompt, *(Candidate(image=image) for image in both))
        for prompt, both in zip(prompts, images, strict=True)
    ]
    found = judge.compare([judge.prepare_comparison(comparison) for comparison in asked])
    probabilities = [result.probability for result in found if isinstance(result, Preference)]
    assert [1 - p for p in probabilities] == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 1e-4
