"""Render every kustomization with ``kubectl kustomize`` and check it: ``python -m k8s.check``.

Each rendered set (base, overlays, each overlay with its training run, and each with every component) is validated
strictly (no unknown field) against the schemas of the three newest Kubernetes minor versions that kubernetes-validate
ships, and against the rules of :mod:`k8s.rules`. Exits 1 when something is wrong, 2 when there is no usable kubectl.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from kubernetes_validate import utils as kubernetes

from k8s.manifests import Document, Manifests
from k8s.rules import problems

ROOT = Path(__file__).resolve().parent
TRAINER = ROOT / "trainer"
VERSIONS = 3
WITHOUT_SCHEMA = {("monitoring.coreos.com/v1", "PodMonitor")}
"""Custom resources, whose schemas live with their operators; the rules still check them."""


class KubectlError(RuntimeError):
    """There is no kubectl, it is too old, or it could not render a kustomization; the message says which."""


def newest_versions(count: int = VERSIONS) -> list[str]:
    """The newest minor versions of Kubernetes that have schemas here, oldest first, such as ``1.37``."""
    minors = dict.fromkeys(kubernetes.major_minor(version) for version in kubernetes.all_versions())
    return list(minors)[-count:]


def overlays(root: Path = ROOT) -> list[Path]:
    """The service's overlays, or with ``TRAINER`` those of a training run."""
    return sorted(path.parent for path in root.glob("overlays/*/kustomization.yaml"))


def components(root: Path = ROOT) -> list[Path]:
    """The same for components."""
    return sorted(path.parent for path in root.glob("components/*/kustomization.yaml"))


def render(kustomization: Path) -> Manifests:
    """What ``kubectl apply -k`` would send; raises :class:`KubectlError`."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise KubectlError("kubectl is not installed: 1.27 or newer is needed (Debian 13: kubernetes-client)")
    command = [kubectl, "kustomize", str(kustomization)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise KubectlError(f"kubectl {kubectl_version(kubectl)} cannot render {kustomization}: {done.stderr.strip()}")
    return Manifests([document for document in yaml.safe_load_all(done.stdout) if document])


def kubectl_version(kubectl: str) -> str:
    command = [kubectl, "version", "--client", "--output=yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    version = (yaml.safe_load(done.stdout) or {}).get("clientVersion", {}).get("gitVersion", "of unknown version")
    return f"{version} (1.27 or newer is needed)"


def render_with(resources: Sequence[Path], chosen: Sequence[Path] = ()) -> Manifests:
    """Overlays together, with components added, as a user's own overlay would have them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()  # kustomize takes relative paths alone, and follows links before them
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(resource, folder) for resource in resources],
            "components": [os.path.relpath(component, folder) for component in chosen],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
        return render(folder)


def schema_problems(manifests: Manifests, version: str) -> Iterator[str]:
    """Where documents differ from the strict schemas of one Kubernetes version."""
    for document in manifests.documents:
        if (document["apiVersion"], document["kind"]) in WITHOUT_SCHEMA:
            continue
        if (problem := schema_problem(document, version)) is not None:
            yield f"{document['kind']} {document['metadata']['name']}: {problem}"


def schema_problem(document: Document, version: str) -> str | None:
    try:
        kubernetes.validate(document, version, strict=True)
    except kubernetes.ValidationError as exc:
        where = ".".join(str(part) for part in exc.absolute_path)
        return f"Kubernetes {version}, at {where or 'the top'}: {exc.message}"
    except kubernetes.SchemaNotFoundError as exc:
        return str(exc.message)
    return None


def rendered() -> Iterator[tuple[str, Manifests]]:
    """Every set that a user might apply, with its name."""
    yield "base", render(ROOT / "base")
    for overlay in overlays():
        yield f"overlays/{overlay.name}", render(overlay)
    for overlay in overlays():
        yield f"overlays/{overlay.name} with all components", render_with([overlay], components())
    for run in overlays(TRAINER):
        pair = [ROOT / "overlays" / run.name, run]
        yield f"trainer/overlays/{run.name} and its service", render_with(pair)
        every = [*components(), *components(TRAINER)]
        yield f"trainer/overlays/{run.name} and its service with all components", render_with(pair, every)


def main() -> int:
    versions = newest_versions()
    failures = 0
    try:
        for name, manifests in rendered():
            found = [problem for version in versions for problem in schema_problems(manifests, version)]
            found += problems(manifests)
            failures += len(found)
            print(f"{'FAILED' if found else 'ok'}  {name}: {len(manifests.documents)} documents")
            for problem in found:
                print(f"  {problem}")
    except KubectlError as exc:
        print(f"k8s-check: {exc}", file=sys.stderr)
        return 2
    print(f"{failures} problems; Kubernetes {', '.join(versions)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
