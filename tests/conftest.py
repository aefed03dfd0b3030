import socket

import pytest

from tests.digits import pack_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of packed digits: train/ and holdout/."""
    return pack_digits(tmp_path_factory.mktemp("digits") / "digits")


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to connect or to look up a name fails the test."""

    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
