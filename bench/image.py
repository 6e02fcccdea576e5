"""Builds an image where there is no Docker, runs it, asks it for masks, stops it: Debian, as root, nothing else.

    python -m dsg.bench.image --out bench/results/image_cpu.json
    python -m dsg.bench.image --target gpu --out bench/results/image_gpu.json

The base is made by debootstrap, the image by buildah; every layer is built from nothing. Both programs are installed
where they are missing. The service runs as in docker-compose.yml: the image's user without capabilities, its root
read-only, /tmp in memory. `dsg.bench.image_run` starts it. The `gpu` image, too, runs on the CPU here.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dsg.bench import report
from dsg.bench.image_run import RunningImage
from dsg.bench.report import Row

_ROOT = Path(__file__).parents[1]
_RELEASE = "bookworm"
_BASE, _IMAGE = "localhost/debian:dsg", "localhost/dsg:image-test"
_AIM_S = {"cpu": 12 * 60, "gpu": 60 * 60}
_AIM_GB = {"cpu": 2.0, "gpu": 8.0}
_CA = Path("/etc/ssl/certs/ca-certificates.crt")
_PHOTO = _ROOT / "docs/pictures/coco_sheet.jpg"


class Workshop:
    """A folder with an image store of its own, so that nothing of the machine's is used or changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        store = folder / "storage.conf"
        self._environment = {
            **os.environ,
            "BUILDAH_ISOLATION": "chroot",
            "CONTAINERS_STORAGE_CONF": str(store),
            "TMPDIR": str(folder / "tmp"),
        }
        (folder / "tmp").mkdir(parents=True)
        lines = ["[storage]", 'driver = "overlay"', f'runroot = "{folder}/run"', f'graphroot = "{folder}/graph"', ""]
        store.write_text("\n".join(lines))

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step under its name."""
        sys.stderr.write(f"==> {name}\n")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        sys.stderr.write(f"==> {name}: {self.seconds[name]} s\n")

    def run(self, *command: str) -> str:
        """A program's output; what it says beside goes to stderr. Raises CalledProcessError."""
        ran = subprocess.run(command, env=self._environment, stdout=subprocess.PIPE, text=True, check=True)
        return ran.stdout.strip()

    def clear(self) -> None:
        """Remove the store; its layers are mounts for as long as it has them."""
        if shutil.which("buildah"):
            subprocess.run(["buildah", "rm", "--all"], env=self._environment, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def install_tools() -> None:
    """buildah and debootstrap, from Debian."""
    if missing := [name for name in ("buildah", "debootstrap") if not shutil.which(name)]:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_base(shop: Workshop) -> None:
    """A minimal Debian, in place of the Dockerfile's own base."""
    tree, archive = shop.folder / "debian", shop.folder / "debian.tar"
    log = (shop.folder / "debootstrap.log").open("w")
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", _RELEASE, str(tree), *mirror()]
    with log:
        subprocess.run(command, stdout=log, check=True)
    shop.run("tar", "-C", str(tree), "-cf", str(archive), ".")
    container = shop.run("buildah", "from", "scratch")
    shop.run("buildah", "add", "--quiet", container, str(archive), "/")
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    shop.run("buildah", "config", "--env", path, container)
    shop.run("buildah", "commit", "--quiet", "--rm", container, _BASE)
    archive.unlink()
    shutil.rmtree(tree)


def mirror() -> list[str]:
    """Where this machine has its own packages from; debootstrap knows one itself."""
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        text = path.read_text() if path.is_file() else ""
        if found := re.search(r"^(?:URIs:|deb(?: \[.*\])?) *(\S+)", text, re.MULTILINE):
            return [found[1]]
    return []


def build(shop: Workshop, context: Path, target: str) -> None:
    """A target, from Python's usual package index alone."""
    mounts = [f"--volume={path}:{path}:ro" for path in what_pip_reads()]
    arguments = [f"--target={target}", "--build-arg", f"BASE={_BASE}", "--build-arg", "TORCH_INDEX=", *mounts]
    command = ["buildah", "bud", "--format=docker", "--pull-never", "--layers", *arguments]
    shop.run(*command, "--file", str(context / "docker/Dockerfile"), "--tag", _IMAGE, str(context))


def what_pip_reads() -> list[Path]:
    """This machine's certificates and pip settings: what pip finds here, it finds in the image's stages, too."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "debug"], capture_output=True, text=True).stdout
    files = [Path(name) for name in re.findall(r"(/\S+), exists: True", listed)]
    named = [name for file in files for name in re.findall(r"(?:file://|[\s=])(/[^\s,'\"]+)", file.read_text())]
    folders = [Path(name) for name in named if Path(name).exists()]
    # A folder of packages beside its index: the index's links lead there.
    folders = [folder.parent if folder.name == "simple" else folder for folder in folders]
    return sorted({path for path in (_CA, *files, *folders) if path.exists()})


def copy_context(target: Path) -> None:
    """What .dockerignore lets through, so that a file can be changed."""
    kept = [line[1:] for line in (_ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in [*kept, ".dockerignore", "docker/Dockerfile"]:
        source, copy = _ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
        else:
            shutil.copy2(source, copy)


def try_out(shop: Workshop) -> dict[str, float]:
    """Start the image, ask it for masks, stop it in the middle of a request.

    Returns:
        seconds by what took them.
    """
    container = shop.run("buildah", "from", "--pull-never", _IMAGE)
    root = Path(shop.run("buildah", "mount", container))
    config = json.loads(shop.run("buildah", "inspect", "--type", "image", _IMAGE))["Docker"]["config"]
    with RunningImage(root, config) as running:
        ready_s = running.wait_until_ready()
        running.check_health()
        answer_s = running.segment(_PHOTO)
        drain_s = running.drain(_PHOTO)
    return {"from start to ready": ready_s, "one photo": answer_s, "from SIGTERM to exit 0": drain_s}


def size_gb(shop: Workshop) -> float:
    """Of all layers, unpacked."""
    (image,) = json.loads(shop.run("buildah", "images", "--json", _IMAGE))
    number, unit = image["size"].split()
    return round(float(number) * {"MB": 1e-3, "GB": 1.0}[unit], 3)


def run(folder: Path, target: str) -> tuple[list[Row], float]:
    """Build and try an image; its rows and the seconds of all steps that it takes to have one that was tried."""
    shop = Workshop(folder)
    try:
        with shop.step("tools from Debian"):
            install_tools()
        with shop.step("base by debootstrap"):
            make_base(shop)
        context = folder / "context"
        copy_context(context)
        with shop.step("build from nothing"):
            build(shop, context, target)
        with shop.step("run, segment, drain"):
            took = try_out(shop)
        whole_s = sum(shop.seconds.values())
        with (context / "service/app.py").open("a") as file:
            file.write("\n# a change of the code\n")
        with shop.step("build again after a change of the code"):
            build(shop, context, target)
        aim = f"the aim of {_AIM_S[target] // 60} minutes"
        rows = [_row(f"all steps but the last; baseline: {aim}", whole_s, "s", _AIM_S[target])]
        rows += [
            _row(f"{name}; baseline: all steps", seconds, "s", whole_s)
            for name, seconds in shop.seconds.items()
            if seconds
        ]
        rows += [_row(f"{name}; baseline: all steps", seconds, "s", whole_s) for name, seconds in took.items()]
        size = size_gb(shop)
        rows.append(_row(f"size of the {target} image; baseline: the aim", size, "GB", _AIM_GB[target]))
        return rows, whole_s
    finally:
        shop.clear()


def _row(case: str, value: float, unit: str, baseline: float) -> Row:
    return Row(case, round(value, 3), unit, round(baseline, 3), round(baseline / max(value, 1e-3), 3))


def main() -> None:
    """Build, try, write; ends with a message where a step fails or an aim is missed."""
    parser = argparse.ArgumentParser(description="Build, run and try an image without Docker.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--target", choices=list(_AIM_S), default="cpu", help="which image")
    parser.add_argument("--work", type=Path, default=_ROOT / "build/image", help="folder, removed at the end")
    given = parser.parse_args()
    report.commit()  # an unknown commit should show before the building, not after
    if not (_ROOT / "docker/Dockerfile").is_file():
        sys.exit("image-test builds from a checkout: run it in one")
    if os.geteuid() != 0:
        sys.exit("image-test unpacks a Debian and mounts layers: run it as root")
    try:
        rows, whole_s = run(given.work.absolute(), given.target)
    except subprocess.CalledProcessError as error:
        sys.exit(f"image-test: {' '.join(error.cmd[:3])} failed with status {error.returncode}")
    report.write(given.out, rows, torch.device("cpu"))
    for row in rows:
        sys.stderr.write(f"{row.value:10.3f} {row.unit}  {row.case}\n")
    if whole_s > (most_s := _AIM_S[given.target]):
        sys.exit(f"image-test took {whole_s:.0f} s, more than {most_s}")


if __name__ == "__main__":
    main()
