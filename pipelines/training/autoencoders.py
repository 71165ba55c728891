"""Autoencoders with weights set by hand: the identity for images, a projection of small patches for video."""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKLWan, AutoencoderTiny
from torch import Tensor, nn

LATENT_UNIT = 2.0**-10  # latents of the image autoencoder are tiny, so that its tanh clamp is linear to 3e-7
PATCH = 4  # pixels a side of one latent of the video autoencoder
_OFFSET = 20.0  # SiLU(y) = y to 1e-7 where y > 19
_CONSTANT = 1e5  # a channel so large that the norm of a pixel's channels does not depend on the pixel


@torch.no_grad()
def identity_autoencoder() -> AutoencoderTiny:
    """`AutoencoderTiny` that is the identity: centre taps only; x = relu(x) - relu(-x) passes the decoder's ReLU."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(6,),
        decoder_block_out_channels=(6,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=3,
        act_fn="relu",
        scaling_factor=1.0 / LATENT_UNIT,
        shift_factor=0.0,
    )
    for parameter in vae.parameters():
        parameter.zero_()
    encoder = [m for m in vae.encoder.modules() if isinstance(m, nn.Conv2d)]
    decoder = [m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d)]
    for c in range(3):
        encoder[0].weight[c, c, 1, 1] = 1.0  # the encoder maps [-1, 1] to [0, 1] before its first layer
        encoder[1].weight[c, c, 1, 1] = 2.0 * LATENT_UNIT
        encoder[1].bias[c] = -LATENT_UNIT
        decoder[0].weight[c, c, 1, 1] = 1.0
        decoder[0].weight[c + 3, c, 1, 1] = -1.0
        decoder[1].weight[c, c, 1, 1] = 0.5 / LATENT_UNIT
        decoder[1].weight[c, c + 3, 1, 1] = -0.5 / LATENT_UNIT
        decoder[1].bias[c] = 0.5  # the decoder maps [0, 1] back to [-1, 1] after its last layer
    return vae.eval()


@torch.no_grad()
def linear_video_autoencoder(basis: Tensor, mean: Tensor, scale: float) -> AutoencoderKLWan:
    """`AutoencoderKLWan` that maps 4 x 4 pixels x of a frame to z = basis (x - mean), and back by its transpose.

    basis: [Z, 48], rows of length one at right angles; mean: [48]; scale: z is divided by it before it meets noise.
    No compression in time. Residual blocks and attention add nothing (their last layers are zero). What is left is RMS
    norm, SiLU and a convolution: an offset keeps SiLU in its linear part, and a huge constant channel makes the norm a
    constant. In float32 the way through errs by about 1e-5; in bfloat16 the offset costs the small digits.
    """
    latents, pixels = basis.shape
    width = latents + 1  # and the constant
    vae = AutoencoderKLWan(
        base_dim=width,
        z_dim=latents,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        latents_mean=[0.0] * latents,
        latents_std=[scale] * latents,
        in_channels=pixels,
        out_channels=pixels,
        patch_size=PATCH,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
    )
    for name, parameter in vae.named_parameters():
        parameter.fill_(1.0 if name.endswith("gamma") else 0.0)
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        convolution.weight[:, :, 0, 0, 0] = torch.eye(len(convolution.weight))
    length = math.sqrt(_CONSTANT**2 + latents * _OFFSET**2)
    for half in (vae.encoder, vae.decoder):
        half.conv_in.bias[:latents] = _OFFSET
        half.conv_in.bias[latents] = _CONSTANT
        half.norm_out.gamma.fill_(length / math.sqrt(width))
    # Causal: the last tap in time is the present.
    vae.encoder.conv_in.weight[:latents, :, -1, 1, 1] = basis
    vae.encoder.conv_in.bias[:latents] -= basis @ mean
    vae.encoder.conv_out.weight[:latents, :latents, -1, 1, 1] = torch.eye(latents)
    vae.encoder.conv_out.bias[:latents] = -_OFFSET
    vae.encoder.conv_out.bias[latents:] = -30.0  # log-variance: the latent is its mean
    vae.decoder.conv_in.weight[:latents, :, -1, 1, 1] = torch.eye(latents)
    vae.decoder.conv_out.weight[:, :latents, -1, 1, 1] = basis.T
    vae.decoder.conv_out.bias[:] = mean - _OFFSET * basis.sum(0)
    return vae.eval()
