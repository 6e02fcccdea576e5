"""Which pictures make up which batch."""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from dsg.model.data.dataset import SampleKey
from dsg.model.data.records import CocoData, DataError

_ORDER_STREAM = 0
"""Keeps the random numbers of the order apart from those of the samples (`dataset.SAMPLE_STREAM`)."""


class TrainBatches(Sampler[list[SampleKey]]):
    """The endless row of training batches. Batch k is a function of the seed and k: a run can go on anywhere.

    In each epoch every picture comes up once, in an order of its own. With groups, a batch holds pictures of
    one group as far as possible; what is left over at the end is mixed. A last batch that is not full is
    dropped, or filled with pictures of the same epoch, varied anew; the latter also where there are fewer
    pictures than a batch holds.

    With weights, an epoch is of the same length, and a picture comes up in it as often as its weight says on average:
    the whole part of that surely, the fraction by lot, each time varied anew.

    The batch is that of all ranks together: rank r takes every world_size-th key of it from the r-th on. So a
    run that goes on with another number of ranks sees the same pictures, varied the same way, in each step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        groups: np.ndarray | None = None,  # bool [length]
        weights: np.ndarray | None = None,  # float64 [length], above 0
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        """Arguments are those of `build_train_loader`; `groups` says which of two groups a picture is of."""
        if length < 1:
            raise DataError("no picture to train on; give a COCO file with images")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch of {batch_size} images for {world_size} processes; make it a multiple of {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must lie in 0 to {world_size - 1}")
        self.batch_size = batch_size
        self.start = start
        self._length = length
        self._seed = seed
        self._groups = groups
        self._weights = weights
        self._rank = rank
        self._world_size = world_size
        full, rest = divmod(length, batch_size)
        self.batches_per_epoch = full + (1 if rest and not (drop_last and full) else 0)
        self._plan: tuple[int, list[list[SampleKey]]] | None = None

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for iteration in itertools.count(self.start):
            yield self.batch(iteration)[self._rank :: self._world_size]

    def batch(self, iteration: int) -> list[SampleKey]:
        """The keys of all ranks' samples of one iteration, counted from 0."""
        epoch, place = divmod(iteration, self.batches_per_epoch)
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, self._plan_epoch(epoch)
        return self._plan[1][place]

    def _plan_epoch(self, epoch: int) -> list[list[SampleKey]]:
        rng = np.random.default_rng([self._seed, _ORDER_STREAM, epoch])
        size = self.batch_size
        order = self._draw(rng)
        parts = [order] if self._groups is None else [order[self._groups[order]], order[~self._groups[order]]]
        whole = [len(part) - len(part) % size for part in parts]
        queue = np.concatenate(
            [part[:stop] for part, stop in zip(parts, whole, strict=True)]
            + [part[stop:] for part, stop in zip(parts, whole, strict=True)]
        )
        laps: Counter[int] = Counter()
        keys = []
        for index in queue.tolist():
            keys.append(SampleKey(index, epoch, laps[index]))
            laps[index] += 1
        wanted = self.batches_per_epoch * size
        for extra in range(wanted - len(keys)):
            index = int(order[extra % self._length])
            keys.append(SampleKey(index, epoch, laps[index]))
            laps[index] += 1
        return [keys[place * size : (place + 1) * size] for place in rng.permutation(self.batches_per_epoch)]

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """An epoch's pictures in their order, int64 [length]."""
        order = rng.permutation(self._length)
        if self._weights is None:
            return order
        # A comb of even teeth over the pictures' shares, laid side by side in random order: each picture is met by the
        # whole part of its share's teeth, and by one more with the probability of the fraction.
        ends = np.cumsum(self._weights[order])
        teeth = (rng.random() + np.arange(self._length)) * (ends[-1] / self._length)
        drawn = order[np.searchsorted(ends, teeth, side="right").clip(max=self._length - 1)]
        return drawn[rng.permutation(self._length)]


def repeat_weights(data: CocoData, share: float) -> np.ndarray:
    """How often each picture should come up, relative to the others: float64 [pictures], 1 or more.

    Repeat-factor sampling (Gupta et al., LVIS, 2019, section 4.1): a class that a share f of the pictures shows asks
    for sqrt(share / f) where that is above 1, and a picture is given the most that one of its classes asks for.
    """
    shown = [{one.category_id for one in record.annotations if not one.iscrowd} for record in data.records]
    pictures = Counter(itertools.chain.from_iterable(shown))
    asked = {name: max(1.0, (share * len(shown) / count) ** 0.5) for name, count in pictures.items()}
    return np.array([max((asked[name] for name in names), default=1.0) for names in shown])
