"""What builds and runs images where there is no engine; `make image-test` is the whole of it."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from dsg.bench import image
from dsg.bench.image_run import RunningImage

ROOT = Path(__file__).parents[1]


def test_the_context_is_what_the_dockerfile_copies(tmp_path: Path) -> None:
    image.copy_context(tmp_path)
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {"ops", "docker/torch_without_cuda.py"} <= names
    assert all((tmp_path / name).exists() for name in names)
    held = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert not held & {".git", "tests", "docs"} and not [*tmp_path.rglob("*.so"), *tmp_path.rglob("__pycache__")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\n", ["http://mirror.example/debian"]),
        ("# none\ndeb http://mirror.example/debian bookworm main\n", ["http://mirror.example/debian"]),
        ("deb [signed-by=/a/key.gpg] http://mirror.example/d bookworm main\n", ["http://mirror.example/d"]),
        ("# nothing\n", []),
    ],
)
def test_the_mirror_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: list[str]
) -> None:
    path = tmp_path / "sources"
    path.write_text(text)
    monkeypatch.setattr(image, "Path", lambda name: path)
    assert image.mirror() == found


def test_what_pip_reads_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, wheels = tmp_path / "index/simple", tmp_path / "wheels"
    index.mkdir(parents=True)
    wheels.mkdir()
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nfind-links = {wheels}\nextra-index-url = file://{index}\nconstraint = /not/there\n")
    said = f"env_var:\nglobal:\n  {config}, exists: True\n  /etc/other.conf, exists: False\n"
    ran = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr(image.subprocess, "run", lambda *args, **options: ran)
    assert set(image.what_pip_reads()) - {image._CA} == {config, wheels, index.parent}


CONFIG = {
    "User": "10001",
    "Env": ["PATH=/opt/dsg/bin:/usr/bin"],
    "Entrypoint": ["dsg"],
    "Cmd": ["serve"],
    "WorkingDir": "/home/dsg",
    "Healthcheck": {"Test": ["CMD", "true"]},
}


def test_a_command_of_the_image_has_its_user_and_environment_and_no_rights() -> None:
    words = RunningImage(Path("/mnt"), CONFIG)._inside(["dsg", "serve"])
    assert words[:2] == ["chroot", "/mnt"]
    assert {"--reuid=10001", "--regid=10001", "--clear-groups", "--bounding-set=-all", "--no-new-privs"} < set(words)
    environment = words[words.index("-i") + 1 : words.index("sh")]
    assert environment[0] == CONFIG["Env"][0] and "DSG_HOST=127.0.0.1" in environment
    assert words[-3:] == ["sh", "-c", "cd /home/dsg && exec dsg serve"]


def test_a_health_check_that_needs_a_shell_is_refused() -> None:
    shell = CONFIG | {"Healthcheck": {"Test": ["CMD-SHELL", "true"]}}
    with pytest.raises(RuntimeError, match="needs a shell"):
        RunningImage(Path("/mnt"), shell).check_health()


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_last_results_keep_the_aims(target: str) -> None:
    path = ROOT / f"bench/results/image_{target}.json"
    rows = {row["case"].partition(";")[0]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["all steps but the last"]["value"] <= image._AIM_S[target]
    assert rows[f"size of the {target} image"]["value"] <= image._AIM_GB[target]
