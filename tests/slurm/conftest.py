import pytest

from tests.slurm.cluster import two_nodes


@pytest.fixture(scope="session")
def slurm():
    with two_nodes():
        yield
