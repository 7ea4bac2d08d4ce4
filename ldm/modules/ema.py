"""Exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """A running average of the trainable parameters of another module.

    The average of parameter ``a.b.weight`` is the buffer ``abweight`` (state-dict name: all dots
    deleted, as upstream does), beside ``decay`` (float32) and ``num_updates`` (int32).

    Args:
        model: the module to average; the average starts as a copy of its weights.
        decay: upper limit of the decay, between 0 and 1.
        use_num_upates: follow ``min(decay, (1 + n) / (10 + n))`` after n updates, so that the
            first steps are forgotten soon; otherwise the decay is constant. (Upstream's spelling.)

    Raises:
        ValueError: the decay is outside 0 .. 1.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True):
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay {decay} must be between 0 and 1")
        self.names = {
            name: name.replace(".", "")
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer(
            "num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int32)
        )
        parameters = dict(model.named_parameters())
        for name, buffer_name in self.names.items():
            self.register_buffer(buffer_name, parameters[name].detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the average towards the module's present weights by one step."""
        # on the weights' own device throughout: a Python number here would wait for the GPU
        warm_up = (2 + self.num_updates) / (11 + self.num_updates)
        is_counting = self.num_updates >= 0
        step = 1 - torch.where(is_counting, torch.minimum(self.decay, warm_up), self.decay)
        self.num_updates += is_counting
        for average, parameter in self._pairs(model):
            average.lerp_(parameter.detach().to(average.dtype), step.to(average.dtype))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the module's weights by their averages."""
        for average, parameter in self._pairs(model):
            parameter.copy_(average)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Let the module have the averaged weights for as long as the context lasts."""
        live = [parameter.detach().clone() for _, parameter in self._pairs(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for weights, (_, parameter) in zip(live, self._pairs(model), strict=True):
                    parameter.copy_(weights)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, nn.Parameter]]:
        parameters = dict(model.named_parameters())
        for name, buffer_name in self.names.items():
            yield getattr(self, buffer_name), parameters[name]
