"""The manifests render, are valid for three Kubernetes versions, keep the rules; the rules notice what breaks them."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import check, rules
from k8s.manifests import Document, Manifests, labels_of, pod_of, selects
from service.app import create_app
from service.settings import Settings
from service.telemetry import Telemetry

Perturbation = Callable[[Manifests], object]


@pytest.fixture
def gpu(rendered: dict[str, Manifests]) -> Manifests:
    return copy.deepcopy(rendered["overlays/gpu with all components"])


@pytest.fixture
def cpu(rendered: dict[str, Manifests]) -> Manifests:
    return copy.deepcopy(rendered["overlays/cpu"])


def only(manifests: Manifests, kind: str) -> Document:
    (document,) = manifests.of_kind(kind)
    return document


def container_of(manifests: Manifests) -> Document:
    container: Document = pod_of(only(manifests, "Deployment"))["containers"][0]
    return container


def test_every_overlay_and_component_is_checked(rendered: dict[str, Manifests]) -> None:
    assert set(rendered) == {
        "base",
        "overlays/cpu",
        "overlays/gpu",
        "overlays/cpu with all components",
        "overlays/gpu with all components",
        "trainer/overlays/cpu and its service",
        "trainer/overlays/gpu and its service",
        "trainer/overlays/cpu and its service with all components",
        "trainer/overlays/gpu and its service with all components",
    }
    assert [path.name for path in check.components()] == ["api-keys", "hub-egress", "monitoring", "weights-volume"]
    assert [path.name for path in check.components(check.TRAINER)] == ["api-key", "hub-egress"]


def test_manifests_are_valid_for_three_versions(rendered: dict[str, Manifests]) -> None:
    versions = check.newest_versions()
    assert len(set(versions)) == 3
    found = {
        (name, version): list(check.schema_problems(manifests, version))
        for name, manifests in rendered.items()
        for version in versions
    }
    assert {key: problems for key, problems in found.items() if problems} == {}


def test_manifests_keep_the_rules(rendered: dict[str, Manifests]) -> None:
    assert {name: rules.problems(manifests) for name, manifests in rendered.items()} == {name: [] for name in rendered}


def test_a_misspelt_field_and_a_wrong_type_are_schema_problems(cpu: Manifests) -> None:
    container_of(cpu)["readinesProbe"] = container_of(cpu)["readinessProbe"]
    only(cpu, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] = "eight"
    for version in check.newest_versions():
        found = sorted(check.schema_problems(cpu, version))
        assert len(found) == 2
        assert "readinesProbe" in found[0]
        assert "eight" in found[1]


def test_the_component_patches_arrive(gpu: Manifests) -> None:
    pod = pod_of(only(gpu, "Deployment"))
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["weights"] == {
        "name": "weights",
        "persistentVolumeClaim": {"claimName": only(gpu, "PersistentVolumeClaim")["metadata"]["name"]},
    }
    assert "optional" not in volumes["api-keys"]["secret"], "asked-for keys must not silently be missing"
    ports = {port["port"] for rule in only(gpu, "NetworkPolicy")["spec"]["egress"] for port in rule["ports"]}
    assert ports == {53, 443}


def test_egress_is_dns_alone_without_components(cpu: Manifests) -> None:
    (rule,) = only(cpu, "NetworkPolicy")["spec"]["egress"]
    assert {(port["protocol"], port["port"]) for port in rule["ports"]} == {("UDP", 53), ("TCP", 53)}


def test_clients_and_prometheus_alone_may_connect(cpu: Manifests) -> None:
    (rule,) = only(cpu, "NetworkPolicy")["spec"]["ingress"]
    client, prometheus = rule["from"]
    assert selects(client["podSelector"], {"reward-service/client": "true"})
    assert not selects(client["podSelector"], {"app": "anything"})
    assert not selects(prometheus["podSelector"], {"reward-service/client": "true"})
    assert selects(prometheus["namespaceSelector"], {"kubernetes.io/metadata.name": "monitoring"})
    assert not selects(prometheus["namespaceSelector"], {"kubernetes.io/metadata.name": "default"})


def test_overlays_can_share_a_namespace(rendered: dict[str, Manifests]) -> None:
    cpu, gpu = rendered["overlays/cpu"], rendered["overlays/gpu"]
    names = [{(doc["kind"], doc["metadata"]["name"]) for doc in overlay.documents} for overlay in (cpu, gpu)]
    assert names[0].isdisjoint(names[1])
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = only(cpu, kind)["spec"]
        selector = spec["podSelector"] if kind == "NetworkPolicy" else spec["selector"]
        selector = {"matchLabels": selector} if kind == "Service" else selector
        assert selects(selector, labels_of(only(cpu, "Deployment")))
        assert not selects(selector, labels_of(only(gpu, "Deployment")))


def test_a_changed_setting_rolls_the_pods(tmp_path: Path, rendered: dict[str, Manifests]) -> None:
    shutil.copytree(check.ROOT / "base", tmp_path / "base")
    settings = tmp_path / "base" / "settings.yaml"
    settings.write_text(settings.read_text() + "log_level: DEBUG\n")

    def mounted(manifests: Manifests) -> Any:
        return pod_of(only(manifests, "Deployment"))["volumes"][0]["configMap"]["name"]

    assert mounted(check.render(tmp_path / "base")) != mounted(rendered["base"])


def test_the_autoscaler_reads_a_metric_that_the_adapter_serves(gpu: Manifests) -> None:
    (metric,) = only(gpu, "HorizontalPodAutoscaler")["spec"]["metrics"]
    values = yaml.safe_load((check.ROOT / "components/monitoring/prometheus_adapter_values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["seriesQuery"].startswith(rule["name"]["as"] + "{")


def test_probes_and_scrapes_ask_routes_of_the_service(gpu: Manifests) -> None:
    routes = create_app(Settings()).openapi()["paths"]
    asked = {container_of(gpu)[probe]["httpGet"]["path"] for probe in rules.PROBE_ROUTES}
    asked |= {endpoint["path"] for endpoint in only(gpu, "PodMonitor")["spec"]["podMetricsEndpoints"]}
    assert asked == {"/health/live", "/health/ready", "/metrics"}
    assert {path for path in asked if "get" not in routes.get(path, {})} == set()


def test_the_autoscaler_reads_a_gauge_of_the_service(gpu: Manifests) -> None:
    (metric,) = only(gpu, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in {family.name for family in Telemetry().registry.collect()}
    assert int(metric["pods"]["target"]["averageValue"]) < Settings().queue.max_cost, "scales before it answers 429"


def pod(manifests: Manifests) -> Document:
    return pod_of(only(manifests, "Deployment"))


def deployment_spec(manifests: Manifests) -> Document:
    spec: Document = only(manifests, "Deployment")["spec"]
    return spec


def spec_of(manifests: Manifests, kind: str) -> Document:
    spec: Document = only(manifests, kind)["spec"]
    return spec


def set_env(manifests: Manifests, name: str, value: str) -> None:
    container = container_of(manifests)
    container["env"] = [entry for entry in container["env"] if entry["name"] != name] + [{"name": name, "value": value}]


def drop(manifests: Manifests, kind: str) -> None:
    manifests.documents[:] = [document for document in manifests.documents if document["kind"] != kind]


PERTURBATIONS: dict[str, tuple[Perturbation, str]] = {
    "writable root": (
        lambda m: container_of(m)["securityContext"].pop("readOnlyRootFilesystem"),
        "wants readOnlyRootFilesystem",
    ),
    "root user": (lambda m: pod(m)["securityContext"].update(runAsUser=0), "wants runAsUser other than 0"),
    "may be root": (lambda m: pod(m)["securityContext"].pop("runAsNonRoot"), "wants runAsNonRoot"),
    "no seccomp": (lambda m: pod(m)["securityContext"].pop("seccompProfile"), "wants seccompProfile"),
    "capabilities": (lambda m: container_of(m)["securityContext"].pop("capabilities"), "wants capabilities: drop ALL"),
    "added capability": (
        lambda m: container_of(m)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
        "wants no added capability",
    ),
    "escalation": (
        lambda m: container_of(m)["securityContext"].pop("allowPrivilegeEscalation"),
        "wants allowPrivilegeEscalation: false",
    ),
    "privileged": (lambda m: container_of(m)["securityContext"].update(privileged=True), "wants not privileged"),
    "pod token": (lambda m: pod(m).pop("automountServiceAccountToken"), "wants automountServiceAccountToken"),
    "account token": (lambda m: only(m, "ServiceAccount").pop("automountServiceAccountToken"), "mounts its token"),
    "service links": (lambda m: pod(m).pop("enableServiceLinks"), "wants enableServiceLinks: false"),
    "process 1": (lambda m: pod(m).pop("shareProcessNamespace"), "wants shareProcessNamespace: true"),
    "host network": (lambda m: pod(m).update(hostNetwork=True), "wants no host namespace"),
    "host path": (lambda m: pod(m)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "wants no hostPath"),
    "latest image": (lambda m: container_of(m).update(image="registry:5000/reward-service:latest"), "no fixed tag"),
    "untagged image": (lambda m: container_of(m).update(image="registry:5000/reward-service"), "no fixed tag"),
    "deployment selector": (
        lambda m: deployment_spec(m)["selector"]["matchLabels"].update(app="other"),
        "its selector does not match its own pods",
    ),
    "service selector": (
        lambda m: spec_of(m, "Service")["selector"].update(app="other"),
        "its selector matches no pod",
    ),
    "no service": (lambda m: drop(m, "Service"), "there is no Service"),
    "service port": (lambda m: spec_of(m, "Service")["ports"][0].update(targetPort="web"), "targetPort web is no port"),
    "other port": (lambda m: set_env(m, "REWARD_PORT", "9000"), "REWARD_PORT is none of the container's ports"),
    "metrics path": (
        lambda m: spec_of(m, "PodMonitor")["podMetricsEndpoints"][0].update(path="/prometheus"),
        "does not scrape /metrics",
    ),
    "probe route": (lambda m: container_of(m)["readinessProbe"]["httpGet"].update(path="/healthz"), "asks /healthz"),
    "heavy liveness": (
        lambda m: container_of(m)["livenessProbe"]["httpGet"].update(path="/health/ready"),
        "livenessProbe asks /health/ready",
    ),
    "no startup probe": (lambda m: container_of(m).pop("startupProbe"), "startupProbe asks None"),
    "probe port": (lambda m: container_of(m)["livenessProbe"]["httpGet"].update(port=81), "livenessProbe asks port 81"),
    "short startup": (lambda m: container_of(m)["startupProbe"].update(failureThreshold=2), "the startup probe gives"),
    "short rollout": (lambda m: deployment_spec(m).update(progressDeadlineSeconds=600), "is within the startup budget"),
    "short grace": (lambda m: pod(m).update(terminationGracePeriodSeconds=76), "is not more than 76 s"),
    "longer drain": (lambda m: set_env(m, "REWARD_DRAIN__MAX_S", "300"), "is not more than 316 s"),
    "no preStop": (lambda m: container_of(m).pop("lifecycle"), "no preStop sleep"),
    "no settings": (lambda m: drop(m, "ConfigMap"), "REWARD_CONFIG names no file"),
    "no account": (lambda m: drop(m, "ServiceAccount"), "its ServiceAccount is not among the manifests"),
    "no claim": (lambda m: drop(m, "PersistentVolumeClaim"), "PersistentVolumeClaim reward-service-weights is not"),
    "no tmp": (
        lambda m: container_of(m).update(
            volumeMounts=[mount for mount in container_of(m)["volumeMounts"] if mount["mountPath"] != "/tmp"]
        ),
        "nothing writable is mounted at /tmp",
    ),
    "no keys volume": (lambda m: set_env(m, "REWARD_API_KEYS_FILE", "/keys/api_keys"), "lies in no mounted volume"),
    "no memory limit": (lambda m: container_of(m)["resources"]["limits"].pop("memory"), "a limit of memory"),
    "two GPUs": (lambda m: container_of(m)["resources"]["limits"].update({"nvidia.com/gpu": "2"}), "has 2 GPUs a pod"),
    "idle GPU": (lambda m: set_env(m, "REWARD_DEVICE", "cpu"), "its REWARD_DEVICE wants 0"),
    "surging GPUs": (lambda m: deployment_spec(m)["strategy"]["rollingUpdate"].update(maxSurge=1), "(maxSurge)"),
    "no spread": (lambda m: pod(m).pop("topologySpreadConstraints"), "no topologySpreadConstraint"),
    "autoscaler target": (
        lambda m: spec_of(m, "HorizontalPodAutoscaler")["scaleTargetRef"].update(name="other"),
        "its target other is not among the manifests",
    ),
    "fixed replicas": (lambda m: deployment_spec(m).update(replicas=3), "would overrule its autoscaler"),
    "no room to scale": (lambda m: spec_of(m, "HorizontalPodAutoscaler").update(minReplicas=4), "is not below"),
    "no eviction": (lambda m: spec_of(m, "PodDisruptionBudget").update(maxUnavailable=0), "forbids every eviction"),
    "all available": (
        lambda m: (
            spec_of(m, "PodDisruptionBudget").pop("maxUnavailable"),
            spec_of(m, "PodDisruptionBudget").update(minAvailable="50%"),
        ),
        "forbids every eviction at 1 replicas",
    ),
    "open egress": (lambda m: spec_of(m, "NetworkPolicy").update(policyTypes=["Ingress"]), "no NetworkPolicy closes"),
    "egress to all": (lambda m: spec_of(m, "NetworkPolicy")["egress"].append({}), "egress rule admits everything"),
    "open ingress": (lambda m: spec_of(m, "NetworkPolicy")["ingress"][0].pop("from"), "ingress rule admits everyone"),
    "any pod": (
        lambda m: spec_of(m, "NetworkPolicy")["ingress"][0].update({"from": [{"podSelector": {}}]}),
        "ingress rule admits everyone",
    ),
    "any port": (lambda m: spec_of(m, "NetworkPolicy")["ingress"][0].pop("ports"), "not about the container's port"),
}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_rules_notice(name: str, gpu: Manifests) -> None:
    perturb, expected = PERTURBATIONS[name]
    perturb(gpu)
    assert any(expected in problem for problem in rules.problems(gpu)), rules.problems(gpu)


def test_missing_kubectl_is_an_error_and_not_a_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.main() == 2
    assert "kubectl is not installed" in capsys.readouterr().err


def test_a_broken_kustomization_is_named(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None and os.environ.get("CI") != "true":
        pytest.skip("kubectl is not installed; CI fails here instead")
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(check.KubectlError, match=r"missing\.yaml"):
        check.render(tmp_path)


def test_the_command_tells_and_its_exit_code_says_whether_all_is_well(
    cpu: Manifests, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "rendered", lambda: iter([("overlays/cpu", cpu)]))
    assert check.main() == 0
    assert "0 problems" in capsys.readouterr().out
    container_of(cpu)["securityContext"].pop("readOnlyRootFilesystem")
    assert check.main() == 1
    assert "wants readOnlyRootFilesystem" in capsys.readouterr().out
