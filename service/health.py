"""A container's health check: `python -m dsg.service.health [--end-unhealthy]`, status 0 when pictures are taken.

Docker restarts a container that ends, and leaves one alone that is only unhealthy. So where the server itself says
that nothing but a restart helps (`/healthz`: a lost GPU, a dead thread), `--end-unhealthy` asks process 1, the
container's own, to end; it drains first. Without a container around it, leave that out.
"""

import http.client
import json
import os
import signal
import sys

_TIMEOUT_S = 4


def main(arguments: list[str]) -> int:
    """Ask the server of this container; 0 or 1."""
    try:
        if _ask("/readyz")[0] == 200:
            return 0
        status, body = _ask("/healthz")
        if "--end-unhealthy" in arguments and status == 503 and json.loads(body)["reason"] == "unhealthy":
            os.kill(1, signal.SIGTERM)
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        sys.stderr.write(f"no answer: {error}\n")
    return 1


def _ask(path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("DSG_PORT") or 8000), timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
