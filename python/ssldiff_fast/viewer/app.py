# SPDX-License-Identifier: Apache-2.0
"""Answers the page's requests: the page itself, tiles, masks and cells, and nothing else.

No path of a request ever names a file: static files come from a table read at the start, images
by their number. Everything lies under a secret path, so that other users of the machine, who reach
its localhost too, see nothing; the Host header must be this machine's, so that a web site whose
name is pointed here sees nothing either.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from . import library
from .scene import Scene

STATIC = Path(__file__).parent / "static"
HOSTS = ["127.0.0.1", "localhost"]
MAX_WORKERS = 4
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# OpenSeadragon styles its elements by script, which the policy allows, adds one style sheet of its
# own, which is named by its hash, and decodes in a worker.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' "
        "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; connect-src 'self'; "
        "img-src 'self' data: blob:; worker-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_NOT_FOUND = "Not found. Open the whole address that `ssldiff view` printed."
# As many digits as the largest image has, so that no number is absurd.
_TILE = re.compile(r"([0-9]{1,2})/([0-9]{1,7})_([0-9]{1,7})\.jpeg")
_KEEP = {"Cache-Control": "private, max-age=3600"}
_ASK = {"Cache-Control": "no-cache"}


class _Answers:
    """One viewer's answers; slow ones are made on a few threads."""

    def __init__(self, scene: Scene, workers: int) -> None:
        self.scene = scene
        self.static = {
            file.name: (file.read_bytes(), _TYPES[file.suffix])
            for file in STATIC.iterdir()
            if file.suffix in _TYPES
        }
        self.cells = {cells.name: cells.to_bytes() for cells in scene.cells}
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="tiles")
        self.pending: dict[Any, asyncio.Future[bytes]] = {}

    def page(self, request: Request) -> Response:
        return self._static("index.html")

    def static_file(self, request: Request) -> Response:
        return self._static(request.path_params["name"])

    def _static(self, name: str) -> Response:
        if name not in self.static:
            return _not_found()
        data, kind = self.static[name]
        return Response(data, media_type=kind, headers=_ASK)

    def scene_json(self, request: Request) -> Response:
        return JSONResponse(self.scene.to_json(), headers=_ASK)

    def descriptor(self, request: Request) -> Response:
        number = self._image(request)
        if number is None:
            return _not_found()
        text = self.scene.zooms[number].descriptor()
        return Response(text, media_type="application/xml", headers=_ASK)

    def cell_values(self, request: Request) -> Response:
        data = self.cells.get(request.path_params["name"])
        if data is None:
            return _not_found()
        return Response(data, media_type="application/octet-stream", headers=_ASK)

    async def tile(self, request: Request) -> Response:
        number = self._image(request)
        match = _TILE.fullmatch(request.path_params["tile"])
        if number is None or match is None:
            return _not_found()
        where = tuple(int(digits) for digits in match.groups())
        if not self.scene.zooms[number].has(*where):
            return _not_found()
        key = (number, *where)
        return await self._made(request, key, lambda: self.scene.tile(*key), "image/jpeg", _KEEP)

    async def mask(self, request: Request) -> Response:
        number = self._image(request)
        if number is None or not self.scene.has_mask(number):
            return _not_found()
        key = ("mask", number)
        make = lambda: self.scene.mask_png(number)  # noqa: E731
        return await self._made(request, key, make, "image/png", _ASK)

    def _image(self, request: Request) -> int | None:
        numbers = {str(index): index for index in range(len(self.scene.images))}
        return numbers.get(request.path_params["image"])

    async def _made(
        self,
        request: Request,
        key: Any,
        make: Callable[[], bytes],
        kind: str,
        headers: dict[str, str],
    ) -> Response:
        """What a thread makes; asked for twice at once, it is made once."""
        task = self.pending.get(key)
        if task is None:
            task = asyncio.ensure_future(self._make(make))
            self.pending[key] = task
            task.add_done_callback(lambda _: self.pending.pop(key, None))
        try:
            data = await asyncio.shield(task)
        except (OSError, ValueError, MemoryError) as error:
            print(f"ssldiff: {error}", file=sys.stderr)
            return PlainTextResponse(f"{error}", 500, headers=_ASK)
        return Response(data, media_type=kind, headers=headers)

    def close(self) -> None:
        """Ends the threads; what they are about to make is not wanted any more."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    async def _make(self, make: Callable[[], bytes]) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self.pool, make)


def make_app(scene: Scene, *, token: str, workers: int | None = None) -> Starlette:
    """The viewer as an ASGI application.

    Args:
        scene: what is shown.
        token: the secret first part of every path.
        workers: threads that render; by default up to 4.

    Raises:
        LibraryError: OpenSeadragon is not in this installation.
    """
    library.check()
    answers = _Answers(scene, workers or min(MAX_WORKERS, os.cpu_count() or 1))
    routes = [
        Route("/", answers.page),
        Route("/static/{name}", answers.static_file),
        Route("/scene.json", answers.scene_json),
        Route("/images/{image}.dzi", answers.descriptor),
        Route("/images/{image}_files/{tile:path}", answers.tile),
        Route("/masks/{image}.png", answers.mask),
        Route("/cells/{name}", answers.cell_values),
    ]
    app = Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        middleware=[
            Middleware(_Headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
        ],
        exception_handlers={404: _http_error, 405: _http_error},
    )
    app.router.redirect_slashes = False
    app.state.answers = answers
    return app


def _not_found() -> Response:
    return PlainTextResponse(_NOT_FOUND, 404)


async def _http_error(request: Request, error: Exception) -> Response:
    if getattr(error, "status_code", 404) == 405:
        return PlainTextResponse("The viewer answers GET alone.", 405, headers={"Allow": "GET"})
    return _not_found()


class _Headers:
    """Adds the security headers to every answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.headers = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self.headers]}
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)
