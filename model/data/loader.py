"""Loaders: the processes that prepare batches, and what comes out of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dsg.model.data.batches import TrainBatches, repeat_weights
from dsg.model.data.dataset import CocoDataset, SampleKey, collate
from dsg.model.data.packed import Batch, PackedBatch
from dsg.model.data.records import DataError
from dsg.model.data.sample import Sample


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
