"""DeepCache: deep features of a U-Net kept for a few calls, as they change slowly between steps."""

from __future__ import annotations

import torch
from torch import Tensor

N_SHALLOW = 2  # blocks at either end that are computed in every call


class DeepReuse:
    """What a sampling run keeps of a U-Net's deep features.

    A plain object, outside the module tree, so that no state dict sees it. Outside of a run, and
    with ``every`` 1, each call computes everything.

    Attributes:
        every: all of the network is computed in the first of so many calls; in the others only its
            first and last blocks, on the deep features of that call.

    Source: Ma et al. 2023 (arXiv 2312.00858), with a uniform interval; their skip branch is the one
    after the first block with attention.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._call: int | None = None
        self._kept: tuple[torch.Size, Tensor] | None = None

    def begin_run(self) -> None:
        """Forget everything, and count calls from now on."""
        self._call, self._kept = 0, None

    def end_run(self) -> None:
        """Forget everything, and keep nothing until the next run."""
        self._call, self._kept = None, None

    def begin_call(self, x: Tensor) -> Tensor | None:
        """The features to go on from, or None where all of the network is to be computed.

        Args:
            x: the network's input, (B, C, h, w); of another shape than before, it starts anew.
        """
        if self._call is None or self.every == 1:
            return None
        if self._kept is None or self._kept[0] != x.shape:
            self._call = 0
        is_whole = self._call % self.every == 0
        self._call += 1
        return None if is_whole or self._kept is None else self._kept[1]

    def keep(self, x: Tensor, deep: Tensor) -> None:
        """Note the features (B, C', h, w) of a whole call with the input x."""
        if self._call is not None and self.every > 1:
            self._kept = x.shape, deep
