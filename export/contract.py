"""What an exported file says about itself, so that whoever has the file alone can use it. Needs no torch.

B images in a batch, H and W their padded size, K detections of an image, m side of a mask.
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from dsg.model.network.info import CheckpointInfo
from dsg.model.network.sizes import STRIDE

INPUTS = {
    "images": "float32 [B, 3, H, W]: RGB in 0..1, resized as checkpoint.resize says, zeros right of and below each",
    "sizes": "int64 [B, 2]: the valid height and width of each picture",
}
OUTPUTS = {
    "valid": "bool [B, K]: rows that are detections, best first; the others hold zeros",
    "boxes": "float32 [B, K, 4]: (x1, y1, x2, y2) in pixels of the resized picture",
    "scores": "float32 [B, K] in 0..1",
    "labels": "int64 [B, K]: label l is checkpoint.categories[l - 1]",
    "mask_probs": "float32 [B, K, m, m] in 0..1: a grid over the box",
}
_VERSION = 1


class ExportError(ValueError):
    """A file that cannot be written, or is no export of this project, or a broken one; one line that names it."""


class Format(StrEnum):
    """The three kinds of file, as the command line calls them."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    AOTI = "aoti"

    @property
    def suffix(self) -> str:
        """Ending of its files."""
        return {Format.ONNX: ".onnx", Format.TORCHSCRIPT: ".ts", Format.AOTI: ".pt2"}[self]

    @property
    def is_code(self) -> bool:
        """Whether a program in the file runs with all rights of the process that loads it."""
        return self is not Format.ONNX


@dataclass(frozen=True)
class Contract:
    """The description inside an exported file."""

    format: Format
    checkpoint: CheckpointInfo
    """Class names and ids, preprocessing, thresholds, version, hash and licence of what was exported."""
    precision: str
    """"float32" or "float16": what it computes in; inputs and outputs are float32 always."""
    device: str
    """Where it runs: "any", "cpu" or "cuda"."""
    ops: tuple[str, ...]
    """Operators that are no standard ones."""
    ops_are_needed: bool
    """Whether their library must be loaded first; an ONNX file holds their bodies too, and runs without."""
    written_by: str
    """Versions of the libraries that wrote it."""
    checksum: str = ""
    """SHA-256 of the rest of the file. It finds damage; it is no signature, and proves nothing about who wrote it."""

    def to_json(self) -> str:
        """One JSON document."""
        document = asdict(self)
        document = {"dsg_export": _VERSION, **document, "stride": STRIDE, "inputs": INPUTS, "outputs": OUTPUTS}
        return json.dumps(document, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Contract":
        """What `to_json` wrote. Raises KeyError, TypeError or ValueError when it is something else."""
        document: dict[str, Any] = json.loads(text)
        if document["dsg_export"] != _VERSION:
            raise ValueError(f"version {document['dsg_export']} of the description, this program knows {_VERSION}")
        for name in ("dsg_export", "stride", "inputs", "outputs"):
            del document[name]
        document["format"] = Format(document["format"])
        document["checkpoint"] = CheckpointInfo.from_json(json.dumps(document["checkpoint"]))
        document["ops"] = tuple(document["ops"])
        return cls(**document)
