"""The container files against each other and the settings; no engine is needed to see them drift apart."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from dsg.service.metrics import Metrics
from dsg.service.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
KUBERNETES = {one["kind"]: one for one in yaml.safe_load_all((ROOT / "docker/kubernetes.yaml").read_text())}
DASHBOARD = json.loads((ROOT / "docker/monitoring/dashboard.json").read_text())
USER = "10001"


def stages() -> dict[str, list[str]]:
    """Instructions of each build stage, continued lines joined; the first is what it is made from."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in DOCKERFILE.replace("\\\n", " ").splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            name = match[2]
            found[name] = [f"FROM {match[1]}"]
        elif name and line and not line.startswith("#"):
            found[name].append(re.sub(r"\s+", " ", line))
    return found


def as_gpu(lines: list[str]) -> list[str]:
    """Lines of a cpu stage as the gpu stage beside it has them."""
    return [line.replace("cpu-", "gpu-").replace("onnx.txt", "onnx-gpu.txt") for line in lines]


def script(name: str) -> ModuleType:
    """A program of docker/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docker/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_target_is_the_cpu_target_line_by_line() -> None:
    of = stages()
    (for_the_toolkit,) = [line for line in of["gpu"] if line.startswith("ENV NVIDIA")]
    assert for_the_toolkit == "ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    assert as_gpu(of["cpu"]) == [line for line in of["gpu"] if line != for_the_toolkit]
    assert as_gpu(of["cpu-packages"]) == of["gpu-packages"]
    assert of["cpu"][0] == "FROM runtime" and of["cpu"][-1] == f"USER {USER}"


def test_both_targets_get_torch_and_kernels_alike() -> None:
    of = stages()
    for_a_cpu_alone = ("ARG TORCH_INDEX", "COPY docker/torch_without_cuda.py")
    cpu_torch = [line for line in of["cpu-torch"] if not line.startswith(for_a_cpu_alone)]
    assert cpu_torch[:-1] == of["gpu-torch"][:-1]
    assert "pip install -r /work/torch.txt" in of["gpu-torch"][-1]
    cpu, gpu = as_gpu(of["cpu-kernels"]), of["gpu-kernels"]
    of_cuda = [line for line in gpu if "nvcc" in line or line.startswith("ARG CUDA_ARCHS")]
    assert cpu[:-1] == [line for line in gpu[:-1] if line not in of_cuda]
    build = "DSG_BUILD_OPS={} python3 setup.py build_ext --build-lib /kernels"
    assert cpu[-1] == f"RUN {build.format('cpu')}" and build.format("cuda") in gpu[-1]


def test_no_target_holds_a_compiler_or_is_root() -> None:
    of = stages()
    for target in ("cpu", "gpu", "train"):
        chain, name = [], target
        while name in of:
            chain += of[name]
            name = of[name][0].removeprefix("FROM ")
        assert name == "${BASE}"
        assert not [line for line in chain if re.search(r"g\+\+|nvcc", line)]
        assert of[target][-1] == f"USER {USER}"
    assert any(line.startswith("HEALTHCHECK") for line in of["runtime"])


def test_a_change_of_the_code_builds_neither_torch_nor_kernels_again() -> None:
    of = stages()
    rooms = {"ops", "model", "export", "service", "cli", "bench"}
    holding = {name for name, lines in of.items() if any(line.split()[1] in rooms for line in lines)}
    assert holding == {"code"}
    # Layers of a target, from the one that changes least.
    sources = re.findall(r"--from=(\S+)", " ".join(of["cpu"]))
    assert sources == ["cpu-packages", "requirements", "cpu-kernels", "code"]
    assert of["cpu"].index("COPY --from=code /code /opt/dsg/code") == len(of["cpu"]) - 2


def test_the_build_context_holds_what_is_copied() -> None:
    own = [line for lines in stages().values() for line in lines if line.startswith("COPY") and "--from" not in line]
    copied = {word for line in own for word in line.split()[1:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line[:1] == "!"}
    # Of ops, all is copied, and its kernels' sources once more.
    assert copied - {"ops/csrc"} == kept
    assert all((ROOT / name).exists() for name in copied)


def test_requirements_are_those_of_pyproject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in stages()["requirements"] if "write_requirements" in line and line.startswith("RUN")]
    extras = line.split()[4:]
    script("write_requirements").main(str(ROOT / "pyproject.toml"), *extras)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {name: (tmp_path / f"{name}.txt").read_text().splitlines() for name in extras}
    assert asked["torch"] == project["optional-dependencies"]["torch"]
    assert set(asked["serve"]) == {*project["dependencies"], *project["optional-dependencies"]["serve"]}
    assert not [need for needs in asked.values() for need in needs if need.startswith("dsg")]
    installed = set(re.findall(r"/(\S+)\.txt", " ".join(" ".join(lines) for lines in stages().values()))) - {"work/*"}
    assert {name.rpartition("/")[2] for name in installed} - {"*"} == set(extras)


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("readelf")), reason="no gcc and readelf here")
def test_a_library_that_is_missing_gets_a_stand_in(tmp_path: Path) -> None:
    """As torch is linked: a function with the library's name as version, one without, one that gives a text."""
    calls = "int cudaGetDeviceCount(int *);\nconst char *cudaGetErrorString(int);\nint ncclGetVersion(void);\n"
    sources = {
        "libcudart.so.13": "int cudaGetDeviceCount(int *n) { return 0; }\n"
        "const char *cudaGetErrorString(int e) { return 0; }\n",
        "libnccl.so.2": "int ncclGetVersion(void) { return 0; }\n",
        "libuser.so": f"{calls}int count(void) {{ int n; return cudaGetDeviceCount(&n) + ncclGetVersion(); }}\n"
        "const char *text(void) { return cudaGetErrorString(1); }\n",
    }
    (tmp_path / "versions").write_text("libcudart.so.13 { global: *; };\n")
    for name, source in sources.items():
        (tmp_path / "one.c").write_text(source)
        version = ["-Wl,--version-script=versions"] if "cudart" in name else []
        needs = ["-L.", "-l:libcudart.so.13", "-l:libnccl.so.2"] if name == "libuser.so" else []
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN", *version, "one.c", *needs]
        subprocess.run([*command, "-o", name], cwd=tmp_path, check=True)
    for name in ("libcudart.so.13", "libnccl.so.2"):
        (tmp_path / name).unlink()
    script("torch_without_cuda").stand_in(tmp_path)
    # In a process of its own: where torch has loaded the true libraries, they would be taken.
    program = (
        "import ctypes; user = ctypes.CDLL('./libuser.so'); user.text.restype = ctypes.c_char_p; "
        "raise SystemExit((user.count(), user.text()) != (200, b'there is no CUDA here'))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_needs_of_torch_on_a_cpu() -> None:
    plain = script("torch_without_cuda").on_a_cpu
    assert plain("jinja2") == "jinja2" and plain("pillow (!=8.3.*,>=5.3.0)") == "pillow (!=8.3.*,>=5.3.0)"
    assert plain("networkx>=2.5.1") == "networkx>=2.5.1"
    for need in ('nvidia-nccl-cu13==2.30.7; platform_system == "Linux"', "triton~=3.8.0", "torch (>=2.14.0)"):
        assert plain(need) == ""
    assert plain("scipy ; extra == 'scipy'") == ""


def test_variables_of_the_service_exist() -> None:
    known = {f"DSG_{name.upper()}" for name in Settings.model_fields}
    of_compose = {"DSG_PUBLISH", "DSG_MODELS", "DSG_MEMORY"}  # read by the compose file alone
    assert set(re.findall(r"DSG_[A-Z_]+", COMPOSE_TEXT)) <= known | of_compose
    assert set(re.findall(r"DSG_[A-Z_]+", DOCKERFILE)) <= known | {"DSG_BUILD_OPS", "DSG_CUDA_ARCHS"}
    container = KUBERNETES["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert {one["name"] for one in container["env"]} <= known | {"HOME"}


def test_what_must_be_set_is_said_and_has_a_value_in_env() -> None:
    lines = [line for line in (ROOT / ".env").read_text().splitlines() if line and not line.startswith("#")]
    defaults = dict(line.split("=", 1) for line in lines)
    asked = dict(re.findall(r"\$\{(\w+):\?([^}]+)\}", COMPOSE_TEXT))
    assert set(defaults) == {*asked, "COMPOSE_PROFILES"}
    assert all("in .env" in message for message in asked.values())
    # Nothing is reachable from other machines unless someone says so.
    published = {name: value for name, value in defaults.items() if name.endswith("_PUBLISH")}
    assert len(published) == 4 and all(value.startswith("127.0.0.1:") for value in published.values())


def test_every_container_is_hardened() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service, name
        assert service["deploy"]["resources"]["limits"]["memory"], name
        assert service["restart"] == ("no" if name == "train" else "unless-stopped"), name
        assert service["profiles"], name
        assert name == "train" or "healthcheck" in service, name


def test_a_gpu_is_reserved_where_one_is_used() -> None:
    reserving = {
        name
        for name, service in COMPOSE["services"].items()
        if service["deploy"]["resources"].get("reservations") == {"devices": [COMPOSE["x-gpu"]]}
    }
    assert reserving == {"dsg", "train"} and COMPOSE["x-gpu"]["capabilities"] == ["gpu"]
    gpu, cpu = (dict(COMPOSE["services"][name]) for name in ("dsg", "dsg-cpu"))
    for service in (gpu, cpu):
        for own in ("profiles", "image", "build", "deploy"):
            del service[own]
    assert gpu == cpu


def test_own_images_are_built_and_others_are_pinned() -> None:
    for name, service in COMPOSE["services"].items():
        image, _, tag = service["image"].rpartition(":")
        if image == "dsg":
            assert service["build"] == {"context": ".", "dockerfile": "docker/Dockerfile", "target": tag}, name
        else:
            assert "build" not in service and re.fullmatch(r"v?\d+\.\d+\.\d+", tag), name


def test_drain_ends_before_the_container_is_killed() -> None:
    (grace,) = re.findall(r"stop_grace_period: (\d+)s # above DSG_DRAIN_MS", COMPOSE_TEXT)
    assert int(grace) * 1000 > Settings().drain_ms
    pod = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert (pod["terminationGracePeriodSeconds"] - before) * 1000 > Settings().drain_ms


def test_kubernetes_runs_the_image_as_it_is_made() -> None:
    deployment, service = KUBERNETES["Deployment"], KUBERNETES["Service"]
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert KUBERNETES["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert pod["spec"]["securityContext"]["runAsUser"] == int(USER)
    assert container["securityContext"]["readOnlyRootFilesystem"] and container["image"] == "dsg:gpu"
    (port,) = container["ports"]
    assert f"EXPOSE {port['containerPort']}" in DOCKERFILE
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/healthz",
    }


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    families = list(Metrics().registry.collect())
    # A family's samples by their endings; one that has no sample yet is known by its kind.
    endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    known = {f"{one.name}{ending}" for one in families for ending in endings[one.type]}
    named = {name for text in expressions() for name in re.findall(r"\b(?:dsg|process)_\w+", text)}
    assert named <= known
    assert len({panel["title"] for panel in DASHBOARD["panels"]}) == len({panel["id"] for panel in DASHBOARD["panels"]})


def test_monitoring_files_name_each_other() -> None:
    monitoring = ROOT / "docker/monitoring"
    (job,) = yaml.safe_load((monitoring / "prometheus.yml").read_text())["scrape_configs"]
    (host, port) = job["static_configs"][0]["targets"][0].split(":")
    assert host in COMPOSE["x-server"]["networks"]["default"]["aliases"] and f"EXPOSE {port}" in DOCKERFILE
    (source,) = yaml.safe_load((monitoring / "datasource.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in COMPOSE["services"]
    used = {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
    assert used == {source["uid"]}
    mounts = [one.split(":")[:2] for one in COMPOSE["services"]["grafana"]["volumes"] if one.startswith("./")]
    assert all((ROOT / own).is_file() for own, _ in mounts)
    (provider,) = yaml.safe_load((monitoring / "dashboards.yml").read_text())["providers"]
    (inside,) = [target for own, target in mounts if own.endswith("dashboard.json")]
    assert str(Path(inside).parent) == provider["options"]["path"]
    assert COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == inside


def tool(name: str) -> str:
    """A checker of the extra test-all."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: make test-all installs it")
    return found


def check(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "hadolint docker/Dockerfile",
        "check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml",
        "kubernetes-validate --strict docker/kubernetes.yaml",
    ],
)
def test_checkers_find_nothing(command: str) -> None:
    name, *arguments = command.split()
    ran = check(tool(name), *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profiles", "services"),
    [
        ([], {"dsg"}),
        (["cpu"], {"dsg-cpu"}),
        (["monitoring"], {"prometheus", "grafana"}),
        (["cpu", "monitoring"], {"dsg-cpu", "prometheus", "grafana"}),
        (["gpu", "monitoring"], {"dsg", "prometheus", "grafana"}),
        (["train"], {"train", "tensorboard"}),
    ],
)
def test_compose_itself_reads_the_profiles(profiles: list[str], services: set[str]) -> None:
    options = [word for profile in profiles for word in ("--profile", profile)]
    ran = check(tool("docker-compose"), *options, "config", "--format", "json")
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    project = json.loads(ran.stdout)
    assert set(project["services"]) == services
    if "dsg" in services:
        (device,) = project["services"]["dsg"]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])


@pytest.mark.slow
def test_compose_says_in_one_line_what_is_not_set(tmp_path: Path) -> None:
    path = shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    ran = subprocess.run([tool("docker-compose"), "-f", path, "config"], capture_output=True, text=True, timeout=120)
    assert not ran.stdout and re.search(r"required variable \w+ is missing a value: .*, in \.env", ran.stderr)
    assert len(ran.stderr.strip().splitlines()) == 1
