"""The training Job: it renders beside its service, finds it, is let in; the rules notice what breaks that."""

from __future__ import annotations

import copy
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from k8s import check, job_rules, rules
from k8s.manifests import Document, Manifests, labels_of, name_of, pod_of, selects

Perturbation = Callable[[Manifests], object]


@pytest.fixture
def cpu(rendered: dict[str, Manifests]) -> Manifests:
    return copy.deepcopy(rendered["trainer/overlays/cpu and its service"])


@pytest.fixture
def gpu(rendered: dict[str, Manifests]) -> Manifests:
    return copy.deepcopy(rendered["trainer/overlays/gpu and its service with all components"])


def job_of(manifests: Manifests) -> Document:
    (job,) = manifests.of_kind("Job")
    return job


def container_of(manifests: Manifests) -> Document:
    container: Document = pod_of(job_of(manifests))["containers"][0]
    return container


def named(manifests: Manifests, kind: str, start: str) -> Document:
    (found,) = [document for document in manifests.of_kind(kind) if document["metadata"]["name"].startswith(start)]
    return found


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_job_names_the_service_of_its_variant(device: str, request: pytest.FixtureRequest) -> None:
    manifests: Manifests = request.getfixturevalue(device)
    (url,) = job_rules.service_urls(container_of(manifests))
    assert url == f"http://reward-service-{device}:8000"
    assert named(manifests, "Service", "reward-service")["metadata"]["name"] == f"reward-service-{device}"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_run_that_is_applied_again_or_restarted_goes_on(device: str, request: pytest.FixtureRequest) -> None:
    arguments = job_rules.expanded(container_of(request.getfixturevalue(device)))
    assert arguments[:2] == ["train", "nft"]
    assert "--resume" in arguments
    assert job_rules.option(arguments, "--out") == "/runs/demo"


def test_the_job_gets_out_to_its_service_and_to_dns_alone(cpu: Manifests) -> None:
    spec = named(cpu, "NetworkPolicy", "reward-trainer")["spec"]
    assert "ingress" not in spec, "and nobody gets in"
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert {port["port"] for rule in spec["egress"] for port in rule["ports"]} == {53, 8000}
    (deployment,) = cpu.of_kind("Deployment")
    assert job_rules.lets(cpu, "egress", job_of(cpu), deployment, 8000)
    assert not job_rules.lets(cpu, "egress", job_of(cpu), deployment, 22)
    assert not job_rules.lets(cpu, "egress", job_of(cpu), job_of(cpu), 8000)


def test_no_service_and_no_budget_takes_the_jobs_pod(gpu: Manifests) -> None:
    labels = labels_of(job_of(gpu))
    for service in gpu.of_kind("Service"):
        assert not selects({"matchLabels": service["spec"]["selector"]}, labels)
    for kind in ("PodDisruptionBudget", "PodMonitor", "Deployment"):
        for document in gpu.of_kind(kind):
            assert not selects(document["spec"]["selector"], labels), name_of(document)


def test_the_component_patches_arrive(gpu: Manifests, cpu: Manifests) -> None:
    environment = {entry["name"]: entry for entry in container_of(gpu)["env"]}
    key = environment["REWARD_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert not key.get("optional"), "an asked-for key must not silently be missing"
    assert "REWARD_API_KEY" not in {entry["name"] for entry in container_of(cpu)["env"]}
    egress = named(gpu, "NetworkPolicy", "reward-trainer")["spec"]["egress"]
    assert {port["port"] for rule in egress for port in rule["ports"]} == {53, 443, 8000}


def test_a_changed_run_is_another_pod(tmp_path: Path, rendered: dict[str, Manifests]) -> None:
    shutil.copytree(check.TRAINER, tmp_path / "trainer")
    run = tmp_path / "trainer/base/run.toml"
    run.write_text(run.read_text().replace("[optimizer]\nlr = ", "[optimizer]\nlr = 2"))

    def mounted(manifests: Manifests) -> str:
        volumes = pod_of(job_of(manifests))["volumes"]
        (name,) = [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]
        return str(name)

    changed = mounted(check.render(tmp_path / "trainer/overlays/cpu"))
    assert changed != mounted(rendered["trainer/overlays/cpu and its service"])


def test_arguments_are_expanded_from_the_environment() -> None:
    container = {
        "args": ["--set", 'rewards.services=["$(A)", "http://b:1"]'],
        "env": [{"name": "A", "value": "http://a:1"}, {"name": "B", "valueFrom": {}}],
    }
    assert job_rules.service_urls(container) == ["http://a:1", "http://b:1"]
    assert job_rules.service_urls({"args": ["--set", "rewards.services=http://a:1"]}) == []
    assert job_rules.service_urls({"args": ["--set", 'policy.source="x"']}) == []
    assert job_rules.service_urls({}) == []


def replace_argument(manifests: Manifests, old: str, new: str | None) -> None:
    arguments = container_of(manifests)["args"]
    place = arguments.index(old)
    arguments[place : place + 1] = [] if new is None else [new]


def set_url(manifests: Manifests, url: str) -> None:
    for entry in container_of(manifests)["env"]:
        if entry["name"] == "REWARD_SERVICE_URL":
            entry["value"] = url


def drop_environment(manifests: Manifests, name: str) -> None:
    container = container_of(manifests)
    container["env"] = [entry for entry in container["env"] if entry["name"] != name]


def drop(manifests: Manifests, kind: str, start: str) -> None:
    manifests.documents.remove(named(manifests, kind, start))


def template_labels(manifests: Manifests) -> dict[str, str]:
    labels: dict[str, str] = job_of(manifests)["spec"]["template"]["metadata"]["labels"]
    return labels


def network(manifests: Manifests) -> Document:
    spec: Document = named(manifests, "NetworkPolicy", "reward-trainer")["spec"]
    return spec


def break_toml(manifests: Manifests) -> None:
    data = named(manifests, "ConfigMap", "reward-trainer-run")["data"]
    data["run.toml"] += "\n[policy\n"


PERTURBATIONS: dict[str, tuple[Perturbation, str]] = {
    "writable root": (
        lambda m: container_of(m)["securityContext"].pop("readOnlyRootFilesystem"),
        "wants readOnlyRootFilesystem",
    ),
    "root user": (
        lambda m: pod_of(job_of(m))["securityContext"].update(runAsUser=0),
        "wants runAsUser other than 0",
    ),
    "escalation": (
        lambda m: container_of(m)["securityContext"].update(allowPrivilegeEscalation=True),
        "wants allowPrivilegeEscalation: false",
    ),
    "capabilities": (lambda m: container_of(m)["securityContext"].pop("capabilities"), "wants capabilities: drop ALL"),
    "pod token": (
        lambda m: pod_of(job_of(m)).pop("automountServiceAccountToken"),
        "wants automountServiceAccountToken",
    ),
    "no seccomp": (lambda m: pod_of(job_of(m))["securityContext"].pop("seccompProfile"), "wants seccompProfile"),
    "latest image": (lambda m: container_of(m).update(image="reward-trainer:latest"), "no fixed tag"),
    "no account": (lambda m: drop(m, "ServiceAccount", "reward-trainer"), "its ServiceAccount is not among"),
    "no claim": (lambda m: drop(m, "PersistentVolumeClaim", "reward-trainer"), "reward-trainer-runs-gpu is not among"),
    "no tmp": (
        lambda m: container_of(m).update(
            volumeMounts=[mount for mount in container_of(m)["volumeMounts"] if mount["mountPath"] != "/tmp"]
        ),
        "nothing writable is mounted at /tmp",
    ),
    "no memory limit": (lambda m: container_of(m)["resources"]["limits"].pop("memory"), "a limit of memory"),
    "restarts always": (lambda m: pod_of(job_of(m)).update(restartPolicy="Never"), "restartPolicy is not OnFailure"),
    "no backoff limit": (lambda m: job_of(m)["spec"].pop("backoffLimit"), "is not between 1 and 10"),
    "two writers": (lambda m: job_of(m)["spec"].update(parallelism=2), "more than one pod would write"),
    "lost run": (lambda m: replace_argument(m, "/runs/demo", "/tmp/demo"), "lies in no persistent volume"),
    "no resume": (lambda m: replace_argument(m, "--resume", None), "wants --resume"),
    "no run file": (
        lambda m: replace_argument(m, "/etc/reward-trainer/run.toml", "/etc/reward-trainer/other.toml"),
        "is no file of a mounted ConfigMap",
    ),
    "broken run file": (break_toml, "is no TOML"),
    "no GPU": (lambda m: container_of(m)["resources"]["limits"].pop("nvidia.com/gpu"), "has 0 GPUs"),
    "CPU image": (lambda m: container_of(m).update(image="reward-trainer:0.1.0-cpu"), "has 1 GPUs"),
    "no service named": (lambda m: replace_argument(m, "--set", "--allow"), "do not say --set rewards.services"),
    "other service": (lambda m: set_url(m, "http://reward-service:8000"), "no Service answers http://reward-service:"),
    "other port": (lambda m: set_url(m, "http://reward-service-gpu:80"), "no Service answers"),
    "URL without a port": (lambda m: set_url(m, "http://reward-service-gpu"), "no Service answers"),
    "not a client": (
        lambda m: template_labels(m).pop("reward-service/client"),
        "does not let it in to port 8000",
    ),
    "no way out": (
        lambda m: network(m).update(
            egress=[rule for rule in network(m)["egress"] if rule["ports"] != [{"port": 8000, "protocol": "TCP"}]]
        ),
        "does not let it out to port 8000",
    ),
    "no policy": (lambda m: drop(m, "NetworkPolicy", "reward-trainer"), "no NetworkPolicy closes both its directions"),
    "no key": (lambda m: drop_environment(m, "REWARD_API_KEY"), "wants a key"),
}


def test_nothing_is_wrong_before_something_is_broken(gpu: Manifests) -> None:
    assert rules.problems(gpu) == []


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_rules_notice(name: str, gpu: Manifests) -> None:
    perturb, expected = PERTURBATIONS[name]
    perturb(gpu)
    found = [problem for problem in rules.problems(gpu) if re.search(r"trainer", problem)]
    assert any(expected in problem for problem in found), rules.problems(gpu)


def test_the_run_is_toml_without_services(cpu: Manifests) -> None:
    run = tomllib.loads(named(cpu, "ConfigMap", "reward-trainer-run")["data"]["run.toml"])
    assert "services" not in run["rewards"], "the Job's arguments name them, by overlay"
