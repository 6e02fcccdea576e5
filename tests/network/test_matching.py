import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsg.model.network.matching import NEGATIVE, POSITIVE, UNUSED, BalancedSampler, match

TRUTH = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
BOTH = torch.tensor([True, True])
NO_CROWD = torch.zeros(0, 4)


def roles(boxes, *, truth=TRUTH, valid=BOTH, ignore=NO_CROWD, best=True):
    index, role = match(torch.tensor(boxes), truth, valid, ignore, 0.7, 0.3, 0.5, best_for_each_truth=best)
    return index.tolist(), role.tolist()


def test_thresholds_by_hand():
    # IoU with the first truth: 1, 0.5, 0.1; the last touches nothing
    index, role = roles([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 1], [200, 200, 210, 210]], best=False)
    assert role == [POSITIVE, UNUSED, NEGATIVE, NEGATIVE]
    assert index[:3] == [0, 0, 0]


def test_best_box_of_each_truth_is_positive_however_small_the_overlap():
    _, role = roles([[0.0, 0, 10, 10], [50, 50, 60, 52], [50, 50, 60, 51]])
    assert role == [POSITIVE, POSITIVE, NEGATIVE]


def test_a_truth_that_nothing_overlaps_makes_no_positive():
    _, role = roles([[0.0, 0, 10, 10], [200, 200, 210, 210]])
    assert role == [POSITIVE, NEGATIVE]


def test_padded_truth_matches_nothing():
    _, role = roles([[50.0, 50, 60, 60]], valid=torch.tensor([True, False]))
    assert role == [NEGATIVE]


def test_no_truth_makes_all_negative():
    index, role = roles([[0.0, 0, 5, 5]], truth=torch.zeros(0, 4), valid=torch.zeros(0, dtype=torch.bool))
    assert (index, role) == ([0], [NEGATIVE])


def test_crowd_regions_are_neither_positive_nor_negative():
    crowd = torch.tensor([[100.0, 100, 200, 200], [0, 0, 12, 12]])
    inside, half_out, positive = [110.0, 110, 120, 120], [95.0, 110, 104, 120], [0.0, 0, 10, 10]
    _, role = roles([inside, half_out, positive], ignore=crowd)
    assert role == [
        UNUSED,
        NEGATIVE,
        POSITIVE,
    ]  # 4/9 of the second lies inside; the third belongs to an instance


@given(st.lists(st.sampled_from([POSITIVE, NEGATIVE, UNUSED]), min_size=1, max_size=60), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_sample_counts(role, seed):
    torch.manual_seed(seed)
    role = torch.tensor(role)
    index, valid = BalancedSampler(16, 0.25)(role)
    assert index.shape == valid.shape == (16,)
    chosen = index[valid]
    assert len(set(chosen.tolist())) == len(chosen)
    positives, negatives = int((role == POSITIVE).sum()), int((role == NEGATIVE).sum())
    expected_positives = min(positives, 4)
    assert int((role[chosen] == POSITIVE).sum()) == expected_positives
    assert len(chosen) == expected_positives + min(negatives, 16 - expected_positives)
    assert (role[chosen] != UNUSED).all()
    assert (role[chosen].diff() <= 0).all()  # positives come first


def test_the_sample_is_random():
    torch.manual_seed(0)
    role = torch.zeros(400, dtype=torch.int64)
    seen = torch.zeros(400)
    for _ in range(200):
        index, valid = BalancedSampler(40, 0.5)(role)
        seen[index[valid]] += 1
    assert seen.mean() == pytest.approx(20) and seen.max() < 45 and seen.min() > 3
