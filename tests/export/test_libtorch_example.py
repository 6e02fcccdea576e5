"""The example of docs/libtorch: a plain C++ program with libtorch runs an exported TorchScript file."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsg.model import load
from dsg.ops import _register

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "libtorch" / "segment.cpp"
LIBRARIES = [ROOT / "ops" / name for name in ("_C_schemas.so", "_C_cpu.so")]


def test_schemas_are_those_of_python() -> None:
    source = (ROOT / "ops" / "csrc" / "schemas" / "schemas.cpp").read_text()
    defined = {
        "".join(re.findall(r'"([^"]*)"', call)) for call in re.findall(r"library\.def\((.*?)\);", source, re.DOTALL)
    }
    assert defined == {schema for schema in _register.SCHEMAS if "_backward" not in schema}


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.skipif(not all(path.is_file() for path in LIBRARIES), reason="the op is not built here")
def test_it_compiles_and_finds_what_the_checkpoint_finds(torchscript_file, checkpoint, pictures, tmp_path) -> None:
    folder = Path(torch.__file__).parent
    program = tmp_path / "segment"
    includes = [f"-I{folder / 'include'}", f"-I{folder / 'include/torch/csrc/api/include'}"]
    links = [f"-L{folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder / 'lib'}"]
    command = ["g++", "-std=c++20", "-O1", *includes, str(EXAMPLE), "-o", str(program), *links]
    subprocess.run(command, check=True, capture_output=True)

    picture = pictures[0]  # taken as it is: this program does not resize
    Image.fromarray(picture).save(tmp_path / "picture.ppm")
    arguments = [program, torchscript_file.path, tmp_path / "picture.ppm", *LIBRARIES]
    ran = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = np.array([[float(word) for word in line.split()] for line in ran.stdout.splitlines()])  # [n, 6]

    images = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    height, width = picture.shape[:2]
    padded = torch.nn.functional.pad(images, (0, -width % 32, 0, -height % 32))
    with torch.inference_mode():
        wanted = load(checkpoint, "cpu").model.infer(padded, torch.tensor([[height, width]]))
    rows = wanted.valid[0]
    assert len(found) == int(rows.sum()) > 5
    assert found[:, 0].tolist() == wanted.labels[0][rows].tolist()
    np.testing.assert_allclose(found[:, 1], wanted.scores[0][rows], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[:, 2:], wanted.boxes[0][rows], rtol=0, atol=1e-2)
