"""Put together what several processes measured."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Gathered(Metric):
    """Rows of numbers from all processes, in the order of their numbers, whoever added them.

    Sums that are taken of them afterwards are then the same to the bit, whatever the number of
    processes.

    Args:
        dtype: of the numbers.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self._kind = dtype

    def update(self, numbers: Tensor, rows: Tensor) -> None:
        """Add rows (n, width) with their numbers (n,), each of which is there once."""
        keyed = torch.cat([numbers[:, None].to(self._kind), rows.to(self._kind)], dim=1)
        self.rows.append(keyed)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns the numbers (N,), ascending, and the rows (N, width) of all processes."""
        rows = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows)
        rows = rows[rows[:, 0].argsort()]
        return rows[:, 0].long(), rows[:, 1:]
