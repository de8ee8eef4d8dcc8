# SPDX-License-Identifier: Apache-2.0
"""The viewer's server: what it answers, what it refuses, and whom it does not wait for."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slide_files import tissue_image, write_slide
from ssldiff_fast.viewer.app import make_app
from ssldiff_fast.viewer.image import open_image
from ssldiff_fast.viewer.scene import Scene
from ssldiff_fast.viewer.server import HOST, PORT, PatientProtocol, listen


def test_the_page_and_its_files_are_answered(viewer: Any) -> None:
    page = viewer.get("")
    assert page.status == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    for name in ("main.js", "pane.js", "style.css", "icon.svg"):
        assert f"static/{name}".encode() in page.body or name == "pane.js"
        assert viewer.get(f"static/{name}").status == 200


def test_the_page_asks_for_nothing_beyond_this_machine(viewer: Any) -> None:
    for name in viewer.app.state.answers.static:
        if name.startswith("openseadragon"):
            continue
        text = viewer.get(f"static/{name}").body.decode()
        links = [word for word in text.split('"') if word.startswith(("http:", "https:"))]
        assert set(links) <= {
            "http://schemas.microsoft.com/deepzoom/2008",
            "http://www.w3.org/2000/svg",
        }
    policy = viewer.get("").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy


def test_the_scene_is_told_as_json(viewer: Any) -> None:
    scene = json.loads(viewer.get("scene.json").body)
    (image,) = scene["images"]
    assert (image["name"], image["width"], image["height"]) == ("slide.tif", 1300, 900)
    assert image["mpp"] == pytest.approx(0.5)
    assert not image["synthetic"]
    assert scene["alignment"] is None


def test_a_tile_is_a_jpeg_of_the_right_pixels(viewer: Any) -> None:
    answer = viewer.get("images/0_files/11/2_1.jpeg")
    assert answer.headers["Content-Type"] == "image/jpeg"
    pixels = np.asarray(Image.open(io.BytesIO(answer.body)))
    assert pixels.shape == (900 - 512, 1300 - 1024, 3)
    expected = tissue_image(1300, 900)[512:, 1024:]
    assert np.abs(pixels.astype(int) - expected).mean() < 4


def test_the_descriptor_is_that_of_deep_zoom(viewer: Any) -> None:
    text = viewer.get("images/0.dzi").body.decode()
    assert 'TileSize="512"' in text
    assert '<Size Width="1300" Height="900"/>' in text


def test_the_mask_is_a_picture_of_the_tissue(viewer: Any) -> None:
    answer = viewer.get("masks/0.png")
    mask = np.asarray(Image.open(io.BytesIO(answer.body)))
    height, width = mask.shape
    assert mask[height // 2, width // 2]
    assert not mask[1, 1]


ABSENT = [
    "images/1.dzi",
    "images/-1.dzi",
    "images/0_files/11/3_0.jpeg",
    "images/0_files/11/0_2.jpeg",
    "images/0_files/12/0_0.jpeg",
    "images/0_files/99/0_0.jpeg",
    "images/0_files/11/9999999_9999999.jpeg",
    f"images/0_files/11/{'9' * 5000}_0.jpeg",
    "images/0_files/-1/0_0.jpeg",
    "images/0_files/11/-1_0.jpeg",
    "images/0_files/11/1e3_0.jpeg",
    "images/0_files/11/%D9%A3_0.jpeg",
    "images/0_files/11/0_0.png",
    "images/0_files/",
    "images/0_files/../../scene.json",
    "images/x_files/0/0_0.jpeg",
    "masks/1.png",
    "cells/similarity",
    "cells/../scene.json",
    "static/",
    "static/..",
    "static/../app.py",
    "static/%2e%2e/app.py",
    "static/..%2fapp.py",
    "static/..%5capp.py",
    "static/%00",
    "static//etc/passwd",
    "static/slide.tif",
    "slide.tif",
    "/",
    "/favicon.ico",
    "/secret",
    "/secre/scene.json",
    "/secret/scene.json",
    "../etc/passwd",
    "//etc/passwd",
    "/../../../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
]


@pytest.mark.parametrize("path", ABSENT)
def test_what_is_not_there_is_not_found(viewer: Any, path: str) -> None:
    answer = viewer.get(path)
    assert answer.status == 404
    assert answer.body.startswith(b"Not found.")
    assert viewer.get("scene.json").status == 200


def test_the_slides_own_folder_is_not_served(viewer: Any, slide_file: Path) -> None:
    for path in (str(slide_file), f"static{slide_file}", f"static/{slide_file.name}"):
        assert viewer.get(path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_changed(viewer: Any, method: str) -> None:
    assert viewer.get("scene.json", method=method).status == 405


def test_another_host_name_is_refused(viewer: Any) -> None:
    assert viewer.get("scene.json", Host="evil.example").status == 400
    assert viewer.get("scene.json", Host=f"localhost:{viewer.port}").status == 200


def test_every_answer_keeps_other_sites_out(viewer: Any) -> None:
    for path in ("", "scene.json", "images/0_files/0/0_0.jpeg", "nothing"):
        headers = viewer.get(path).headers
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


def _raw(port: int, data: bytes, *, seconds: float = 10) -> bytes:
    with socket.create_connection((HOST, port), timeout=seconds) as client:
        client.sendall(data)
        received = b""
        try:
            while piece := client.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
        return received


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"\r\n" * 50_000,
    ],
    ids=["words", "no path", "version", "tls", "bytes", "long path", "headers", "length", "lines"],
)
def test_a_malformed_request_ends_its_own_connection_only(viewer: Any, data: bytes) -> None:
    received = _raw(viewer.port, data + b"\r\nConnection: close\r\n\r\n", seconds=15)
    assert received == b"" or received.startswith(b"HTTP/1.1 4")
    assert viewer.get("scene.json").status == 200


class Impatient(PatientProtocol):
    request_s, answer_s, max_connections = 0.4, 0.6, 8


GONE = r"reset|Broken|aborted"


def _dribble(client: socket.socket, data: bytes) -> None:
    for byte in data:
        client.sendall(bytes([byte]))
        time.sleep(0.05)


def test_who_sends_a_request_too_slowly_is_sent_away(
    serve: Callable[..., Any], slide_file: Path
) -> None:
    viewer = serve(Scene((open_image(slide_file),)), Impatient)
    with socket.create_connection((HOST, viewer.port), timeout=10) as client:
        start = time.monotonic()
        with pytest.raises(OSError, match=GONE):
            _dribble(client, b"GET /secret/scene.json HTTP/1.1\r\n" * 20)
        assert time.monotonic() - start < 8
    silent = socket.create_connection((HOST, viewer.port), timeout=10)
    with silent, contextlib.suppress(ConnectionResetError):
        assert silent.recv(1) == b""


def test_a_second_request_on_a_connection_may_not_be_slow_either(
    serve: Callable[..., Any], slide_file: Path
) -> None:
    viewer = serve(Scene((open_image(slide_file),)), Impatient)
    whole = f"GET /{viewer.token}/scene.json HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with socket.create_connection((HOST, viewer.port), timeout=10) as client:
        for _ in range(2):
            client.sendall(whole)
            received = b""
            while not received.endswith(b"]}"):
                received += client.recv(65536)
            assert received.startswith(b"HTTP/1.1 200")
        with pytest.raises(OSError, match=GONE):
            _dribble(client, whole[:-2] + b"X: y\r\n" * 100)


def test_who_does_not_take_the_answer_is_sent_away(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)
    slide = open_image(write_slide(tmp_path / "noise.tif", noise))
    viewer = serve(Scene((slide,)), Impatient)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((HOST, viewer.port))
    tile = f"/{viewer.token}/images/0_files/10/1_1.jpeg"
    client.sendall(
        f"GET {tile} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 40
    )  # 40 answers of 400 kB each are more than any buffer takes
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        time.sleep(0.2)
        try:
            client.sendall(b"\r\n")
        except OSError:
            break
    else:
        pytest.fail("the connection was kept")
    client.close()
    assert viewer.get("scene.json").status == 200


def test_many_idle_connections_do_not_shut_out_the_next(
    serve: Callable[..., Any], slide_file: Path
) -> None:
    viewer = serve(Scene((open_image(slide_file),)), Impatient)
    idle = [socket.create_connection((HOST, viewer.port), timeout=10) for _ in range(40)]
    time.sleep(1.2)
    assert viewer.get("scene.json").status == 200
    for client in idle:
        client.close()


def test_a_tile_asked_for_many_times_at_once_is_made_once(
    serve: Callable[..., Any], slide_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = serve(Scene((open_image(slide_file),)))
    made = []
    real = viewer.scene.zooms[0].render

    def slow(*where: int) -> bytes:
        made.append(where)
        time.sleep(0.3)
        return real(*where)

    monkeypatch.setattr(viewer.scene.zooms[0], "render", slow)
    answers: list[bytes] = []
    ask = lambda: answers.append(viewer.get("images/0_files/10/0_0.jpeg").body)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert made == [(10, 0, 0)]
    assert len(answers) == 12
    assert len(set(answers)) == 1


def test_a_tile_that_cannot_be_read_says_why_and_harms_no_other(
    serve: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_slide(tmp_path / "cut.tif", tissue_image(1300, 900), compression="jpeg")
    viewer = serve(Scene((open_image(path),)))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    tiles = [f"images/0_files/11/{x}_{y}.jpeg" for x in range(3) for y in range(2)]
    statuses = {viewer.get(tile).status for tile in tiles for _ in range(2)}
    assert 500 in statuses
    assert statuses <= {200, 500}
    assert "cut.tif could not be read at level 0" in capfd.readouterr().err
    assert viewer.get("scene.json").status == 200


def test_it_listens_on_this_machine_only() -> None:
    with listen() as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_without_a_port_a_free_one_is_taken() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind((HOST, PORT))
            other.listen()
        except OSError:
            pass  # a viewer runs on this machine: that does as well
        with listen() as listener:
            assert listener.getsockname()[1] != PORT


def test_a_port_in_use_is_one_sentence() -> None:
    with listen() as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} is in use by another program .* --port"):
            listen(port)


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_a_port_that_is_none_is_one_sentence(port: int) -> None:
    with pytest.raises(ValueError, match=f"the port is {port}, expected 1 to 65535"):
        listen(port)


def test_without_the_library_no_server_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slide_file: Path
) -> None:
    from ssldiff_fast.viewer import library

    present = library.present
    monkeypatch.setattr(library, "present", lambda folder: present(tmp_path))
    with pytest.raises(library.LibraryError, match=r"OpenSeadragon .* is not in this installation"):
        make_app(Scene((open_image(slide_file),)), token="t")
