"""reward-service serve | fetch | score | compare | models | evaluate | fit | bench"""

from __future__ import annotations

import base64
import importlib
import json
import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import httpx
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table
from rich.text import Text

from service.evaluation.command import evaluate
from service.fit_command import fit

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Rewards for images, over HTTP.")
app.command()(evaluate)
app.command()(fit)
console = Console()
progress = Console(stderr=True)

Url = Annotated[str, typer.Option(help="the service", envvar="REWARD_URL")]
Key = Annotated[str | None, typer.Option(help="bearer key", envvar="REWARD_API_KEY")]
Images = Annotated[list[Path], typer.Argument(help="PNG, JPEG or WebP files", exists=True, dir_okay=False)]
Prompt = Annotated[str, typer.Option(help="the prompt that the images were made from")]
Json = Annotated[bool, typer.Option("--json", help="print the service's answer instead of a table")]

DEFAULT_URL = "http://127.0.0.1:8000"
IMAGES_PER_REQUEST = 16


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML settings; REWARD_* variables win over it")] = None,
    host: Annotated[str | None, typer.Option(help="0.0.0.0 to be reachable from other machines")] = None,
    port: Annotated[int | None, typer.Option(help="default 8000")] = None,
) -> None:
    """Load the models of the settings and answer HTTP until SIGTERM."""
    # As process 1 of a container the default action would be to ignore it; nothing is admitted before the server runs.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if config is not None:
        os.environ["REWARD_CONFIG"] = str(config)
    from service.settings import Settings, SettingsProblem, load_settings
    from service.telemetry import configure_logging

    given: dict[str, Any] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    try:
        settings: Settings = load_settings(**given)
    except SettingsProblem as problem:
        _stop(f"settings: {problem}")
    configure_logging(settings.log_level, settings.log_format)
    from service.runtime import set_library_variables

    set_library_variables(settings)
    from service.app import create_app  # imports torch: after the settings, so that a typo is told at once
    from service.process import bind
    from service.process import serve as serve_app

    try:
        bound = bind(settings.host, settings.port)
    except OSError as error:
        _stop(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}")
    console.print(f"listening on http://{settings.host}:{bound.getsockname()[1]} once the models are loaded")
    raise typer.Exit(serve_app(create_app(settings), settings, bound))


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="reward models", metavar="NAME...")],
    config: Annotated[Path | None, typer.Option(help="YAML settings, whose sources of weights are used")] = None,
    weights_dir: Annotated[Path | None, typer.Option(help="where to put them; default: as the settings say")] = None,
) -> None:
    """Download the weights of models and verify them; what is here already is verified only."""
    if config is not None:
        os.environ["REWARD_CONFIG"] = str(config)
    from service.settings import SettingsProblem, load_settings

    try:
        settings = load_settings(**({} if weights_dir is None else {"weights_dir": weights_dir}))
    except SettingsProblem as problem:
        _stop(f"settings: {problem}")
    try:
        for plugin in settings.plugins:
            importlib.import_module(plugin)
    except ImportError as problem:
        _stop(f"settings: plugins: {problem}")
    import models.catalog  # noqa: F401
    from models.base import WeightsError
    from models.registry import list_models
    from service.fetch import fetch_model

    known = list_models(hidden=True)
    unknown = [name for name in names if name not in known]
    if unknown:
        _stop(f"unknown reward model {', '.join(unknown)}; known: {', '.join(known)}")
    failed = False
    for name in names:
        try:
            fetch_model(name, settings, _say, progress)
        except ValueError as problem:
            _stop(f"settings: models.{name}.options: {problem}")
        except WeightsError as problem:
            failed = True
            _complain(f"{name}: {problem}")
    if failed:
        raise typer.Exit(1)


@app.command()
def score(
    images: Images,
    prompt: Prompt,
    model: Annotated[list[str], typer.Option(help="NAME or NAME=WEIGHT; may repeat")],
    metadata: Annotated[str, typer.Option(help="JSON object for models that want one")] = "{}",
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Score images and print them best first."""
    weights = dict(_model_and_weight(entry) for entry in model)
    extra = _json_object(metadata)
    answers = []
    with _client(url, key) as client:
        for chunk in track(
            list(_chunks(images)), "scoring", console=progress, disable=len(images) <= IMAGES_PER_REQUEST
        ):
            item = {"prompt": prompt, "images": [_encode(path) for path in chunk], "metadata": extra}
            answers.append(_post(client, "/score", {"models": weights, "items": [item], "explain": True}))
    if as_json:
        console.print_json(json.dumps(answers if len(answers) > 1 else answers[0]))
        return
    rows = [(path, answer["results"][0], i) for chunk, answer in zip(_chunks(images), answers, strict=True)
            for i, path in enumerate(chunk)]  # fmt: skip
    rows.sort(key=lambda row: (row[1]["total"][row[2]] is None, -(row[1]["total"][row[2]] or 0.0)))
    table = Table("rank", "image", *weights, "total", "notes", title=Text(prompt))
    for rank, (path, result, i) in enumerate(rows, 1):
        scores = [_number(result["scores"][name][i]) for name in weights]
        table.add_row(str(rank), Text(path.name), *scores, _number(result["total"][i]), _notes(result, i))
    console.print(table)
    if all(result["total"][i] is None for _, result, i in rows):
        raise typer.Exit(1)


@app.command()
def compare(
    images: Images,
    prompt: Prompt,
    model: Annotated[str, typer.Option(help="any reward model")],
    explain: Annotated[bool, typer.Option(help="print each comparison, with the words of a judge that writes")] = False,
    adaptive: Annotated[bool, typer.Option(help="ask a judge only the pairs that tell most, not all")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Compare images pairwise and print the ranking with Bradley-Terry strengths."""
    with _client(url, key) as client, progress.status("comparing"):
        item = {"prompt": prompt, "images": [_encode(path) for path in images]}
        item["pairs"] = "adaptive" if adaptive else "all"
        answer = _post(client, "/compare", {"model": model, "items": [item], "explain": explain})
    if as_json:
        console.print_json(json.dumps(answer))
        return
    result = answer["results"][0]
    table = Table("rank", "image", "win rate", "strength", "± s.e.", "notes", title=Text(f"{model}: {prompt}"))
    for rank, i in enumerate(result["ranking"], 1):
        numbers = [_number(result[name][i]) for name in ("win_rate", "strength", "strength_stderr")]
        table.add_row(str(rank), Text(images[i].name), *numbers, _notes(result, i))
    console.print(table)
    _print_comparisons(result["comparisons"], images, explain)


def _print_comparisons(comparisons: Sequence[dict[str, Any]], images: Sequence[Path], explain: bool) -> None:
    """Each comparison where they are asked for, else those that failed: a ranking without them is another one."""
    for comparison in comparisons:
        if not explain and comparison["error"] is None:
            continue
        pair = f"{images[comparison['i']].name} or {images[comparison['j']].name}"
        error = comparison["error"]
        verdict = (
            f"P(first) {comparison['probability']:.3f}" if error is None else f"{error['code']}: {error['message']}"
        )
        console.print(Text(f"{pair}: {verdict}", style="bold" if error is None else "red"))
        for text in comparison["text"] or ():
            console.print(Text(text), soft_wrap=True)


@app.command()
def models(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """List the reward models of a service."""
    with _client(url, key) as client:
        answer = _checked(_send(client, "GET", "/models"))
    if as_json:
        console.print_json(json.dumps(answer))
        return
    table = Table("model", "kind", "inputs", "range", "grad", "licence", "weights", "ready", "fingerprint", title=url)
    for row in answer["models"]:
        low, high = row["range"]
        table.add_row(
            row["name"], row["kind"], ", ".join(row["inputs"]), f"{low:g} .. {high:g}",
            "yes" if row["differentiable"] else "", row["license"], _weights(row), "yes" if row["ready"] else "no",
            (row["fingerprint"] or "")[7:19],
        )  # fmt: skip
    console.print(table)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="a loaded model")],
    images: Annotated[list[Path] | None, typer.Argument(help="images to send; default: generated ones")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="clients at once; may repeat; default 1 8 64")] = None,
    group: Annotated[int, typer.Option(help="images per request", min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="per concurrency", min=0.5)] = 10.0,
    prompt: Prompt = "a photo",
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Load a running service and print images per second, latencies and errors."""
    from service.loadtest import run_and_print

    run_and_print(console, url, key, model, images or [], concurrency or [1, 8, 64], group, seconds, prompt)


def _client(url: str, key: str | None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(600, connect=10))


def _post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return _checked(_send(client, "POST", path, body))


def _send(client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    try:
        return client.request(method, path, json=body)
    except httpx.ConnectError:
        _stop(f"nothing answers at {client.base_url}; start a service with `reward-service serve`, or give --url")
    except httpx.HTTPError as error:
        _stop(f"{client.base_url}: {type(error).__name__}")


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.is_success:
        return cast(dict[str, Any], response.json())
    try:
        problem = response.json()
        _stop(f"{problem['status']} {problem['code']}: {problem['detail']}")
    except (ValueError, KeyError, TypeError):
        _stop(f"HTTP {response.status_code} from {response.request.url}")


def _stop(message: str) -> NoReturn:
    _complain(message)
    raise typer.Exit(2)


def _complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(message, style="red", markup=False, highlight=False)


def _say(message: str) -> None:
    console.print(message, soft_wrap=True, markup=False, highlight=False)


def _weights(row: dict[str, Any]) -> str:
    """Whether a model's weights are here, and how much is to fetch where they are not."""
    if row["weights_present"]:
        return "here" if row["weights"] else ""
    missing = [source["bytes"] for source in row["sources"] if not source["present"]]
    size = sum(missing) if all(missing) else row["weights_bytes"] if len(missing) == len(row["sources"]) else 0
    return f"missing, {decimal(size)}" if size else "missing"


def _chunks(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), IMAGES_PER_REQUEST):
        yield paths[start : start + IMAGES_PER_REQUEST]


def _encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _model_and_weight(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        _stop(f"--model {text}: the weight is not a finite number")
    return name, value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        _stop("--metadata is not a JSON object")
    return value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _notes(result: dict[str, Any], i: int) -> Text:
    notes = [f"{e['code']}: {e['message']}" for e in result["errors"][i]] + [
        w["message"] for w in result["warnings"][i]
    ]
    for model, details in (result.get("details") or {}).items():
        told = ", ".join(f"{k}={v}" for k, v in (details[i] or {}).items() if isinstance(v, str))
        if told:
            notes.append(f"{model}: {told}")
    return Text("; ".join(notes))  # recognised text is somebody else's: never markup


def main() -> None:
    app()


if __name__ == "__main__":
    main()
