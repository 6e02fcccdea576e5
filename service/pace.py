"""What is measured while batches run: how quick the devices are, and how much fits on one."""

import statistics
from collections import OrderedDict, deque

_MEMORY = 0.8  # weight of the past in the running means
_PATIENCE = 16  # batches that must pass before a limit that was lowered is raised again ...
_LONGEST_PATIENCE = 1024  # ... and the most that it becomes where raising it fails again and again
_GROWTH = 1.25
_RECENT = 5  # batches of a size that are remembered
_MOST_SIZES = 256
_FIRST_TRAVEL_S = 0.005
_MARGIN_S = 0.001


class Pace:
    """Running means of what a device takes for a picture and for a pixel.

    Written by the device threads, read by the event loop; each value is one float, so that no lock is needed.
    """

    def __init__(self) -> None:
        self._seconds_per_picture = 0.0
        self._seconds_per_pixel = 0.0

    def ran(self, pictures: int, pixels: int, seconds: float) -> None:
        """A device took `seconds` for a batch of so many pictures and padded pixels."""
        self._seconds_per_picture = _mean(self._seconds_per_picture, seconds / pictures)
        self._seconds_per_pixel = _mean(self._seconds_per_pixel, seconds / pixels)

    def seconds_for_pictures(self, count: float) -> float:
        """What one device takes for so many pictures; 0 before the first batch."""
        return count * self._seconds_per_picture

    def seconds_for_pixels(self, count: float) -> float:
        """What one device takes for so many padded pixels; 0 before the first batch."""
        return count * self._seconds_per_pixel


class Foresight:
    """When a device will be done with what it runs, and how long before that the next batch has to be sent.

    For one device, of one thread.
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[int, deque[float]] = OrderedDict()
        self._travel_s = _FIRST_TRAVEL_S

    def ran(self, pixels: int, seconds: float, travel_s: float) -> None:
        """A batch of so many padded pixels occupied the device for `seconds`, which had it `travel_s` after it was
        sent."""
        self._recent.setdefault(pixels, deque(maxlen=_RECENT)).append(seconds)
        self._recent.move_to_end(pixels)
        if len(self._recent) > _MOST_SIZES:
            self._recent.popitem(last=False)
        self._travel_s = _mean(self._travel_s, travel_s)

    def seconds(self, pixels: int) -> float | None:
        """What a batch of so many padded pixels occupies the device for; None before the first one.

        Of the last few the middle one: the first batch of a shape takes many times as long as those after it.
        """
        return statistics.median(self._recent[pixels]) if pixels in self._recent else None

    @property
    def travel_s(self) -> float:
        """From the sending of a batch to when the device has it, with a margin."""
        return self._travel_s + _MARGIN_S


def _mean(past: float, now: float) -> float:
    return _MEMORY * (past or now) + (1 - _MEMORY) * now


class BatchLimit:
    """How large a batch of one device may be.

    A batch that ran out of memory halves the limit; batches that pass raise it again step by step, at first soon, and
    later where it fails again.

    Args:
        pictures: most pictures in a batch.
        pixels: most padded pixels in a batch of several pictures.
        few_sizes: batches of 1, 2, 4, 8, ... pictures, and the most, alone. A GPU's libraries plan anew for each number
            of pictures of a shape, which was seen to take a quarter of a second.
    """

    def __init__(self, pictures: int, pixels: int, few_sizes: bool = False) -> None:
        self.pictures = pictures
        self.pixels = pixels
        self._few_sizes = few_sizes
        self._most_pixels = pixels
        self._patience = _PATIENCE
        self._passed = 0

    def most(self, pixels: int) -> int:
        """Most pictures of so many padded pixels each in a batch, at least one."""
        return max(1, min(self.pictures, self.pixels // pixels))

    def size(self, count: int) -> int:
        """How many of so many pictures, at least one, go at once."""
        if count >= self.pictures:
            return self.pictures
        return 1 << (count.bit_length() - 1) if self._few_sizes else count

    def out_of_memory(self, pixels: int) -> None:
        """A batch of several pictures and so many padded pixels did not fit."""
        self.pixels = max(1, min(self.pixels, pixels // 2))
        self._patience = min(self._patience * 2, _LONGEST_PATIENCE)
        self._passed = 0

    def passed(self) -> None:
        """A batch ran."""
        if self.pixels == self._most_pixels:
            return
        self._passed += 1
        if self._passed < self._patience:
            return
        self._passed = 0
        self.pixels = min(self._most_pixels, int(self.pixels * _GROWTH) + 1)
        if self.pixels == self._most_pixels:
            self._patience = _PATIENCE
