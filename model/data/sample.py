"""One picture and its annotations, seen through a `View`: what the network is trained on.

n: objects, c: crowd regions; H, W: size of the sample.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsg.model.data.masks import Patch, draw_runs, polygon_points, rle_runs
from dsg.model.data.records import Annotation
from dsg.model.data.view import View

Sample = tuple[Tensor, dict[str, Any]]
"""(image uint8 [3, H, W] RGB, target): the target holds

* boxes float32 [n, 4] xyxy, labels int64 [n], masks uint8 [n, H, W] of 0 and 1;
* has_mask bool [n]: False where only the box is known, the mask is then all 0;
* ignore_boxes float32 [c, 4]: crowd regions;
* image_id int;
* semantic uint8 [H, W], where the data has maps: the class of each pixel, 255 unknown.
"""


def make_sample(
    picture: Image.Image,
    annotations: Sequence[Annotation],
    image_id: int,
    view: View,
    min_visible: float = 0.0,
    min_side: float = 0.0,
) -> Sample:
    """A picture and its objects as `view` shows them.

    The box of an object that the view cuts becomes the box of the mask's part that is left; the box of one
    without a mask is clipped. An object that is not cut keeps its box as annotated, which is finer than
    pixels.

    Args:
        picture: RGB, of size `view.source`.
        annotations: in the picture's pixels.
        image_id: goes into the target.
        view: what to show.
        min_visible: share of an object's box that must be in view, else it is dropped; 0 to 1.
        min_side: objects whose box in view is narrower or lower than this are dropped; sample pixels.
    """
    height, width = view.size
    objects = [one for one in annotations if not one.iscrowd]
    full = view.map_boxes(_boxes(objects))  # [n, 4]
    clipped = view.clip_boxes(full)
    share = _areas(clipped) / np.maximum(_areas(full), 1e-12)
    sides = np.min(clipped[:, 2:] - clipped[:, :2], axis=1, initial=np.inf)
    seen = (_areas(clipped) > 0) & (share >= min_visible) & (sides >= min_side)
    boxes, labels, patches = [], [], []
    for index in np.flatnonzero(seen):
        one, box, patch = objects[index], clipped[index], None
        if one.segmentation is not None:
            patch = _patch(one.segmentation, view)
            tight = patch.box()
            if share[index] < 1 - 1e-9:
                if tight is None or min(tight[2] - tight[0], tight[3] - tight[1]) < min_side:
                    continue
                box = np.array(tight)
            elif tight is None:
                # Too thin to cover the centre of any pixel: the object is there, its mask is not known.
                patch = None
        boxes.append(box)
        labels.append(one.category_id)
        patches.append(patch)
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, patch in zip(masks, patches, strict=True):
        if patch is not None:
            patch.write(mask)
    crowds = view.clip_boxes(view.map_boxes(_boxes([one for one in annotations if one.iscrowd])))
    target = {
        "boxes": _tensor(np.array(boxes).reshape(-1, 4)),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.from_numpy(masks),
        "has_mask": torch.tensor([patch is not None for patch in patches], dtype=torch.bool),
        "ignore_boxes": _tensor(crowds[_areas(crowds) > 0]),
        "image_id": image_id,
    }
    return view.map_picture(picture), target


def _patch(segmentation: list[list[float]] | dict[str, Any], view: View) -> Patch:
    if isinstance(segmentation, dict):
        return view.map_patch(draw_runs(rle_runs(segmentation, *view.source), view.source[0]))
    return view.draw([polygon_points(polygon) for polygon in segmentation])


def _boxes(annotations: Sequence[Annotation]) -> np.ndarray:
    return np.array([one.box for one in annotations], np.float64).reshape(-1, 4)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _tensor(boxes: np.ndarray) -> Tensor:
    return torch.from_numpy(boxes.astype(np.float32))
