"""Loaders: which pictures make up which batch, and the processes that prepare them."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dsg.model.data.dataset import CocoDataset, SampleKey, collate
from dsg.model.data.records import CocoData, DataError
from dsg.model.data.sample import Sample

__all__ = [
    "Batch",
    "EvalLoader",
    "TrainBatches",
    "TrainLoader",
    "build_eval_loader",
    "build_train_loader",
    "collate",
]

Batch = tuple[list[Tensor], list[dict[str, Any]]]

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


class _Guarded(Dataset[Sample | DataError]):
    """Hands an error on as a value: raised in a worker, its message would grow that process's traceback."""

    def __init__(self, dataset: CocoDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: int | SampleKey) -> Sample | DataError:
        try:
            return self._dataset[key]
        except DataError as error:
            return error


class PackedBatch:
    """A batch with all tensors of a dtype in one storage.

    Each storage that a worker hands over costs an open file while the batch lives, and each that goes to a GPU a copy
    and a lock: one for every tensor would run into the usual limit of 1024 files with a few workers, and keep the
    training process busy with thousands of small things.
    """

    def __init__(self, batch: Batch) -> None:
        images, targets = batch
        self._count = len(images)
        tensors = images + [value for target in targets for value in target.values() if isinstance(value, Tensor)]
        # None stands for a tensor, so that the keys keep their order.
        self._targets = [{k: None if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets]
        self._places = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self._flat = {
            dtype: torch.cat([tensor.reshape(-1) for tensor in tensors if tensor.dtype == dtype])
            for dtype in {tensor.dtype for tensor in tensors}
        }

    def pin_memory(self) -> "PackedBatch":
        """The same in page-locked memory; what a DataLoader calls."""
        self._flat = {dtype: flat.pin_memory() for dtype, flat in self._flat.items()}
        return self

    def to(self, device: torch.device) -> "PackedBatch":
        """The same on a device; from page-locked memory without waiting for it."""
        self._flat = {dtype: flat.to(device, non_blocking=True) for dtype, flat in self._flat.items()}
        return self

    def unpack(self) -> Batch:
        """Images and targets, each tensor a view of its storage."""
        used: Counter[torch.dtype] = Counter()
        tensors = []
        for dtype, shape in self._places:
            start, used[dtype] = used[dtype], used[dtype] + shape.numel()
            tensors.append(self._flat[dtype][start : used[dtype]].view(shape))
        rest = iter(tensors[self._count :])
        targets = [{k: next(rest) if v is None else v for k, v in target.items()} for target in self._targets]
        return tensors[: self._count], targets


def _collate_guarded(samples: list[Sample | DataError]) -> PackedBatch | DataError:
    sound = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        sound.append(sample)
    return PackedBatch(collate(sound))


class _Loader:
    """A DataLoader whose data errors are one line, whatever process they came up in."""

    def __init__(self, dataset: CocoDataset, workers: int, **batching: Any) -> None:
        if workers < 0:
            raise ValueError(f"workers is {workers}; it must be 0 or more")
        self._loader = DataLoader(
            _Guarded(dataset),
            num_workers=workers,
            collate_fn=_collate_guarded,
            pin_memory=torch.cuda.is_available(),
            # Its own, so that making a loader takes nothing from the global random numbers.
            generator=torch.Generator(),
            **batching,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self.on(torch.device("cpu"))

    def on(self, device: torch.device) -> Iterator[Batch]:
        """Batches on a device."""
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch.to(device).unpack()


class TrainLoader(_Loader):
    """Endless training batches, this rank's part; each `iter` begins at `batches.start`."""

    def __init__(self, dataset: CocoDataset, batches: TrainBatches, workers: int) -> None:
        super().__init__(dataset, workers, batch_sampler=batches)
        self.batches = batches

    @property
    def batches_per_epoch(self) -> int:
        """Iterations of one epoch."""
        return self.batches.batches_per_epoch


class EvalLoader(_Loader):
    """Each picture of this rank's part once, in the order of the data."""

    def __init__(self, dataset: CocoDataset, indices: Sequence[int], batch_size: int, workers: int) -> None:
        super().__init__(dataset, workers, sampler=indices, batch_size=batch_size)

    def __len__(self) -> int:
        return len(self._loader)


def build_train_loader(
    dataset: CocoDataset,
    batch_size: int,
    *,
    seed: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
    start: int = 0,
    repeat_below: float = 0.0,
) -> TrainLoader:
    """An endless loader, grouped by aspect ratio unless the transform gives all samples one shape.

    Args:
        dataset: with a transform; its own seed decides how samples are varied.
        batch_size: images of an iteration over all ranks, a multiple of `world_size`; a rank gets its part.
        seed: decides the order, 0 or more.
        workers: processes of this rank that prepare samples; 0: this process does. Results are the same.
        rank: number of this process, 0 to world_size - 1.
        world_size: number of processes that train together.
        drop_last: leave out an epoch's last images that fill no batch; False: fill up with others of it.
        start: iteration to begin with: the number of batches already used, for a run that goes on.
        repeat_below: share of the pictures, 0 to 1: pictures with a class that fewer show come up more often, see
            `repeat_weights`; 0: all equally often.

    Raises:
        ValueError: a batch that the ranks cannot share evenly, a rank or number of workers out of range.
        DataError: no picture; or, while iterating, a picture that cannot be used.
    """
    one_shape = dataset.transform is not None and dataset.transform.config.same_shape
    batches = TrainBatches(
        len(dataset),
        batch_size,
        seed=seed,
        groups=None if one_shape else dataset.wide(),
        weights=repeat_weights(dataset.data, repeat_below) if repeat_below else None,
        start=start,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
    )
    return TrainLoader(dataset, batches, workers)


def repeat_weights(data: CocoData, share: float) -> np.ndarray:
    """How often each picture should come up, relative to the others: float64 [pictures], 1 or more.

    Repeat-factor sampling (Gupta et al., LVIS, 2019, section 4.1): a class that a share f of the pictures shows asks
    for sqrt(share / f) where that is above 1, and a picture is given the most that one of its classes asks for.
    """
    shown = [{one.category_id for one in record.annotations if not one.iscrowd} for record in data.records]
    pictures = Counter(itertools.chain.from_iterable(shown))
    asked = {name: max(1.0, (share * len(shown) / count) ** 0.5) for name, count in pictures.items()}
    return np.array([max((asked[name] for name in names), default=1.0) for names in shown])


def build_eval_loader(
    dataset: CocoDataset, *, batch_size: int = 1, workers: int = 0, rank: int = 0, world_size: int = 1
) -> EvalLoader:
    """Each picture once over all ranks; rank r takes every world_size-th from the r-th on.

    Args:
        dataset: without a transform, so that pictures keep their size; `Predictor` resizes them.
        batch_size: pictures in one list; the last list may be shorter.
        workers: processes that decode; 0: this process does.
        rank, world_size: as for `build_train_loader`.

    Raises:
        ValueError: a number out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must lie in 0 to {world_size - 1}")
    return EvalLoader(dataset, range(rank, len(dataset), world_size), batch_size, workers)
