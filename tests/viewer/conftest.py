# SPDX-License-Identifier: Apache-2.0
"""Viewers that really listen, answered to by a client of the standard library."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slide_files import tissue_image, write_slide
from ssldiff_fast.viewer import library
from ssldiff_fast.viewer.app import make_app
from ssldiff_fast.viewer.image import open_image
from ssldiff_fast.viewer.scene import Scene
from ssldiff_fast.viewer.server import PatientProtocol, Server, listen

_NUMBERS = itertools.count()


@dataclass
class Client:
    """Asks a viewer that runs."""

    port: int
    token: str
    scene: Scene
    app: Any

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.token}/"

    def get(self, path: str, *, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        """The answer to a path below the secret one, or to an absolute one; `body` is read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        target = path if path.startswith("/") else f"/{self.token}/{path}"
        connection.request(method, target, headers=headers)
        answer = connection.getresponse()
        answer.body = answer.read()  # type: ignore[attr-defined]
        connection.close()
        return answer


@contextmanager
def running(scene: Scene, protocol: type[PatientProtocol] = PatientProtocol) -> Iterator[Client]:
    """Serves a scene; the server needs no OpenSeadragon for that, only its page does."""
    # Another path for each, as in life: a browser keeps the tiles of the one before.
    token = f"secret{next(_NUMBERS)}"
    ready = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "check", lambda: None)
        app = make_app(scene, token=token, workers=2)
    server = Server(app, listen(), started=ready.set, protocol=protocol)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        yield Client(server.port, token, scene, app)
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
        app.state.answers.close()
        scene.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Client]]:
    """Serves scenes until the test ends."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(running(*arguments))


@pytest.fixture(scope="session")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 1300 x 900 pixels with two levels."""
    folder = tmp_path_factory.mktemp("slide")
    return write_slide(folder / "slide.tif", tissue_image(1300, 900), levels=2)


@pytest.fixture(scope="module")
def viewer(slide_file: Path) -> Iterator[Client]:
    """That slide, served."""
    with running(Scene((open_image(slide_file),))) as client:
        yield client
