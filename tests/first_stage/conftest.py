import pytest

from tests.first_stage.folders import save_kl


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory):
    """A folder with a scale of its own, so that latents have a deviation of about 1."""
    return save_kl(tmp_path_factory.mktemp("autoencoder"), scaling_factor=0.8, shift_factor=0.1)
