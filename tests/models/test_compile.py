"""What a GPU asks of every model, shown without one.

CUDA graphs and torch.compile want functions that never wait for the device and never mix in a tensor of the CPU. Each
tower is compiled in one piece on the CPU, and runs on fake tensors of a CUDA device: these have shapes, dtypes and
devices and no data, so a computation that reads a value or mixes devices raises there as it would stall or fail there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models.catalog  # noqa: F401
from models.base import LoadOptions, RewardModel
from models.registry import get_info, get_model, list_models, load_model
from models.towers import TowerReward
from models.weights import file_sha256

IMAGES = Path(__file__).parents[1] / "fixtures" / "pointwise" / "images"
CUDA = torch.device("cuda:0")
NAMES = [name for name in list_models() if get_info(name).kind == "pointwise"]
TOWERS = [name for name in NAMES if issubclass(get_model(name), TowerReward)]
ON_DEVICE = [name for name in NAMES if get_model(name).uses_device]
INLINED_BYTES = 0
"""Constants of up to eight numbers: inductor writes them into its kernels (``lowering.tensor``) and copies nothing."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, the options that load it, and the folder of its tiny checkpoint (empty where it needs none)."""

    model: Any
    options: LoadOptions
    folder: Path


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Loaded:
    options = get_model(name).random_checkpoint(folder, "tiny") if get_info(name).sources else LoadOptions()
    options = replace(options, dtype=dtype)
    return Loaded(load_model(name, options), options, folder)


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TowerReward:
    model = load(request.param, tmp_path_factory.mktemp(request.param)).model
    assert isinstance(model, TowerReward)
    return model


@pytest.fixture(params=ON_DEVICE)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Loaded:
    """Its tensors may be changed: no other test sees it."""
    return load(request.param, tmp_path)


def batch(model: TowerReward, count: int = 2) -> tuple[Tensor, Tensor]:
    """Pixels and tokens of ``count`` samples whose images differ, all of one shape."""
    canary = model.canary()
    names = ("landscape", "portrait", "tiny", "square")
    files = [path for name in names for path in sorted(IMAGES.glob(f"{name}*.png"))]
    size = canary.image(model.info.name).size
    pictures = [Image.open(files[i % len(files)]).convert("RGB").resize(size).rotate(90 * i) for i in range(count)]
    prompts = [canary.prompt, *(f"{canary.prompt} {letter}" for letter in "abcdefgh")]
    pixels = torch.stack([model.prepare_image(picture) for picture in pictures])
    tokens = [model.prepare_text(prompts[i])[0] for i in range(count)]
    assert len({len(row) for row in tokens}) == 1
    return pixels, torch.stack(tokens)


def image_part(model: TowerReward) -> Callable[[Tensor], Tensor]:
    return lambda pixels: model.encode_image(model.normalize(pixels))


def head_part(model: TowerReward) -> Callable[[Tensor, Tensor], Tensor]:
    def head(image_features: Tensor, text_features: Tensor) -> Tensor:
        result = model.head(image_features, text_features)
        return torch.stack([result.score_B, *result.outputs.values()], dim=1)

    return head


# -- compilation ------------------------------------------------------------------------------------------------------


def compiled_equals_eager(model: TowerReward, backend: str, tolerance: float) -> None:
    """Each part compiles without a graph break, gives what it gives uncompiled, and serves other rows as it is."""
    torch._dynamo.reset()
    with torch.inference_mode():
        pixels, tokens = (rows.clone() for rows in batch(model))
        features = (image_part(model)(pixels), model.encode_text(tokens))
        for function, rows in (
            (image_part(model), (pixels,)),
            (model.encode_text, (tokens,)),
            (head_part(model), features),
        ):
            compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
            for given in (rows, tuple(part.flip(0).contiguous() for part in rows)):
                expected, found = function(*given).float(), compiled(*given).float()
                assert found.shape == expected.shape
                scale = max(float(expected.abs().max()), 1e-6)
                assert float((found - expected).abs().max()) <= tolerance * scale
                torch.compiler.set_stance("fail_on_recompile")
            torch.compiler.set_stance("default")


@pytest.fixture
def default_stance() -> Iterator[None]:
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.usefixtures("default_stance")
def test_every_part_is_one_graph_that_serves_all_batches_of_its_shape(tower: TowerReward) -> None:
    compiled_equals_eager(tower, "aot_eager", 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("default_stance")
def test_generated_kernels_give_the_eager_numbers(tower: TowerReward) -> None:
    compiled_equals_eager(tower, "inductor", 1e-4)


# -- a device that is not there ---------------------------------------------------------------------------------------


class HostTraffic(TorchDispatchMode):
    """Notes every operation that reads or makes a tensor of the CPU of more than ``allowed`` bytes."""

    def __init__(self, allowed: int = INLINED_BYTES) -> None:
        super().__init__()
        self.allowed = allowed
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "cpu" and tensor.nbytes > self.allowed for tensor in tensors):
            self.found.append(str(func))
        return result


def modules_of(model: object) -> list[nn.Module]:
    """Every module that a model or one of its parts holds, without their submodules."""
    found: list[nn.Module] = []
    for value in vars(model).values():
        if isinstance(value, nn.Module):
            found.append(value)
        elif type(value).__module__.startswith("models."):
            found += modules_of(value)
    return found


def on_fake_cuda(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    fake = mode.from_tensor(tensor.detach())
    with mode:
        return fake.to(CUDA)


@contextmanager
def moved_to_fake_cuda(model: RewardModel) -> Iterator[FakeTensorMode]:
    """For a while the model's tensors are fake ones on a CUDA device."""
    mode = FakeTensorMode()
    originals: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
    fakes: dict[int, Tensor] = {}
    for module in (submodule for whole in modules_of(model) for submodule in whole.modules()):
        for tensors in (module._parameters, module._buffers):
            originals.append((tensors, dict(tensors)))
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = on_fake_cuda(mode, tensor)
                fake = fakes[id(tensor)]
                tensors[name] = nn.Parameter(fake, requires_grad=False) if name in module._parameters else fake
    try:
        yield mode
    finally:
        for tensors, before in originals:
            tensors.update(before)


def test_scoring_never_waits_for_the_device_or_reads_the_cpu(tower: TowerReward) -> None:
    pixels, tokens = batch(tower)
    with moved_to_fake_cuda(tower) as mode:
        rows = on_fake_cuda(mode, pixels), on_fake_cuda(mode, tokens)
        with mode, torch.inference_mode(), HostTraffic() as traffic:
            features = tower.encode_image(tower.normalize(rows[0])), tower.encode_text(rows[1])
            output = tower.head(*features)
    assert traffic.found == []
    for values in (output.score_B, *output.outputs.values()):
        assert (values.device, values.dtype, values.shape) == (CUDA, torch.float32, (2,))
    assert set(output.outputs) == set(tower.info.outputs)


def test_the_twin_never_waits_for_the_device_or_reads_the_cpu(tower: TowerReward) -> None:
    """The forward of a gradient; its backward is autograd's, which wants a device that is there."""
    if not tower.info.differentiable:
        pytest.skip(f"{tower.info.name} is not differentiable")
    _, tokens = batch(tower)
    with moved_to_fake_cuda(tower) as mode:
        ids = on_fake_cuda(mode, tokens)
        with mode:
            leaf = torch.rand(2, 3, 90, 110, device=CUDA).requires_grad_()
            with HostTraffic() as traffic:
                score_B = tower.head(tower.encode_image(tower.preprocess_tensor(leaf)), tower.encode_text(ids)).score_B
    assert traffic.found == []
    assert score_B.requires_grad
    assert score_B.device == CUDA


def test_the_detector_of_geneval_never_waits_for_the_device_or_reads_the_cpu(tmp_path: Path) -> None:
    model = load("geneval", tmp_path).model
    pixels = model.prepare(model.canary()).prepared.pixels
    with moved_to_fake_cuda(model) as mode:
        rows = on_fake_cuda(mode, pixels[None])
        # It is not compiled, and makes the sizes of its three levels anew in each forward: int64 [3, 2].
        with mode, torch.inference_mode(), HostTraffic(allowed=48) as traffic:
            output = model.detector.network(pixel_values=rows)
    assert traffic.found == []
    assert output.class_queries_logits.device == output.masks_queries_logits.device == CUDA


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda features: features * torch.arange(features.shape[-1]),  # on the CPU
        lambda features: features * torch.arange(features.shape[-1]).to(CUDA),  # copied at every call
        lambda features: features * (2 if bool((features > 0).any()) else 1),
        lambda features: features * features.sum().item(),
    ],
    ids=["cpu", "copy", "bool", "item"],
)
def test_the_check_finds_what_it_looks_for(spoiled: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    model = load("shapes-clip", tmp_path).model
    pixels, _ = batch(model)
    with moved_to_fake_cuda(model) as mode:
        rows = on_fake_cuda(mode, pixels)
        try:
            with mode, torch.inference_mode(), HostTraffic() as traffic:
                spoiled(model.encode_image(model.normalize(rows)))
        except DataDependentOutputException:
            return
        except RuntimeError as error:
            assert "device" in str(error)  # noqa: PT017
            return
    assert traffic.found != []


# -- weights ----------------------------------------------------------------------------------------------------------


def tensors_of(model: RewardModel) -> dict[str, Tensor]:
    """Parameters, buffers, and tensors that a module holds as plain attributes."""
    found: dict[str, Tensor] = {}
    for number, whole in enumerate(modules_of(model)):
        for prefix, module in whole.named_modules(prefix=str(number)):
            for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
                if isinstance(value, Tensor):
                    found[f"{prefix}.{name}"] = value
    return found


def test_no_tensor_is_left_without_data_and_none_wants_a_gradient(loaded: Loaded) -> None:
    tensors = tensors_of(loaded.model)
    assert len(tensors) > 10
    assert [name for name, tensor in tensors.items() if tensor.is_meta] == []
    assert [name for name, tensor in tensors.items() if tensor.requires_grad] == []
    assert all(bool(t[~torch.isneginf(t)].isfinite().all()) for t in tensors.values() if t.is_floating_point())


def test_a_model_that_is_changed_leaves_its_files_as_they_were(loaded: Loaded) -> None:
    """Tensors may lie in a mapped file: it is mapped for this process alone."""
    files = [file for file in loaded.folder.rglob("*") if file.is_file()]
    if not files:
        pytest.skip(f"the weights of {loaded.model.info.name} are none of its own files")
    before = [file_sha256(file) for file in files]
    for tensor in tensors_of(loaded.model).values():
        tensor.zero_()
    assert [file_sha256(file) for file in files] == before
    assert load_model(loaded.model.info.name, loaded.options).weights_hash == loaded.model.weights_hash


@pytest.mark.parametrize("name", TOWERS)
def test_scores_of_a_bfloat16_model_are_not_rounded_to_bfloat16(name: str, tmp_path: Path) -> None:
    """Eight bits are too few to rank a group: cosines and the last layers of every head are computed in float32."""
    model = load(name, tmp_path, torch.bfloat16).model
    pixels, tokens = batch(model, 8)
    with torch.inference_mode():
        features = model.encode_image(model.normalize(pixels)), model.encode_text(tokens)
        scores_B = model.head(*features).score_B
    assert features[0].dtype == torch.bfloat16
    assert scores_B.dtype == torch.float32
    assert int((scores_B != scores_B.bfloat16().float()).sum()) >= 6
