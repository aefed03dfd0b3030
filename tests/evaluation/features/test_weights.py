"""Weight files: found, fetched once, and refused where they are not the right bytes."""

import hashlib
import http.server
import threading

import pytest
import torch

from dtrain.distributed import free_port
from dtrain.errors import UserError
from dtrain.evaluation.features import weights
from dtrain.evaluation.features.build import extractor
from dtrain.evaluation.features.weights import INCEPTION, WeightFile, find, obtain
from tests.ranks import run_ranks

CONTENT = bytes(range(256)) * (3 << 12)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DTRAIN_WEIGHTS", raising=False)
    return tmp_path / "cache" / "dtrain"


class Server:
    """Serves `content` under any path, saying it is `length` bytes long, and counts the requests."""

    def __init__(self, content: bytes, length: int | None = None, status: int = 200):
        requests = self.requests = []

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(length or len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self._server.server_port}/w.pt"
        self.file = WeightFile("w.pt", url, hashlib.sha256(CONTENT).hexdigest())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def _obtain(file):
    return hashlib.sha256(obtain(file).read_bytes()).hexdigest()


def test_four_processes_that_need_the_file_at_once_fetch_it_once(own_cache):
    with Server(CONTENT) as server:
        cache = {"XDG_CACHE_HOME": str(own_cache.parent)}
        assert run_ranks(_obtain, 4, server.file, environment=cache) == [server.file.sha256] * 4
        assert obtain(server.file) == own_cache / "w.pt"
        assert len(server.requests) == 1
    assert sorted(p.name for p in own_cache.iterdir()) == [".w.pt.lock", "w.pt"]


@pytest.mark.parametrize(
    ("content", "length", "status", "message"),
    [
        (CONTENT[:-1000], len(CONTENT), 200, "cut off"),  # the connection ends early
        (CONTENT[:-1] + b"x", None, 200, "cut off or changed"),
        (b"gone", None, 404, r"cannot download .* \(Not Found\)"),
    ],
)
def test_a_download_that_fails_leaves_nothing_that_could_be_trusted(own_cache, content, length, status, message):
    with Server(content, length, status) as server:
        with pytest.raises(UserError, match=message) as error:
            obtain(server.file)
        assert f"copy w.pt (sha256 {server.file.sha256}) from one that has it to {own_cache / 'w.pt'}" in str(
            error.value
        )
        assert [p.name for p in own_cache.iterdir()] == [".w.pt.lock"]
    with Server(CONTENT) as server:  # and the next attempt begins anew
        assert obtain(server.file).read_bytes() == CONTENT


def test_without_a_network_the_error_says_what_to_copy_where(own_cache):
    file = WeightFile(INCEPTION.name, f"http://127.0.0.1:{free_port()}/w.pt", INCEPTION.sha256)
    with pytest.raises(UserError) as error:
        obtain(file)
    for part in ("Connection refused", INCEPTION.name, INCEPTION.sha256, str(own_cache), "--weights", "DTRAIN_WEIGHTS"):
        assert part in str(error.value)


def test_a_file_is_found_where_it_is_named_without_touching_the_network(tmp_path, own_cache, monkeypatch, no_network):
    file = WeightFile("w.pt", "http://example.invalid/w.pt", hashlib.sha256(CONTENT).hexdigest())
    assert find(file) is None
    for folder in ("named", "environment"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.pt").write_bytes(CONTENT)
    own_cache.mkdir(parents=True)
    (own_cache / "w.pt").write_bytes(CONTENT)
    assert obtain(file) == own_cache / "w.pt"
    monkeypatch.setenv("DTRAIN_WEIGHTS", str(tmp_path / "environment"))
    assert obtain(file) == tmp_path / "environment" / "w.pt"
    assert obtain(file, str(tmp_path / "named" / "w.pt")) == tmp_path / "named" / "w.pt"


@pytest.mark.parametrize("source", ["named", "environment", "cache"])
@pytest.mark.parametrize("name", ["inception", "auto"])
def test_truncated_wrong_and_missing_weights_are_refused_wherever_they_lie(
    tmp_path, own_cache, monkeypatch, no_network, source, name
):
    path = own_cache / INCEPTION.name if source == "cache" else tmp_path / INCEPTION.name
    given = str(path) if source == "named" else None
    if source == "environment":
        monkeypatch.setenv("DTRAIN_WEIGHTS", str(path))
    if source != "cache":
        with pytest.raises(UserError, match="which is not there"):
            extractor(name, 32, 3, given)
    path.parent.mkdir(parents=True, exist_ok=True)
    for content in (b"", CONTENT):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"\({len(content):,} bytes, sha256 .* is not inception-2015-12-05\.pt"):
            extractor(name, 32, 3, given)


def test_auto_takes_efficientnet_where_inception_is_not_and_needs_no_network(no_network):
    chosen = extractor("auto", 32, 3)
    assert chosen.name == "effnet_lite0"
    assert chosen(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 1280)
    assert weights.find(INCEPTION) is None
