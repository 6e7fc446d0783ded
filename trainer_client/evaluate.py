"""``reward-trainer evaluate``: the command line of :mod:`trainer_client.evaluation`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer_client.config import ConfigError
from trainer_client.errors import RewardError

if TYPE_CHECKING:  # they import torch, which takes seconds that --help need not wait for
    from trainer_client.evaluation import Evaluation

SERVICE = "http://127.0.0.1:8000"
Dtype = Literal["float32", "bfloat16", "float16"]

# fmt: off
Policy = Annotated[str, typer.Argument(help="diffusers folder or hub id", metavar="POLICY")]
Prompts = Annotated[str, typer.Option(help="prompt file, or a shipped set such as shapes:heldout")]
Names = Annotated[list[str], typer.Option(help="reward model; may repeat", metavar="NAME")]
Out = Annotated[Path, typer.Option(help="folder for numbers and images", file_okay=False)]
Services = Annotated[list[str] | None, typer.Option(help="address of a service; may repeat", show_default=SERVICE)]
Lora = Annotated[Path | None, typer.Option(help="trained weights: adapters, a checkpoint, or a run's folder")]
Ema = Annotated[bool, typer.Option("--ema", help="take the checkpoint's averaged weights")]
Against = Annotated[str | None, typer.Option(help="another policy, on the same prompts and noise", metavar="POLICY")]
AgainstLora = Annotated[Path | None, typer.Option(help="trained weights of the other policy")]
AgainstEma = Annotated[bool, typer.Option("--against-ema", help="the averaged ones of the other policy")]
Judge = Annotated[str | None, typer.Option(help="reward model that compares the policies' images", metavar="NAME")]
Count = Annotated[int | None, typer.Option(help="prompts taken from the start of the file; all by default", min=1)]
Seeds = Annotated[int, typer.Option(help="images of each prompt", min=1)]
Seed = Annotated[int, typer.Option(help="what all noise follows from", min=0)]
Steps = Annotated[int, typer.Option(help="denoising steps", min=1)]
Guidance = Annotated[float, typer.Option(help="classifier-free guidance above 1; FLUX: its guidance input", min=0)]
Negative = Annotated[str, typer.Option(help="what guidance steers away from")]
Side = Annotated[int | None, typer.Option(help="pixels; the policy's own by default", min=1)]
BatchSize = Annotated[int, typer.Option(help="images drawn at once", min=1)]
Device = Annotated[str, typer.Option(help="auto takes CUDA where there is a GPU")]
ComputeDtype = Annotated[Dtype, typer.Option(help="what network and text encoders compute in")]
Tokens = Annotated[int | None, typer.Option(help="tokens of the long text encoder; 0 leaves it out", min=0)]
Patience = Annotated[float, typer.Option(help="seconds to wait for a service that is away", min=0)]
# fmt: on


def evaluate_command(
    policy: Policy,
    prompts: Prompts,
    rewards: Names,
    out: Out,
    services: Services = None,
    lora: Lora = None,
    ema: Ema = False,
    against: Against = None,
    against_lora: AgainstLora = None,
    against_ema: AgainstEma = False,
    judge: Judge = None,
    count: Count = None,
    seeds: Seeds = 4,
    seed: Seed = 1_000_003,
    steps: Steps = 20,
    guidance: Guidance = 1.0,
    negative: Negative = "",
    height: Side = None,
    width: Side = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: ComputeDtype = "float32",
    max_sequence_length: Tokens = None,
    patience: Patience = 300.0,
) -> None:
    """Score a policy's images, or compare two policies, with 95 % intervals over prompts.

    --lora takes adapters in diffusers' form, a checkpoint, or a run's folder, whose last checkpoint counts; of a
    checkpoint the weights as trained, or with --ema their average. REWARD_API_KEY holds the key of the services.
    """
    others: dict[str, Any] = {
        "count": count, "seeds": seeds, "seed": seed, "steps": steps, "guidance": guidance, "negative": negative,
        "height": height, "width": width, "batch_size": batch_size, "device": device, "dtype": dtype,
        "max_sequence_length": max_sequence_length, "patience": patience,
    }  # fmt: skip
    with _one_line():
        if against is None and (against_lora is not None or against_ema):
            raise ConfigError("--against-lora and --against-ema say more of the policy that --against names")
        if (ema and lora is None) or (against_ema and against_lora is None):
            raise ConfigError("averaged weights are those of a checkpoint: name it (--lora, --against-lora)")
        from trainer_client.evaluation import EvaluationConfig, PolicySource

        config = EvaluationConfig(
            policy=PolicySource(policy, lora, ema),
            against=None if against is None else PolicySource(against, against_lora, against_ema),
            prompts=prompts,
            rewards=tuple(rewards),
            judge=judge,
            services=tuple(services or (SERVICE,)),
            out=out,
            **others,
        )
        _show(_evaluated(config), out)


def _evaluated(config: Any) -> Evaluation:
    from trainer_client.evaluation import evaluate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    with _quiet_libraries(), bars:
        return evaluate(config, bars)


def _show(found: Evaluation, out: Path) -> None:
    from trainer_client.eval_results import tables

    console = Console()
    for table in tables(found.prompts, found.scores, found.judgement):
        console.print(table)
    for each in found.scores:
        for reason, times in Counter(each.failures).most_common(3):
            _say(f"{each.label}: {times} x {reason}")
    if found.judgement is not None:
        for reason, times in Counter(found.judgement.failures).most_common(3):
            _say(f"{found.judgement.name}: {times} x {reason}")
    console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


@contextmanager
def _one_line() -> Iterator[None]:
    """Say in one line what a user can mend, and end with 2. Faults keep their trace."""
    try:
        yield
    except (ConfigError, RewardError, OSError, ValueError) as error:
        _say(f"reward-trainer: {' '.join(str(error).split()) or type(error).__name__}")
        sys.exit(2)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without the bars of diffusers and transformers, and their warnings of prefixes that adapters do not have."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    modules: tuple[Any, ...] = (of_diffusers, of_transformers)
    levels = [module.get_verbosity() for module in modules]
    barred = [module.is_progress_bar_enabled() for module in modules]
    for module in modules:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, was_on in zip(modules, levels, barred, strict=True):
            module.set_verbosity(level)
            if was_on:
                module.enable_progress_bar()
