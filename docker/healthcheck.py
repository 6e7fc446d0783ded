"""Container health check: exit 0 when ``GET /health/ready`` answers 200, else 1 with the reason on stderr.

Readiness runs the models, so a container whose process lives but cannot score is unhealthy. Standard library only: the
image has no curl, and importing the service would load torch every few seconds.
"""

from __future__ import annotations

import http.client
import os
import sys


def check(host: str, port: int, timeout_s: float) -> str | None:
    """None when the service on ``host:port`` is ready, else why it is not."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/health/ready")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        return f"no answer from {host}:{port}: {exc}"
    finally:
        connection.close()
    return None if status == http.client.OK else f"/health/ready answered {status}"


if __name__ == "__main__":
    reason = check("127.0.0.1", int(os.environ.get("REWARD_PORT", "8000")), timeout_s=8.0)
    if reason is not None:
        print(reason, file=sys.stderr)
        sys.exit(1)
