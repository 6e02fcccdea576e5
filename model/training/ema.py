"""Exponential moving average of a network's weights: what is validated and shipped."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A second copy of a network whose weights trail the first one's.

    After each optimiser step ``average += (1 - d) * (weights - average)``. The decay ``d`` grows from 0.1 to
    ``decay`` as ``(1 + n) / (10 + n)`` over the updates ``n``, so that the random start is forgotten in a
    short run too. Floating-point buffers (running statistics) are averaged like parameters, integer ones are
    copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the network that is trained, not its distributed wrapper.
            decay: share of the old average that one update keeps, in (0, 1).
        """
        if not 0 < decay < 1:
            raise ValueError(f"ema.decay is {decay}; it must lie between 0 and 1")
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs: tuple[nn.Module, tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards `model`'s weights of now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, weights, counts = self._pairs_with(model)
        torch._foreach_lerp_(averages, weights, 1 - decay)  # one launch for all tensors, not one each
        for average, now in counts:
            average.copy_(now)

    def _pairs_with(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Averages and weights in the same order, and the pairs of integers.

        Listed once: hundreds of names a step would take longer than the arithmetic. Steps and `load_state_dict` change
        tensors in place, so the lists stay true.
        """
        if self._pairs is None or self._pairs[0] is not model:
            now = model.state_dict()
            own = self.module.state_dict()
            floats = [name for name, average in own.items() if average.is_floating_point()]
            counts = [(own[name], now[name]) for name in own.keys() - set(floats)]
            self._pairs = model, ([own[name] for name in floats], [now[name] for name in floats], counts)
        return self._pairs[1]

    def state_dict(self) -> dict:
        """What a resumed run needs to go on exactly: the average and how many updates made it."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Takes back what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
