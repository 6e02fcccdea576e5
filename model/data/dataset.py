"""COCO data as samples of a torch Dataset; each sample's randomness depends on its key alone."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dsg.model.data.copy_paste import copy_paste
from dsg.model.data.pixels import read_picture
from dsg.model.data.records import CocoData, DataError, ImageRecord
from dsg.model.data.sample import Sample, make_sample
from dsg.model.data.semantic_maps import SemanticMaps
from dsg.model.data.transforms import Augment
from dsg.model.data.view import View

SAMPLE_STREAM = 1
"""Keeps the random numbers of samples apart from those of their order, which start from the same seed."""


class SampleKey(NamedTuple):
    """What a sample is, random numbers included."""

    picture: int
    """Its number in the data, 0 to len - 1."""
    epoch: int = 0
    lap: int = 0
    """Above 0 where a picture comes up once more within an epoch, to fill a batch."""


class CocoDataset(Dataset[Sample]):
    """Pictures and targets, as `Sample` describes them.

    With a transform, what `dataset[key]` gives depends on the seed and the key alone: not on the process that
    makes it, nor on what was asked for before. Without one, pictures come as they are, with all objects.
    """

    def __init__(
        self,
        data: CocoData,
        transform: Augment | None = None,
        *,
        seed: int = 0,
        cache_images: bool = False,
        maps: Path | None = None,
    ) -> None:
        """Checks that all picture files are there; they are decoded later, or now with `cache_images`.

        Args:
            data: what to train or evaluate on.
            transform: how samples are varied; None for evaluation.
            seed: start of all random numbers, 0 or more.
            cache_images: keep all pictures decoded in memory, 3 bytes a pixel; forked workers share it.
            maps: folder of semantic maps; each target then has `semantic` uint8 [H, W], see `SemanticMaps`.

        Raises:
            DataError: pictures or maps are missing, or, with `cache_images`, cannot be decoded.
            ValueError: a negative seed.
        """
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        missing = [record.path for record in data.records if not record.path.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: no such picture (nor {len(missing) - 1} more of {len(data.records)}); "
                "check the images directory"
            )
        self.data = data
        self.transform = transform
        self.seed = seed
        self._maps = SemanticMaps(maps, data.records) if maps else None
        self._pasteable = [
            index
            for index, record in enumerate(data.records)
            if any(one.segmentation is not None and not one.iscrowd for one in record.annotations)
        ]
        self._cache = self._decode_all() if cache_images else None

    def __len__(self) -> int:
        return len(self.data.records)

    def __getitem__(self, key: int | SampleKey) -> Sample:
        """One sample; a plain number is that picture in epoch 0.

        Raises:
            DataError: the picture cannot be decoded, or is not of the size that its annotations say.
            IndexError: no such picture.
        """
        key = key if isinstance(key, SampleKey) else SampleKey(key)
        if not 0 <= key.picture < len(self):
            raise IndexError(f"sample {key.picture} of {len(self)}")
        if self.transform is None:
            return self._plain(key.picture)
        rng = np.random.default_rng([self.seed, SAMPLE_STREAM, key.epoch, key.lap, key.picture])
        sample = self._varied(key.picture, self.transform, rng)
        if self._pasteable and rng.random() < self.transform.config.copy_paste:
            above = self._pasteable[int(rng.integers(len(self._pasteable)))]
            sample = copy_paste(sample, self._varied(above, self.transform, rng), rng)
        return sample

    def wide(self) -> np.ndarray:
        """bool [len]: which pictures are at least as wide as high, for grouping by aspect ratio."""
        return np.array([record.width >= record.height for record in self.data.records], dtype=bool)

    def _plain(self, index: int) -> Sample:
        record, picture = self.data.records[index], self._picture(index)
        view = View.whole(record.size)
        return self._with_map(make_sample(picture, record.annotations, record.id, view), record, view)

    def _varied(self, index: int, transform: Augment, rng: np.random.Generator) -> Sample:
        record, config = self.data.records[index], transform.config
        view = transform.draw_view(record.size, rng)
        picture = self._picture(index)
        image, target = make_sample(picture, record.annotations, record.id, view, config.min_visible, config.min_side)
        return self._with_map((transform.change_colors(image, rng), target), record, view)

    def _with_map(self, sample: Sample, record: ImageRecord, view: View) -> Sample:
        if self._maps is None:
            return sample
        image, target = sample
        return image, {**target, "semantic": self._maps.of(record, view)}

    def _picture(self, index: int) -> Image.Image:
        if self._cache is not None:
            return Image.fromarray(self._cache[index])
        record = self.data.records[index]
        return read_picture(record.path, record.size)

    def _decode_all(self) -> list[np.ndarray]:
        """uint8 [H, W, 3] of each picture. Decoders let go of the interpreter's lock, so threads serve."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda record: np.array(read_picture(record.path, record.size)), self.data.records))


def collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Samples as the network takes them: a list of images, uint8 [3, H, W], and a list of targets."""
    return [image for image, _ in samples], [target for _, target in samples]
