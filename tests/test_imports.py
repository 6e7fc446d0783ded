"""The walls of the house: which package may import which, read from the source and not from a running process."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("service", "models", "trainer_client")
HTTP = {
    "fastapi", "starlette", "uvicorn", "httpx", "requests", "aiohttp", "urllib3", "http",
    "pydantic", "prometheus_client",
}  # fmt: skip
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ENVIRONMENT = {"environ", "getenv", "putenv", "environb"}
READS_ENVIRONMENT = {
    "service/settings.py",
    "service/remote_settings.py",
    "service/engine/compile.py",  # torch takes the place of its compile cache from a variable
    "models/ocr.py",  # turns off what the wheel of onnxruntime reports to its maker; it reads a variable at import
    "service/runtime.py",  # OpenMP and MKL read theirs when torch is imported
    "service/cli.py",  # hands --config to settings.py through REWARD_CONFIG
}


def sources(*folders: str) -> list[Path]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path for path in found if "build" not in path.relative_to(ROOT).parts]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_under(module: str, *roots: str) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)


def violations(folder: str, *forbidden: str) -> list[str]:
    return [
        f"{name_of(path)} imports {module}"
        for path in sources(folder)
        for module in imports(ast.parse(path.read_text()), path)
        if is_under(module, *forbidden)
    ]


def test_there_is_something_to_check() -> None:
    assert all(len(sources(package)) > 5 for package in PACKAGES)
    app = ROOT / "service" / "app.py"
    assert "service.engine.engine" in set(imports(ast.parse(app.read_text()), app))


def test_relative_imports_are_resolved() -> None:
    path = ROOT / "models" / "backbones" / "new.py"
    assert "service.app" not in set(imports(ast.parse("from . import clip\nfrom ..base import Reward"), path))
    found = set(imports(ast.parse("from . import clip\nfrom ..base import Reward"), path))
    assert {"models.backbones.clip", "models.base.Reward"} <= found


def test_models_import_no_http_and_no_service() -> None:
    assert violations("models", "service", "trainer_client", *HTTP) == []


def test_the_trainer_stands_alone() -> None:
    assert violations("trainer_client", "service", "models") == []


def test_the_client_needs_no_torch() -> None:
    """Checked where it counts: at import time of every module that the package's name pulls in."""
    top_level = [
        f"{name_of(path)} imports {module}"
        for path in sources("trainer_client")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in imports(ast.Module([node], []), path)
        if is_under(module, "torch")
        and path.name in {"__init__.py", "client.py", "items.py", "results.py", "errors.py"}
    ]
    assert top_level == []


def test_the_service_does_not_import_the_trainer() -> None:
    assert violations("service", "trainer_client") == []


def test_the_engine_imports_no_routes_and_no_web_framework() -> None:
    assert violations("service/engine", "service.routes", "service.app", "service.cli", "service.process",
                      "service.wire", "service.schemas", "fastapi", "starlette", "uvicorn") == []  # fmt: skip


def test_routes_reach_models_only_by_their_contracts() -> None:
    """routes -> engine -> models; the catalogue is words and needs the registry, nobody needs a model's file."""
    allowed = ("models.base", "models.judge", "models.registry")
    found = [
        f"{name_of(path)} imports {module}"
        for path in sources("service/routes")
        for module in imports(ast.parse(path.read_text()), path)
        if is_under(module, "models") and module != "models" and not is_under(module, *allowed)
    ]
    assert found == []


def test_only_app_and_process_know_the_routes() -> None:
    found = {
        name_of(path)
        for path in sources("service")
        if path.parent.name != "routes"
        and any(is_under(module, "service.routes") for module in imports(ast.parse(path.read_text()), path))
    }
    assert found == {"service/app.py"}


def test_only_the_settings_read_the_environment() -> None:
    readers = set()
    for path in sources("service", "models"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and any(
                alias.name in ENVIRONMENT for alias in node.names
            )  # fmt: skip
            if named or imported:
                readers.add(name_of(path))
    assert readers <= READS_ENVIRONMENT
    assert "service/settings.py" in readers  # the check sees what it looks for


@pytest.mark.parametrize("package", PACKAGES)
def test_no_pickle_anywhere(package: str) -> None:
    assert violations(package, *PICKLES) == []


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield node


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def test_nothing_is_unpickled_by_the_back_door() -> None:
    found = []
    for path in sources(*PACKAGES, "benchmarks", "docker", "k8s"):
        tree = ast.parse(path.read_text())
        found += [name_of(path) for call in calls(tree, "torch.load") if keyword(call, "weights_only") != "True"]
        found += [
            name_of(path) for call in calls(tree, "np.load", "numpy.load") if keyword(call, "allow_pickle") == "True"
        ]
        found += [name_of(path) for call in calls(tree, "yaml.load", "eval", "exec", "torch.hub.load")]
        found += [
            name_of(path) for node in ast.walk(tree)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False"
        ]  # fmt: skip
    assert found == []


def test_a_torch_load_without_weights_only_would_be_seen() -> None:
    tree = ast.parse("torch.load(path)\ntorch.load(path, weights_only=True)\ntorch.load(path, weights_only=False)")
    assert [keyword(call, "weights_only") for call in calls(tree, "torch.load")] == [None, "True", "False"]
