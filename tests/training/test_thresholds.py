"""Thresholds of a stated precision: by hand, against pycocotools and a slow loop, and what must hold of all."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dsg.model.network.checkpoint import JUST_ABOVE_ONE, Category, CheckpointInfo, Resize
from dsg.model.training.thresholds import class_thresholds, with_class_thresholds

A, B, C = 7, 3, 90


def document(images, objects):
    """COCO ground truth; objects are (image, category, box, crowd)."""
    return {
        "images": [{"id": number, "height": 200, "width": 200} for number in range(1, images + 1)],
        "categories": [{"id": one, "name": f"c{one}"} for one in (A, B, C)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": int(crowd),
            }
            for number, (image, category, box, crowd) in enumerate(objects, start=1)
        ],
    }


def results(*found):
    """COCO results of (image, category, score, box)."""
    return [
        {"image_id": image, "category_id": category, "score": score, "bbox": list(box)}
        for image, category, score, box in found
    ]


def world(*cases):
    """Truth and results in which each detection (category, score, "R" or "W") is alone in its image, right or wrong."""
    box = (10, 10, 20, 20)
    numbered = list(enumerate(cases, start=1))
    objects = [(n, category, box, False) for n, (category, _, verdict) in numbered if verdict == "R"]
    return document(len(cases), objects), results(*((n, category, score, box) for n, (category, score, _) in numbered))


# Shares of right ones at or above each score: 1, 1, 2/3, 3/4, 3/5.
ONE_CLASS = world((A, 0.9, "R"), (A, 0.8, "R"), (A, 0.7, "W"), (A, 0.6, "R"), (A, 0.5, "W"))


@pytest.mark.parametrize(
    ("precision", "expected"), [(0.5, 0.5), (0.6, 0.5), (0.61, 0.6), (0.75, 0.6), (0.76, 0.8), (1.0, 0.8)]
)
def test_one_class_by_hand(precision, expected):
    assert class_thresholds(*ONE_CLASS, [A], precision, support=0) == (expected, (expected,))
    # of one class, the share of all classes is its own
    assert class_thresholds(*ONE_CLASS, [A], precision, support=10) == (expected, (expected,))


# Of both classes: 1 at .9 and .8, 2/3 at .7, 3/4 at .6, 4/5 at .5.
TWO_CLASSES = world((A, 0.9, "R"), (A, 0.8, "R"), (B, 0.7, "W"), (A, 0.6, "R"), (A, 0.5, "R"))
ABOVE_7 = float(np.nextafter(np.float32(0.7), np.float32(1)))


@pytest.mark.parametrize(
    ("precision", "pooled", "of_a", "of_b"),
    [
        (0.60, 0.5, 0.5, 0.7),  # B: (0 + 10 * 2/3) / 11 = .606
        (0.61, 0.5, 0.5, ABOVE_7),
        (0.85, 0.8, 0.5, 0.8),  # A at .5: (4 + 10 * 4/5) / 14 = .857; all at .5: .8; B is not enough, and as all
        (0.86, 0.8, 0.8, 0.8),  # A at .6: (3 + 10 * 3/4) / 13 = .808
    ],
)
def test_two_classes_by_hand(precision, pooled, of_a, of_b):
    found = class_thresholds(*TWO_CLASSES, [B, C, None, A], precision, support=10)
    assert found == (pooled, (of_b, pooled, pooled, of_a))  # no detection of C, and no class: as all


def test_without_smoothing_a_class_is_its_own():
    assert class_thresholds(*TWO_CLASSES, [A, B], 0.9, support=0) == (0.8, (0.5, 0.8))
    assert class_thresholds(*TWO_CLASSES, [A, B], 0.75, support=0) == (0.5, (0.5, ABOVE_7))


def test_a_low_best_score_says_nothing_about_higher_ones():
    truth, found = world((A, 0.9, "R"), (A, 0.8, "R"), (A, 0.7, "W"), (B, 0.02, "W"))
    # B's .02 is not enough, and just above it nothing speaks for B
    assert class_thresholds(truth, found, [A, B], 0.9) == (0.8, (0.8, 0.8))


def test_equal_scores_stand_or_fall_together():
    truth, found = world((A, 0.9, "R"), (A, 0.5, "R"), (A, 0.5, "W"), (A, 0.5, "W"))
    assert class_thresholds(truth, found, [A], 0.6, support=0) == (0.9, (0.9,))
    assert class_thresholds(truth, found, [A], 0.5, support=0) == (0.5, (0.5,))


def test_where_no_score_is_enough_nothing_that_was_seen_is_shown():
    truth, found = world((A, 0.25, "W"), (A, 1.0, "W"))
    pooled, (own,) = class_thresholds(truth, found, [A], 0.9)
    assert pooled == own == JUST_ABOVE_ONE and np.float32(own) > 1
    assert class_thresholds(truth, [], [A, B], 0.9) == (JUST_ABOVE_ONE, (JUST_ABOVE_ONE, JUST_ABOVE_ONE))


def verdict_of(truth, detection):
    """Whether a detection of class A counts as right, as wrong, or not at all, beside one right detection of B."""
    image = len(truth["images"]) + 1
    truth = {**truth, "images": [*truth["images"], {"id": image, "height": 200, "width": 200}]}
    extra = {"id": 999, "image_id": image, "category_id": B, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    truth["annotations"] = [*truth["annotations"], extra]
    found = results((1, A, 0.5, detection), (image, B, 0.4, (0, 0, 9, 9)))
    pooled, (own,) = class_thresholds(truth, found, [A], 0.75, support=0)
    if own == pooled == 0.4:
        return None
    return own == 0.5


def test_right_wrong_and_left_out():
    one = document(1, [(1, A, (10, 10, 20, 20), False)])
    assert verdict_of(one, (10, 10, 20, 20)) is True
    assert verdict_of(one, (10, 10, 20, 40)) is True  # an IoU of exactly .5
    assert verdict_of(one, (10, 10, 20, 41)) is False
    assert verdict_of(document(1, [(1, B, (10, 10, 20, 20), False)]), (10, 10, 20, 20)) is False

    crowd = document(1, [(1, A, (0, 0, 100, 100), True)])
    assert verdict_of(crowd, (10, 10, 20, 20)) is None
    assert verdict_of(crowd, (90, 0, 20, 20)) is None  # half of it lies inside
    assert verdict_of(crowd, (91, 0, 20, 20)) is False
    assert verdict_of(document(1, [(1, B, (0, 0, 100, 100), True)]), (10, 10, 20, 20)) is False
    both = document(1, [(1, A, (0, 0, 100, 100), True), (1, A, (10, 10, 20, 20), False)])
    assert verdict_of(both, (10, 10, 20, 20)) is True


def test_an_object_is_found_once():
    truth = document(1, [(1, A, (10, 10, 20, 20), False)])
    found = results((1, A, 0.5, (10, 10, 20, 20)), (1, A, 0.9, (10, 10, 20, 30)))
    # the better score takes the object, though the other fits it better: 1 at .9, 1/2 at .5
    assert class_thresholds(truth, found, [A], 0.9, support=0) == (0.9, (0.9,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": 0.0}, "a precision must be above 0 and at most 1, got 0.0"),
        ({"precision": 1.1}, "a precision must be above 0 and at most 1, got 1.1"),
        ({"precision": float("nan")}, "a precision must be above 0"),
        ({"support": -1.0}, "support must be 0 or more, got -1.0"),
        ({"results": results((99, A, 0.5, (0, 0, 1, 1)))}, "have no image 99"),
        ({"truth": {"images": []}}, "annotations have no list 'categories'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(change, message):
    arguments = {"truth": ONE_CLASS[0], "results": ONE_CLASS[1], "category_ids": [A], "precision": 0.5}
    with pytest.raises(ValueError, match=message) as caught:
        class_thresholds(**{**arguments, **change})
    assert "\n" not in str(caught.value)


def test_a_description_gets_them_all():
    categories = (Category(B, "b"), Category(A, "a"))
    info = CheckpointInfo("n", "dsg_lite0_fpn", {}, categories, Resize(64, 64), 0.3)
    told = with_class_thresholds(info, *TWO_CLASSES, [B, A], 0.85)
    assert (told.score_threshold, told.class_thresholds, told.class_precision) == (0.8, (0.8, 0.5), 0.85)
    assert told.default_threshold == (0.8, 0.5) and info.default_threshold == 0.3
    assert told.threshold_in_words == "0.50 to 0.80 by class (chosen for 85% right ones)"
    hopeless = with_class_thresholds(info, *world((A, 1.0, "W")), [B, A], 0.85)
    assert hopeless.score_threshold == 1.0 and hopeless.class_thresholds == (JUST_ABOVE_ONE, JUST_ABOVE_ONE)


boxes = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 16)] * 2)
scores = st.integers(1, 16).map(lambda sixteenth: sixteenth / 16)  # float32 holds them; many are equal
places = st.tuples(st.integers(1, 2), st.sampled_from([A, B]))
truths = st.lists(st.tuples(places, boxes, st.booleans()), max_size=8).map(
    lambda drawn: document(2, [(*place, box, crowd) for place, box, crowd in drawn])
)
founds = st.lists(st.tuples(places, scores, boxes), min_size=1, max_size=14).map(
    lambda drawn: results(*((*place, score, box) for place, score, box in drawn))
)
precisions = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0])
supports = st.sampled_from([0.0, 1.0, 10.0])


def judged(truth, found):
    """(score, right) by class of what pycocotools calls right or wrong at an IoU of .5."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes([dict(one) for one in found]), "bbox")
        evaluator.params.iouThrs = np.array([0.5])
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [1000]
        evaluator.evaluate()
    by_class = {A: [], B: [], C: []}
    for image in evaluator.evalImgs:
        if image is not None:
            rows = zip(image["dtScores"], image["dtMatches"][0], image["dtIgnore"][0], strict=True)
            by_class[image["category_id"]] += [(score, match > 0) for score, match, ignored in rows if not ignored]
    return by_class


def share(rows, score, support=0.0, share_of_all=0.0):
    """Share of right ones at or above a score, one by one."""
    above = [right for one, right in rows if one >= score]
    return (sum(above) + support * share_of_all) / (len(above) + support)


def slow_threshold(rows, everything, precision, support):
    """The definition, word for word."""
    of_all = JUST_ABOVE_ONE if rows is everything else slow_threshold(everything, everything, precision, 0.0)
    if not rows:
        return of_all
    for score in sorted({score for score, _ in rows}):
        if share(rows, score, support, share(everything, score)) >= precision - 1e-9:
            return score
    above = float(np.nextafter(np.float32(max(score for score, _ in rows)), np.float32(2)))
    return above if rows is everything else max(above, of_all)


@settings(max_examples=150, deadline=None)
@given(truths, founds, precisions, supports)
def test_equal_to_a_slow_loop_over_what_pycocotools_calls_right(truth, found, precision, support):
    by_class = judged(truth, found)
    everything = [row for rows in by_class.values() for row in rows]
    pooled, chosen = class_thresholds(truth, found, [C, A, B], precision, support)
    assert pooled == slow_threshold(everything, everything, precision, 0.0)
    assert chosen == tuple(slow_threshold(by_class[one], everything, precision, support) for one in (C, A, B))


@settings(max_examples=100, deadline=None)
@given(truths, founds, precisions, supports)
def test_the_precision_holds_where_it_was_chosen(truth, found, precision, support):
    by_class = judged(truth, found)
    everything = [row for rows in by_class.values() for row in rows]
    _, chosen = class_thresholds(truth, found, [A, B], precision, support)
    for category_id, threshold in zip((A, B), chosen, strict=True):
        shown = [row for row in by_class[category_id] if row[0] >= threshold]
        if shown:
            smoothed = share(shown, threshold, support, share(everything, threshold))
            assert smoothed >= precision - 1e-9
            if not support:
                assert sum(right for _, right in shown) >= (precision - 1e-9) * len(shown)


@settings(max_examples=100, deadline=None)
@given(truths, founds, st.tuples(precisions, precisions).map(sorted), supports)
def test_a_higher_precision_never_lowers_a_threshold(truth, found, asked, support):
    (low, low_by_class), (high, high_by_class) = (
        class_thresholds(truth, found, [A, B, C], precision, support) for precision in asked
    )
    assert low <= high
    assert all(one <= other for one, other in zip(low_by_class, high_by_class, strict=True))
