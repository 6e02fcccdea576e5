"""A container image's file system as a running service, with nothing but the kernel's own tools."""

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

_START_S, _ANSWER_S, _END_S = 180, 120, 60


class RunningImage:
    """The image's own command as its own user, first process of a process namespace, as an engine would run it.

    Args:
        root: where the image's layers are mounted.
        config: of the image, as Docker writes it: `User`, `Env`, `Entrypoint`, `Cmd`, `WorkingDir`, `Healthcheck`.
    """

    def __init__(self, root: Path, config: dict[str, Any]) -> None:
        self._root = root
        self._config = config
        self._port = _free_port()

    def __enter__(self) -> "RunningImage":
        root, command = shlex.quote(str(self._root)), [*self._config["Entrypoint"], *self._config["Cmd"]]
        # The mounts vanish with their namespace. Layers are changed before they are made read-only: mount points.
        mounts = [
            "set -e",
            f"mkdir -p {root}/proc {root}/dev {root}/tmp",
            f"mount --bind {root} {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs tmpfs {root}/tmp",
            f"mount -o remount,bind,ro {root}",
        ]
        script = "; ".join([*mounts, f"exec {shlex.join(self._inside(command))}"])
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--ipc", "sh", "-c", script]
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(_END_S)

    def _inside(self, command: list[str]) -> list[str]:
        """A command of the image, as its user, without rights and with the image's environment alone."""
        user = str(self._config["User"])
        rights = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--bounding-set=-all"]
        environment = [*self._config["Env"], "HOME=/tmp", "DSG_HOST=127.0.0.1", f"DSG_PORT={self._port}"]
        start = f"cd {shlex.quote(self._config['WorkingDir'])} && exec {shlex.join(command)}"
        return [
            *("chroot", str(self._root), *rights, "--no-new-privs", "env", "-i"),
            *(*environment, "sh", "-c", start),
        ]

    def wait_until_ready(self) -> float:
        """Seconds from the start until pictures are taken. Raises RuntimeError if that never comes."""
        while time.monotonic() - self._began < _START_S:
            if self._process.poll() is not None:
                raise RuntimeError(f"the image's command ended with status {self._process.returncode}")
            try:
                if self._ask("GET", "/readyz")[0] == 200:
                    self._check_user()
                    return time.monotonic() - self._began
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"not ready after {_START_S} s")

    def _check_user(self) -> None:
        """The service must not be root, nor be able to become it."""
        status = Path(f"/proc/{self._first_process()}/status").read_text()
        said = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        rights = {int(said[name].split()[0], 16) for name in ("CapEff", "CapPrm", "CapBnd")}
        if said["Uid"].split() != [str(self._config["User"])] * 4 or rights != {0} or said["NoNewPrivs"] != "1":
            raise RuntimeError(f"runs as {said['Uid'].split()} with rights {rights}")

    def _first_process(self) -> int:
        return int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])

    def check_health(self) -> None:
        """Run the image's own health check. Raises CalledProcessError."""
        kind, *command = self._config["Healthcheck"]["Test"]
        if kind != "CMD":
            raise RuntimeError("the image's health check needs a shell")
        subprocess.run(self._inside(command), check=True, timeout=_ANSWER_S)

    def segment(self, photo: Path) -> float:
        """Seconds of the second of two requests with a photo. Raises RuntimeError unless it has masks."""
        self._segment(photo)
        began = time.monotonic()
        self._segment(photo)
        return time.monotonic() - began

    def _segment(self, photo: Path) -> None:
        status, body = self._ask("POST", "/segment", photo.read_bytes(), {"Content-Type": "image/jpeg"})
        found = json.loads(body).get("annotations", [])
        if status != 200 or not found or not all(one["segmentation"]["counts"] for one in found):
            raise RuntimeError(f"/segment answered {status} with {len(found)} objects: {body[:300]!r}")

    def drain(self, photo: Path) -> float:
        """SIGTERM while a request runs: seconds until the end. Raises RuntimeError unless all is in order."""
        failures: list[Exception] = []

        def ask() -> None:
            try:
                self._segment(photo)
            except Exception as error:
                failures.append(error)

        client = threading.Thread(target=ask)
        client.start()
        while client.is_alive() and b"\ndsg_accepted_pictures 1.0" not in self._ask("GET", "/metrics")[1]:
            pass
        caught = client.is_alive()
        began = time.monotonic()
        os.kill(self._first_process(), signal.SIGTERM)
        status = self._process.wait(_END_S)
        seconds = time.monotonic() - began
        client.join(_END_S)
        if failures or status != 0 or not caught:
            raise RuntimeError(f"after SIGTERM: status {status}, request in flight: {caught}, failures: {failures}")
        return seconds

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_S)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
