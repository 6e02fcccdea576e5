"""The container files against each other and the settings; no engine is needed to see them drift apart."""

import re
from pathlib import Path

from dsg.service.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()


def stages() -> dict[str, list[str]]:
    """Instructions of each build stage, continued lines joined."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in DOCKERFILE.replace("\\\n", " ").splitlines():
        if match := re.match(r"FROM \S+ AS (\S+)", line):
            name = match[1]
            found[name] = []
        elif name and line and not line.startswith("#"):
            found[name].append(re.sub(r"\s+", " ", line))
    return found


def test_both_targets_run_the_same_way() -> None:
    of = stages()
    assert [line.replace("cpu-", "gpu-") for line in of["cpu"]] == of["gpu"]
    assert of["cpu-python"] == of["gpu-python"]
    last = [line.split()[0] for line in of["cpu"]]
    assert last[-2:] == ["ENTRYPOINT", "CMD"] and "HEALTHCHECK" in last
    assert "USER 10001" in of["cpu"]


def test_both_builds_install_the_same_but_kernels_and_torch() -> None:
    cpu, gpu = (stages()[name] for name in ("cpu-build", "gpu-build"))
    assert cpu[-1].replace("DSG_BUILD_OPS=cpu", "DSG_BUILD_OPS=cuda") == gpu[-1]
    index = "${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} "
    assert [line.replace(index, "") for line in cpu if "venv /opt/dsg" in line] == [
        line for line in gpu if "venv /opt/dsg" in line
    ]


def test_the_build_context_holds_what_is_copied() -> None:
    copied = {word for line in stages()["source"] for word in line.split()[1:-1]}
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_variables_of_the_service_exist() -> None:
    known = {f"DSG_{name.upper()}" for name in Settings.model_fields}
    of_compose = {"DSG_PUBLISH", "DSG_MODELS"}  # read by the compose file alone
    assert set(re.findall(r"DSG_[A-Z_]+", COMPOSE)) <= known | of_compose
    assert set(re.findall(r"DSG_[A-Z_]+", DOCKERFILE)) <= known | {"DSG_BUILD_OPS"}


def test_drain_ends_before_the_container_is_killed() -> None:
    (grace,) = re.findall(r"stop_grace_period: (\d+)s", COMPOSE)
    assert int(grace) * 1000 > Settings().drain_ms
