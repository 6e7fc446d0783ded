"""Rules over the training Jobs of a rendered set: they end, keep their run, and reach a service that lets them in."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from urllib.parse import urlsplit

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

SERVICES = "rewards.services"


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value after ``name``; None where it is not given."""
    return next((value for key, value in pairwise(arguments) if key == name), None)


def expanded(container: Document) -> list[str]:
    """A container's arguments with ``$(NAME)`` replaced by its literal environment variables, as the kubelet does."""
    arguments: list[str] = list(container.get("args", []))
    for name, value in environment(container).items():
        arguments = [argument.replace(f"$({name})", value) for argument in arguments]
    return arguments


def service_urls(container: Document) -> list[str]:
    """The services that ``--set rewards.services=[...]`` names; empty where it is missing or is no list."""
    key, _, value = (option(expanded(container), "--set") or "").partition("=")
    if key != SERVICES:
        return []
    try:
        urls = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return []
    return [str(url) for url in urls] if isinstance(urls, list) else []


def check_end(manifests: Manifests) -> Iterator[str]:
    for job in manifests.of_kind("Job"):
        spec, pod = job["spec"], pod_of(job)
        if pod.get("restartPolicy") != "OnFailure":
            yield f"{name_of(job)}: restartPolicy is not OnFailure"
        if not 1 <= spec.get("backoffLimit", 0) <= 10:
            yield f"{name_of(job)}: backoffLimit {spec.get('backoffLimit')} is not between 1 and 10"
        if spec.get("parallelism", 1) != 1 or spec.get("completions", 1) != 1:
            yield f"{name_of(job)}: more than one pod would write to one run"


def check_run(manifests: Manifests) -> Iterator[str]:
    for job in manifests.of_kind("Job"):
        pod = pod_of(job)
        container = pod["containers"][0]
        arguments = expanded(container)
        claims = {volume["name"] for volume in pod.get("volumes", []) if "persistentVolumeClaim" in volume}
        kept = [mount["mountPath"] for mount in container.get("volumeMounts", []) if mount["name"] in claims]
        out = PurePosixPath(option(arguments, "--out") or "")
        if not any(PurePosixPath(path) in out.parents for path in kept):
            yield f"{name_of(job)}: its run's folder {out} lies in no persistent volume"
        if "--resume" not in arguments:
            yield f"{name_of(job)}: wants --resume, or a restarted pod stops at its own checkpoint"
        path = PurePosixPath(option(arguments, "--config") or "")
        run = mounted_file(manifests, job, path)
        if run is None:
            yield f"{name_of(job)}: --config {path} is no file of a mounted ConfigMap"
            continue
        try:
            tomllib.loads(run)
        except tomllib.TOMLDecodeError as exc:
            yield f"{name_of(job)}: {path} is no TOML: {exc}"


def check_device(manifests: Manifests) -> Iterator[str]:
    for job in manifests.of_kind("Job"):
        container = pod_of(job)["containers"][0]
        gpus, wanted = gpus_of(container), int(container["image"].endswith("-gpu"))
        if gpus != wanted:
            yield f"{name_of(job)}: has {gpus} GPUs; its image {container['image']} wants {wanted}"


def check_service(manifests: Manifests) -> Iterator[str]:
    for job in manifests.of_kind("Job"):
        urls = service_urls(pod_of(job)["containers"][0])
        if not urls:
            yield f"{name_of(job)}: its arguments do not say --set {SERVICES}=[...]"
        for url in urls:
            host, port = urlsplit(url).hostname, urlsplit(url).port
            services = [
                service
                for service in manifests.of_kind("Service")
                if service["metadata"]["name"] == host and port in {each["port"] for each in service["spec"]["ports"]}
            ]
            if not services:
                yield f"{name_of(job)}: no Service answers {url}"
            for service in services:
                yield from unreachable(manifests, job, service)


def unreachable(manifests: Manifests, job: Document, service: Document) -> Iterator[str]:
    """Why a Job's pod cannot use the pods of a Service, by the network policies and the keys of both."""
    for deployment in manifests.of_kind("Deployment"):
        if not selects({"matchLabels": service["spec"]["selector"]}, labels_of(deployment)):
            continue
        container = pod_of(deployment)["containers"][0]
        for port in (each["containerPort"] for each in container.get("ports", [])):
            if not lets(manifests, "egress", job, deployment, port):
                yield f"{name_of(job)}: its NetworkPolicy does not let it out to port {port} of {name_of(deployment)}"
            if not lets(manifests, "ingress", deployment, job, port):
                yield f"{name_of(job)}: the NetworkPolicy of {name_of(deployment)} does not let it in to port {port}"
        keys = {entry["name"] for entry in pod_of(job)["containers"][0].get("env", [])}
        if "REWARD_API_KEYS_FILE" in environment(container) and "REWARD_API_KEY" not in keys:
            yield f"{name_of(job)}: {name_of(deployment)} wants a key, and REWARD_API_KEY is not set"


def lets(manifests: Manifests, direction: str, subject: Document, peer: Document, port: int) -> bool:
    """Whether a policy of the ``subject``'s pods has a rule for the ``peer``'s pods (of its namespace) and the port."""
    side = {"egress": "to", "ingress": "from"}[direction]
    return any(
        any(each.get("port") == port for each in rule.get("ports", []))
        and any(
            "podSelector" in end and "namespaceSelector" not in end and selects(end["podSelector"], labels_of(peer))
            for end in rule.get(side, [])
        )
        for policy in manifests.of_kind("NetworkPolicy")
        if selects(policy["spec"]["podSelector"], labels_of(subject))
        for rule in policy["spec"].get(direction, [])
    )


RULES = (check_end, check_run, check_device, check_service)
