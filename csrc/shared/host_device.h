// What the bodies in csrc/shared need to be compiled both for a CPU and for a GPU. No torch.
//
// Everything is inlined, so a body is compiled for the instruction set of the function that calls it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KLOSS_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define KLOSS_HD inline __attribute__((always_inline))
#else
#define KLOSS_HD inline
#endif

namespace kloss {

KLOSS_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

KLOSS_HD float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

KLOSS_HD uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

KLOSS_HD float widen(float value) { return value; }
KLOSS_HD float widen(BF16 value) { return as_float((uint32_t)value.bits << 16); }
KLOSS_HD float widen(FP16 value) {
  // Small numbers through a sum that cannot round, others by moving the exponent.
  uint32_t bits = (uint32_t)value.bits << 16, sign = bits & 0x80000000u, doubled = bits + bits;
  float normal = as_float((doubled >> 4) + 0x70000000u) * 0x1p-112f, small = as_float(doubled >> 17 | 0x3f000000u) - 0.5f;
  return as_float(sign | as_bits(doubled < 0x08000000u ? small : normal));
}

// Rounded to nearest, ties to even, as torch does.
KLOSS_HD void narrow(float value, float& to) { to = value; }
KLOSS_HD void narrow(float value, BF16& to) {
  uint32_t bits = as_bits(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
KLOSS_HD void narrow(float value, FP16& to) {
  // Two products carry what overflows to infinity; a sum with the right power of two rounds at the last bit that is kept.
  uint32_t bits = as_bits(value), sign = bits & 0x80000000u, doubled = bits + bits, bias = doubled & 0xff000000u;
  float base = as_float(bits & 0x7fffffffu) * 0x1p112f * 0x1p-110f;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  uint32_t sum = as_bits(as_float((bias >> 1) + 0x07800000u) + base);
  uint32_t kept = (sum >> 13 & 0x7c00u) + (sum & 0xfffu);
  to.bits = (uint16_t)(sign >> 16 | (doubled > 0xff000000u ? 0x7e00u : kept));
}

}  // namespace kloss
