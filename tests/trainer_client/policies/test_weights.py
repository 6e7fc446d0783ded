"""What is trained: adapters or the whole network, their named copies, the reference, and the files of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.trainer_client.policies.tiny_pipelines import BUILDERS, PROMPTS, build
from trainer_client.ema import ema_update_
from trainer_client.policies import DDPMPolicy, FlowPolicy, Policy, TrainableWeights, policy_for

SIZE = {"height": 32, "width": 32}
FAMILIES = list(BUILDERS)
KINDS = ["lora", "full"]
DROPPED = tuple(
    f"transformer_blocks.1.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "attn.norm_added_q", "txt_mlp")
)
"""The last block's text stream, which SD3 and Qwen-Image drop: no gradient goes there."""


def trained(policy: Policy, kind: str) -> TrainableWeights:
    if kind == "full":
        return policy.train_full()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return policy.train_lora(4, 12)


def predict(policy: Policy, seed: int = 1) -> Tensor:
    """What the network says about one state, with the gradients that are asked for."""
    latents = policy.initial_latents([seed, seed + 1], **SIZE)
    conditioning = policy.encode_prompts(PROMPTS)
    if isinstance(policy, FlowPolicy):
        return policy.velocity(latents, torch.tensor([0.8, 0.4]), conditioning)
    assert isinstance(policy, DDPMPolicy)
    return policy.prediction(latents, torch.tensor([800, 400]), conditioning)


@torch.no_grad()
def shake(weights: TrainableWeights, name: str = "default", seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.tensors(name):
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_at_the_reference_and_leaves_it_alone(family: str, kind: str) -> None:
    policy = policy_for(build(family))
    before = predict(policy)
    assert not before.requires_grad
    weights = trained(policy, kind)
    assert torch.equal(predict(policy).detach(), before)
    shake(weights)
    assert (predict(policy).detach() - before).abs().max() > 1e-3
    with policy.reference():
        inside = predict(policy)
    assert torch.equal(inside, before)
    assert not inside.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_trained_tensor_and_nothing_else(family: str, kind: str) -> None:
    policy = policy_for(build(family))
    weights = trained(policy, kind)
    weights.add("old")
    if kind == "lora":
        shake(weights)  # at B = 0 the gradient of A is zero
    predict(policy).square().mean().backward()
    named = weights.named_tensors()
    unused = {key for key, tensor in named.items() if tensor.grad is None or not tensor.grad.any()}
    assert all(family in ("sd3", "qwen-image") and key.startswith(DROPPED) for key in unused), unused
    others = [part for part in policy.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    holders = {id(tensor) for tensor in named.values()}
    stray = [p for part in others for p in part.parameters() if p.grad is not None and id(p) not in holders]
    assert stray == []
    if kind == "lora":
        assert {key.rsplit(".", 1)[1] for key in named} == {"lora_A", "lora_B"}
        assert {tensor.shape[0] for key, tensor in named.items() if key.endswith("lora_A")} == {4}


@pytest.mark.parametrize("kind", KINDS)
def test_named_copies_are_independent_and_switched_by_context(kind: str) -> None:
    policy = policy_for(build("sd3"))
    weights = trained(policy, kind)
    shake(weights)
    first = predict(policy).detach()
    weights.add("old")
    assert weights.names == ("default", "old")
    shake(weights, seed=1)
    second = predict(policy).detach()
    assert (first - second).abs().max() > 1e-3
    with policy.use("old"):
        inside = predict(policy)
        with policy.reference(), policy.use("default"):
            assert torch.equal(predict(policy).detach(), second)
        again = predict(policy)
    assert torch.equal(inside, first)
    assert torch.equal(again, first)
    assert not inside.requires_grad
    after = predict(policy)
    assert torch.equal(after.detach(), second)
    assert after.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_inside_a_context_restores_the_trained_weights(kind: str) -> None:
    policy = policy_for(build("sd3"))
    weights = trained(policy, kind)
    shake(weights)
    before = predict(policy).detach()
    with pytest.raises(ZeroDivisionError), policy.reference():
        raise ZeroDivisionError
    assert torch.equal(predict(policy).detach(), before)
    assert predict(policy).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_policy_can_be_an_average(kind: str) -> None:
    """DiffusionNFT's update, by ema_update_; in the middle of a context too, where "default" isn't in use."""
    policy = policy_for(build("sd3"))
    weights = trained(policy, kind)
    weights.add("old")
    before = {key: tensor.detach().clone() for key, tensor in weights.named_tensors("old").items()}
    shake(weights)
    now = {key: tensor.detach().clone() for key, tensor in weights.named_tensors().items()}
    with policy.use("old"):
        ema_update_(weights.tensors("old"), weights.tensors("default"), 0.25)
    for key, tensor in weights.named_tensors("old").items():
        torch.testing.assert_close(tensor, 0.25 * before[key] + 0.75 * now[key])
    for key, tensor in weights.named_tensors().items():
        assert torch.equal(tensor, now[key])


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_keeps_its_hold_through_contexts_and_loading(kind: str) -> None:
    policy = policy_for(build("sd3"))
    weights = trained(policy, kind)
    weights.add("old")
    optimizer = torch.optim.SGD(weights.tensors(), lr=0.5)
    stored = {key: tensor.detach().clone() for key, tensor in weights.named_tensors().items()}
    start = predict(policy).detach()
    velocity = predict(policy)
    with policy.reference(), torch.no_grad():
        predict(policy)
    with policy.use("old"), torch.no_grad():
        predict(policy)
    velocity.square().mean().backward()  # the graph was made before the contexts
    optimizer.step()
    assert (predict(policy).detach() - start).abs().max() > 1e-4
    with policy.use("old"):
        assert torch.equal(predict(policy), start)
    weights.load(stored)
    assert torch.equal(predict(policy).detach(), start)
    optimizer.zero_grad()
    predict(policy).square().mean().backward()
    optimizer.step()
    assert (predict(policy).detach() - start).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same(kind: str) -> None:
    gradients = []
    for enabled in (False, True):
        policy = policy_for(build("sd3"))
        weights = trained(policy, kind)
        shake(weights)
        policy.gradient_checkpointing(enabled)
        assert policy.network.is_gradient_checkpointing == enabled
        velocity = predict(policy)
        with policy.reference(), torch.no_grad():
            predict(policy)
        velocity.square().mean().backward()
        gradients.append([tensor.grad for tensor in weights.tensors()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None and checkpointed is not None:
            torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-7)


# Autocast hands FLUX's norm bfloat16 inputs with float32 weights; torch says that it then takes its slower kernel.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_the_trained_weights_in_float32(family: str, kind: str) -> None:
    exact = predict(policy_for(build(family)))
    pipeline = build(family)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != "vae":
            part.to(torch.bfloat16)
    policy = policy_for(pipeline)
    assert policy.dtype == torch.bfloat16
    weights = trained(policy, kind)
    weights.add("old")
    assert {tensor.dtype for name in weights.names for tensor in weights.tensors(name)} == {torch.float32}
    prediction = predict(policy)
    assert prediction.dtype == torch.float32
    error = (prediction.detach() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1  # rounded, and still the same function
    prediction.square().mean().backward()
    assert any(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in weights.tensors())
    assert policy.decode(policy.initial_latents([1], **SIZE)).dtype == torch.float32


def sample(policy: Policy) -> Tensor:
    return policy.sample(PROMPTS, [1, 2], steps=3, **SIZE)


def reloaded(family: str, directory: Path) -> DiffusionPipeline:
    """The untrained pipeline with the folder's adapters, by diffusers alone."""
    pipeline = build(family)
    pipeline.load_lora_weights(str(directory))
    return pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapters_load_into_the_diffusers_pipeline(family: str, tmp_path: Path) -> None:
    policy = policy_for(build(family))
    base = sample(policy)
    weights = trained(policy, "lora")  # alpha / rank is 3: lost if the file doesn't carry it
    shake(weights)
    weights.add("old")
    shake(weights, seed=5)
    ours = sample(policy)
    with policy.use("old"):
        old = sample(policy)
    assert min((ours - base).abs().max(), (old - base).abs().max(), (ours - old).abs().max()) > 1e-3
    for name, expected in (("default", ours), ("old", old)):
        policy.save_lora(tmp_path / name, name)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        guidance = {} if family == "qwen-image" else {"guidance_scale": 1.0}
        theirs = reloaded(family, tmp_path / name)(
            PROMPTS, num_inference_steps=3, generator=generators, output_type="pt", **guidance, **SIZE
        ).images
        assert (expected - theirs).abs().max() < 1e-4
    assert [path.suffix for path in sorted((tmp_path / "old").iterdir())] == [".safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapters_load_into_policies(family: str, tmp_path: Path) -> None:
    policy = policy_for(build(family))
    shake(trained(policy, "lora"))
    expected = predict(policy).detach()
    policy.save_lora(tmp_path)
    fresh = policy_for(build(family))
    weights = fresh.load_lora(tmp_path)
    assert torch.equal(predict(fresh).detach(), expected)
    assert predict(fresh).requires_grad
    weights.add("old")
    held = weights.tensors()
    shake(weights, seed=9)
    fresh.load_lora(tmp_path)
    assert torch.equal(predict(fresh).detach(), expected)
    assert all(a is b for a, b in zip(held, weights.tensors(), strict=True))
    assert weights.names == ("default", "old")
    assert predict(fresh).requires_grad


def test_adapters_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    policy = policy_for(build("sd3"))
    shake(trained(policy, "lora"))
    before = predict(policy).detach()
    for i, (rank, alpha, message) in enumerate([(4, 8, "alpha / rank is 2"), (8, 24, "don't fit 'default'")]):
        other = policy_for(build("sd3"))
        shake(other.train_lora(rank, alpha))
        other.save_lora(tmp_path / str(i))
        with pytest.raises(ValueError, match=message):
            policy.load_lora(tmp_path / str(i))
        assert torch.equal(predict(policy).detach(), before)
        assert policy.weights.names == ("default",)


def test_misuse_is_named() -> None:
    policy = policy_for(build("sd3"))
    with pytest.raises(RuntimeError, match="nothing is trained yet"):
        policy.weights  # noqa: B018
    with pytest.raises(ValueError, match="no_such_layer"):
        policy_for(build("sd3")).train_lora(targets=["no_such_layer"])
    weights = policy.train_full()
    with pytest.raises(RuntimeError, match="trained already"):
        policy.train_lora()
    with pytest.raises(RuntimeError, match="no adapters"):
        policy.save_lora("nowhere")
    with pytest.raises(KeyError, match="only default"), policy.use("old"):
        pass
    weights.add("old")
    with pytest.raises(ValueError, match="called 'old' already"):
        weights.add("old")
    with pytest.raises(ValueError, match="don't fit 'old'"):
        weights.load({}, "old")


def test_adapters_sit_where_flow_grpo_puts_them() -> None:
    weights = trained(policy_for(build("sd3")), "lora")
    layers = {key.removesuffix(".lora_A").split(".attn.")[1] for key in weights.named_tensors() if "lora_A" in key}
    assert layers == {
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    }  # fmt: skip
