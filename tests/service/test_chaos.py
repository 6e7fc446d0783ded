"""Bad bodies, disconnects and good requests at once; then the service is as it was."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil

from tests.service.bodies import JPEG_MODEL, SAFETENSORS, b64, item, noise, score_body, tensor_body
from tests.service.live import Live

MODELS = {JPEG_MODEL: 1.0, "tiny-tower": 1.0, "raises-on-red": 0.0}
GOOD = {"models": MODELS, "items": [item("a cat", noise(1), noise(2, 40, 24))]}


def result(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["results"]


def good(live: Live, random_: random.Random) -> None:
    """A score among the chaos is the score of the quiet."""
    assert result(live.post("/score", GOOD)) == live.expected  # type: ignore[attr-defined]


def guilty(live: Live, random_: random.Random) -> None:
    body = GOOD | {"items": [item("red", noise(1)), GOOD["items"][0]]}  # type: ignore[index]
    failed, fine = result(live.post("/score", body))
    assert failed["scores"]["raises-on-red"] == [None]
    assert fine == live.expected[0]  # type: ignore[attr-defined]


def mangled_json(live: Live, random_: random.Random) -> None:
    """One byte of a good body is replaced: a structural byte fails the request, one of a pixel a sample at most."""
    text = bytearray(json.dumps(GOOD).encode())
    text[random_.randrange(len(text))] = random_.choice(b'{}[]",:\x00\xffA9')
    response = live.post("/score", content=bytes(text), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404, 422), response.text


def mangled_tensors(live: Live, random_: random.Random) -> None:
    request = score_body(JPEG_MODEL, {"prompt": "a", "images": ["x"]})
    body = bytearray(tensor_body(request, {"x": noise(1)}))
    body[random_.randrange(400)] = random_.randrange(256)
    response = live.post("/score", content=bytes(body), headers={"content-type": SAFETENSORS})
    assert response.status_code in (200, 400, 404, 413, 422), response.text


def broken_image(live: Live, random_: random.Random) -> None:
    text = b64(noise(3))
    cut = random_.randrange(len(text) // 4) * 4
    body = score_body(JPEG_MODEL, {"prompt": "a", "images": [text[:cut], b64(noise(1))]})
    [found] = result(live.post("/score", body))
    assert found["scores"][JPEG_MODEL][0] is None
    assert found["errors"][0][0]["code"]
    assert found["scores"][JPEG_MODEL][1] == live.expected[0]["scores"][JPEG_MODEL][0]  # type: ignore[attr-defined]


def leave(live: Live, random_: random.Random) -> None:
    """A client sends some or all of a request, and goes."""
    model = random_.choice(["slow", "tiny-tower"])
    text = json.dumps(score_body(model, item("a", *[noise(i) for i in range(8)]))).encode()
    head = f"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    message = head.encode() + text
    with socket.create_connection(live.address, timeout=30) as connection:
        connection.sendall(message[: random_.choice([10, len(head), len(message) // 2, len(message)])])


def hurry(live: Live, random_: random.Random) -> None:
    body = score_body("slow", item("a", *[noise(i) for i in range(16)]), deadline_ms=random_.randrange(1, 300))
    assert live.post("/score", body).status_code in (200, 429, 504)


DEEDS: list[Callable[[Live, random.Random], None]] = [
    good, good, guilty, mangled_json, mangled_json, mangled_tensors, mangled_tensors, broken_image, leave, leave, hurry,
]  # fmt: skip


def test_after_chaos_the_service_is_as_it_was(service: Live) -> None:
    service.expected = result(service.post("/score", GOOD))  # type: ignore[attr-defined]
    process = psutil.Process(service.process.pid)
    internal = service.metric("reward_errors_total", code="internal_error")
    log_before = len(service.log)

    def one(seed: int) -> None:
        chooser = random.Random(seed)
        chooser.choice(DEEDS)(service, chooser)

    def chaos(seeds: range) -> None:
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(one, seeds):
                pass

    chaos(range(200))
    service.assert_healthy()
    threads, files = process.num_threads(), process.num_fds()
    chaos(range(200, 500))
    service.assert_healthy()
    good(service, random.Random())
    assert service.metric("reward_errors_total", code="internal_error") == internal
    assert "unhandled" not in service.log[log_before:]
    assert process.num_threads() <= threads + 8  # nothing is left behind by those who left
    assert process.num_fds() <= files + 20  # idle keep-alive connections of the pool
