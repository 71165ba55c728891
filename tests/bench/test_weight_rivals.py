"""Rivals of vector-quantised weights: one contract, honest bytes, errors where they are known to lie, real K-quants."""

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from dit_accel.bench import weight_kquants
from dit_accel.bench.weight_rivals import RIVALS, Rival, group_of
from dit_accel.errors import ArgumentError
from dit_accel.weights.hessian import output_error

NEEDS = {"torchao": "torchao", "sdnq": "sdnq"}
# Share of the energy of Gaussian weights that is lost: .115, .034, .0089 for clipped RTN in the research notes.
GAUSSIAN = {
    "rtn-int2": (0.105, 0.125),
    "rtn-int3": (0.030, 0.037),
    "rtn-int4": (0.0080, 0.0098),
    "gguf-q2_k": (0.060, 0.075),
    "gguf-q3_k": (0.018, 0.023),
    "gguf-q4_k": (0.0044, 0.0055),
    "torchao-int2": (0.15, 0.18),
    "torchao-int3": (0.027, 0.033),
    "torchao-int4": (0.0060, 0.0073),
    "torchao-hqq-int2": (0.125, 0.15),
    "torchao-hqq-int3": (0.030, 0.037),
    "torchao-hqq-int4": (0.0070, 0.0088),
    "torchao-kernel-int4": (0.0050, 0.0065),
    "sdnq-uint2": (0.09, 0.12),
    "sdnq-uint3": (0.025, 0.032),
    "sdnq-uint4": (0.0070, 0.0090),
}
# Bits a weight of a layer [256, 384]: groups of 128, 32 or 16 as each method has them.
BITS = {
    "rtn-int2": 2 + 32 / 128,
    "gptq-int3": 3 + 32 / 128,
    "gptq-order-int4": 4 + 32 / 128 + 16 / 256,
    "gguf-q2_k": 2.625,
    "gguf-q3_k": 3.4375,
    "gguf-q4_k-imatrix": 4.5,
    "torchao-int2": 2 + 24 / 32,
    "torchao-hqq-int3": 3 + 16 / 32,
    "torchao-kernel-int4": 4 + 32 / 32,
    "sdnq-uint2": 2 + 64 / 16,
    "sdnq-uint3": 3 + 64 / 32,
}


def drawn(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian weights [O, I] and the Hessian [I, I] of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(outputs, inputs, generator=generator)
    mixed = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    x = mixed * torch.logspace(-1, 1, inputs)
    return weight, x.T @ x


def available(name: str) -> Rival:
    for prefix, package in NEEDS.items():
        if name.startswith(prefix) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return RIVALS[name]


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_keeps_the_contract(name: str) -> None:
    weight, hessian = drawn(48, 80)
    before = weight.clone()
    rival = available(name)
    dense, nbytes = rival.function(weight, hessian)
    assert rival.name == name and rival.about and rival.bits in (2, 3, 4) and str(rival.bits) in name
    assert dense.shape == weight.shape and dense.dtype == torch.float32 and torch.isfinite(dense).all()
    assert torch.equal(weight, before) and dense.data_ptr() != weight.data_ptr()
    assert isinstance(nbytes, int) and weight.numel() * rival.bits <= 8 * nbytes < weight.numel() * 8
    error = output_error(weight, dense, hessian)
    assert 0 < error < {2: 0.3, 3: 0.08, 4: 0.02}[rival.bits]
    again, same = rival.function(weight, hessian)
    assert same == nbytes and (torch.equal(again, dense) or name.startswith("sdnq"))


@pytest.mark.parametrize("name", GAUSSIAN)
def test_errors_on_gaussian_weights_are_the_known_ones(name: str) -> None:
    weight, _ = drawn(256, 384)
    low, high = GAUSSIAN[name]
    assert low < output_error(weight, available(name).function(weight, None)[0]) < high


@pytest.mark.parametrize("name", BITS)
def test_bytes_are_those_of_the_format(name: str) -> None:
    weight, hessian = drawn(256, 384)
    assert 8 * available(name).function(weight, hessian)[1] / weight.numel() == pytest.approx(BITS[name])


def test_groups_are_divisors_of_the_row() -> None:
    assert [group_of(inputs) for inputs in (96, 128, 384, 480, 80, 1152, 131, 262)] == [
        96, 128, 128, 120, 80, 128, 131, 262
    ]  # fmt: skip
    assert [group_of(inputs, 32) for inputs in (96, 80, 50, 7)] == [32, 20, 25, 7]


@pytest.mark.parametrize("name", [name for name in RIVALS if not name.startswith("sdnq")])
def test_odd_shapes(name: str) -> None:
    weight, hessian = drawn(7, 50)
    dense, nbytes = available(name).function(weight, hessian)
    assert dense.shape == weight.shape and 8 * nbytes >= RIVALS[name].bits * weight.numel()
    assert output_error(weight, dense) < 0.9


def test_data_helps_where_it_is_used() -> None:
    weight, hessian = drawn(128, 96)
    for bits in (2, 3, 4):
        made = {name: output_error(weight, RIVALS[name].function(weight, hessian)[0], hessian) for name in (
            f"rtn-int{bits}", f"gptq-int{bits}", f"gptq-order-int{bits}", f"gguf-q{bits}_k", f"gguf-q{bits}_k-imatrix"
        )}  # fmt: skip
        assert made[f"gptq-order-int{bits}"] < made[f"gptq-int{bits}"] < made[f"rtn-int{bits}"]
        assert made[f"gguf-q{bits}_k-imatrix"] < made[f"gguf-q{bits}_k"]


@pytest.mark.parametrize("name", ["gptq-int2", "gptq-order-int3", "gguf-q4_k-imatrix"])
def test_what_needs_data_says_so(name: str) -> None:
    with pytest.raises(ArgumentError, match="Hessian"):
        RIVALS[name].function(torch.randn(8, 64), None)


@pytest.mark.parametrize("name", ["torchao-int2", "torchao-kernel-int4", "sdnq-uint4"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr("dit_accel.bench.weight_rivals.importlib.import_module", missing)
    with pytest.raises(ImportError, match=f"pip install {name.split('-')[0]}"):
        RIVALS[name].function(torch.randn(32, 64), None)


# ------------------------------------------------------------------------------------------------------------ K-quants


def weights_of(kind: str) -> Tensor:
    """Weights of one kind that a layout may meet: [O, I]."""
    generator = torch.Generator().manual_seed(1)
    gauss = torch.randn(40, 256, generator=generator)
    return {
        "gauss": gauss,
        "tiny": 1e-4 * gauss,
        "heavy tails": gauss**3,
        "all positive": gauss.abs() + 1,
        "all negative": -gauss.abs() - 1,
        "odd": gauss[:33, :90],
        "zero": torch.zeros(3, 50),
        "rows of zeros": gauss * (torch.arange(40) % 2).unsqueeze(1),
    }[kind]


@pytest.mark.parametrize(
    "weights", ["gauss", "tiny", "heavy tails", "all positive", "all negative", "odd", "zero", "rows of zeros"]
)
@pytest.mark.parametrize("kind", weight_kquants.LAYOUTS)
def test_k_quants_are_read_by_gguf_as_we_say(kind: str, weights: str) -> None:
    package = pytest.importorskip("gguf")
    weight = weights_of(weights)
    dense, packed = weight_kquants.quantise(weight, kind)
    blocks = math.ceil(weight.numel() / 256)
    name = package.GGMLQuantizationType[kind]
    assert packed.dtype == torch.uint8 and packed.shape == (blocks, package.GGML_QUANT_SIZES[name][1])
    read = torch.from_numpy(package.quants.dequantize(packed.numpy(), name)).flatten()
    assert torch.equal(read[: weight.numel()].view(weight.shape), dense)


def read(packed: Tensor, kind: str) -> Tensor:
    """diffusers' own reader of GGUF -> float32 [N, 256]."""
    package = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    function = utils.dequantize_functions[package.GGMLQuantizationType[kind]]
    _, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
    return function(packed.clone(), 256, size, dtype=torch.float32)


@pytest.mark.parametrize("kind", weight_kquants.LAYOUTS)
def test_k_quants_are_read_by_diffusers_as_we_say(kind: str) -> None:
    weight = weights_of("gauss")
    dense, packed = weight_kquants.quantise(weight, kind)
    torch.testing.assert_close(read(packed, kind).view(weight.shape), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "levels"), [("Q2_K", 3), ("Q4_K", 15)])
def test_the_search_beats_the_range_of_each_part(kind: str, levels: int) -> None:
    weight = weights_of("gauss")
    parts = weight.view(-1, weight_kquants.LAYOUTS[kind].part)
    low, high = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)
    step = (high - low) / levels
    plain = low + step * ((parts - low) / step).round()  # scales and offsets not even rounded
    assert output_error(weight, weight_kquants.quantise(weight, kind)[0]) < 0.85 * output_error(
        weight, plain.view(weight.shape)
    )


@pytest.mark.parametrize("kind", weight_kquants.LAYOUTS)
def test_inputs_that_matter_are_kept_better(kind: str) -> None:
    weight = weights_of("gauss")
    matter = torch.ones(256)
    matter[::4] = 100.0
    with_it, without = (weight_kquants.quantise(weight, kind, given)[0] for given in (matter, None))

    def error(dense: Tensor) -> float:
        return float((weight - dense)[:, ::4].square().sum())

    assert error(with_it) < 0.7 * error(without)
