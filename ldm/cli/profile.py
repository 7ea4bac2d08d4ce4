"""A record of one step, made by torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfile:
    """Records the second step of a run, or the first one's, if there is no other.

    The first step also does what is done once, so that the second shows what steps cost.
    """

    def __init__(self) -> None:
        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(ProfilerActivity.CUDA)
        self._kinds = kinds
        self._running: Any = None
        self._record: Any = None

    def __enter__(self) -> StepProfile:
        """Begin to record."""
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        """End, if no step has ended it."""
        self._stop()

    def on_step(self, i: int, n_steps: int, predicted: torch.Tensor) -> None:
        """Called after each step: begin again after the first, end after the second."""
        if self._running is None:
            return
        is_first = self._record is None and i == 0
        self._stop()
        if is_first and n_steps > 1:
            self._start()

    def write(self, path: Path) -> None:
        """Write what was recorded as a Chrome trace (JSON)."""
        self._record.export_chrome_trace(str(path))

    def _start(self) -> None:
        self._running = profile(activities=self._kinds, record_shapes=True)
        self._running.__enter__()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._record, self._running = self._running, None
