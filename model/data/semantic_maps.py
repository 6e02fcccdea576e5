"""Maps of what every pixel shows, things and stuff, as COCO's stuffthingmaps have them: a PNG beside each picture.

H, W: size of a sample.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsg.model.data.masks import Patch
from dsg.model.data.records import DataError, ImageRecord
from dsg.model.data.view import View

UNKNOWN = 255
"""Value of pixels that nothing is learned from."""
_MODES = ("L", "P")


class SemanticMaps:
    """One folder of maps, each named as its picture with the ending .png; 8 bits a pixel, grey or palette.

    Args:
        folder: of the PNG files.
        records: pictures that must have one.

    Raises:
        DataError: maps are missing.
    """

    def __init__(self, folder: Path, records: tuple[ImageRecord, ...]) -> None:
        self.folder = folder
        missing = [path for record in records if not (path := self._path(record)).is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: no such map (nor {len(missing) - 1} more of {len(records)}); check batch.stuff_maps,"
                " or use overrides.semantic=instances"
            )

    def of(self, record: ImageRecord, view: View) -> Tensor:
        """The picture's map as `view` shows it, each pixel the value of the nearest one: uint8 [H, W].

        Raises:
            DataError: the file is no such map, or of another size than the picture.
        """
        path = self._path(record)
        try:
            with Image.open(path) as image:
                mode, values = image.mode, np.array(image)
        except Exception as error:  # Pillow's decoders of broken files raise nearly anything
            raise DataError(f"{path}: cannot be read as a map: {error}") from None
        if mode not in _MODES or values.shape != record.size:
            raise DataError(f"{path}: must be 8-bit grey or palette of {record.size}, is {mode} of {values.shape}")
        shown = np.full(view.size, UNKNOWN, np.uint8)
        view.map_patch(Patch(values, 0, 0)).write(shown)
        return torch.from_numpy(shown)

    def _path(self, record: ImageRecord) -> Path:
        return self.folder / f"{record.path.stem}.png"
