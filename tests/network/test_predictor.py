import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dsg.model import build, load
from dsg.model.network.checkpoint import Category, CheckpointInfo, Resize, save_checkpoint
from dsg.model.network.eager import prepare_tensor
from dsg.model.network.image_tensor import resize
from dsg.model.network.predictor import Predictor
from dsg.model.network.sizes import resized_size

OVERRIDES = {"channels": 16, "box_head_width": 32, "proposals": 40}


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    model = build("dsg_lite0_fpn", 3, **OVERRIDES).eval()
    for layer, std in (
        (model.box_head.classifier, 1.0),
        (model.mask_head.predictor, 0.3),
        (model.rpn_head.objectness, 0.3),
    ):
        torch.nn.init.normal_(layer.weight, std=std)
    info = CheckpointInfo(
        "small",
        "dsg_lite0_fpn",
        OVERRIDES,
        tuple(Category(i, f"class {i}") for i in (5, 6, 9)),
        Resize(64, 128),
        0.3,
        max_detections=50,
    )
    return Predictor(model, info)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def same(one, other, within=1e-5):
    """Equal but for the last bits: on several threads they depend on a RoI's row in a matrix product."""
    return torch.equal(one.labels, other.labels) and all(
        torch.allclose(getattr(one, part), getattr(other, part), rtol=within, atol=within)
        for part in ("boxes", "scores", "mask_probs")
    )


def test_every_form_of_a_picture_gives_the_same(predictor, tmp_path):
    array = pixels(90, 120)
    Image.fromarray(array).save(tmp_path / "picture.png")
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [
        array,
        Image.fromarray(array),
        tensor,
        tmp_path / "picture.png",
        os.fspath(tmp_path / "picture.png"),
    ]
    results = predictor.predict(forms, score_threshold=0.0)
    assert len(results) == 5 and len(results[0]) > 5
    assert all(same(result, results[0]) and result.image_size == (90, 120) for result in results)
    # at the network's own size there is no resize, and with it no rounding to 8 bits
    unscaled = tensor[:, :64, :96]
    as_bytes, as_floats = predictor.predict([unscaled, unscaled.float() / 255], score_threshold=0.0)
    assert same(as_bytes, as_floats)


def test_mixed_sizes_come_back_in_order_and_in_their_own_pixels(predictor):
    sizes = [
        (90, 120),
        (200, 100),
        (64, 64),
        (91, 119),
        (30, 300),
        (200, 101),
        (64, 65),
        (63, 64),
        (90, 120),
        (65, 64),
        (66, 64),
    ]
    pictures = [pixels(*size, seed=number) for number, size in enumerate(sizes)]
    together = predictor.predict(pictures, score_threshold=0.0)
    for picture, size, found in zip(pictures, sizes, together, strict=True):
        assert found.image_size == size
        assert (found.boxes[:, 2] <= size[1] + 1e-3).all() and (found.boxes[:, 3] <= size[0] + 1e-3).all()
        (alone,) = predictor.predict([picture], score_threshold=0.0)
        assert len(alone) == len(found)
        assert torch.allclose(alone.boxes, found.boxes, atol=1e-2)


def test_boxes_scale_back_to_the_original(predictor):
    """A picture and the same picture, blown up: boxes are blown up too."""
    small = pixels(64, 96)
    large = np.repeat(np.repeat(small, 4, axis=0), 4, axis=1)
    (one,), (four,) = predictor.predict([small], 0.0), predictor.predict([large], 0.0)
    wide = max(float((one.boxes[:, 2]).max()), 1)
    assert float(four.boxes[:, 2].max()) == pytest.approx(4 * wide, rel=0.1)


def test_limits(predictor):
    picture = pixels(64, 64)
    everything = predictor.predict([picture], score_threshold=0.0)[0]
    default = predictor.predict([picture])[0]
    assert (default.scores >= 0.3).all() and len(default) == int((everything.scores >= 0.3).sum())
    assert len(predictor.predict([picture], 0.0, max_detections=2)[0]) == 2
    for arguments, message in [
        ({"score_threshold": 1.5}, "score_threshold must be in 0..1"),
        ({"max_detections": 51}, "max_detections must be in 1..50 for small"),
        ({"max_detections": 0}, "max_detections must be in 1..50"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictor.predict([picture], **arguments)
    assert predictor.predict([]) == []


def test_thresholds_of_classes_are_the_default(predictor):
    pictures = [pixels(64, 96), pixels(70, 64, seed=2)]
    everything = predictor.predict(pictures, score_threshold=0.0)
    labels = torch.cat([found.labels for found in everything])
    scores = torch.cat([found.scores for found in everything])
    assert labels.unique().tolist() == [1, 2, 3]
    # half of each class, so that each has a threshold of its own
    chosen = tuple(float(scores[labels == label].median()) for label in (1, 2, 3))
    info = replace(predictor.info, class_thresholds=chosen, class_precision=0.5)
    own = Predictor(predictor.model, info)
    for found, default in zip(everything, own.predict(pictures), strict=True):
        least = torch.tensor(chosen)[found.labels - 1]
        assert 0 < len(default) < len(found) and same(default, found.select(chosen, 50))
        assert torch.equal(default.scores, found.scores[found.scores >= least])
    for found, asked in zip(everything, own.predict(pictures, score_threshold=0.0), strict=True):
        assert same(found, asked)  # what is asked for goes before the checkpoint's
    assert own.limits(None, None) == (chosen, 50) and own.limits(0.2, 3) == (0.2, 3)


def test_a_threshold_leaves_out_and_changes_nothing_else(predictor):
    pictures = [pixels(64, 96), pixels(64, 96, seed=1), pixels(70, 64, seed=2)]
    everything = predictor.predict(pictures, score_threshold=0.0)
    threshold = float(everything[0].scores.median())
    for some, found in zip(predictor.predict(pictures, threshold), everything, strict=True):
        expected = found.select(threshold, 50)
        assert 0 < len(some) == len(expected) <= len(found)
        for part in ("boxes", "scores", "labels", "mask_probs"):
            torch.testing.assert_close(getattr(some, part), getattr(expected, part))


def test_a_network_of_another_kind_gets_pictures_alone(predictor):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = predictor.model

        def forward(self, images):
            return self.inner(images)

    picture = pixels(64, 96)
    (found,) = Predictor(Wrapped(), predictor.info).predict([picture], 0.6)
    (expected,) = predictor.predict([picture], 0.6)
    assert len(found) == len(expected) and (found.scores >= 0.6).all()
    assert torch.equal(found.boxes, expected.boxes)


def test_the_owner_may_change_the_networks_dtype(predictor):
    import copy

    twin = Predictor(copy.deepcopy(predictor.model), predictor.info)
    picture = pixels(64, 96)
    (before,) = twin.predict([picture], 0.0)
    twin.model.double()
    (after,) = twin.predict([picture], 0.0)
    assert after.boxes.dtype == torch.float64
    assert (after.scores[:3] - before.scores[:3]).abs().max() < 1e-4


def test_half_precision_pictures(predictor):
    tensor = torch.from_numpy(pixels(90, 70).copy()).permute(2, 0, 1)
    half = (tensor.float() / 255).half()
    (found,), (wanted,) = predictor.predict([half], 0.0), predictor.predict([half.float()], 0.0)
    assert same(found, wanted)


@pytest.mark.parametrize("arguments", [{"score_threshold": "0.5"}, {"score_threshold": True}, {"max_detections": 2.5}])
def test_limits_of_another_type_are_named(predictor, arguments):
    with pytest.raises(TypeError, match=f"{next(iter(arguments))} must be a"):
        predictor.predict([pixels(64, 64)], **arguments)


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (np.zeros((8, 8), np.uint8), ValueError, r"\[H, W, 3\]"),
        (np.zeros((8, 8, 3), np.float32), TypeError, "uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "uint8 or float"),
        (torch.zeros(8, 8, 3), ValueError, r"\[3, H, W\]"),
        (torch.full((3, 8, 8), 255.0), ValueError, "0..1"),
        (torch.full((3, 8, 8), float("nan")), ValueError, "0..1"),
        (17, TypeError, "got int"),
        ("nowhere.jpg", FileNotFoundError, "no picture at nowhere.jpg"),
    ],
)
def test_what_is_no_picture(predictor, picture, error, message):
    with pytest.raises(error, match=message):
        predictor.predict([picture])


def test_a_file_that_is_no_picture(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ValueError, match="it is not a picture"):
        predictor.predict([tmp_path / "text.jpg"])
    Image.fromarray(pixels(64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    with pytest.raises(ValueError, match=r"cannot read .*half\.jpg"):
        predictor.predict([tmp_path / "half.jpg"])


def test_a_single_picture_outside_a_list_is_named(predictor):
    with pytest.raises(TypeError, match=r"put it in \[ \]"):
        predictor.predict("picture.jpg")


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 200, (64, 128)), (100, 100, (64, 64)), (50, 400, (16, 128)), (10, 5000, (1, 128))],
)
def test_resized_size_by_hand(height, width, expected):
    assert resized_size(height, width, Resize(64, 128)) == expected


def test_resize_keeps_flat_colours_and_rounds_8_bit():
    flat = torch.full((3, 90, 50), 77, dtype=torch.uint8)
    assert (resize(flat, Resize(64, 128)) == 77).all() and resize(flat, Resize(64, 128)).dtype == torch.uint8
    plain = resize(flat, Resize(64, 128, antialias=False))
    assert plain.dtype == torch.float32 and torch.allclose(plain, torch.tensor(77 / 255))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_resize_without_low_pass_is_left_to_the_device_where_that_is_less_to_bring(predictor, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    how = Resize(64, 128, antialias=False)
    model = copy.deepcopy(predictor.model).to(device)
    one = Predictor(model, replace(predictor.info, resize=how, score_threshold=0.05))
    for height, width, left in ((40, 60, True), (64, 128, False), (100, 140, True), (150, 200, False)):
        picture = pixels(height, width, seed=height)
        prepared, at_once = one.prepare(picture), prepare_tensor(picture, how)
        assert (prepared.scale_to is not None) is left
        assert (prepared.pixels.dtype == torch.uint8) is (left or (height, width) == (64, 128))
        assert prepared.size == at_once.size == tuple(at_once.pixels.shape[-2:])
        assert prepared.padded_size == at_once.padded_size and prepared.original_size == (height, width)
        (found,), (expected,) = one.detect([prepared]), one.detect([at_once])
        # A GPU's interpolation rounds otherwise than a CPU's.
        assert len(found) > 3 and same(found.to("cpu"), expected.to("cpu"), 1e-5 if device == "cpu" else 2e-3)


def test_load_by_path_and_by_name(predictor, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "small.safetensors", predictor.model, predictor.info)
    by_path = load(tmp_path / "small.safetensors", device="cpu")
    # its layout is its own affair: the same file can be written from it
    written = save_checkpoint(tmp_path / "again.safetensors", by_path.model, by_path.info)
    assert written.hash == by_path.info.hash
    (tmp_path / "again.safetensors").unlink()
    assert by_path.model.rpn_head.conv.weight.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr("dsg.model.network.predictor.WEIGHTS_DIR", tmp_path)
    by_name = load("small", device="cpu")
    picture = pixels(70, 80)
    assert same(by_path.predict([picture], 0.0)[0], by_name.predict([picture], 0.0)[0])
    with pytest.raises(FileNotFoundError, match="neither a file nor one of the names small"):
        load("large")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        load("small", device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_named(predictor, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "small.safetensors", predictor.model, predictor.info)
    with pytest.raises(ValueError, match="device cuda is not there"):
        load(tmp_path / "small.safetensors", device="cuda")
