"""CUDA graphs at test time.

A GPU runs the kernels of a few pictures in less time than Python takes to launch them. From the second batch of a shape
on they are launched all at once: everything between the pixels and the padded detections has static shapes and asks the
host nothing. The graphs hold no compiled code, so a restart makes them again in a fraction of a second.

B images, H and W height and width of the padded batch.
"""

import logging
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsg.model.network.detector import Detector
from dsg.model.network.types import PaddedDetections

_logger = logging.getLogger("dsg.model")

# Graphs of one network share their memory, about 800 bytes for each pixel of the largest batch, which is an eighth of
# the GPU's at most: eleven pictures of 800x1344 on a card of 80 GB. Larger batches keep a GPU busy for longer than
# their launches take.
_BYTES_OF_PIXEL = 800
_SHARE_OF_MEMORY = 8
# Shapes whose graphs are kept, and shapes that are remembered as having run once. Graphs share the memory of what is
# between their inputs and outputs.
_MOST_GRAPHS = 128
_MOST_RAN = 1024


@dataclass(frozen=True)
class _Recorded:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Tensor
    sizes: Tensor
    found: PaddedDetections


class Replay:
    """Runs a detector on a GPU: small batches of a known shape as a graph, all others as they come.

    What it has recorded counts only while the network's weights lie where they lay; a network that was moved, cast or
    given another number of proposals starts afresh.
    """

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, _Recorded | None] = OrderedDict()  # None: does not work as a graph
        self._ran: OrderedDict[Hashable, None] = OrderedDict()
        self._of: Hashable = None
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def infer(self, model: Detector, batch: Tensor, sizes: Tensor) -> PaddedDetections | None:
        """What `model.infer` gives, or None where there is no graph of this shape to replay.

        The tensors are overwritten by the next call.

        Args:
            model: in eval mode, no gradients wanted.
            batch: Tensor[B, 3, H, W]; sizes: int64 [B, 2]; as `Detector.infer` takes them.
        """
        if not batch.is_cuda or batch.shape[0] * batch.shape[2] * batch.shape[3] > _most_pixels(batch.device):
            return None
        state = _state_of(model)
        if state != self._of:
            self._recorded.clear()
            self._ran.clear()
            self._of, self._pool, self._stream = state, None, None  # it may be on another GPU now
        key = _key_of(batch)
        if key not in self._recorded:
            if key not in self._ran:
                return None
            del self._ran[key]
            self._recorded[key] = self._record(model, batch, sizes)
            if len(self._recorded) > _MOST_GRAPHS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        recorded = self._recorded[key]
        if recorded is None:
            return None
        recorded.batch.copy_(batch)
        recorded.sizes.copy_(sizes)
        recorded.graph.replay()
        return recorded.found

    def ran(self, batch: Tensor) -> None:
        """Say that a batch has run as it came, [B, 3, H, W]: its shape is recorded the next time.

        Not when it began: what a graph is recorded from must have run before, so that its kernels are chosen.
        """
        self._ran[_key_of(batch)] = None
        if len(self._ran) > _MOST_RAN:
            self._ran.popitem(last=False)

    def _record(self, model: Detector, batch: Tensor, sizes: Tensor) -> _Recorded | None:
        """The graph of one shape that has been run before, so that its kernels are chosen; None where it cannot be."""
        own_batch, own_sizes = batch.clone(), sizes.clone()
        self._stream = self._stream or torch.cuda.Stream(batch.device)
        torch.cuda.synchronize(batch.device)
        graph = torch.cuda.CUDAGraph()
        # Not by `torch.cuda.graph`, which gives all cached memory back first, and the next batch would ask for it anew.
        with torch.cuda.stream(self._stream):
            # Other threads may go on using the GPU meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                found = model.infer(own_batch, own_sizes)
            except BaseException as error:
                with suppress(RuntimeError):
                    graph.capture_end()
                if isinstance(error, torch.cuda.OutOfMemoryError) or not isinstance(error, RuntimeError):
                    raise
                reason = str(error).partition("\n")[0]
                _logger.warning("batches of %s go without a CUDA graph: %s", list(batch.shape), reason)
                return None
            graph.capture_end()
        self._pool = self._pool or graph.pool()
        return _Recorded(graph, own_batch, own_sizes, found)


def _key_of(batch: Tensor) -> Hashable:
    return tuple(batch.shape), batch.dtype, batch.stride()


@cache
def _most_pixels(device: torch.device) -> int:
    """Of a batch that becomes a graph."""
    return int(torch.cuda.get_device_properties(device).total_memory) // (_SHARE_OF_MEMORY * _BYTES_OF_PIXEL)


def _state_of(model: Detector) -> Hashable:
    """What changes when a network's graphs no longer hold."""
    ends = next(model.parameters()), model.rpn_head.conv.weight  # of all: this is asked before each batch
    return tuple((one.data_ptr(), one.dtype, one.device) for one in ends), model.selector.proposals, model.training
