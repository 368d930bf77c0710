#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

// Behind the standard headers: other files share their functions.
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#define KLOSS_NAME avx2_f32
#define KLOSS_BF16 0
#define KLOSS_LANES 8
#define KLOSS_ROWS 6
#include "heads.inl"
#endif
