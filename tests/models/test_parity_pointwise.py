"""The rewards with checkpoints agree with their oracles, and parity notices each weight tensor that is off.

Full-size models take minutes and gigabytes each and run under ``make test-full``.
"""

import copy
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from models import parity, parity_checkpoint, parity_hpsv3, parity_pointwise
from models.base import WeightsError
from models.parity import Topic
from models.parity_checkpoint import Cases, read_cases, written
from models.parity_recipe import build, write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures" / "pointwise"
KINDS = {
    "aesthetic": parity_pointwise.AESTHETIC,
    "clipscore": parity_pointwise.CLIPSCORE,
    "hpsv2": parity_pointwise.HPSV2,
    "hpsv3": parity_hpsv3.HPSV3,
    "imagereward": parity_pointwise.IMAGEREWARD,
    "pickscore": parity_pointwise.PICKSCORE,
}
FULL = sorted(file.name for file in FIXTURES.glob("*_full.json"))


pytestmark = pytest.mark.usefixtures("one_thread")


def handle(file: Path) -> dict[str, Topic]:
    """What the runner's handler finds in one file."""
    for module in parity.HANDLER_MODULES:
        import_module(module)
    (handler,) = [handler for pattern, handler in parity._HANDLERS.items() if file.match(pattern)]
    return {topic.name: topic for topic in handler(file)}


@cache
def found(name: str) -> dict[str, Topic]:
    return handle(FIXTURES / f"{name}_small.json")


def folder_of(tmp_path: Path, name: str, change: Callable[[Any], None]) -> Path:
    """A folder with one small result file, changed, and what it needs."""
    document = json.loads((FIXTURES / f"{name}_small.json").read_text("utf-8"))
    change(document)
    (tmp_path / f"{name}_small.json").write_text(json.dumps(document), "utf-8")
    for needed in ("images", "manifests"):
        shutil.copytree(FIXTURES / needed, tmp_path / needed)
    for needed in ("inputs.json", *([document["npz"]] if "npz" in document else ())):
        shutil.copy(FIXTURES / needed, tmp_path)
    return tmp_path


def main(folder: Path) -> tuple[int, str]:
    text = io.StringIO()
    status = parity.main([str(folder)], Console(file=text, width=200))
    return status, text.getvalue()


def off(topics: Mapping[str, Topic]) -> set[str]:
    return {name for name, topic in topics.items() if not topic.ok}


@pytest.mark.parametrize("name", KINDS)
def test_the_small_models_agree(name: str) -> None:
    assert off(found(name)) == set()
    order = found(name)["order in bfloat16"]
    assert order.cases >= 10
    document = json.loads((FIXTURES / f"{name}_small.json").read_text("utf-8"))
    if name == "hpsv3":
        rows = sum(len(case["logits_fp32"]) for case in document["cases"])
        assert found(name)["mean and second output"].cases == found(name)["sequential positions"].cases == rows
        assert found(name)["user text"].cases == len(document["prompt_text"])
        assert found(name)["resized images"].cases == len(document["preprocessing_full"])
        return
    counted = sum(
        found(name)[topic].cases for topic in ("score", "score as RGB", "not scored there") if topic in found(name)
    )
    assert counted == len(document["scores"])
    assert found(name)["score"].tolerance == KINDS[name].tolerance
    assert found(name)["score, relative"].tolerance == 1e-3
    if "prompts" in document:
        assert found(name)["tokens"].cases == len(document["prompts"])


def test_every_part_of_a_result_file_is_compared() -> None:
    common = {"checkpoint", "preprocessing", "score", "score, relative", "order in bfloat16"}
    clip = common | {"image features", "text features", "tokens"}
    assert found("aesthetic").keys() == common | {"image features"}
    assert found("clipscore").keys() == clip
    assert found("pickscore").keys() == clip | {"score in one call"}
    refused = {"score as RGB", "not scored there"}
    assert found("hpsv2").keys() == clip | refused | {"score in one call", "hpsv2.1"}
    blip = {"vision tokens", "text states", "MLP output", "tokens", "score in one call", "rank"}
    assert found("imagereward").keys() == common | blip


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FULL)
def test_the_full_size_models_agree(name: str) -> None:
    topics = handle(FIXTURES / name)
    assert off(topics) == set()
    assert topics["score"].cases == len(json.loads((FIXTURES / name).read_text("utf-8"))["scores"])


# --- a tensor that is off -------------------------------------------------------------------------------------------

UNUSED = {
    "aesthetic": r"text_model\..*|text_projection\.weight|logit_scale",
    "clipscore": r"(?!)",
    "hpsv2": r"logit_scale",
    "hpsv3": r"lm_head\.weight",
    "imagereward": r"blip\.(vision|text)_proj\..*|.*position_ids",
    "pickscore": r"(?!)",
}
"""What the score of a checkpoint does not depend on."""
SHIFTS = {
    "aesthetic": r".*\.k_proj\.bias",
    "clipscore": r".*\.k_proj\.bias",
    "hpsv2": r"(?!)",
    "hpsv3": r"(?!)",
    "imagereward": r".*\.key\.bias",
    "pickscore": r".*\.k_proj\.bias",
}
"""Biases of keys add one number to all logits of a query, which the softmax takes away again (rotary ones do not)."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model loaded from a small checkpoint, and the tensors that the checkpoint was made of."""

    name: str
    cases: Cases
    model: Any
    tensors: Mapping[str, Tensor]

    def scores_agree(self) -> bool:
        """Whether the scores are within their tolerance: first one alone, which is off most of the time."""
        return all(self._agree(entries) for entries in (slice(3, 4), slice(None)))

    def _agree(self, entries: slice) -> bool:
        document = self.cases.document
        if self.name == "hpsv3":
            arrays = parity_hpsv3.read_arrays(self.cases)
            return all(topic.ok for topic in parity_hpsv3.logits(self.model, self.cases, arrays)[:2])
        cases = replace(self.cases, document={**document, "scores": document["scores"][entries]})
        return parity_checkpoint.scores(self.model, cases, KINDS[self.name].tolerance)[0].ok


@pytest.fixture(scope="module", params=KINDS)
def prepared(request: pytest.FixtureRequest) -> Prepared:
    name = request.param
    cases = read_cases(FIXTURES / f"{name}_small.json")
    with written(cases, KINDS[name]) as (options, _):
        if name == "hpsv3":
            options = replace(options, options={"config": parity_hpsv3.sizes(cases)})
            model: Any = parity_hpsv3.load(options)
        else:
            model = parity_checkpoint.load_tower(KINDS[name].model, options)
    tensors: dict[str, Tensor] = {}
    for key in ("manifest", "mlp_manifest"):
        if key in cases.document:
            manifest = json.loads((FIXTURES / cases.document[key]).read_text("utf-8"))
            tensors |= build(manifest, cases.document["fill_seed"])
    return Prepared(name, cases, model, tensors)


def content(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).digest()


def places(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where the tensors of a checkpoint lie in the loaded model, by their values: whole, transposed or as a third."""
    modules = [model] if isinstance(model, nn.Module) else [m for m in vars(model).values() if isinstance(m, nn.Module)]
    by_content: dict[bytes, Tensor] = {}
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        views = [parameter.data]
        if parameter.ndim == 2:
            views.append(parameter.data.T)
        if parameter.ndim and len(parameter) % 3 == 0:
            views += parameter.data.chunk(3)
        by_content |= {content(view): view for view in views}
    return {name: by_content[content(tensor)] for name, tensor in tensors.items() if content(tensor) in by_content}


def disturb(tensor: Tensor, seed: int) -> None:
    """Add 5 % of the tensor's root mean square to every number, with random signs."""
    signs = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    tensor += 0.05 * tensor.float().square().mean().sqrt() * signs


def test_every_tensor_that_a_score_depends_on_is_loaded(prepared: Prepared) -> None:
    unused = {name for name in prepared.tensors if re.fullmatch(UNUSED[prepared.name], name)}
    assert prepared.tensors.keys() - places(prepared.model, prepared.tensors).keys() <= unused


def remember_images(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[bytes, Tensor]:
    """The image tower runs once for equal pixels, until the dictionary is cleared: it takes most of the time."""
    remembered: dict[bytes, Tensor] = {}
    encode = model.encode_image

    def encode_once(pixels: Tensor) -> Tensor:
        key = content(pixels)
        if key not in remembered:
            remembered[key] = encode(pixels)
        return remembered[key]

    monkeypatch.setattr(model, "encode_image", encode_once)
    return remembered


def test_a_single_tensor_that_is_off_is_noticed(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of the checkpoint's: the scores are off, unless the formula does not know the tensor."""
    remembered = {} if prepared.name == "hpsv3" else remember_images(prepared.model, monkeypatch)
    assert prepared.scores_agree()
    unnoticed = set()
    found_places = places(prepared.model, prepared.tensors)
    for seed, (name, tensor) in enumerate(found_places.items()):
        kept = tensor.clone()
        disturb(tensor, seed)
        undisturbed = dict(remembered)
        if re.search("visual|vision", name):
            remembered.clear()
        if prepared.scores_agree():
            unnoticed.add(name)
        tensor.copy_(kept)
        remembered |= undisturbed
    assert prepared.scores_agree()
    pattern = f"{UNUSED[prepared.name]}|{SHIFTS[prepared.name]}"
    assert unnoticed == {name for name in found_places if re.fullmatch(pattern, name)}


@pytest.mark.parametrize("tensor", ["visual.transformer.resblocks.1.ln_2.bias", None])
def test_a_checkpoint_with_one_tensor_off_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str | None
) -> None:
    """From the file to the exit status; without a disturbed tensor it is 0."""

    def write(tensors: Mapping[str, Tensor], file: Path, *, nested: str | None = None) -> Path:
        changed = {name: value.clone() for name, value in tensors.items()}
        if tensor is not None:
            disturb(changed[tensor], 0)
        return write_checkpoint(changed, file, nested=nested)

    monkeypatch.setattr(parity_checkpoint, "write_checkpoint", write)
    status, text = main(folder_of(tmp_path, "hpsv2", lambda document: None))
    assert status == (0 if tensor is None else 1)
    assert ("off" in text) == (tensor is not None)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(tensors: Mapping[str, Tensor], file: Path, *, nested: str | None = None) -> Path:
        return write_checkpoint({k: v for k, v in tensors.items() if k != "ln_final.bias"}, file, nested=nested)

    monkeypatch.setattr(parity_checkpoint, "write_checkpoint", write)
    with pytest.raises(WeightsError, match=r"ln_final\.bias"):
        parity.run(folder_of(tmp_path, "hpsv2", lambda document: None))


def test_buffers_of_older_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that transformers before 4.31 saved hold counters of positions."""
    manifest = json.loads((FIXTURES / "manifests" / "pickscore_small.json").read_text("utf-8"))
    legacy = {e["name"]: torch.arange(e["shape"][-1])[None] for e in manifest["optional_legacy_entries"]}
    assert len(legacy) == 2

    def write(tensors: Mapping[str, Tensor], file: Path, *, nested: str | None = None) -> Path:
        return write_checkpoint({**tensors, **legacy}, file, nested=nested)

    monkeypatch.setattr(parity_checkpoint, "write_checkpoint", write)
    assert main(folder_of(tmp_path, "pickscore", lambda document: None))[0] == 0


# --- a number that is off -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aesthetic", "hpsv2", "hpsv3"])
def test_other_weights_do_not_give_the_same_numbers(tmp_path: Path, name: str) -> None:
    def other_seed(document: Any) -> None:
        document["fill_seed"] += 1

    topics = handle(folder_of(tmp_path, name, other_seed) / f"{name}_small.json")
    scores = {"mean and second output", "rows alone"} if name == "hpsv3" else {"score", "score, relative"}
    assert {"checkpoint"} | scores <= off(topics)
    assert topics["preprocessing"].ok


def edit_score(document: Any) -> None:
    document["scores"][5]["score_fp32"] += 4e-6


def edit_tokens(document: Any) -> None:
    document["prompts"]["long"]["input_ids"][70] += 1


def edit_pixel(document: Any) -> None:
    document["images"]["gray"]["preprocessed"]["probe"][7][1] += 2e-5


def edit_image_feature(document: Any) -> None:
    document["scores"][0]["image_features"]["first8"][3] += 1e-5


def edit_text_feature(document: Any) -> None:
    document["scores"][0]["text_features"]["first8"][3] += 1e-5


def edit_list(document: Any) -> None:
    document["list_api"]["scores"][2] += 4e-6


def edit_refused(document: Any) -> None:
    entry = next(entry for entry in document["scores"] if "score_fp32_after_convert_rgb" in entry)
    entry["score_fp32_after_convert_rgb"] += 4e-6


def test_a_changed_number_is_off(tmp_path: Path) -> None:
    """One change a topic, all in one file of HPSv2's; what was not changed stays in order."""
    changes = {
        "score": edit_score,
        "tokens": edit_tokens,
        "preprocessing": edit_pixel,
        "image features": edit_image_feature,
        "text features": edit_text_feature,
        "score in one call": edit_list,
        "score as RGB": edit_refused,
    }

    def change(document: Any) -> None:
        for edit in changes.values():
            edit(document)

    topics = handle(folder_of(tmp_path, "hpsv2", change) / "hpsv2_small.json")
    assert off(topics) == changes.keys() | {"hpsv2.1"}
    assert not found("hpsv2").keys() - topics.keys()


@pytest.mark.parametrize("prepared", ["imagereward"], indirect=True)
def test_a_changed_rank_and_state_of_imagereward_are_off(prepared: Prepared) -> None:
    document = copy.deepcopy(dict(prepared.cases.document))
    document["ranking"]["rank"][:2] = document["ranking"]["rank"][1::-1]
    document["images"]["portrait"]["vision_last_token"]["first8"][0] += 1e-3
    document["scores"][1]["text_last_token"]["first8"][0] += 1e-3
    document["scores"][2]["raw_mlp_output"] += 1e-4
    cases = replace(prepared.cases, document=document)
    topics = parity_pointwise.blip_features(prepared.model, cases)
    topics += parity_checkpoint.lists(prepared.model, cases, parity_pointwise.IMAGEREWARD.tolerance)
    assert off({topic.name: topic for topic in topics}) == {"rank", "vision tokens", "text states", "MLP output"}


def test_changed_numbers_of_hpsv3_are_off(tmp_path: Path) -> None:
    def change(document: Any) -> None:
        batched = document["cases"][2]
        batched["logits_fp32"][1][1] += 2e-5
        batched["rows_alone_logits_fp32"][0][0] += 2e-5
        batched["hidden_at_reward"][1]["first8"][2] += 1e-3
        batched["diagnostic_not_reference_logits_with_3d_mrope"][2] = batched["logits_fp32"][2]
        document["cases"][0]["visual_tokens"]["first8"][1] += 1e-2
        document["preprocessing_full"]["gray"]["resized_wh"].reverse()
        document["preprocessing_full"]["tiny"]["pixel_values"]["first8"][0] += 1e-4
        document["prompt_text"]["empty"]["user_text_chars"] += 1
        document["prompt_text"]["plain"]["assumed_chat_text_sha256"] = "0" * 64

    topics = handle(folder_of(tmp_path, "hpsv3", change) / "hpsv3_small.json")
    assert topics.keys() - off(topics) == {"checkpoint", "score, relative", "order in bfloat16"}
