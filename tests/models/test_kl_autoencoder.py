"""The autoencoder of latent diffusion beside diffusers' own, and the parameters of the published one."""

import pytest
import torch
from diffusers import AutoencoderKL

from dtrain.models.kl_autoencoder import KLAutoencoder
from dtrain.models.layers import initialize


def theirs(channels, widths, res_blocks, latent_channels, attention=True):
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=res_blocks,
        latent_channels=latent_channels,
        norm_num_groups=min(32, min(widths) // 4),
        mid_block_add_attention=attention,
    )


@pytest.mark.parametrize(
    "sizes", [(3, [8, 16], 1, 4), (1, [8, 8, 16], 2, 2), (3, [16], 1, 3, False)], ids=["f2", "f4", "f1"]
)
@torch.no_grad()
def test_it_answers_as_diffusers_with_the_same_weights(sizes):
    torch.manual_seed(0)
    other, ours = theirs(*sizes).eval(), KLAutoencoder(*sizes)
    assert ours.state_dict().keys() == other.state_dict().keys()
    ours.load_state_dict(other.state_dict())
    x = torch.randn(2, sizes[0], 16, 16)
    posterior = other.encode(x).latent_dist
    mean, log_variance = ours.encode(x)
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_variance, posterior.logvar, rtol=1e-5, atol=1e-5)
    noise = torch.randn(mean.shape)
    latent = posterior.mean + posterior.std * noise
    torch.testing.assert_close(ours(x, noise).pixels, other.decode(latent).sample, rtol=1e-5, atol=1e-5)


def test_the_published_autoencoder_has_its_83_653_863_parameters():
    """Stable Diffusion's and LDM's f = 8 with 4 latent channels."""
    with torch.device("meta"):
        model = KLAutoencoder(3, [128, 256, 512, 512], 2, 4)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863


def test_it_begins_as_a_function_of_the_seed_whose_blocks_do_nothing_yet():
    models = [KLAutoencoder(3, [8, 16], 1, 4) for _ in range(2)]
    for model in models:
        initialize(model, 3)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    middle = models[0].encoder.mid_block
    assert torch.equal(middle(x), x)
