"""A real `mlflow server` on SQLite that can be stopped and paused, a proxy that can break, and the REST API."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dtrain.distributed import free_port


class MlflowServer:
    """One process group, one database: what it held before `stop` is there again after `start`."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Wait until it answers; nothing to do where it runs."""
        if self._process is None:
            self.begin()
        end = time.monotonic() + 120
        while not self.answers():
            assert time.monotonic() < end, (self.folder / "server.log").read_text()
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.1)

    def begin(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """Kill it in whatever it does."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


class Proxy:
    """Passes everything on to `port`; while `broken`, answers 500 instead. Keeps the Authorization headers it gets."""

    def __init__(self, port: int):
        self.broken = False
        self.refused = 0
        self.authorizations: set[str | None] = set()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.authorizations.add(self.headers.get("Authorization"))
                if proxy.broken:
                    proxy.refused += 1
                    self.reply(500, b'{"error_code": "INTERNAL_ERROR", "message": "out of order"}')
                    return
                upstream = HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    answer = upstream.getresponse()
                    self.reply(answer.status, answer.read(), answer.getheader("Content-Type"))
                except OSError:
                    self.close_connection = True  # the client sees a connection that ends without an answer
                finally:
                    upstream.close()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def reply(self, status, body, content_type=None):
                self.send_response(status)
                self.send_header("Content-Type", content_type or "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # a client that gave up waiting

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, name="proxy", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Rest:
    """MLflow's REST API by urllib: an independent look at what has arrived."""

    def __init__(self, url: str):
        self.url = f"{url}/api/2.0/mlflow"

    def get(self, endpoint: str, **query) -> dict[str, Any]:
        return self._ask(urllib.request.Request(f"{self.url}/{endpoint}?{urllib.parse.urlencode(query)}"))

    def post(self, endpoint: str, **body) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}/{endpoint}", json.dumps(body).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        return self._ask(request)

    def _ask(self, request) -> dict[str, Any]:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def experiment(self, name: str) -> str:
        return self.get("experiments/get-by-name", experiment_name=name)["experiment"]["experiment_id"]

    def runs(self, experiment: str, where: str = "") -> list[dict[str, Any]]:
        found = self.post("runs/search", experiment_ids=[self.experiment(experiment)], filter=where, max_results=1000)
        return found.get("runs", [])

    def run(self, experiment: str, name: str) -> dict[str, Any]:
        (found,) = self.runs(experiment, f"attributes.run_name = '{name}'")
        return found

    def history(self, run: dict[str, Any]) -> dict[str, list[tuple[int, int, float]]]:
        """Metric key → all that was ever logged, as (step, milliseconds, value) in order; nothing collapsed."""
        found = {}
        for key in (m["key"] for m in run["data"].get("metrics", [])):
            told = self.get("metrics/get-history", run_id=run["info"]["run_id"], metric_key=key)
            found[key] = sorted((int(m["step"]), int(m["timestamp"]), float(m["value"])) for m in told["metrics"])
        return found

    def models(self, run: dict[str, Any], order_by: str | None = None) -> list[dict[str, Any]]:
        order = {"order_by": [{"field_name": order_by, "ascending": True}]} if order_by else {}
        info = run["info"]
        found = self.post("logged-models/search", experiment_ids=[info["experiment_id"]], **order)
        return [m for m in found.get("models", []) if m["info"]["source_run_id"] == info["run_id"]]

    def artifacts(self, run: dict[str, Any], folder: str = "") -> list[str]:
        told = self.get("artifacts/list", run_id=run["info"]["run_id"], path=folder)
        return sorted(f["path"] for f in told.get("files", []) if not f.get("is_dir"))

    def artifact(self, run: dict[str, Any], path: str) -> bytes:
        query = urllib.parse.urlencode({"path": path, "run_uuid": run["info"]["run_id"]})
        with urllib.request.urlopen(f"{self.url.removesuffix('/api/2.0/mlflow')}/get-artifact?{query}") as reply:
            return reply.read()


def pairs(found: list[dict[str, str]]) -> dict[str, str]:
    """Params and tags as REST tells them, as a mapping."""
    return {one["key"]: one["value"] for one in found}
