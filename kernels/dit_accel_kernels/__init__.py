"""Kernels of dit_accel: tensors in, tensors out; knows neither diffusers nor dit_accel."""

from dit_accel_kernels.attention import block_sparse_attention, choose_implementation
from dit_accel_kernels.errors import KernelError, KernelUnavailableError
from dit_accel_kernels.mask import BlockMask
from dit_accel_kernels.nearest import nearest_codewords
from dit_accel_kernels.vq_forward import vq_linear

__all__ = [
    "BlockMask",
    "KernelError",
    "KernelUnavailableError",
    "block_sparse_attention",
    "choose_implementation",
    "nearest_codewords",
    "vq_linear",
]
