"""Rivals of vector-quantised weights: what people use at 2 to 4 bits, all with one contract, for layers of any size.

A rival takes (weight [O, I], hessian [I, I] or None) and returns (dense float32 [O, I], the weight that it would
compute with, bytes that it stores). What counts as stored: codes packed at their own number of bits, whole bytes a
layer; scales and offsets at the size in which the method keeps them (float16 for RTN and GPTQ; what the byte layout has
for GGUF; bfloat16 scales and int8 zero points for torchao's intx, whose tensors on a CPU really hold a byte a code;
every tensor as it is, float32 scales included, for SDNQ, whose defaults those are); an order of inputs at 2 bytes an
input. Biases, names and headers do not count, for ours neither.

Groups are 128 inputs of a row (32 for torchao), or where a row is shorter or no multiple of that, the largest smaller
divisor of it; the whole row where that would be below 16.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dit_accel.bench import weight_kquants
from dit_accel.errors import ArgumentError
from dit_accel.weights.scalar import Scalar, gptq, round_to_nearest

Quantiser = Callable[[Tensor, Tensor | None], tuple[Tensor, int]]
_SMALLEST_GROUP = 16


@dataclasses.dataclass(frozen=True)
class Rival:
    """A method. bits: of one code; function: the contract above; about: what it is and where it comes from."""

    name: str
    bits: int
    function: Quantiser
    about: str


def group_of(inputs: int, most: int = 128) -> int:
    """Inputs of a group: the largest divisor of the row that is at most `most`, or the row where that is below 16."""
    group = next(size for size in range(min(most, inputs), 0, -1) if inputs % size == 0)
    return group if group >= _SMALLEST_GROUP else inputs


def rounded(weight: Tensor, hessian: Tensor | None, *, bits: int) -> tuple[Tensor, int]:
    """Round to nearest; the range of a group is clipped where that lowers the squared error."""
    del hessian
    return _scalar(round_to_nearest(weight, bits, group=group_of(weight.shape[1])))


def with_gptq(weight: Tensor, hessian: Tensor | None, *, bits: int, order: bool) -> tuple[Tensor, int]:
    """GPTQ with the same groups; order: inputs with the largest diag(H) first (`desc_act`)."""
    if hessian is None:
        raise ArgumentError("GPTQ was given no Hessian; collect one from calibration runs.")
    group = group_of(weight.shape[1])
    if not order:
        return _scalar(gptq(weight, hessian, bits, group=group))
    places = hessian.diagonal().argsort(descending=True)
    dense, nbytes = _scalar(gptq(weight[:, places], hessian[places][:, places], bits, group=group))
    return dense[:, places.argsort()], nbytes + 2 * weight.shape[1]


def _scalar(made: Scalar) -> tuple[Tensor, int]:
    """As it would be stored: scales and offsets in float16."""
    made = dataclasses.replace(made, scale=made.scale.half().float(), offset=made.offset.half().float())
    return made.dense(), _packed(made.codes, made.bits) + 4 * made.scale.numel()


def _packed(codes: Tensor, bits: int) -> int:
    return -(-codes.numel() * bits // 8)


def gguf(weight: Tensor, hessian: Tensor | None, *, kind: str, important: bool) -> tuple[Tensor, int]:
    """A K-quant; important: errors weighted by diag(H), as with an importance matrix of llama.cpp."""
    if important and hessian is None:
        raise ArgumentError("An importance matrix was asked for without a Hessian; collect one from calibration runs.")
    importance = hessian.diagonal() if important and hessian is not None else None
    dense, packed = weight_kquants.quantise(weight, kind, importance)
    return dense, packed.numel()


def torchao_intx(weight: Tensor, hessian: Tensor | None, *, bits: int, hqq: bool) -> tuple[Tensor, int]:
    """torchao's IntxWeightOnlyConfig: groups of 32, asymmetric from the range, or symmetric with HQQ's scales.

    Its own default, symmetric from the range, is worse than either: .22, .041, .0090 on Gaussian weights at 2, 3 and 4
    bits against .16, .030, .0067 and .137, .034, .0079.
    """
    del hessian
    ao = _package("torchao.quantization", "torchao")
    algorithms = _package("torchao.quantization.quantize_.workflows", "torchao").IntxChooseQParamsAlgorithm
    layer = _linear(weight.float())
    config = ao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=ao.PerGroup(group_of(weight.shape[1], 32)),
        mapping_type=ao.MappingType.SYMMETRIC if hqq else ao.MappingType.ASYMMETRIC,
        scale_dtype=torch.bfloat16,
        intx_choose_qparams_algorithm=algorithms.HQQ_SCALE_ONLY if hqq else algorithms.AFFINE,
    )
    ao.quantize_(layer, config)
    made: Any = layer.weight
    zeros = 0 if hqq else made.zero_point.numel()
    return made.dequantize().float(), _packed(made.qdata, bits) + 2 * made.scale.numel() + zeros


def torchao_int4(weight: Tensor, hessian: Tensor | None) -> tuple[Tensor, int]:
    """torchao's PrototypeInt4WeightOnlyConfig with HQQ in groups of 32 and bfloat16, its one int4 kernel for CPUs.

    Inputs are filled up with zeros to a multiple of 32 and outputs to one of 16, which costs bytes; torchao itself
    would leave such a layer as it is, or refuse it. Read back by multiplying with 1. Int4WeightOnlyConfig does not run
    on CPUs in torchao 0.18: its formats plain and preshuffled need mslk, plain-int32 an XPU or NPU, tile-packed CUDA.
    """
    del hessian
    ao = _package("torchao.quantization", "torchao")
    prototype = _package("torchao.prototype.quantization.int4", "torchao")
    outputs, inputs = weight.shape
    layer = _linear(nn.functional.pad(weight, (0, -inputs % 32, 0, -outputs % 16)).bfloat16())
    config = prototype.PrototypeInt4WeightOnlyConfig(
        group_size=32, int4_choose_qparams_algorithm="hqq", set_inductor_config=False
    )
    ao.quantize_(layer, config)
    with torch.no_grad():
        dense = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T.float()
    made: Any = layer.weight
    nbytes = sum(t.numel() * t.element_size() for t in (made.qdata, made.scale_and_zero))
    return dense[:outputs, :inputs].contiguous(), nbytes


def sdnq(weight: Tensor, hessian: Tensor | None, *, bits: int, scales: str | None) -> tuple[Tensor, int]:
    """SDNQ's unsigned codes with its own choice of group; scales: what they are quantised to in turn, or None.

    Layers below 16384 weights, which it would leave as they are, are quantised as well. A number of weights that is no
    multiple of 4 (2 bits) or 8 (3 bits) it cannot pack, and raises RuntimeError.
    """
    del hessian
    with mock.patch.dict(os.environ, {"SDNQ_USE_TORCH_COMPILE": "0"}):  # compiling takes seconds for every shape
        package = _package("sdnq", "sdnq")
    config = package.SDNQConfig(
        weights_dtype=f"uint{bits}", scale_dtype=scales, minimum_allowed_numel=1, minimum_allowed_channel_size=1
    )
    model, _ = package.apply_sdnq_to_module(nn.Sequential(_linear(weight.float())), config, torch_dtype=torch.float32)
    made = model[0]
    if not hasattr(made, "sdnq_dequantizer"):
        raise ArgumentError(f"SDNQ left a layer of shape {list(weight.shape)} as it was.")
    nbytes = sum(t.numel() * t.element_size() for t in made.parameters())
    return made.dequantize().weight.detach().float(), nbytes


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer


def _package(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{name} is needed for this rival and cannot be imported ({error}); pip install {name}"
        ) from error


def _rivals() -> list[Rival]:
    def with_(function: Callable[..., tuple[Tensor, int]], **settings: object) -> Quantiser:
        return lambda weight, hessian: function(weight, hessian, **settings)

    found = []
    for bits, kind in zip((2, 3, 4), weight_kquants.LAYOUTS):
        found += [
            Rival(f"rtn-int{bits}", bits, with_(rounded, bits=bits), "round to nearest, groups of 128, clipped"),
            Rival(f"gptq-int{bits}", bits, with_(with_gptq, bits=bits, order=False), "GPTQ 2210.17323, groups of 128"),
            Rival(
                f"gptq-order-int{bits}",
                bits,
                with_(with_gptq, bits=bits, order=True),
                "GPTQ, inputs in the order of diag(H) (desc_act)",
            ),
            Rival(
                f"gguf-{kind.lower()}",
                bits,
                with_(gguf, kind=kind, important=False),
                f"GGUF {kind} of llama.cpp, no data",
            ),
            Rival(
                f"gguf-{kind.lower()}-imatrix",
                bits,
                with_(gguf, kind=kind, important=True),
                f"GGUF {kind} of llama.cpp, with diag(H) as importance matrix",
            ),
            Rival(
                f"torchao-int{bits}",
                bits,
                with_(torchao_intx, bits=bits, hqq=False),
                "torchao IntxWeightOnlyConfig, groups of 32, asymmetric (a byte a code on a CPU, counted packed)",
            ),
            Rival(
                f"torchao-hqq-int{bits}",
                bits,
                with_(torchao_intx, bits=bits, hqq=True),
                "torchao IntxWeightOnlyConfig, groups of 32, HQQ scales (a byte a code on a CPU, counted packed)",
            ),
            Rival(f"sdnq-uint{bits}", bits, with_(sdnq, bits=bits, scales=None), "SDNQ, its defaults (float32 scales)"),
            Rival(
                f"sdnq-double-uint{bits}",
                bits,
                with_(sdnq, bits=bits, scales="uint8"),
                "SDNQ, scales and zero points quantised to uint8",
            ),
        ]
    found.append(
        Rival("torchao-kernel-int4", 4, torchao_int4, "torchao PrototypeInt4WeightOnlyConfig, HQQ, groups of 32")
    )
    return found


RIVALS: dict[str, Rival] = {rival.name: rival for rival in _rivals()}
