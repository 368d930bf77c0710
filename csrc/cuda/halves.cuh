// Numbers of 16 bits, two in a register, and the draws of dropout that keep or drop them: kloss/kernels/dropout.py.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

namespace kloss {

using BFPair = __nv_bfloat162;  // two neighbours
using FPPair = __half2;
using Half = uint16_t;

__device__ __forceinline__ float2 unpack(BFPair two) { return __bfloat1622float2(two); }
__device__ __forceinline__ float2 unpack(FPPair two) { return __half22float2(two); }
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t two) {
  return unpack(*(T*)&two);
}
template <class T>
__device__ __forceinline__ uint32_t halves(float a, float b) {
  T two;
  if constexpr (std::is_same_v<T, BFPair>)
    two = __floats2bfloat162_rn(a, b);
  else
    two = __floats2half2_rn(a, b);
  return *(uint32_t*)&two;
}

// What a pair of neighbouring features draws at a site, 16 bits each.
__device__ __forceinline__ uint32_t draw(uint32_t pair, uint64_t key) {
  uint32_t h = pair * 0x9E3779B1u ^ (uint32_t)key;
  h = (h ^ h >> 16) * 0x7FEB352Du;
  h ^= h >> 15;
  h = (h ^ (uint32_t)(key >> 32)) * 0x846CA68Bu;
  return h ^ h >> 16;
}

// A draw keeps its feature if it is at least this.
__device__ __forceinline__ uint32_t threshold_of(float p) { return (uint32_t)min((int)rintf(p * 65536.0f), 65535); }
__device__ __forceinline__ float scale_of(uint32_t threshold) { return __fdiv_rn(65536.0f, (float)(65536 - threshold)); }

}  // namespace kloss
