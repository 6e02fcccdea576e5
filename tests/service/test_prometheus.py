"""Prometheus itself scrapes a running server, and every query of the dashboard has data."""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from service_fakes import Server, encoded, picture, serving

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "docker/monitoring"
GOOD = encoded(picture((20, 10, 60, 40)))
_PATIENCE_S = 60

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of prometheus and promtool: this machine's, or unpacked from Debian's package and not installed."""
    if found := shutil.which("prometheus"):
        return Path(found).parent
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        pytest.skip("no prometheus here, and no Debian to take it from")
    folder = tmp_path_factory.mktemp("prometheus")
    download = ["apt-get", "-qq", "download", "prometheus"]
    if subprocess.run(download, cwd=folder, capture_output=True).returncode != 0:
        # A fresh machine has no list of packages yet.
        subprocess.run(["apt-get", "-qq", "update"], capture_output=True)
        if subprocess.run(download, cwd=folder, capture_output=True).returncode != 0:
            pytest.skip("no prometheus here, and Debian's package cannot be fetched")
    (package,) = folder.glob("prometheus_*.deb")
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
    return folder / "usr/bin"


class Prometheus:
    """A server that answers queries."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=_PATIENCE_S)

    def query(self, expression: str) -> list[dict[str, Any]]:
        response = self.client.get("/api/v1/query", params={"query": expression})
        assert response.status_code == 200, response.text
        result: list[dict[str, Any]] = response.json()["data"]["result"]
        return [one for one in result if one["value"][1] != "NaN"]


@contextmanager
def scraping(server: Server, programs: Path, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the file of docker/monitoring, but for the server's address and the pace."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.base_url.removeprefix("http://")]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        str(programs / "prometheus"),
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        found = Prometheus(f"http://127.0.0.1:{port}")
        try:
            with httpx.Client(transport=httpx.HTTPTransport(retries=20), timeout=_PATIENCE_S) as client:
                while client.get(f"http://127.0.0.1:{port}/-/ready").status_code != 200:
                    pass
            yield found
        finally:
            found.client.close()
            process.terminate()
            process.wait(_PATIENCE_S)


def panels() -> Iterator[tuple[str, str]]:
    """Title and query of everything that the dashboard asks, its interval filled in as Grafana does."""
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "30s")


def test_every_query_of_the_dashboard_has_data(programs: Path, tmp_path: Path) -> None:
    with serving() as server, scraping(server, programs, tmp_path) as prometheus:
        while not prometheus.query('up{job="dsg"} == 1'):
            pass
        missing = dict.fromkeys(panels())
        # Until rates have two scrapes with something between them: asking is what passes the time.
        while missing:
            assert server.post(GOOD).status_code == 200
            assert server.post(b"no picture").status_code == 400
            missing = {one: None for one in missing if not prometheus.query(one[1])}
        (accepted,) = prometheus.query('sum by (status) (dsg_request_duration_seconds_count{status="400"})')
        assert float(accepted["value"][1]) > 0
        # Figures, not only their presence: what the server counted is what Prometheus has.
        asked = int(server.metric("dsg_batch_size_count"))
        while not prometheus.query(f"sum(dsg_batch_size_count) == {asked}"):
            pass
        (mean,) = prometheus.query("sum(dsg_batch_size_sum) / sum(dsg_batch_size_count)")
        assert float(mean["value"][1]) == 1


def test_promtool_finds_nothing(programs: Path) -> None:
    command = [str(programs / "promtool"), "check", "config", str(MONITORING / "prometheus.yml")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
