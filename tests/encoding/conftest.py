from tests.first_stage.conftest import autoencoder

__all__ = ["autoencoder"]
