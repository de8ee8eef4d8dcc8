# SPDX-License-Identifier: Apache-2.0
"""Listens on this machine's own address, and sends slow or idle clients away."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HOST = "127.0.0.1"
PORT = 8400  # where none is asked for; the next free one if it is in use
# A browser sends a request whole, and takes what it asked for. Who does not within these times
# holds a connection for nothing.
REQUEST_S = 10.0
ANSWER_S = 30.0
MAX_CONNECTIONS = 128
MAX_HEADER_BYTES = 16 * 1024
STOP_S = 2


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP, with limits on how long a request may take to come and an answer to go."""

    request_s, answer_s, max_connections = REQUEST_S, ANSWER_S, MAX_CONNECTIONS
    _request_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._expect_request()

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except UnicodeError:  # a target with bytes that no URL has
            self.transport.abort()
            return
        if self.cycle is None or self.cycle.response_complete:
            self._expect_request()  # a part of one; the clock started by its first byte runs on
        else:
            self._stop_request_clock()

    def on_response_complete(self) -> None:
        self._stop_request_clock()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._answer_timer is None:
            self._answer_timer = self.loop.call_later(self.answer_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_answer_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_request_clock()
        self._stop_answer_clock()
        super().connection_lost(exc)

    def _expect_request(self) -> None:
        if self._request_timer is None:
            self._request_timer = self.loop.call_later(self.request_s, self.transport.abort)

    def _stop_request_clock(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _stop_answer_clock(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None


def listen(port: int | None = None) -> socket.socket:
    """A socket on 127.0.0.1.

    Args:
        port: the port; None for 8400, or any free one where that is in use.

    Raises:
        ValueError: no port number.
        OSError: the port is in use, or may not be listened on.
    """
    if port is not None and not 1 <= port <= 65_535:
        raise ValueError(f"the port is {port}, expected 1 to 65535")
    for candidate in (PORT, 0) if port is None else (port,):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, candidate))
            listener.listen(MAX_CONNECTIONS)
            return listener
        except OSError as error:
            listener.close()
            if port is not None or candidate == 0 or error.errno != errno.EADDRINUSE:
                raise _cannot_listen(candidate, error) from None
    raise AssertionError("unreachable: port 0 binds or raises")


def _cannot_listen(port: int, error: OSError) -> OSError:
    if error.errno == errno.EADDRINUSE:
        return OSError(
            f"port {port} is in use by another program (or another viewer): give another --port, "
            "or none to take a free one"
        )
    return OSError(
        f"port {port} of {HOST} cannot be listened on ({error.strerror}): give another --port"
    )


class Server:
    """A running viewer.

    Args:
        app: the ASGI application.
        listener: a listening socket.
        started: called once requests are answered.
        protocol: of the connections.
    """

    def __init__(
        self,
        app: Any,
        listener: socket.socket,
        *,
        started: Callable[[], None] | None = None,
        protocol: type[PatientProtocol] = PatientProtocol,
    ) -> None:
        # A malformed request is the client's affair: it is answered 400, and nothing is printed.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(REQUEST_S),
            timeout_graceful_shutdown=STOP_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        self._listener = listener
        self._server = _Announcing(config, started)

    @property
    def port(self) -> int:
        """The port listened on."""
        number: int = self._listener.getsockname()[1]
        return number

    def run(self) -> None:
        """Answers requests until Ctrl-C, SIGTERM or `stop`."""
        try:
            self._server.run(sockets=[self._listener])
        except KeyboardInterrupt:  # raised again by uvicorn once it has stopped
            pass
        finally:
            self._listener.close()

    def stop(self) -> None:
        """Ends `run`, from any thread."""
        self._server.should_exit = True


class _Announcing(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._announce = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._announce is not None:
            # A browser that is slow to start must not hold up the first answers.
            threading.Thread(target=self._announce, daemon=True).start()
