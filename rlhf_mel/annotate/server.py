"""Serving the page: on this machine alone, or to others who have the token. Nothing is fetched from elsewhere.

Beyond localhost every request needs the token: once in the address (`?token=...`), from then on in a cookie, which the
first answer sets while it takes the token out of the address. Every answer forbids the browser, by a content security
policy, to load anything from another host.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rlhf_mel.annotate.labelling import Labelling
from rlhf_mel.annotate.page import build_page, page_options

LOCALHOST = frozenset({"127.0.0.1", "::1", "localhost"})

COOKIE = "rlhf-mel-token"

POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
"""gradio's page needs inline scripts and evaluates templates; neither may come from another host."""

Message = MutableMapping[str, Any]


class TokenGate:
    """An ASGI app in front of another: who has no token gets status 401 and nothing else.

    Args:
        token: None: no token is needed.
    """

    def __init__(self, app: Any, token: str | None) -> None:
        self.app = app
        self.token = token

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Pass a request on, answer it with a redirect that sets the cookie, or refuse it."""
        from starlette.requests import HTTPConnection
        from starlette.responses import PlainTextResponse, RedirectResponse, Response

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        request = HTTPConnection(scope)
        answer: Response | None = None
        if self.token is not None and not self._matches(request.cookies.get(COOKIE)):
            if self._matches(request.query_params.get("token")) and scope.get("method") == "GET":
                answer = RedirectResponse(str(request.url.remove_query_params("token").replace(scheme="", netloc="")))
                answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            else:
                answer = PlainTextResponse("Open the address with the token that the server printed.\n", 401)
        await (answer or self.app)(scope, receive, _with_policy(send))

    def _matches(self, given: str | None) -> bool:
        assert self.token is not None
        return given is not None and secrets.compare_digest(given.encode(), self.token.encode())


def _with_policy(send: Callable[[Message], Awaitable[None]]) -> Callable[[Message], Awaitable[None]]:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
            message["headers"] = [
                *message.get("headers", []),
                *((name.encode(), value.encode()) for name, value in headers.items()),
            ]
        await send(message)

    return sending


def token_for(host: str) -> str | None:
    """A random token where `host` is reached from other machines, else None."""
    return None if host in LOCALHOST else secrets.token_urlsafe(16)


def build_app(labelling: Labelling, token: str | None) -> TokenGate:
    """The page behind its gate, as an ASGI app.

    Raises:
        ImportError: gradio is not installed.
    """
    page = build_page(labelling)  # says so where gradio is missing
    import gradio
    from fastapi import FastAPI

    page.queue(default_concurrency_limit=8)
    options = dict(ssr_mode=False, run_history=False, enable_monitoring=False, show_error=True, max_file_size="1kb")
    app = gradio.mount_gradio_app(FastAPI(docs_url=None, redoc_url=None), page, path="/", **options, **page_options())
    return TokenGate(app, token)


def serve(labelling: Labelling, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until interrupted, and print its address, once, with the token where one is needed.

    Args:
        port: 0: any that is free.

    Raises:
        OSError: the port is taken, or the host is not of this machine.
    """
    import uvicorn

    token = token_for(host)
    app = build_app(labelling, token)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        print(f"labelling page: {_address(host, listening.getsockname()[1], token)}", flush=True)
        # Pages keep a connection open for as long as they are: Ctrl-C is not to wait for them.
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listening])


def _address(host: str, port: int, token: str | None) -> str:
    reached = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{reached}:{port}/" + (f"?token={token}" if token else "")
