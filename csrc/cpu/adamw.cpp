#include <cmath>

// The header says which products are fused.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "adamw.h"

#define KLOSS_NAME generic
#include "adamw.inl"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KLOSS_X86 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define KLOSS_NAME avx2
#include "adamw.inl"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define KLOSS_NAME avx512
#include "adamw.inl"
#pragma GCC pop_options
#endif

namespace kloss::cpu {

const AdamWParts* adamw_parts(int64_t variant) {
#if KLOSS_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && variant-- == 0)
    return avx512::PARTS;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && variant-- == 0) return avx2::PARTS;
#endif
  return variant == 0 ? generic::PARTS : nullptr;
}

}  // namespace kloss::cpu
