import socket

import pytest

from tests.digits import pack_digits, tiny


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of packed digits: train/ and holdout/."""
    return pack_digits(tmp_path_factory.mktemp("digits") / "digits")


@pytest.fixture(scope="session")
def finished_run(digits, tmp_path_factory):
    """The config of a run that two ranks trained 40 steps, once for all tests of a worker: read it, change only copies.

    `copied` of tests/training/runs.py makes them.
    """
    from tests.training.runs import FINISHED, trained

    config = tiny(digits, tmp_path_factory.mktemp("finished"), *FINISHED)
    trained(config, 2)
    return config


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to connect or to look up a name fails the test."""

    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
