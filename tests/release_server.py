"""A local stand-in for the host of the published checkpoints, which can misbehave."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Serves one content at every path, with byte ranges.

    Attributes:
        content: what is served.
        url: base address.
        requests: (path, Range header or "") of each request so far.
        cut: how many bytes each coming answer sends before it hangs up; then answers are whole.
        statuses: HTTP errors given to the coming requests, one each.
        ranges: whether ranges are honoured.
        before: called before each answer.
    """

    def __init__(self, content: bytes):
        self.content = content
        self.url = ""
        self.requests: list[tuple[str, str]] = []
        self.cut: list[int] = []
        self.statuses: list[int] = []
        self.ranges = True
        self.before: Callable[[], None] = lambda: None

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range", "")
        self.requests.append((handler.path, asked))
        self.before()
        if self.statuses:
            return handler.send_error(self.statuses.pop(0))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start >= len(self.content):
            return handler.send_error(416)
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cut.pop(0)] if self.cut else body)


@contextlib.contextmanager
def drip(start: bytes) -> Iterator[tuple[str, list[socket.socket]]]:
    """Run a server that sends `start`, then a byte every hundredth of a second; gives its address and connections."""
    connections: list[socket.socket] = []
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(listener.accept()[0])
                    connections[-1].sendall(start)
                    threading.Thread(target=send, args=[connections[-1]]).start()

        def send(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                while not stop.wait(0.01):
                    connection.sendall(b"x")

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
        finally:
            stop.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextlib.contextmanager
def serve(content: bytes) -> Iterator[Server]:
    """Run a server in a thread."""
    server = Server(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
