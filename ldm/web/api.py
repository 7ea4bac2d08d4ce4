"""A small HTTP API in the shape that A1111's clients speak, below ``/sdapi/v1``.

Jobs wait in the same line as the page's. Pictures are saved like the page's, too.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ldm.addons import embedding_words, find_addons
from ldm.checkpoint.files import stem_of
from ldm.errors import InputError, OutOfMemory, is_out_of_memory
from ldm.images import loses_sides, picture_texts
from ldm.infotext import understood
from ldm.text import check_kind
from ldm.web.bodies import Options, Order, in_their_words, read_body, switch
from ldm.web.desk import Desk
from ldm.web.form import Base
from ldm.web.pictures import Pictures
from ldm.web.queue import Broken
from ldm.web.task import Draw, DrawJob
from ldm.web.uploads import file_of, mask_of, picture_of
from ldm.web_ui import WEB_UI_SAMPLERS, WEB_UI_SCHEDULES, WEB_UI_UPSCALERS, web_ui_text

MOST = 128 * 2**20  # bytes of a request
HERE = "/sdapi/v1"


class Api:
    """The routes.

    Args:
        desk: takes the jobs.
        base: what the program was started with.
        pictures: finished ones.
    """

    def __init__(self, desk: Desk, base: Base, pictures: Pictures) -> None:
        self.desk = desk
        self.base = base
        self.pictures = pictures
        self.options = Options()
        self._turn = asyncio.Lock()  # orders are accepted as they come, one after the other

    def routes(self) -> list[Route]:
        """All of them."""
        gets: dict[str, Callable[[], Any]] = {
            "options": self._options,
            "sd-models": self._models,
            "samplers": _samplers,
            "schedulers": _schedulers,
            "upscalers": lambda: [{"name": WEB_UI_UPSCALERS["lanczos"], "scale": 4}],
            "latent-upscale-modes": lambda: [{"name": WEB_UI_UPSCALERS["latent"]}],
            "loras": lambda: [{"name": name, "alias": name} for name in find_addons("lora")],
            "embeddings": lambda: {
                "loaded": {word: {} for word in embedding_words()},
                "skipped": {},
            },
            "sd-vae": lambda: [
                {"model_name": path.name, "filename": name}
                for name, path in find_addons("vae").items()
            ],
            "scripts": lambda: {"txt2img": [], "img2img": []},
            "cmd-flags": dict,
            "progress": self._progress,
        }
        posts: dict[str, Callable[[Any], Any]] = {
            "options": self._set_options,
            "interrupt": lambda _: self.desk.queue.stop(),
            "skip": lambda _: self.desk.queue.skip(),
            "refresh-checkpoints": lambda _: None,
            "png-info": _png_info,
        }
        return [
            *(Route(f"{HERE}/{name}", _get(answer)) for name, answer in gets.items()),
            *(
                Route(f"{HERE}/{name}", _post(answer), methods=["POST"])
                for name, answer in posts.items()
            ),
            Route(f"{HERE}/txt2img", self._drawing(has_picture=False), methods=["POST"]),
            Route(f"{HERE}/img2img", self._drawing(has_picture=True), methods=["POST"]),
        ]

    # --- drawing ----------------------------------------------------------------------------

    def _drawing(self, has_picture: bool) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            try:
                body = await _body(request)
                async with self._turn:
                    order, job = await run_in_threadpool(self._order, body, has_picture)
                await self.desk.queue.end_of(job)
                if job.error is not None:
                    return _refusal(job.error)
                return JSONResponse(await run_in_threadpool(self._result, body, order, job))
            except Exception as error:
                return _refusal(error)

        return handle

    def _order(self, body: Any, has_picture: bool) -> tuple[Order, DrawJob]:
        models = self.desk.runner.models
        order = read_body(body, self.base.wishes, self.options, models, has_picture)
        model = order.options.model or self._model()
        init = mask = None
        if has_picture:
            pictures = check_kind(body.get("init_images") or [], list, "init_images")
            if len(pictures) != 1:
                raise InputError(f"init_images: one is needed, not {len(pictures)}")
            init = picture_of(pictures[0], "init_images")
            if body.get("mask"):
                mask = mask_of(body["mask"], "mask")
                is_inverted = switch(body.get("inpainting_mask_invert"), "inpainting_mask_invert")
                mask = ~mask if is_inverted else mask
        draw = Draw(order.wishes.settings(), order.wishes.tome)
        if init is not None and not body.get("resize_mode"):  # A1111 would squash it
            height, width = draw.settings.H, draw.settings.W
            if height and width and loses_sides(init, height, width):
                order = replace(order, not_used=(*order.not_used, "resize_mode"))
        job = self.desk.order(model, [draw], init, mask, "init_images", order.options.vae)
        return order, job

    def _model(self) -> str:
        """The model of jobs that name none: what others last drew with does not matter."""
        return self.options.model or next(iter(self.desk.runner.models))

    def _result(self, body: Any, order: Order, job: DrawJob) -> dict[str, Any]:
        """Pictures in base64, what was asked for, and what came of it as a text of JSON."""
        names = [one.name for one in job.report.pictures]
        sent = [] if body.get("send_images") is False else names
        files = [base64.b64encode(self.pictures.path(name).read_bytes()) for name in sent]
        given = {key: value for key, value in body.items() if key not in ("init_images", "mask")}
        info = {**_info(job), "not_used": list(order.not_used), "files": names}
        return {
            "images": [file.decode() for file in files],
            "parameters": given,
            "info": json.dumps(info),
        }

    # --- what there is ----------------------------------------------------------------------

    def _models(self) -> list[dict[str, Any]]:
        return [
            {"title": name, "model_name": stem_of(path), "hash": None, "sha256": None}
            | {"filename": name, "config": None}
            for name, path in self.desk.runner.models.items()
        ]

    def _options(self) -> dict[str, Any]:
        options = self.options
        wishes = self.base.wishes.changed(options.changes())
        config = self.desk.runner.resolve(self._model(), wishes.tome)
        is_number = isinstance(config.ratio, int | float)
        return {
            "sd_model_checkpoint": self._model(),
            "token_merging_ratio": (0.0 if config.is_off else config.ratio if is_number else None),
            "token_merging_ratio_img2img": options.img2img_ratio or 0.0,
            "token_merging_ratio_hr": options.hires_ratio or 0.0,
            "tome": dict(options.tome),
            "CLIP_stop_at_last_layers": wishes.given.get("clip_skip", 1),
            "sd_vae": options.vae or "Automatic",
        }

    def _set_options(self, given: Any) -> None:
        said = self._options()  # clients read them all, change one, and send all of them back
        given = check_kind(given, dict, "the request").items()
        new = {name: value for name, value in given if name not in said or value != said[name]}
        options = self.options.changed(new, self.desk.runner.models)
        if options.not_used:
            raise InputError(f"{', '.join(options.not_used)}: no option here")
        wishes = self.base.wishes.changed(options.changes())
        self.desk.runner.resolve(options.model or self._model(), wishes.tome)
        self.options = options

    def _progress(self) -> dict[str, Any]:
        jobs = self.desk.queue.jobs()
        job, n_left = self.desk.queue.running, sum(not job.is_over for job in jobs)
        state: dict[str, Any] = {"job": "", "job_count": n_left, "job_no": 0}
        state |= {"sampling_step": 0, "sampling_steps": 0, "interrupted": False, "skipped": False}
        answer = {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None}
        if job is None:
            return {**answer, "textinfo": None}
        report = job.report
        state |= {"job": f"job {job.number}", "job_no": len(report.pictures)}
        state |= {"sampling_step": report.step[0], "sampling_steps": report.step[1]}
        state |= {"interrupted": job.stop.is_set(), "skipped": job.skip.is_set()}
        preview = report.preview
        return {
            "progress": report.share,
            "eta_relative": report.seconds_left or 0.0,
            "state": state,
            "current_image": base64.b64encode(preview).decode() if preview else None,
            "textinfo": report.text,
        }


def _info(job: DrawJob) -> dict[str, Any]:
    """What was drawn, under A1111's names."""
    infos = job.report.infos
    first: dict[str, Any] = infos[0] if infos else {}
    settings = job.task.draws[0].settings
    model = first.get("model", {})
    return {
        "prompt": settings.prompt,
        "all_prompts": [one["prompt"] for one in infos],
        "negative_prompt": settings.negative_prompt,
        "all_negative_prompts": [settings.negative_prompt] * len(infos),
        "seed": settings.seed,
        "all_seeds": [one["seed"] for one in infos],
        "width": first.get("W"),
        "height": first.get("H"),
        "sampler_name": WEB_UI_SAMPLERS.get(first.get("sampler", "")),
        "cfg_scale": first.get("scale"),
        "steps": first.get("steps"),
        "batch_size": settings.n_samples,
        "denoising_strength": first.get("strength", first.get("hires_strength")),
        "sd_model_name": model.get("name"),
        "sd_model_hash": model.get("hash"),
        "index_of_first_image": 0,
        "infotexts": [web_ui_text(one) for one in infos],
        "tome": first.get("tome"),
        "messages": [line.text for line in job.report.lines],
    }


def _samplers() -> list[dict[str, Any]]:
    return [
        {"name": theirs, "aliases": [ours], "options": {}}
        for ours, theirs in WEB_UI_SAMPLERS.items()
        if ours != "dpm_solver"  # the same, by upstream's name
    ]


def _schedulers() -> list[dict[str, Any]]:
    named = [{"name": name, "label": label} for name, label in WEB_UI_SCHEDULES.items()]
    return [{"name": "automatic", "label": "Automatic"}, *named]


def _png_info(body: Any) -> dict[str, Any]:
    with file_of(check_kind(body, dict, "the request").get("image"), "image") as path:
        texts = picture_texts(path)
        info = texts.get("parameters", "")
        try:
            found = understood(texts, "image")
        except InputError:
            return {"info": info, "items": texts, "parameters": {}, "not_used": []}
    parameters = {**found.settings, "tome": found.tome}
    return {"info": info, "items": texts, "parameters": parameters, "not_used": found.left_out}


# --- requests and answers ---------------------------------------------------------------------


async def _body(request: Request) -> Any:
    """The JSON of a request; nothing where there is none.

    Raises:
        InputError: it is too large, or no JSON.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST:
            raise InputError(f"the request is larger than {MOST // 2**20} MiB")
        parts.append(part)
    text = b"".join(parts)
    try:
        body = json.loads(text, parse_constant=_no_number) if text.strip() else {}
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()  # as answers repeat it
        return body
    except RecursionError:
        raise InputError("the request is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"the request is no JSON ({error})") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _get(answer: Callable[[], Any]) -> Callable[[Request], Response]:
    return lambda request: JSONResponse(answer())


def _post(answer: Callable[[Any], Any]) -> Callable[[Request], Any]:
    async def handle(request: Request) -> Response:
        try:
            body = await _body(request)
            return JSONResponse(await run_in_threadpool(answer, body))
        except Exception as error:
            return _refusal(error)

    return handle


def _refusal(error: Exception) -> Response:
    """An error in A1111's form: 422 for bad input, 500 where memory ran out or a job broke."""
    if is_out_of_memory(error):
        error = error if isinstance(error, OutOfMemory) else OutOfMemory()
    elif not isinstance(error, (InputError, Broken)):
        raise error
    status = 500 if isinstance(error, (OutOfMemory, Broken)) else 422
    text = in_their_words(str(error))
    content = {"error": type(error).__name__, "detail": text, "body": "", "errors": text}
    return JSONResponse(content, status_code=status)
