import pytest

from tests.tracking.servers import MlflowServer, Proxy


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An `mlflow server` that the first test which needs it starts: it takes seconds."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.stop()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()
