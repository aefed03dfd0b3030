"""HTTP servers on 127.0.0.1 that serve a folder, and misbehave as told."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class Behaviour:
    """What the server does wrong: `mode` for the next `times` GET requests (None: for all of them)."""

    def __init__(self):
        self.mode, self.times = "", None
        self.requests: list[tuple[str, str | None]] = []
        self.bytes_per_second: float | None = None
        self.lock = threading.Lock()

    def next_mode(self) -> str:
        with self.lock:
            if self.times is None:
                return self.mode
            self.times -= 1
            return self.mode if self.times >= 0 else ""


@contextmanager
def serve(folder: Path, may=None):
    """(URL, behaviour) of a server of the files in `folder`; a file may be sparse and large.

    may: of a request's path, query and Authorization header, whether it is answered; others get 403.
    """
    behaviour = Behaviour()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def refused(self) -> bool:
            asked = urlsplit(self.path)
            if may is None or may(asked.path, asked.query, self.headers.get("Authorization", "")):
                return False
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True

        def do_HEAD(self):
            if self.refused():
                return
            path = folder / urlsplit(self.path).path.lstrip("/")
            self.send_response(200 if path.is_file() else 404)
            self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
            self.end_headers()

        def do_GET(self):
            if self.refused():
                return
            mode = behaviour.next_mode()
            path = folder / urlsplit(self.path).path.lstrip("/")
            wanted = self.headers.get("Range")
            behaviour.requests.append((self.path, wanted))
            if mode == "503" or not path.is_file():
                self.send_response(503 if mode == "503" else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if mode == "stall":
                time.sleep(1.5)
                self.close_connection = True
                return
            size = path.stat().st_size
            start, stop = 0, size
            if wanted and mode != "ignore ranges":
                first, last = wanted.removeprefix("bytes=").split("-")
                start, stop = int(first), min(size, int(last) + 1)
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(stop - start)
            self.send_response(206 if stop - start < size or start else 200)
            if stop - start < size:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            length = len(data)
            if mode == "short":  # an honest length of less than was asked
                data, length = data[: len(data) // 2], len(data) // 2
            if mode == "long length":  # promises more than it sends
                length += 1000
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if mode == "truncate" or mode == "long length":
                self.wfile.write(data[: len(data) // 2] if mode == "truncate" else data)
                self.close_connection = True
                return
            if mode == "flip":
                data = bytes([data[0] ^ 1]) + data[1:]
            self._send(data)

        def _send(self, data: bytes) -> None:
            if behaviour.bytes_per_second is None:
                self.wfile.write(data)
                return
            for at in range(0, len(data), 65536):
                part = data[at : at + 65536]
                with behaviour.lock:  # one line for all connections
                    time.sleep(len(part) / behaviour.bytes_per_second)
                self.wfile.write(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that time out hang up
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", behaviour
    finally:
        server.shutdown()
        server.server_close()
