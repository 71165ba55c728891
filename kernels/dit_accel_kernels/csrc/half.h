// Half precision in plain C++: bfloat16 and float16 as their bits, and the way to float and back, to nearest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 { uint16_t raw; };
struct Float16 { uint16_t raw; };

inline uint32_t raw_bits(float x) {
    uint32_t raw;
    std::memcpy(&raw, &x, 4);
    return raw;
}
inline float from_bits(uint32_t raw) {
    float x;
    std::memcpy(&x, &raw, 4);
    return x;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return from_bits(uint32_t(x.raw) << 16); }
inline float widen(Float16 x) {
    float magnitude = from_bits(uint32_t(x.raw & 0x7fff) << 13) * 0x1p112f;  // moves the exponent, subnormals too
    uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;             // infinity and NaN
    return from_bits(raw_bits(magnitude) | special | uint32_t(x.raw & 0x8000) << 16);
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, BFloat16& to) {
    uint32_t raw = raw_bits(x);
    uint32_t rounded = (raw + 0x7fff + (raw >> 16 & 1)) >> 16;  // to nearest, ties to even
    to.raw = uint16_t(x != x ? 0x7fc0 : rounded);
}
inline void narrow(float x, Float16& to) {
    float magnitude = std::fabs(x);
    uint32_t raw = raw_bits(magnitude);
    uint32_t normal = (raw - (112u << 23) + 0xfff + (raw >> 13 & 1)) >> 13;
    uint32_t subnormal = raw_bits(magnitude + 0.5f) - raw_bits(0.5f);  // the sum rounds at 2^-24
    uint32_t result = magnitude < 0x1p-14f ? subnormal : normal;
    result = magnitude < 65536.0f ? result : magnitude != magnitude ? 0x7e00u : 0x7c00u;
    to.raw = uint16_t(result | (raw_bits(x) >> 16 & 0x8000));
}

}  // namespace
