// Which of an operator's variants run on this processor. A table names them from the widest instructions to the plainest.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kloss {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KLOSS_X86 1
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
inline bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

// The variant-th kind that this processor supports, 0 being the fastest; null if there are fewer.
template <class Kind, size_t N>
const Kind* pick(const Kind (&kinds)[N], int64_t variant) {
  for (const Kind& kind : kinds)
    if (kind.supported && variant-- == 0) return &kind;
  return nullptr;
}

}  // namespace kloss
