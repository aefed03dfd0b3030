import pytest

from tests.digits import pack_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of packed digits: train/ and holdout/."""
    return pack_digits(tmp_path_factory.mktemp("digits") / "digits")
