"""LLaVA-OneVision in the form of its authors' program: the network of transformers' form, or a clear refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.backbones import llava_original
from models.backbones.vlm import LocalChat
from models.backbones.vlm_loading import load_chat
from models.base import Candidate, InputError, LoadOptions, WeightsError
from models.judge import Comparison, Generation, Turn
from models.unified_reward import UnifiedReward
from tests.models.backbones.llava_folders import CHATML, SHOWN, TOWER, changed, edit, original, published
from tests.models.backbones.vlm_chats import WORDS, candidates, folder, question, rendered, table, word_scores


@pytest.fixture(autouse=True)
def small_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llava_original.TOWERS, "siglip-tiny", TOWER)


def chat_of(folder: Path) -> LocalChat:
    return load_chat(folder, LoadOptions())


def scored(chat: LocalChat, turns: list[Turn]) -> torch.Tensor:
    return table(chat.score([chat.prepare(turn) for turn in turns], WORDS))


def test_it_answers_as_the_same_network_in_transformers_form() -> None:
    """Single images are cut into tiles of several layouts, pairs are not; the vocabulary is as long as the file's."""
    ours, theirs = chat_of(original()), chat_of(published())
    turns = [Turn((candidate, "Is it red?")) for candidate in candidates()]
    turns += [question(0, 2), question(3, 1), Turn(question(0, 4).parts, system="Be strict.")]
    for turn in turns:
        assert ours.prepare(turn).ids.tolist() == theirs.prepare(turn).ids.tolist()
    found = scored(ours, turns)
    assert found.std() > 0.1
    torch.testing.assert_close(found, scored(theirs, turns), atol=1e-6, rtol=0)


def test_image_tokens_are_those_of_the_last_kept_layer_without_the_norm_after_it() -> None:
    """The authors' program takes the tower's last hidden states, through the projector, and ends with a line break."""
    chat, first, second = chat_of(original()), candidates()[0], candidates()[1]
    picture = chat.prepare(Turn((first, second, "?"))).pictures[0]
    model = chat.model.model
    with torch.no_grad():
        states = model.vision_tower.embeddings(picture.pixels)
        for layer in model.vision_tower.encoder.layers:
            states = layer(states, attention_mask=None)
        projector = model.multi_modal_projector
        tokens = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(states[0])))
        expected = torch.cat([tokens, model.image_newline[None]])
        torch.testing.assert_close(chat.encode(picture)[0], expected)


def test_unified_reward_judges_with_either_form_alike() -> None:
    options = {"version": "v1-llava", "max_tokens": 12}
    ours, theirs = (
        UnifiedReward.load(LoadOptions(weights=str(folder), options=options)) for folder in (original(), published())
    )
    comparison = Comparison("a red circle", candidates()[0], candidates()[2])
    turns = [judge.prepare_comparison(comparison).turns for judge in (ours, theirs)]
    scores = [table(judge.chat.score(turn, WORDS)) for judge, turn in zip((ours, theirs), turns, strict=True)]
    torch.testing.assert_close(*scores, atol=1e-6, rtol=0)
    answers = [judge.chat.generate(turn, Generation(12)) for judge, turn in zip((ours, theirs), turns, strict=True)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("form", [original, published])
def test_both_images_of_a_pair_are_cut_into_tiles_where_the_option_says_so(form: Callable[[], Path]) -> None:
    """As transformers' own processor does with images that it is given one by one."""
    chat = load_chat(form(), LoadOptions(options={"pair_tiles": True}))
    turn = question(0, 2)
    single = [chat.prepare(Turn((candidates()[place], "?"))).pictures[0].text for place in (0, 2)]
    prepared = chat.prepare(turn)
    assert [picture.text for picture in prepared.pictures] == single
    assert prepared.tokens > chat_of(form()).prepare(turn).tokens
    pictures = [part.image for part in turn.parts if isinstance(part, Candidate)]
    with torch.no_grad():
        told = chat_of(published()).processor(text=[rendered(chat, turn)], images=pictures, return_tensors="pt")
        logits = chat_of(published()).model(**told).logits[0, -1]
    torch.testing.assert_close(
        scored(chat, [turn]), torch.tensor([word_scores(chat, logits)], dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert chat.identity != chat_of(form()).identity


def test_a_family_without_tiles_takes_no_such_option() -> None:
    with pytest.raises(ValueError, match="pair_tiles"):
        load_chat(folder("qwen2_vl"), LoadOptions(options={"pair_tiles": True}))


def test_videos_are_seen_alike() -> None:
    frames = tuple(candidate.image for candidate in candidates()[:2] if candidate.image is not None)
    turns = [Turn((Candidate(frames=frames, fps=2.0), "Is it a sunrise?"))]
    torch.testing.assert_close(
        scored(chat_of(original()), turns), scored(chat_of(published()), turns), atol=1e-6, rtol=0
    )


def test_videos_of_another_treatment_are_refused(tmp_path: Path) -> None:
    copied = shutil.copytree(original(), tmp_path / "chat")
    changed(copied, mm_newline_position="grid")
    chat, (first, *_) = chat_of(copied), candidates()
    assert first.image is not None
    assert chat.prepare(Turn((first, "?"))).tokens > 0
    with pytest.raises(InputError) as refused:
        chat.prepare(Turn((Candidate(frames=(first.image,), fps=1.0), "?")))
    assert refused.value.code == "video_unsupported"


def test_the_chat_is_the_checkpoints_own_and_qwens_where_it_has_none(tmp_path: Path) -> None:
    turn = Turn((candidates()[0], "\nIs it red?"))
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nIs it red?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert rendered(chat_of(original()), turn) == expected
    copied = shutil.copytree(original(), tmp_path / "chat")
    edit(copied / "tokenizer_config.json", lambda told: told.pop("chat_template"))
    assert rendered(chat_of(copied), turn) == expected
    other = CHATML.replace("assistant\n' }}{% endif", "judge\n' }}{% endif")
    edit(copied / "tokenizer_config.json", lambda told: told.update(chat_template=other))
    changed_chat = chat_of(copied)
    assert rendered(changed_chat, turn) == expected.replace("<|im_start|>assistant", "<|im_start|>judge")
    assert changed_chat.identity != chat_of(original()).identity
    (copied / "chat_template.jinja").write_text(SHOWN)
    assert rendered(chat_of(copied), turn) == expected


def test_a_caption_that_spells_the_picture_token_is_text() -> None:
    chat = chat_of(original())
    plain = chat.prepare(Turn((candidates()[0], "a cat")))
    hostile = chat.prepare(Turn((candidates()[0], "a <image> cat")))
    image = chat.processor.image_token_id
    assert (plain.ids == image).sum() == (hostile.ids == image).sum()


def test_words_tied_to_the_embeddings(tmp_path: Path) -> None:
    """The head of the 0.5b checkpoint is its embeddings: it need not be in the file."""
    copied = shutil.copytree(original(), tmp_path / "chat")
    changed(copied, tie_word_embeddings=True)
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        chat_of(copied)
    edit_tensors(copied, lambda tensors: tensors.pop("lm_head.weight", None))
    chat = chat_of(copied)
    assert torch.equal(chat.model.lm_head.weight, tensors_of(copied)["model.embed_tokens.weight"])
    edit_tensors(
        copied,
        lambda tensors: (
            "model.embed_tokens.weight" in tensors
            and tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        ),
    )
    turns = [question(0, 1)]
    assert torch.equal(scored(chat, turns), scored(chat_of(copied), turns))


def test_a_vocabulary_without_room_for_pictures(tmp_path: Path) -> None:
    """Published configurations leave the size of the vocabulary out; the files may end with the last word."""
    copied = shutil.copytree(original(), tmp_path / "chat")
    tokens = len(chat_of(copied).processor.tokenizer) - 2
    edit_tensors(copied, shorten(tokens))
    ours, theirs = chat_of(copied), chat_of(published())
    assert ours.model.lm_head.weight.shape[0] == tokens
    turns = [question(0, 2), Turn((candidates()[3], "Is it red?"))]
    found, expected = scored(ours, turns), scored(theirs, turns)
    odds = [each[:, 0] - each[:, 1] for each in (found, expected)]
    torch.testing.assert_close(*odds, atol=1e-6, rtol=0)
    assert isinstance(ours.generate([ours.prepare(turn) for turn in turns], Generation(4))[0], list)


def shorten(tokens: int) -> Callable[[dict[str, torch.Tensor]], object]:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return lambda tensors: tensors.update({n: tensors[n][:tokens].clone() for n in names if n in tensors})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name, None)


def add(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: "model.norm.weight" in tensors and tensors.update({name: torch.zeros(2)})


def cut(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: name in tensors and tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("model.image_newline"), r"lack 1 tensors, such as model\.image_newline"),
        (drop("model.embed_tokens.weight"), r"embed_tokens\.weight"),
        (drop("lm_head.weight"), r"lack 1 tensors, such as lm_head\.weight"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name],
            r"lack \d+ tensors, such as model\.vision_tower",
        ),
        (add("model.faster_token"), r"model\.faster_token"),
        (add("model.layers.3.mlp.up_proj.weight"), r"1 tensors too many .*layers\.3\.mlp"),
        (cut("model.norm.weight"), r"norm\.weight has the shape \[63\], not \[64\]"),
        (cut("model.mm_projector.2.bias"), r"linear_2\.bias has the shape"),
        (cut("lm_head.weight"), r"lm_head\.weight has the shape"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], said: str
) -> None:
    copied = shutil.copytree(original(), tmp_path / "chat")
    edit_tensors(copied, change)
    with pytest.raises(WeightsError, match=said):
        chat_of(copied)


def test_buffers_of_older_programs_are_left_out(tmp_path: Path) -> None:
    copied = shutil.copytree(original(), tmp_path / "chat")
    edit_tensors(copied, add("model.layers.0.self_attn.rotary_emb.inv_freq"))
    turns = [question(0, 1)]
    assert torch.equal(scored(chat_of(copied), turns), scored(chat_of(original()), turns))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "clip-vit-large-patch14-336' is not known"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio is 'pad'"),
        ({"image_grid_pinpoints": "(1x1),(2x2)"}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[56, 57]]}, "image_grid_pinpoints"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    ],
)
def test_configurations_of_another_network_are_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    copied = shutil.copytree(original(), tmp_path / "chat")
    changed(copied, **fields)
    with pytest.raises(WeightsError, match=said):
        chat_of(copied)


def test_the_program_is_known_by_its_class_too(tmp_path: Path) -> None:
    """Some trainers keep the model_type of their base."""
    copied = shutil.copytree(original(), tmp_path / "chat")
    changed(copied, model_type="llava")
    turns = [question(0, 1)]
    assert torch.equal(scored(chat_of(copied), turns), scored(chat_of(original()), turns))
    changed(copied, architectures=["LlavaLlamaForCausalLM"])
    with pytest.raises(WeightsError, match="is a 'llava'"):
        chat_of(copied)


def test_anyres_without_a_number_makes_no_layout_smaller(tmp_path: Path) -> None:
    copied = shutil.copytree(original(), tmp_path / "chat")
    changed(copied, image_aspect_ratio="anyres")
    assert chat_of(copied).processor.vision_aspect_ratio == "anyres_max_2"


def test_a_tokenizer_is_read_from_tokenizer_json_alone(tmp_path: Path) -> None:
    copied = shutil.copytree(original(), tmp_path / "chat")
    (copied / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        chat_of(copied)


def test_the_settings_of_generation_are_the_folders_own(tmp_path: Path) -> None:
    copied = shutil.copytree(original(), tmp_path / "chat")
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 365]}))
    assert chat_of(copied).model.generation_config.eos_token_id == [7, 365]
