"""What gradio's own client can ask the page for, by name. Who asks waits; nothing else does."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ldm.errors import InputError
from ldm.text import check_kind
from ldm.web.desk import Desk
from ldm.web.form import Base
from ldm.web.live import Live
from ldm.web.task import Draw


class Endpoints:
    """``/draw``, ``/jobs``, ``/stop``, ``/skip``, ``/models`` and ``/presets``.

    Args:
        desk: takes the jobs.
        base: what the program was started with.
        live: knows what is said of jobs.
    """

    def __init__(self, desk: Desk, base: Base, live: Live) -> None:
        self.desk = desk
        self.base = base
        self.live = live

    def add(self) -> None:
        """Add them to the page that is being laid out."""
        gr.api(self.draw, api_name="draw", concurrency_limit=None)
        for endpoint in (self.jobs, self.stop, self.skip, self.models, self.presets):
            gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=None)

    async def draw(
        self,
        prompt: str,
        settings: dict[str, Any] | None = None,
        tome: dict[str, Any] | None = None,
        preset: str = "",
        model: str = "",
    ) -> dict[str, Any]:
        """Draw pictures, and wait for them.

        Args:
            prompt: what to draw.
            settings: steps, seed and whatever else is a flag, by its name.
            tome: keys of Token Merging.
            preset: of Token Merging.
            model: its name; empty: the one that is loaded.

        Returns:
            The pictures' addresses below ``/live/picture/``, their settings, and what was said.
        """
        try:
            own = check_kind(settings or {}, dict, "settings")
            changes = {"seed": -1, **own, "prompt": prompt}
            if preset:
                changes["tome.preset"] = preset
            wishes = self.base.wishes.changed({**changes, **({"tome": tome} if tome else {})})
            name = model or self.desk.runner.loaded or next(iter(self.desk.runner.models))
            job = self.desk.order(name, [Draw(wishes.settings(), wishes.tome)])
        except InputError as error:
            raise gr.Error(str(error)) from None
        await self.desk.queue.end_of(job)
        if job.error is not None:
            raise gr.Error(str(job.error))
        return {
            "pictures": [one.name for one in job.report.pictures],
            "settings": job.report.infos,
            "messages": [line.text for line in job.report.lines],
        }

    def jobs(self) -> list[dict[str, Any]]:
        """What is drawn, waits, and is over."""
        return self.live.state()["jobs"]

    def stop(self, number: int = 0) -> bool:
        """Stop a job, by default the one under way."""
        self.desk.queue.stop(number or None)
        return True

    def skip(self) -> bool:
        """End the picture under way."""
        self.desk.queue.skip()
        return True

    def models(self) -> list[str]:
        """Names of the checkpoints."""
        return list(self.desk.runner.models)

    def presets(self) -> list[str]:
        """Names of the presets."""
        return list(self.base.presets)
