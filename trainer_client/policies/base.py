"""A policy: the text-to-image model that is trained, as the algorithms see it. Built over a diffusers pipeline.

State: latents are float32 [B, C, h, w], whatever a network packs them into, scaled so that its VAE's latents have
about unit variance; images are float32 [B, 3, H, W] in [0, 1]. Text encoders and VAE are frozen. The network computes
in the policy's dtype; sigmas, timesteps and guidance are float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer_client.ddpm import to_image
from trainer_client.policies.conditioning import Conditioning
from trainer_client.policies.weights import TRAINED, FullWeights, LoraWeights, TrainableWeights, several_adapters

ATTENTION_LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""Both streams of a joint attention: where Flow-GRPO (arXiv 2505.05470) puts its adapters."""

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(latents [B, C, h, w], level [B], conditioning of B rows) -> the network's prediction, float32 [B, C, h, w]."""


class Policy(ABC):
    """A text-to-image model over the parts of a diffusers ``pipeline``, which stays usable: both share the weights.

    ``max_sequence_length`` is the number of tokens of the long text encoder (None: the pipeline's default; 0 leaves
    its tokens out, for a Stable Diffusion 3 without T5). Nothing asks for gradients until :meth:`train_lora` or
    :meth:`train_full` is called.
    """

    family: ClassVar[str]
    network_name: ClassVar[str]
    """The trained part, by its name in the pipeline."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Ends of the names of the linear layers that get adapters unless told otherwise."""
    latent_multiple: ClassVar[int] = 1
    """Height and width of latents must be a multiple of this."""
    guidance_is_input: ClassVar[bool] = False
    """Guidance is an input of the network (distilled) instead of a second, negative pass."""

    def __init__(self, pipeline: Any, *, max_sequence_length: int | None = None) -> None:
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.network: Any = getattr(pipeline, self.network_name)
        self.vae: Any = pipeline.vae
        parameter = next(self.network.parameters())
        self.dtype: torch.dtype = parameter.dtype
        self.device: torch.device = parameter.device
        self._weights: TrainableWeights | None = None

    # What is trained

    @property
    def weights(self) -> TrainableWeights:
        """The trained weights and their named copies. Raises RuntimeError before train_lora or train_full."""
        if self._weights is None:
            raise RuntimeError("nothing is trained yet: call train_lora(), train_full() or load_lora() first")
        return self._weights

    def train_lora(self, rank: int = 32, alpha: int = 64, *, targets: Sequence[str] | None = None) -> TrainableWeights:
        """Train fresh adapters of the given rank, scaled by alpha / rank, on ``targets`` (None: the family's own).

        They start at B = 0, where the policy is the reference; A comes from torch's global generator. Raises
        RuntimeError if something is trained already, ValueError if no layer is called by one of the targets.
        """
        self._nothing_trained_yet()
        self._weights = LoraWeights.create(self.network, rank, alpha, targets or self.lora_targets)
        return self._weights

    def train_full(self) -> TrainableWeights:
        """Train the whole network. It turns to float32 and computes in the policy's dtype under autocast; the
        reference is a copy of it. Raises RuntimeError if something is trained already."""
        self._nothing_trained_yet()
        self._weights = FullWeights(self.network)
        return self._weights

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Within it the policy computes with the weights ``name``, such as "old"; see TrainableWeights.use."""
        with self.weights.use(name):
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the policy is what it was before training: adapters off, or the first weights."""
        with self.weights.use(None):
            yield

    def gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations in the backward pass: of the network, and of the VAE's decoder where it can."""
        for part in (self.network, self.vae):
            if part is self.network or getattr(part, "_supports_gradient_checkpointing", False):
                (part.enable_gradient_checkpointing if enabled else part.disable_gradient_checkpointing)()

    def save_lora(self, directory: str | Path, name: str = TRAINED) -> None:
        """Write adapters as diffusers does: ``pipeline.load_lora_weights(directory)`` takes them, rank and alpha too.

        Raises RuntimeError where the whole network is trained, KeyError for an unknown name.
        """
        weights = self._lora_weights()
        layers = {f"{key}.weight": tensor.detach().cpu() for key, tensor in weights.named_tensors(name).items()}
        self.pipeline.save_lora_weights(
            directory,
            safe_serialization=True,
            **{
                f"{self.network_name}_lora_layers": layers,
                f"{self.network_name}_lora_adapter_metadata": self.network.peft_config[name].to_dict(),
            },
        )

    def save_network(self, directory: str | Path, name: str = TRAINED) -> None:
        """Write the whole trained network, float32, as diffusers does: ``type(network).from_pretrained(directory)``
        reads it, for a pipeline's part of the name ``network_name``.

        Raises RuntimeError where adapters are trained, KeyError for an unknown name.
        """
        if not isinstance(self.weights, FullWeights):
            raise RuntimeError("adapters are trained: save_lora() writes them")
        with self.weights.use(name):
            self.network.save_pretrained(directory, safe_serialization=True)

    def load_lora(self, directory: str | Path) -> TrainableWeights:
        """Adapters that :meth:`save_lora` or diffusers wrote become the trained weights.

        Where adapters are trained already, their values are overwritten in place, so an optimizer keeps its hold on
        them. Raises ValueError if the folder's adapters have other shapes or another scale, RuntimeError where the
        whole network is trained.
        """
        if self._weights is None:
            self.pipeline.load_lora_weights(str(directory), adapter_name=TRAINED, use_safetensors=True)
            self._weights = LoraWeights(self.network)
            return self._weights
        weights = self._lora_weights()
        passing = "loaded_from_disk"
        with several_adapters():
            self.pipeline.load_lora_weights(str(directory), adapter_name=passing, use_safetensors=True)
        try:
            configs = self.network.peft_config
            scale, found = (configs[name].lora_alpha / configs[name].r for name in (TRAINED, passing))
            if scale != found:
                raise ValueError(f"alpha / rank is {found:g} in {directory} and {scale:g} in the policy")
            weights.load(weights.named_tensors(passing))
        finally:
            weights.refresh()  # peft warns of deleting the one in use
            self.network.delete_adapters(passing)
        return weights

    # Prompts

    def needs_negative(self, guidance_scale: float) -> bool:
        """Whether sampling at this scale takes a second pass with a negative prompt."""
        return guidance_scale > 1 and not self.guidance_is_input

    def encode_prompts(self, prompts: Sequence[str], negative: str | Sequence[str] | None = None) -> Conditioning:
        """Conditioning of B prompts, on the policy's device, without gradient.

        ``negative`` is what classifier-free guidance steers away from, one text for all or one for each; "" is the
        usual choice, None leaves guidance out. Raises ValueError for no prompts or another number of negatives.
        """
        if not prompts:
            raise ValueError("no prompts")
        if negative is None:
            return self._encode(list(prompts), is_negative=False)
        texts = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(texts) != len(prompts):
            raise ValueError(f"{len(texts)} negative prompts for {len(prompts)} prompts")
        positive = self._encode(list(prompts), is_negative=False)
        distinct = list(dict.fromkeys(texts))
        steered_from = self._encode(distinct, is_negative=True)[[distinct.index(text) for text in texts]]
        return Conditioning(positive.embeddings, positive.pooled, positive.mask, steered_from)

    @abstractmethod
    def _encode(self, prompts: list[str], *, is_negative: bool) -> Conditioning:
        """Conditioning of the prompts, without a negative."""

    # Latents and images

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[str] | Conditioning,
        seeds: Sequence[int | torch.Generator],
        *,
        steps: int,
        guidance_scale: float = 1.0,
        negative: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], image i from prompt i and seed i, without gradient.

        They are the images of the pipeline itself. Where guidance needs a negative prompt and none is given, it is "".
        """

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the pipeline makes unless told otherwise."""
        size = self.pipeline.default_sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale, width * self.vae_scale

    @property
    def vae_scale(self) -> int:
        """Pixels per latent position along an edge."""
        scale: int = self.pipeline.vae_scale_factor
        return scale

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels C of latents."""

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) for images of ``height`` x ``width`` pixels. Raises ValueError for a size that isn't a multiple
        of what the VAE and the network take."""
        height, width = height or self.default_size[0], width or self.default_size[1]
        multiple = self.vae_scale * self.latent_multiple
        if height % multiple or width % multiple:
            raise ValueError(f"images of {self.family} have sides of multiples of {multiple}, not {height}x{width}")
        return self.latent_channels, height // self.vae_scale, width // self.vae_scale

    def initial_latents(
        self, seeds: Sequence[int | torch.Generator], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Standard normal latents [B, C, h, w], row i from seed or generator i alone: no row depends on its batch.

        Drawn on the CPU, so that a seed means the same on every device; the pipeline draws the same from CPU
        generators in float32.
        """
        shape = (1, *self.latent_shape(height, width))
        generators = as_generators(seeds)
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of latents [B, C, h, w]; differentiable, without gradient where clamped."""
        return to_image(self._decode(latents.to(self.vae.dtype)).float())

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [0, 1]: the mode of the VAE's posterior. Differentiable."""
        return self._posterior_mode((images * 2 - 1).to(self.vae.dtype)).float()

    def _decode(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents)
        decoded: Tensor = self.vae.decode(latents * std + mean, return_dict=False)[0]
        return decoded

    def _posterior_mode(self, pixels: Tensor) -> Tensor:
        mode: Tensor = self.vae.encode(pixels).latent_dist.mode()
        mean, std = self._latent_statistics(mode)
        return (mode - mean) / std

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of what the VAE makes, [1, C or 1, 1, 1]: latents are scaled by them."""
        config = self.vae.config
        scale = config.get("scaling_factor", 1.0)
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            mean, std = like.new_tensor([config.get("shift_factor") or 0.0]), like.new_tensor([1.0])
        else:
            mean, std = like.new_tensor(config.latents_mean), like.new_tensor(config.latents_std)
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1) / scale

    # Inside

    def _guided(
        self, predict: Predict, latents: Tensor, level: Tensor, conditioning: Conditioning, scale: float
    ) -> Tensor:
        """``predict`` with classifier-free guidance, both halves in one batch; none for a scale of at most 1."""
        if scale <= 1:
            return predict(latents, level, conditioning)
        if conditioning.negative is None:
            raise ValueError("guidance needs a negative prompt: encode_prompts(prompts, negative='')")
        told = Conditioning(conditioning.embeddings, conditioning.pooled, conditioning.mask)
        both = Conditioning.cat([conditioning.negative, told])
        away, toward = predict(torch.cat([latents] * 2), torch.cat([level] * 2), both).chunk(2)
        return self._combine(away, toward, scale)

    def _combine(self, away: Tensor, toward: Tensor, scale: float) -> Tensor:
        return away + scale * (toward - away)

    def _levels(self, level: float | Tensor, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """A noise level as float32 [B]; raises ValueError where batch sizes differ."""
        levels = torch.as_tensor(level, dtype=torch.float32, device=latents.device).reshape(-1)
        if len(latents) != len(conditioning) or len(levels) not in (1, len(latents)):
            raise ValueError(f"{len(latents)} latents, {len(conditioning)} prompts and {len(levels)} noise levels")
        return levels.expand(len(latents))

    def _precision(self) -> Any:
        """Autocast where weights are kept in a wider type than the policy computes in."""
        if isinstance(self._weights, FullWeights) and self.dtype != torch.float32:
            return torch.autocast(self.device.type, self.dtype)
        return nullcontext()

    def _input_dtype(self) -> torch.dtype:
        return torch.float32 if isinstance(self._weights, FullWeights) else self.dtype

    def _nothing_trained_yet(self) -> None:
        if self._weights is not None:
            raise RuntimeError("this policy is trained already; make another one")

    def _lora_weights(self) -> LoraWeights:
        if not isinstance(self.weights, LoraWeights):
            raise RuntimeError("the whole network is trained and there are no adapters: use pipeline.save_pretrained")
        return self.weights


def as_generators(seeds: Sequence[int | torch.Generator]) -> list[torch.Generator]:
    """A CPU generator for each seed; generators as they are."""
    return [seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed) for seed in seeds]
