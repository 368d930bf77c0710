#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

// Behind the standard headers: other files share their functions.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include <immintrin.h>

#define KLOSS_NAME avx512_bf16
#define KLOSS_BF16 1
#define KLOSS_LANES 16
#define KLOSS_ROWS 8
#include "heads.inl"
#endif
