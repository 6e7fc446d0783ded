"""What a schema cannot say of the manifests: rules over one rendered set, each yielding what is wrong as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import yaml

from k8s import job_rules
from k8s.manifests import (
    Document,
    Manifests,
    environment,
    gpus_of,
    labels_of,
    mounted_file,
    name_of,
    pod_of,
    selects,
)

PROBE_ROUTES = {
    "startupProbe": "/health/ready",  # loading and warm-up count
    "readinessProbe": "/health/ready",  # runs the models
    "livenessProbe": "/health/live",  # must not: a busy model is not a dead process
}
WRITABLE = {
    "Deployment": ("/tmp", "/var/cache/reward-service", "/var/lib/reward-service"),
    "Job": ("/tmp", "/var/cache/reward-trainer", "/runs"),
}
WRITE_S = 10
"""As in service/process.py: seconds that clients have to read their answers after the drain."""
MIN_STARTUP_S = 300
"""Weights are loaded and models warmed up before the service is ready."""


def scaled(value: int | str, replicas: int) -> int:
    """A PodDisruptionBudget's number or percentage, of ``replicas``; Kubernetes rounds percentages up."""
    if isinstance(value, str):
        return math.ceil(int(value.removesuffix("%")) * replicas / 100)
    return value


def check_selectors(manifests: Manifests) -> Iterator[str]:
    deployments = manifests.of_kind("Deployment")
    if not deployments:
        yield "there is no Deployment"
    for deployment in deployments:
        if not selects(deployment["spec"]["selector"], labels_of(deployment)):
            yield f"{name_of(deployment)}: its selector does not match its own pods"
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
        documents = manifests.of_kind(kind)
        if not documents and kind != "PodMonitor":
            yield f"there is no {kind}"
        for document in documents:
            spec = document["spec"]
            selector = {"matchLabels": spec["selector"]} if kind == "Service" else spec.get("selector")
            selector = spec["podSelector"] if kind == "NetworkPolicy" else selector
            takes = manifests.workloads if kind == "NetworkPolicy" else deployments
            if not any(selects(selector, labels_of(workload)) for workload in takes):
                yield f"{name_of(document)}: its selector matches no pod"


def check_ports(manifests: Manifests) -> Iterator[str]:
    for deployment in manifests.of_kind("Deployment"):
        container = pod_of(deployment)["containers"][0]
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        known = {*ports, *ports.values()}
        if int(environment(container).get("REWARD_PORT", 8000)) not in ports.values():
            yield f"{name_of(deployment)}: REWARD_PORT is none of the container's ports {sorted(ports.values())}"
        for service in manifests.of_kind("Service"):
            for port in service["spec"]["ports"]:
                if port.get("targetPort", port["port"]) not in known:
                    yield f"{name_of(service)}: targetPort {port.get('targetPort')} is no port of the container"
        for monitor in manifests.of_kind("PodMonitor"):
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in ports or endpoint["path"] != "/metrics":
                    yield f"{name_of(monitor)}: does not scrape /metrics on a port of the container"
        for probe in PROBE_ROUTES:
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            if probe in container and port not in known:
                yield f"{name_of(deployment)}: {probe} asks port {port}, which the container does not have"


def check_probes(manifests: Manifests) -> Iterator[str]:
    for deployment in manifests.of_kind("Deployment"):
        container = pod_of(deployment)["containers"][0]
        for name, route in PROBE_ROUTES.items():
            path = container.get(name, {}).get("httpGet", {}).get("path")
            if path != route:
                yield f"{name_of(deployment)}: {name} asks {path}, not {route}"
        startup = container.get("startupProbe", {})
        budget_s = startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)
        if budget_s < MIN_STARTUP_S:
            yield f"{name_of(deployment)}: the startup probe gives {budget_s} s; {MIN_STARTUP_S} s are needed"
        ends_s = deployment["spec"].get("progressDeadlineSeconds", 600)
        if ends_s <= budget_s:
            yield f"{name_of(deployment)}: progressDeadlineSeconds {ends_s} is within the startup budget {budget_s} s"


def check_drain(manifests: Manifests) -> Iterator[str]:
    for deployment in manifests.of_kind("Deployment"):
        pod = pod_of(deployment)
        container = pod["containers"][0]
        wait_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if wait_s < 1:
            yield f"{name_of(deployment)}: no preStop sleep; requests would still arrive while it drains"
        drain = settings_of(manifests, deployment).get("drain", {})
        env = environment(container)
        if "max_s" not in drain and "REWARD_DRAIN__MAX_S" not in env:
            yield f"{name_of(deployment)}: the settings do not say drain.max_s"
            continue
        min_s = float(env.get("REWARD_DRAIN__MIN_S", drain.get("min_s", 0)))
        max_s = float(env.get("REWARD_DRAIN__MAX_S", drain.get("max_s", 0)))
        # The queue empties within max_s; then open connections get WRITE_S to take their answers (service/process.py).
        needed_s = wait_s + max(min_s, max_s) + WRITE_S + 1
        grace_s = pod.get("terminationGracePeriodSeconds", 30)
        if grace_s <= needed_s:
            yield (
                f"{name_of(deployment)}: terminationGracePeriodSeconds {grace_s} is not more than {needed_s:g} s "
                f"(preStop {wait_s} s, drain {max(min_s, max_s):g} s, answers {WRITE_S} s)"
            )


def settings_of(manifests: Manifests, deployment: Document) -> dict[str, Any]:
    """The settings file that REWARD_CONFIG of a deployment names; {} where there is none."""
    path = PurePosixPath(environment(pod_of(deployment)["containers"][0]).get("REWARD_CONFIG", ""))
    return yaml.safe_load(mounted_file(manifests, deployment, path) or "") or {}


def check_settings(manifests: Manifests) -> Iterator[str]:
    for deployment in manifests.of_kind("Deployment"):
        if not settings_of(manifests, deployment):
            yield f"{name_of(deployment)}: REWARD_CONFIG names no file of a mounted ConfigMap"
        container = pod_of(deployment)["containers"][0]
        mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
        keys_file = environment(container).get("REWARD_API_KEYS_FILE")
        if keys_file is not None and str(PurePosixPath(keys_file).parent) not in mounts:
            yield f"{name_of(deployment)}: REWARD_API_KEYS_FILE {keys_file} lies in no mounted volume"


def check_references(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        pod = pod_of(workload)
        if not manifests.has("ServiceAccount", pod.get("serviceAccountName", "default")):
            yield f"{name_of(workload)}: its ServiceAccount is not among the manifests"
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and not manifests.has("PersistentVolumeClaim", claim):
                yield f"{name_of(workload)}: PersistentVolumeClaim {claim} is not among the manifests"
        mounts = {mount["mountPath"]: mount for mount in pod["containers"][0].get("volumeMounts", [])}
        for mount in mounts.values():
            if mount["name"] not in volumes:
                yield f"{name_of(workload)}: mounts volume {mount['name']}, which the pod does not have"
        for path in WRITABLE[workload["kind"]]:
            if path not in mounts or mounts[path].get("readOnly"):
                yield f"{name_of(workload)}: nothing writable is mounted at {path}"


def check_security(manifests: Manifests) -> Iterator[str]:
    for account in manifests.of_kind("ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{name_of(account)}: mounts its token"
    for workload in manifests.workloads:
        pod = pod_of(workload)
        context = pod.get("securityContext", {})
        required = {
            "runAsNonRoot": context.get("runAsNonRoot") is True,
            "runAsUser other than 0": context.get("runAsUser", 0) > 0,
            "seccompProfile RuntimeDefault": context.get("seccompProfile", {}).get("type") == "RuntimeDefault",
            "automountServiceAccountToken: false": pod.get("automountServiceAccountToken") is False,
            "enableServiceLinks: false": pod.get("enableServiceLinks") is False,
            "shareProcessNamespace: true": pod.get("shareProcessNamespace") is True,
            "no host namespace": not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")),
            "no hostPath volume": not any("hostPath" in volume for volume in pod.get("volumes", [])),
        }
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            own = container.get("securityContext", {})
            capabilities = own.get("capabilities", {})
            required |= {
                f"readOnlyRootFilesystem in {container['name']}": own.get("readOnlyRootFilesystem") is True,
                f"allowPrivilegeEscalation: false in {container['name']}": own.get("allowPrivilegeEscalation") is False,
                f"not privileged in {container['name']}": not own.get("privileged"),
                f"capabilities: drop ALL in {container['name']}": capabilities.get("drop") == ["ALL"],
                f"no added capability in {container['name']}": not capabilities.get("add"),
            }
        yield from (f"{name_of(workload)}: wants {what}" for what, kept in required.items() if not kept)


def check_images(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for container in pod_of(workload)["containers"]:
            image = container["image"]
            tag = image.rpartition("/")[2].partition(":")[2]
            if "@sha256:" not in image and tag in ("", "latest"):
                yield f"{name_of(workload)}: image {image} has no fixed tag"


def check_resources(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        resources = pod_of(workload)["containers"][0].get("resources", {})
        if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
            yield f"{name_of(workload)}: wants requests of cpu and memory and a limit of memory"
    for deployment in manifests.of_kind("Deployment"):
        container = pod_of(deployment)["containers"][0]
        gpus = gpus_of(container)
        wanted = 1 if environment(container).get("REWARD_DEVICE") == "cuda" else 0
        if gpus != wanted:
            yield f"{name_of(deployment)}: has {gpus} GPUs a pod; its REWARD_DEVICE wants {wanted}"
        rolling = deployment["spec"].get("strategy", {}).get("rollingUpdate", {})
        if gpus and rolling.get("maxSurge") != 0 and deployment["spec"].get("strategy", {}).get("type") != "Recreate":
            yield f"{name_of(deployment)}: a rollout would ask for one more GPU than the replicas have (maxSurge)"
        spread = pod_of(deployment).get("topologySpreadConstraints", [])
        if not any(selects(constraint["labelSelector"], labels_of(deployment)) for constraint in spread):
            yield f"{name_of(deployment)}: no topologySpreadConstraint takes its pods"


def check_autoscalers(manifests: Manifests) -> Iterator[str]:
    for autoscaler in manifests.of_kind("HorizontalPodAutoscaler"):
        spec = autoscaler["spec"]
        if not manifests.has("Deployment", spec["scaleTargetRef"]["name"]):
            yield f"{name_of(autoscaler)}: its target {spec['scaleTargetRef']['name']} is not among the manifests"
        if spec.get("minReplicas", 1) >= spec["maxReplicas"]:
            yield f"{name_of(autoscaler)}: minReplicas is not below maxReplicas"
    for deployment in manifests.of_kind("Deployment"):
        if manifests.autoscaler(deployment) and "replicas" in deployment["spec"]:
            yield f"{name_of(deployment)}: says replicas, and every apply would overrule its autoscaler"


def check_disruption_budgets(manifests: Manifests) -> Iterator[str]:
    for budget in manifests.of_kind("PodDisruptionBudget"):
        for deployment in manifests.of_kind("Deployment"):
            if not selects(budget["spec"]["selector"], labels_of(deployment)):
                continue
            replicas = manifests.replicas(deployment)
            if "maxUnavailable" in budget["spec"]:
                evictable = scaled(budget["spec"]["maxUnavailable"], replicas)
            else:
                evictable = replicas - scaled(budget["spec"]["minAvailable"], replicas)
            if evictable < 1:
                yield f"{name_of(budget)}: forbids every eviction at {replicas} replicas; no node could be drained"


def check_network(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        ports = {port["containerPort"] for port in pod_of(workload)["containers"][0].get("ports", [])}
        policies = [
            policy
            for policy in manifests.of_kind("NetworkPolicy")
            if selects(policy["spec"]["podSelector"], labels_of(workload))
        ]
        if {kind for policy in policies for kind in policy["spec"].get("policyTypes", [])} != {"Ingress", "Egress"}:
            yield f"{name_of(workload)}: no NetworkPolicy closes both its directions"
        for policy in policies:
            for rule in policy["spec"].get("ingress", []):
                if not all(any(peer.values()) for peer in rule.get("from", [])) or not rule.get("from"):
                    yield f"{name_of(policy)}: an ingress rule admits everyone"
                if {port["port"] for port in rule.get("ports", [])} != ports:
                    yield f"{name_of(policy)}: an ingress rule is not about the container's port"
            for rule in policy["spec"].get("egress", []):
                if not rule.get("to") or not rule.get("ports"):
                    yield f"{name_of(policy)}: an egress rule admits everything"


RULES = (
    check_selectors,
    check_ports,
    check_probes,
    check_drain,
    check_settings,
    check_references,
    check_security,
    check_images,
    check_resources,
    check_autoscalers,
    check_disruption_budgets,
    check_network,
    *job_rules.RULES,
)


def problems(manifests: Manifests) -> list[str]:
    """What is wrong with one rendered set, as sentences; empty when nothing is."""
    return [problem for rule in RULES for problem in rule(manifests)]
