"""The page with Python behind it, over HTTP on this machine alone.

A site that is open in the same browser can send requests to this server as well. It is answered nothing: the host has
to be this machine's, which a name that resolves to it is not, and every call of the API has to hold a token that the
page is told. Whoever asks for the page has to know it too: it is part of the address that the command prints. So other
users of the machine, whose requests come from the same place, are answered nothing either.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hmac
import io
import json
import logging
import re
import secrets
import socket
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from jaxtyping import UInt8
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

import anyup_core
from anyup_core.command import REFUSALS
from anyup_jax.app.explorer import Explorer, Settings
from anyup_jax.app.folder import WEIGHT_SUFFIXES

PAGE = Path(anyup_core.__file__).parent / "page"
HOST = "127.0.0.1"
HOSTS = [HOST, "localhost"]
PICTURE, WEIGHTS, QUESTION = 100_000_000, 2_000_000_000, 100_000  # bytes of a body, at most
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
BLOCK = 1 << 24  # bytes of features that are sent at once


class Refusal(Exception):
    """A request that is not answered, with its status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def build(explorer: Explorer, token: str) -> Starlette:
    """Return the application: the page at "/", the API below "/api/"; both ask for `token`."""
    api = Api(explorer, token)
    index = (PAGE / "index.html").read_text("utf-8")
    marked = index.replace("<head>", f'<head>\n<meta name="anyup-server" content="{token}">', 1)

    async def serve_index(request: Request) -> Response:
        if not api.admits(request.query_params.get("token", "")):
            return PlainTextResponse(
                "Open the address that `anyup app` has printed: it holds the key of this page.", 403
            )
        return HTMLResponse(marked)

    routes = [
        Route("/", serve_index),
        Route("/index.html", serve_index),
        Route("/api/offers", api.answered(api.offers)),
        Route("/api/features.npy", api.answered(api.features)),
        *(
            Route(f"/api/{name}", api.answered(getattr(api, name)), methods=["POST"])
            for name in ("picture", "weights", "open", "prepare", "run", "compare", "pick", "clear")
        ),
    ]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False), Middleware(Headers)]
    app = Starlette(routes=routes, middleware=guards)
    app.mount("/", StaticFiles(directory=PAGE))
    return app


class Headers:
    """Adds the headers that keep other sites out to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def added(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, added if scope["type"] == "http" else send)


class Api:
    """The calls of the API; each takes a request and returns a response."""

    def __init__(self, explorer: Explorer, token: str):
        self.explorer, self.token = explorer, token

    def admits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    def answered(self, call: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Return a call that checks the token, and answers what is refused with one sentence."""

        async def answer(request: Request) -> Response:
            given = request.headers.get("X-AnyUp-Token") or request.query_params.get("token", "")
            try:
                if not self.admits(given):
                    raise Refusal(403, "This is not the page of this server; reload it.")
                return await call(request)
            except Refusal as error:
                return in_json({"error": str(error)}, error.status)
            except ClientDisconnect:
                return Response(status_code=400)
            except asyncio.CancelledError:
                return in_json({"error": "The server was stopped; start `anyup app` again, and reload this page."}, 503)
            except (*REFUSALS, TypeError) as error:
                text = self.explorer.named(" ".join(str(error).split())) or type(error).__name__
                memory = isinstance(error, MemoryError)
                return in_json({"error": f"There is not enough memory: {text}" if memory else text}, 400)
            except Exception as error:
                logging.getLogger("uvicorn.error").exception("A call failed.")
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                return in_json({"error": f"This failed ({text}); more stands in the server's terminal."}, 500)

        return answer

    async def offers(self, request: Request) -> Response:
        offers = await in_thread(self.explorer.offers)
        return in_json({**offers, "largest": PICTURE, "largestWeights": WEIGHTS})

    async def picture(self, request: Request) -> Response:
        name = file_name(request, "picture")
        async with self._received(request, "", PICTURE) as path:
            try:
                return in_json(await in_thread(self.explorer.open, path, name))
            except (ValueError, OSError) as error:  # which call the file by its path here
                raise Refusal(400, str(error).replace(str(path), name)) from error

    async def weights(self, request: Request) -> Response:
        name = file_name(request, "weights")
        if not name.lower().endswith(WEIGHT_SUFFIXES):
            raise Refusal(400, f"{name} is no file of weights; these end in {', '.join(WEIGHT_SUFFIXES)}.")
        async with self._received(request, Path(name).suffix, WEIGHTS) as path:
            return in_json(await in_thread(self.explorer.keep, path, name))

    @contextlib.asynccontextmanager
    async def _received(self, request: Request, suffix: str, most: int) -> AsyncIterator[Path]:
        """Give the body as a file, which is removed at the end, also where the body is refused or cut off."""
        with tempfile.TemporaryDirectory(dir=self.explorer.scratch) as folder:
            path = Path(folder, f"file{suffix}")
            with path.open("wb") as file:
                async for chunk in body(request, most):
                    await in_thread(file.write, chunk)
            yield path

    async def open(self, request: Request) -> Response:
        name = (await question(request, "file")).get("file")
        if not isinstance(name, str):
            raise Refusal(400, f"file={name!r} must be the name of a picture in the folder.")
        path = self.explorer.folder.path(name)
        answer = await in_thread(self.explorer.open, path, name)
        return in_json({**answer, "file": name})

    async def prepare(self, request: Request) -> Response:
        return packed(*await in_thread(self.explorer.prepare, *await asked(request)))

    async def run(self, request: Request) -> Response:
        return packed(*await in_thread(self.explorer.run, *await asked(request)))

    async def compare(self, request: Request) -> Response:
        return packed(*await in_thread(self.explorer.compare, *await pixel(request)))

    async def pick(self, request: Request) -> Response:
        return packed(*await in_thread(self.explorer.pick, *await pixel(request)))

    async def clear(self, request: Request) -> Response:
        (number,) = whole(await question(request, "result"), "result")
        await in_thread(self.explorer.clear, number)
        return in_json({})

    async def features(self, request: Request) -> Response:
        text = request.query_params.get("result", "")
        if not re.fullmatch(r"\d{1,9}", text):
            raise Refusal(400, f"result={text!r} must be a whole number.")
        output = await in_thread(self.explorer.output, int(text))
        headers = {"Content-Length": str(len(npy_header(output)) + output.nbytes)}
        return StreamingResponse(npy(output), media_type="application/octet-stream", headers=headers)


async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a thread of its own. Those of a pool would be waited for when the process ends, for minutes perhaps."""
    answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
    answer.set_running_or_notify_cancel()  # so that nothing can cancel it: the thread goes on in any case

    def call() -> None:
        try:
            answer.set_result(work(*arguments))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return await asyncio.wrap_future(answer)


def in_json(value: Any, status: int = 200) -> Response:
    """Return JSON in ASCII: names of files may hold bytes that are no UTF-8, which Python keeps as half surrogates."""
    return Response(json.dumps(value).encode(), status, media_type="application/json")


def file_name(request: Request, default: str) -> str:
    """Return the name of a file that is sent, without the folders that it may be told with."""
    return re.split(r"[/\\]", request.query_params.get("name", ""))[-1][:200] or default


async def body(request: Request, most: int) -> AsyncIterator[bytes]:
    """Yield the body of a request. Raises Refusal once there is more of it than `most`."""
    told = request.headers.get("Content-Length", "0")
    received = 0
    if not told.isdecimal() or int(told) > most:
        raise Refusal(413, f"This has {told} bytes; at most {most:,} are taken.")
    async for chunk in request.stream():
        received += len(chunk)
        if received > most:
            raise Refusal(413, f"This has more than {most:,} bytes, which is the most that is taken.")
        yield chunk


async def question(request: Request, *names: str) -> dict[str, Any]:
    """Return the JSON object that a request holds, with these names where any are given."""
    content = b"".join([chunk async for chunk in body(request, QUESTION)])
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or (names and set(value) != set(names)):
        raise Refusal(400, f"The question must be a JSON object{f' of {chr(44).join(names)}' if names else ''}.")
    return value


def whole(values: dict[str, Any], *names: str) -> tuple[int, ...]:
    for name in names:
        if type(values[name]) is not int:
            raise Refusal(400, f"{name}={values[name]!r} must be a whole number.")
    return tuple(values[name] for name in names)


async def asked(request: Request) -> tuple[int, Settings]:
    """Return the number of the picture, and the settings for it."""
    values = await question(request)
    (picture,) = whole({"picture": values.pop("picture", None)}, "picture")
    return picture, Settings.read(values)


async def pixel(request: Request) -> tuple[int, ...]:
    """Return the number of the result, the row and the column that are asked about."""
    names = ("result", "y", "x")
    return whole(await question(request, *names), *names)


def packed(answer: dict[str, Any], arrays: dict[str, UInt8[np.ndarray, "_ _ ..."]]) -> Response:
    """Return the length of some JSON in four bytes, little-endian, the JSON, and the arrays whose shapes it lists."""
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    text = json.dumps({**answer, "arrays": shapes}).encode()
    parts = (np.ascontiguousarray(array).tobytes() for array in arrays.values())
    return Response(b"".join([struct.pack("<I", len(text)), text, *parts]), media_type="application/octet-stream")


def npy_header(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    return file.getvalue()


def npy(array: np.ndarray) -> Iterator[bytes]:
    """Yield a NumPy file of an array, some rows at a time."""
    yield npy_header(array)
    rows = max(1, BLOCK // max(array[:1].nbytes, 1))
    for first in range(0, len(array), rows):
        yield np.ascontiguousarray(array[first : first + rows]).tobytes()


def listen(port: int) -> socket.socket:
    """Return a socket of this machine; port 0 is any free one. Raises OSError if the port is in use."""
    here = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        here.bind((HOST, port))
        here.listen()
    except OSError as error:
        here.close()
        raise OSError(f"Port {port} cannot be used ({error.strerror}); choose another one with --port.") from error
    return here


class Server(uvicorn.Server):
    """Stops within a second: what is still computed then is cut off, which is no error to be logged."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


@contextlib.contextmanager
def serving(explorer: Explorer, here: socket.socket) -> Iterator[str]:
    """Serve in a thread of its own, for tests and notebooks. Gives the address."""
    token = new_token()
    server = Server(configured(explorer, token))
    server.install_signal_handlers = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[here]), daemon=True)
    thread.start()
    try:
        yield address(here, token)
    finally:
        server.should_exit = True
        thread.join()


def new_token() -> str:
    return secrets.token_urlsafe(32)


def configured(explorer: Explorer, token: str) -> uvicorn.Config:
    app = build(explorer, token)
    return uvicorn.Config(
        app, loop="asyncio", http="h11", ws="none", lifespan="off", log_level="warning", access_log=False,
        timeout_graceful_shutdown=1, server_header=False,
    )  # fmt: skip


def address(here: socket.socket, token: str) -> str:
    return f"http://{HOST}:{here.getsockname()[1]}/?token={token}"
