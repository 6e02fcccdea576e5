"""Pixels that two processes see: as they were, in memory that is used again and goes when nobody needs it."""

import contextlib
import gc
import os
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_worker_device import prepared, shared

from dsg.model.network.predictor import PreparedImage
from dsg.service import shared_pixels
from dsg.service.shared_pixels import OpenSegments, SharedPixels
from dsg.service.worker_device import WorkerDevice

ROWS_COLUMNS_COLOURS = np.arange(30, dtype=np.uint8).reshape(2, 5, 3)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4),
        np.ones((3, 5, 7), "f4"),
        torch.from_numpy(ROWS_COLUMNS_COLOURS).permute(2, 0, 1),  # as a decoder has them
        ROWS_COLUMNS_COLOURS.transpose(2, 0, 1),
        torch.arange(90).reshape(3, 5, 6)[:, ::2, 1:3],
    ],
)
def test_pixels_are_shared_as_they_are(pixels: torch.Tensor | np.ndarray) -> None:
    one, there = SharedPixels(pixels), OpenSegments("cpu")
    there.add(one.segment.number, os.dup(one.segment.file))
    again = there.pixels(one.segment.number, one.layout)
    assert type(again) is type(pixels) and again.shape == pixels.shape and (again == pixels).all()
    if pixels.shape == (3, 2, 5):
        assert np.asarray(again).strides == np.asarray(pixels).strides  # not turned round


@pytest.fixture
def no_free_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # pictures of other tests would give theirs back in the middle of one that counts
    monkeypatch.setattr(shared_pixels, "_free", deque())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("no_free_segments")
def test_a_segment_serves_one_picture_after_the_other() -> None:
    first, second = SharedPixels(np.zeros((3, 9, 9), "f4")), SharedPixels(np.ones((3, 9, 9), "f4"))
    numbers = first.segment.number, second.segment.number
    assert numbers[0] != numbers[1]
    there = OpenSegments("cpu")
    for one in (first, second):
        there.add(one.segment.number, os.dup(one.segment.file))
    mapped, before = there.pixels(numbers[0], first.layout), descriptors()
    del first
    third = SharedPixels(np.full((2, 5), 7, "u1"))
    assert third.segment.number == numbers[0] and descriptors() == before
    assert (there.pixels(numbers[0], third.layout) == 7).all()
    assert (there.pixels(numbers[1], second.layout) == 1).all()
    there.forget([numbers[0]])
    del mapped
    assert descriptors() == before - 1  # the mapping's own
    with pytest.raises(KeyError):
        there.pixels(numbers[0], third.layout)


def test_a_gpu_that_does_not_register_a_segment_gets_its_pixels_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    refused = SimpleNamespace(cudaHostRegister=lambda address, size, flags: 2)
    for device, cudart in ((lost, refused), (lambda name: contextlib.nullcontext(), lambda: refused)):
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(torch.cuda, "cudart", cudart)
        one, there = SharedPixels(np.full((3, 4, 5), 7, "u1")), OpenSegments("cuda:0")
        there.add(one.segment.number, os.dup(one.segment.file))
        assert (there.pixels(one.segment.number, one.layout) == 7).all()
        there.forget([one.segment.number])  # nothing is registered that would have to be given back


@pytest.mark.usefixtures("no_free_segments")
def test_free_segments_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    megabyte = 1 << 20
    monkeypatch.setattr(shared_pixels, "_KEPT_BYTES", 6 * megabyte)
    before = descriptors()
    pictures = [SharedPixels(np.zeros(megabyte - number, "u1")) for number in range(8)]
    large, too_large = (SharedPixels(np.zeros(size * megabyte, "u1")) for size in (3, 7))
    assert {one.segment.size for one in pictures} == {megabyte} and large.segment.size == 4 * megabyte
    assert descriptors() == before + 10
    kept = [one.segment.number for one in pictures[-2:]]
    while pictures:
        del pictures[0]
    assert descriptors() == before + 6 + 2
    del large  # those that were not used for longest make room
    assert descriptors() == before + 2 + 1 + 1
    again = [SharedPixels(np.zeros(size * megabyte, "u1")) for size in (1, 3, 1)]
    assert sorted(again[number].segment.number for number in (0, 2)) == kept
    assert descriptors() == before + 3 + 1
    del too_large
    assert descriptors() == before + 3


@pytest.mark.usefixtures("no_free_segments")
def test_a_worker_maps_a_segment_once_and_lets_go_of_it_when_it_is_gone(device: WorkerDevice) -> None:
    def mapped() -> int:
        return Path(f"/proc/{device.process_id}/maps").read_text().count("memfd:dsg-pictures")

    def lefts(*pictures: PreparedImage) -> list[float]:
        return [float(one.boxes[0, 0]) for one in device.begin(0, pictures, 0.0)().detections]

    device.restart()  # it has mapped what other tests sent it
    three = shared(device, *(prepared(left=left) for left in (5, 25, 45)))
    assert lefts(*three) == [5, 25, 45] and mapped() == 3
    assert lefts(three[2], three[0]) == [45, 5] and mapped() == 3  # as when halves of a batch run again
    del three
    again = shared(device, *(prepared(left=left) for left in (35, 15)))
    assert lefts(*again) == [35, 15] and mapped() == 3
    shared_pixels._free.clear()
    assert lefts(*again) == [35, 15] and mapped() == 2
    device.restart()
    assert lefts(*again) == [35, 15] and mapped() == 2
