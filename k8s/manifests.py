"""One rendered kustomization, and what rules ask of its documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

Document = dict[str, Any]


@dataclass(frozen=True)
class Manifests:
    """One rendered kustomization."""

    documents: list[Document]

    def of_kind(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    @property
    def workloads(self) -> list[Document]:
        """What runs pods: Deployments, then Jobs."""
        return [*self.of_kind("Deployment"), *self.of_kind("Job")]

    def has(self, kind: str, name: str) -> bool:
        return any(document["metadata"]["name"] == name for document in self.of_kind(kind))

    def autoscaler(self, deployment: Document) -> Document | None:
        for autoscaler in self.of_kind("HorizontalPodAutoscaler"):
            target = autoscaler["spec"]["scaleTargetRef"]
            if (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"]):
                return autoscaler
        return None

    def replicas(self, deployment: Document) -> int:
        """The least number of replicas that a deployment may have."""
        autoscaler = self.autoscaler(deployment)
        spec = autoscaler["spec"].get("minReplicas", 1) if autoscaler else deployment["spec"].get("replicas", 1)
        return int(spec)


def name_of(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def pod_of(workload: Document) -> Document:
    pod: Document = workload["spec"]["template"]["spec"]
    return pod


def labels_of(workload: Document) -> dict[str, str]:
    labels: dict[str, str] = workload["spec"]["template"]["metadata"].get("labels", {})
    return labels


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector (matchLabels and In/Exists expressions) takes a pod with ``labels``."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        key, operator = expression["key"], expression["operator"]
        if operator == "In" and labels.get(key) not in expression["values"]:
            return False
        if operator == "Exists" and key not in labels:
            return False
        if operator not in ("In", "Exists"):
            raise ValueError(f"selector operator {operator} is not known to this check")
    return True


def environment(container: Document) -> dict[str, str]:
    """The literal environment variables of a container."""
    return {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}


def gpus_of(container: Document) -> int:
    return int(container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))


def mounted_file(manifests: Manifests, workload: Document, path: PurePosixPath) -> str | None:
    """The text that a workload's container finds at ``path``, from a mounted ConfigMap; None where there is none."""
    pod = pod_of(workload)
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for mount in pod["containers"][0].get("volumeMounts", []):
        config_map = volumes.get(mount["name"], {}).get("configMap", {}).get("name")
        if PurePosixPath(mount["mountPath"]) == path.parent:
            for document in manifests.of_kind("ConfigMap"):
                if document["metadata"]["name"] == config_map and path.name in document["data"]:
                    text: str = document["data"][path.name]
                    return text
    return None
