import socket

import pytest


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to connect or to look up a name fails the test."""

    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
