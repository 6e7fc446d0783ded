"""Other people's signatures, answered by a live service; what is compared against is the plain client."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tests.service.bodies import JPEG_MODEL, grey, noise
from tests.service.live import ROOT, Live, running
from trainer_client import Candidate, Item, RequestRejected, RewardClient, SamplesFailed
from trainer_client.adapters import (
    FlowFactoryGroupwise,
    FlowFactoryPointwise,
    RewardOutput,
    reward_fn,
    score_samples,
    trl_reward_func,
)

BRIGHTNESS = "raises-on-red"
MODELS = {JPEG_MODEL: 0.5, BRIGHTNESS: 2.0}
KEY = "the-key"
SETTINGS = {"models": {JPEG_MODEL: {}, "jpeg-compressibility": {}, BRIGHTNESS: {}, "ocr": {}}, "api_keys": [KEY]}
PIXELS = np.stack([noise(i, 32, 40) for i in range(6)])
PROMPTS = ["a", "b", "a", "c", "b", "a"]
TOO_SMALL = grey(9, 8)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("adapters"), SETTINGS) as live:
        yield live


@pytest.fixture(scope="module")
def client(service: Live) -> Iterator[RewardClient]:
    with RewardClient(service.url, api_key=KEY, patience=30) as client:
        yield client


@pytest.fixture(scope="module")
def totals(client: RewardClient) -> list[float]:
    """Each sample of PIXELS alone."""
    items = [Item(prompt, [image]) for prompt, image in zip(PROMPTS, PIXELS, strict=True)]
    return [item.total[0] for item in client.score(items, MODELS).raise_for_errors()]


def as_float(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pixels.astype(np.float32) / 255


def word(text: str) -> Image.Image:
    image = Image.new("RGB", (320, 120), "white")
    ImageDraw.Draw(image).text((30, 25), text, "black", font=ImageFont.load_default(64))
    return image


IMAGES: dict[str, Callable[[], Any]] = {
    "torch NCHW float": lambda: torch.from_numpy(as_float(PIXELS)).permute(0, 3, 1, 2),
    "torch NCHW uint8": lambda: torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
    "numpy NHWC uint8": lambda: PIXELS,
    "numpy NCHW float": lambda: as_float(PIXELS).transpose(0, 3, 1, 2),
    "list of PIL": lambda: [Image.fromarray(image) for image in PIXELS],
    "list of tensors": lambda: list(torch.from_numpy(as_float(PIXELS)).permute(0, 3, 1, 2).requires_grad_()),
    "tuple of arrays": lambda: tuple(PIXELS),
}


# -- Flow-GRPO, DiffusionNFT, ddpo-pytorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGES)
def test_every_form_of_images_has_the_scores_of_the_plain_client(
    client: RewardClient, totals: list[float], kind: str
) -> None:
    scores, info = reward_fn(client, MODELS)(IMAGES[kind](), PROMPTS, [{} for _ in PROMPTS])
    assert scores["avg"].tolist() == totals
    assert info["ok"].all()
    assert info["failures"] == {}


def test_the_form_of_flow_grpo(client: RewardClient, totals: list[float]) -> None:
    """Called as its training script calls: positional, a tuple of prompts, only_strict; read by torch.as_tensor."""
    score = reward_fn(client, MODELS)
    scores, info = score(IMAGES["torch NCHW float"](), tuple(PROMPTS), ({},) * 6, only_strict=True)
    assert set(scores) == {*MODELS, "avg"}
    tensors = {name: torch.as_tensor(values).float() for name, values in scores.items()}
    weighted = sum(weight * tensors[name] for name, weight in MODELS.items())
    torch.testing.assert_close(tensors["avg"], weighted)
    assert scores[BRIGHTNESS].tolist() == pytest.approx(PIXELS.mean((1, 2, 3)) / 255)
    assert set(info["fingerprints"]) == set(MODELS)


def test_the_form_of_ddpo(client: RewardClient, totals: list[float]) -> None:
    scores, info = reward_fn(client, MODELS, form="array")(PIXELS, PROMPTS)
    assert isinstance(scores, np.ndarray)
    assert scores.dtype == np.float64
    assert scores.tolist() == totals
    assert info["ok"].tolist() == [True] * 6


def test_a_failed_sample_raises_and_is_named_by_its_place(client: RewardClient) -> None:
    score = reward_fn(client, MODELS)
    with pytest.raises(SamplesFailed, match=f"at sample 1, {BRIGHTNESS}: model_error") as caught:
        score(PIXELS, ["a", "red", "b", "c", "a", "red"])
    assert [where for where, _ in caught.value.failures] == ["sample 1", "sample 5"]


def test_a_failed_sample_is_nan_where_asked_and_the_others_keep_their_scores(
    client: RewardClient, totals: list[float]
) -> None:
    images = [*PIXELS[:3], TOO_SMALL, *PIXELS[4:]]
    prompts = ["a", "red", "a", "c", "b", "a"]
    scores, info = reward_fn(client, MODELS, failed="nan")(images, prompts)
    assert np.isnan(scores["avg"]).tolist() == [False, True, False, True, False, False]
    assert np.isnan(scores[JPEG_MODEL]).tolist() == [False, False, False, True, False, False]
    assert [scores["avg"][i] for i in (0, 2, 4, 5)] == [totals[i] for i in (0, 2, 4, 5)]
    assert info["ok"].tolist() == [True, False, True, False, True, True]
    assert {place: [each.code for each in failures] for place, failures in info["failures"].items()} == {
        1: ["model_error"], 3: ["image_too_small"],
    }  # fmt: skip


def test_metadata_goes_with_its_sample(client: RewardClient) -> None:
    score = reward_fn(client, "ocr")
    rows = [{"target": "HELLO"}, {"target": "WORLD"}, {"target": "HELLO"}]
    scores, _ = score([word("HELLO")] * 3, ["a sign"] * 3, rows)
    assert (scores["ocr"][0], scores["ocr"][2]) == (1.0, 1.0)
    assert scores["ocr"][1] < 0.5
    quoted, _ = score([word("HELLO")] * 2, ['a sign that says "HELLO"'] * 2, {})
    assert quoted["avg"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("images", "prompts", "metadata", "error"),
    [
        (PIXELS, PROMPTS[:5], None, ValueError),
        (PIXELS, PROMPTS, [{}] * 5, ValueError),
        (PIXELS, PROMPTS, {"target": "x"}, TypeError),
        (PIXELS, PROMPTS, [{"target": object()}] * 6, TypeError),
        (PIXELS[0], ["a"], None, TypeError),
        (Image.fromarray(PIXELS[0]), ["a"], None, TypeError),
        (as_float(PIXELS) * 255, PROMPTS, None, ValueError),
        (PIXELS, [7] * 6, None, TypeError),
        ([], [], None, ValueError),
    ],
)
def test_senseless_arguments_raise(client: RewardClient, images: Any, prompts: Any, metadata: Any, error: Any) -> None:
    with pytest.raises(error):
        reward_fn(client, MODELS)(images, prompts, metadata)


@pytest.mark.parametrize("options", [{"form": "list"}, {"failed": "zero"}, {"failed": "none"}])
def test_senseless_options_raise(client: RewardClient, options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        reward_fn(client, MODELS, **options)


def test_a_model_named_as_the_total_is_refused(client: RewardClient) -> None:
    with pytest.raises(ValueError, match="avg"):
        reward_fn(client, ["avg", JPEG_MODEL])


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
    samples=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 255), st.integers(0, 2)), min_size=1, max_size=12)
)
def test_scores_keep_the_order_of_samples(client: RewardClient, samples: list[tuple[str, int, int]]) -> None:
    """However prompts and metadata repeat and are mixed: the score of an even image is its brightness."""
    found = score_samples(
        client,
        BRIGHTNESS,
        [prompt for prompt, _, _ in samples],
        [Candidate(image=grey(level, 16)) for _, level, _ in samples],
        [{"x": x} if x else None for _, _, x in samples],
    )
    assert found.total.tolist() == pytest.approx([level / 255 for _, level, _ in samples])


# -- Flow-Factory ------------------------------------------------------------------------------------------------------


@dataclass
class RewardModelOutput:
    """The fields of Flow-Factory's class of this name."""

    rewards: Any
    extra_info: dict[str, Any] | None = None


class Base(ABC):
    """The constructor and the abstract call of Flow-Factory's bases, as published."""

    required_fields: tuple[str, ...] = ("image", "prompt")

    def __init__(self, config: Any, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.device = config.device

    @abstractmethod
    def __call__(self, prompt: list[str], **kwargs: Any) -> RewardModelOutput: ...


class Pointwise(FlowFactoryPointwise, Base):
    required_fields = ("prompt", "image", "metadata")
    output_type = RewardModelOutput


class Groupwise(FlowFactoryGroupwise, Base):
    pass


def config(service: Live, models: Any = MODELS, **extra: Any) -> Any:
    given = {"server_url": service.url, "models": models, "api_key": KEY, "device": torch.device("cpu")}
    return types.SimpleNamespace(**(given | extra))


def test_pointwise_gives_the_weighted_totals(service: Live, totals: list[float]) -> None:
    reward = Pointwise(config(service), accelerator="accelerator")
    assert isinstance(reward, Base)
    assert reward.accelerator == "accelerator"
    images = [Image.fromarray(image) for image in PIXELS]
    output = reward(prompt=PROMPTS, image=images, video=None, condition_images=None, condition_videos=None)
    assert isinstance(output, RewardModelOutput)
    assert output.rewards.dtype == torch.float32
    assert output.rewards.tolist() == pytest.approx(totals)
    assert output.extra_info is not None
    assert set(output.extra_info["fingerprints"]) == set(MODELS)
    reward.client.close()


def test_pointwise_reads_metadata_as_datasets_keep_it(service: Live) -> None:
    """A JSON text a sample, with lists and objects in it as text again: OCR says that a list is no target."""
    reward = Pointwise(config(service, ["ocr"], failed="nan"), None)
    rows = [json.dumps({"target": "HELLO"}), {"target": "WORLD"}, json.dumps({"target": '["HELLO"]'}), "{}"]
    output = reward(prompt=["a sign"] * 4, image=[word("HELLO")] * 4, metadata=rows)
    assert output.rewards[0] == 1.0
    assert output.rewards[1] < 0.5
    assert torch.isnan(output.rewards).tolist() == [False, False, True, True]
    codes = {place: failures[0].code for place, failures in output.extra_info["failures"].items()}
    assert codes == {2: "target_invalid", 3: "target_missing"}
    with pytest.raises(TypeError, match="JSON object"):
        reward(prompt=["a sign"], image=[word("HELLO")], metadata=["[1]"])
    reward.client.close()


def test_pointwise_raises_for_a_failed_sample_unless_told(service: Live) -> None:
    images = [Image.fromarray(PIXELS[0]), Image.fromarray(TOO_SMALL)]
    strict, lenient = Pointwise(config(service), None), Pointwise(config(service, failed="nan"), None)
    with pytest.raises(SamplesFailed, match="at sample 1, every model: image_too_small"):
        strict(prompt=["a", "a"], image=images)
    rewards = lenient(prompt=["a", "a"], image=images).rewards
    assert torch.isnan(rewards).tolist() == [False, True]
    strict.client.close()
    lenient.client.close()


def test_groupwise_gives_win_rates(service: Live, client: RewardClient) -> None:
    group = list(torch.from_numpy(as_float(PIXELS)).permute(0, 3, 1, 2))
    reward = Groupwise(config(service, BRIGHTNESS), None)
    output = reward(prompt=["a"] * 6, image=group)
    assert isinstance(output, RewardOutput)
    rates = client.compare(Item("a", PIXELS), BRIGHTNESS)[0].win_rate
    assert output.rewards.tolist() == pytest.approx(rates)
    assert output.rewards.mean().item() == pytest.approx(0.5)
    assert output.rewards.argmax() == PIXELS.mean((1, 2, 3)).argmax()
    reward.client.close()


def test_groupwise_weighs_the_win_rates_of_several_models(service: Live, client: RewardClient) -> None:
    reward = Groupwise(config(service), None)
    rates = {name: client.compare(Item("a", PIXELS), name)[0].as_array().values for name in MODELS}
    expected = sum(weight * rates[name] for name, weight in MODELS.items())
    assert reward(prompt=["a"] * 6, image=list(PIXELS)).rewards.tolist() == pytest.approx(expected)
    reward.client.close()


def test_groupwise_failures(service: Live) -> None:
    images = [PIXELS[0], TOO_SMALL, PIXELS[1]]
    strict, lenient = Groupwise(config(service), None), Groupwise(config(service, failed="nan"), None)
    with pytest.raises(SamplesFailed, match="image_too_small"):
        strict(prompt=["a"] * 3, image=images)
    output = lenient(prompt=["a"] * 3, image=images)
    assert torch.isnan(output.rewards).tolist() == [False, True, False]
    assert output.extra_info["ok"].tolist() == [True, False, True]
    with pytest.raises(ValueError, match="one prompt"):
        strict(prompt=["a", "b"], image=[PIXELS[0], PIXELS[1]])
    strict.client.close()
    lenient.client.close()


@pytest.mark.parametrize("extra", [{"condition_images": [[PIXELS[0]]]}, {"video": [[PIXELS[0]]]}, {"audio": [0]}])
def test_what_the_reward_would_not_look_at_is_refused(service: Live, extra: Any) -> None:
    reward = Pointwise(config(service), None)
    with pytest.raises(ValueError, match=next(iter(extra))):
        reward(prompt=["a"], image=[PIXELS[0]], **extra)
    with pytest.raises(ValueError, match="prompt, image and metadata"):
        reward(prompt=["a"])
    reward.client.close()


@pytest.mark.parametrize(
    ("change", "match"),
    [({"server_url": None}, "server_url"), ({"models": {}}, "models"), ({"failed": "zero"}, "failed")],
)
def test_a_wrong_configuration_raises_at_once(service: Live, change: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Pointwise(config(service, **change), None)


def test_without_its_key_the_service_refuses(service: Live) -> None:
    reward = Pointwise(config(service, api_key=None), None)
    with pytest.raises(RequestRejected, match="bearer key"):
        reward(prompt=["a"], image=[PIXELS[0]])
    reward.client.close()


# -- TRL ---------------------------------------------------------------------------------------------------------------


def test_trl_images_of_all_forms(client: RewardClient) -> None:
    reward = trl_reward_func(client, BRIGHTNESS)
    picture = Image.fromarray(grey(51))
    message = [
        {"role": "assistant", "content": [{"type": "text", "text": "here"}, {"type": "image", "image": picture}]}
    ]
    asked = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "a square"}]}]
    completions = [picture, grey(102), torch.full((3, 16, 16), 0.6), message]
    rewards = reward(prompts=["a", asked, "b", asked], completions=completions, completion_ids=[], trainer_state=None)
    assert rewards == pytest.approx([0.2, 0.4, 0.6, 0.2])
    assert all(type(value) is float for value in rewards)


def test_trl_reads_the_last_prompt_of_the_user(client: RewardClient) -> None:
    """The model fails where the prompt says red: in the last question, and not in those before."""
    reward = trl_reward_func(client, BRIGHTNESS, failed="none")

    def talk(first: str, last: str) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": first},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": last},
        ]

    images = [grey(51), grey(51)]
    assert reward(prompts=[talk("red", "blue"), talk("blue", "red")], completions=images) == [pytest.approx(0.2), None]


def test_trl_a_failed_sample_raises_unless_told(client: RewardClient) -> None:
    """A text is nothing to a model of images: a typed failure, and None or an exception."""
    strict, lenient = trl_reward_func(client, JPEG_MODEL), trl_reward_func(client, JPEG_MODEL, failed="none")
    completions = ["a text", [{"role": "assistant", "content": "a text"}], PIXELS[0]]
    with pytest.raises(SamplesFailed, match=f"at sample 0, {JPEG_MODEL}: unsupported_input"):
        strict(prompts=["a"] * 3, completions=completions)
    rewards = lenient(prompts=["a"] * 3, completions=completions)
    assert rewards[:2] == [None, None]
    assert rewards[2] is not None
    assert rewards[2] > 0


def test_trl_columns_named_as_metadata_go_along(client: RewardClient) -> None:
    reward = trl_reward_func(client, "ocr", metadata=("target",))
    columns = {"target": ["HELLO", "WORLD"], "not_json": [object(), object()]}
    right, wrong = reward(prompts=["a sign"] * 2, completions=[word("HELLO")] * 2, **columns)
    assert right == 1.0
    assert wrong is not None
    assert wrong < 0.5
    with pytest.raises(ValueError, match="no column 'target'"):
        reward(prompts=["a sign"], completions=[word("HELLO")])


def test_trl_names_in_the_log(client: RewardClient) -> None:
    names = [
        trl_reward_func(client, MODELS),
        trl_reward_func(client, "ocr"),
        trl_reward_func(client, "ocr", name="text"),
    ]
    assert [function.__name__ for function in names] == [f"{JPEG_MODEL}+{BRIGHTNESS}", "ocr", "text"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompt", "completion", "error"),
    [
        (7, PIXELS[0], TypeError),
        ([{"role": "system", "content": "x"}], PIXELS[0], ValueError),
        ([{"role": "user", "content": None}], PIXELS[0], TypeError),
        ("a", [{"role": "assistant", "content": None}], TypeError),
        ("a", [{"role": "assistant", "content": [{"type": "image", "image": PIXELS[0]}] * 2}], ValueError),
        ("a", {"role": "assistant"}, TypeError),
    ],
)
def test_trl_senseless_arguments_raise(client: RewardClient, prompt: Any, completion: Any, error: Any) -> None:
    with pytest.raises(error):
        trl_reward_func(client, JPEG_MODEL)(prompts=[prompt], completions=[completion])


# -- the package and its page ------------------------------------------------------------------------------------------


def test_the_adapters_import_no_torch() -> None:
    code = "import sys, trainer_client.adapters; sys.exit('torch' in sys.modules or 'trl' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_examples_of_the_page_run(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(ROOT) / "docs" / "adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    stand_in = types.ModuleType("flow_factory.rewards")
    vars(stand_in).update(PointwiseRewardModel=Base, GroupwiseRewardModel=Base, RewardModelOutput=RewardModelOutput)
    monkeypatch.setitem(sys.modules, "flow_factory", types.ModuleType("flow_factory"))
    monkeypatch.setitem(sys.modules, "flow_factory.rewards", stand_in)
    with running(tmp_path_factory.mktemp("page")) as live:
        for block in blocks:
            names: dict[str, Any] = {}
            exec(compile(block.replace("http://127.0.0.1:8000", live.url), "docs/adapters.md", "exec"), names)
            if "client" in names:
                names["client"].close()
            if "RemoteWinRate" in names:
                given = config(live, "jpeg-compressibility", api_key=None)
                for kind in (names["Remote"], names["RemoteWinRate"]):
                    reward = kind(given, None)
                    output = reward(prompt=["a", "a"], image=list(PIXELS[:2]))
                    assert isinstance(output, RewardModelOutput)
                    assert output.rewards.shape == (2,)
                    reward.client.close()
    assert len(capsys.readouterr().out.splitlines()) == 2
