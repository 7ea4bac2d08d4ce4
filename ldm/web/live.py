"""What the page asks for while jobs run: their state, previews, finished pictures; stop and skip.

The browser asks once and is answered when something has changed, so that jobs which wait cost
nothing and a lost connection loses nothing: whoever asks again is told everything.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ldm.errors import InputError
from ldm.images import read_settings
from ldm.web.pictures import Pictures
from ldm.web.queue import Job, Queue, State
from ldm.web.report import Report, duration
from ldm.web.task import Task

N_SHOWN = 48  # pictures in the gallery
N_OVER = 5  # jobs that are over, in the answer
PATIENCE = 25.0  # seconds until an answer comes even though nothing has changed
Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


class Live:
    """Routes below ``/live``.

    Args:
        queue: of jobs.
        pictures: finished ones.
    """

    def __init__(self, queue: Queue[Task, Report], pictures: Pictures) -> None:
        self.queue = queue
        self.pictures = pictures

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("/live/state", self._state),
            Route("/live/preview/{number:int}", self._preview),
            Route("/live/about/{name:path}", answered(self._about)),
            Route("/live/picture/{name:path}", answered(self._picture)),
            Route("/live/picture/{name:path}", answered(self._delete), methods=["DELETE"]),
            Route("/live/stop", self._stop, methods=["POST"]),
            Route("/live/stop/{number:int}", self._stop, methods=["POST"]),
            Route("/live/skip", self._skip, methods=["POST"]),
        ]

    async def _state(self, request: Request) -> Response:
        since = request.query_params.get("since", "")
        if since.isdecimal() and len(since) < 16:
            await self.queue.changed(int(since), PATIENCE)
        return JSONResponse(self.state(), headers={"cache-control": "no-store"})

    def state(self) -> dict[str, Any]:
        """Everything that the page shows of jobs and pictures."""
        version = self.queue.version  # first: what changes meanwhile is told by the next answer
        jobs = self.queue.jobs()
        waiting = [job for job in jobs if job.state is State.WAITING]
        over = [job for job in jobs if job.is_over][-N_OVER:]
        shown = [*over, *(job for job in jobs if job.state is State.RUNNING), *waiting]
        places = {job.number: place for place, job in enumerate(waiting, 1)}
        return {
            "version": version,
            "jobs": [_described(job, places.get(job.number, 0)) for job in shown],
            "pictures": self.pictures.names(N_SHOWN),
        }

    async def _preview(self, request: Request) -> Response:
        number = request.path_params["number"]
        for job in self.queue.jobs():
            if job.number == number and job.report.preview is not None:
                return Response(job.report.preview, media_type="image/webp")
        return Response(status_code=404)

    def _picture(self, name: str) -> Response:
        return FileResponse(self.pictures.path(name), media_type="image/png")

    def _about(self, name: str) -> Response:
        return JSONResponse(read_settings(self.pictures.path(name)))

    def _delete(self, name: str) -> Response:
        self.pictures.delete(name)
        self.queue.tell()
        return JSONResponse({})

    async def _stop(self, request: Request) -> Response:
        self.queue.stop(request.path_params.get("number"))
        return JSONResponse({})

    async def _skip(self, request: Request) -> Response:
        self.queue.skip()
        return JSONResponse({})


def answered(answer: Callable[[str], Response]) -> Callable[[Request], Response]:
    """A route about a named picture, in a thread; bad input is an answer, too."""

    def handle(request: Request) -> Response:
        try:
            return answer(request.path_params["name"])
        except InputError as error:
            return JSONResponse({"error": str(error)}, status_code=404)

    return handle


def _described(job: Job[Task, Report], place: int) -> dict[str, Any]:
    report = job.report
    words = [report.text] if report.text else []
    left = report.seconds_left
    if left is not None:
        words.append(f"about {duration(left)} left")
    text = ", ".join(words)
    if job.state is State.RUNNING and job.stop.is_set():
        text = f"stopping after this step ({report.text})"
    elif job.state is State.RUNNING and job.skip.is_set():
        n = report.n_at_once
        what = "this picture" if n == 1 else f"these {n} pictures, which are drawn together,"
        text = f"skipping {what} after this step ({report.text})"
    lines = [{"text": line.text, "kind": line.kind} for line in report.lines]
    if job.error is not None:
        lines.append({"text": f"error: {job.error}", "kind": "error"})
    if job.state is State.STOPPED:
        lines.append({"text": "Stopped", "kind": ""})
    return {
        "number": job.number,
        "title": report.title,
        "state": job.state.value,
        "place": place,
        "text": text,
        "share": round(report.share, 4),
        "lines": lines,
        "pictures": [{"name": one.name, "label": one.label} for one in report.pictures],
        "preview": report.n_previews if report.preview is not None else 0,
        "n_pictures": report.n_pictures,
        "seed": str(report.seed),  # beyond 2**53 a number of JavaScript is another
        "is_pair": report.is_pair,
    }
