"""The Prefect server as we run it: on a socket that is given to it, refusing what comes from elsewhere.

    python -P flows/child_process.py flows.server_app FD      FD: a TCP socket, bound to the loopback

Prefect's own password and CSRF tokens stand behind this. A Host that is not the loopback's is DNS rebinding, and an
Origin that is not our page's is another page in the user's browser; neither reaches Prefect.
"""

from __future__ import annotations

import logging
import os
import socket
import sys

import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import get_current_settings
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.server import ERROR, HOSTS

# The UI asks an analytics service for settings of its own, and a text of the data could name a picture anywhere.
# Its run graph (pixi.js) and its forms (ajv) compile code of their own at run time: without eval both stay empty.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'; img-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)


class SameOrigin:
    """Passes on what our own page and programs ask, and confines the page to this server."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app, self.origins = app, [f"http://{host}:{port}" for host in HOSTS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 to a request of another page."""

        async def confined(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        if scope["type"] == "lifespan" or Headers(scope=scope).get("origin", self.origins[0]) in self.origins:
            await self.app(scope, receive, confined)
        else:
            await PlainTextResponse("Origin refused", status_code=403)(scope, receive, send)


class OneLine(logging.Handler):
    """Writes an error, with the exception that it came from, as one line that `flows.server` finds in the log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, to the stream that the log is made of."""
        error = record.exc_info[1] if record.exc_info else None
        cause = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}" if error else ""
        message = record.getMessage().strip().rpartition("\n")[2]  # uvicorn's is a traceback
        if "database is locked" in cause + message:  # SQLite is busy: the server answers 503, and clients ask again
            return
        line = " ".join(f"{record.name}: {message} {cause}".split())
        sys.stderr.write(f"{ERROR}{line}\n")


def main() -> None:
    """Serve until SIGTERM."""
    os.umask(0o077)
    bound = socket.socket(fileno=int(sys.argv[1]))
    app = SameOrigin(create_app(final=True), bound.getsockname()[1])
    for name in ("", "uvicorn"):  # Prefect's settings, which it has now made, keep uvicorn's from the root
        logging.getLogger(name).addHandler(OneLine(logging.ERROR))
    settings = get_current_settings().server
    config = uvicorn.Config(
        TrustedHostMiddleware(app, allowed_hosts=HOSTS, www_redirect=False),
        log_config=None,
        access_log=False,
        timeout_keep_alive=settings.api.keepalive_timeout,
        timeout_graceful_shutdown=2,  # an open page holds web sockets for ever
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
    )
    uvicorn.Server(config).run(sockets=[bound])


if __name__ == "__main__":
    main()
