// A product C [m, n] = A [m, k] B [k, n] in registers.
//
// k is counted in units: one fp32, or two neighbouring bf16, which one step of the processor multiplies. A is read in place,
// through a pointer for each row. B is packed as b[u][c], COLUMNS or W columns at a time.

#include <algorithm>

#include "vectors.inl"

namespace kloss::cpu::KLOSS_NAME {
namespace {

// Copies n < 2 * W elements, in pieces whose sizes the compiler knows.
inline void copy_few(const Scalar* from, int64_t n, Scalar* to) {
#pragma GCC unroll 8
  for (int piece = W; piece; piece /= 2)
    if (n & piece) {
      std::memcpy(to, from, piece * sizeof(Scalar));
      from += piece, to += piece;
    }
}

// One round of a transposition: lane i of v[j] and lane i ^ STEP of v[j ^ STEP] change places where i has bit STEP and j has not.
template <int STEP>
inline void exchange(Ints* v) {
  Ints low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = i & STEP ? W + (i ^ STEP) : i;
    high[i] = i & STEP ? W + i : i ^ STEP;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & STEP) continue;
    Ints a = v[i], b = v[i ^ STEP];
    v[i] = __builtin_shuffle(a, b, low);
    v[i ^ STEP] = __builtin_shuffle(a, b, high);
  }
}

// Writes W units of each of W rows as W rows of `out`.
inline void transpose(const Scalar* const* rows, int64_t u, Unit* out, int64_t stride) {
  Ints v[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) std::memcpy(&v[i], rows[i] + u * PER, sizeof v[i]);
  exchange<1>(v);
  exchange<2>(v);
  if constexpr (W > 4) exchange<4>(v);
  if constexpr (W > 8) exchange<8>(v);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) std::memcpy(out + i * stride, &v[i], sizeof v[i]);
}

// Packs columns that are rows of `source` [columns, k]: b[u][c] = source[c][u].
inline void pack_transposed(const Scalar* source, int64_t stride, int64_t columns, int64_t k, Unit* b) {
  int64_t width = columns > W ? COLUMNS : W, all = units(k);
  for (int64_t c0 = 0; c0 < width; c0 += W) {
    const Scalar* rows[W];
    int64_t done = 0;
    for (int i = 0; i < W; ++i) rows[i] = source + std::min<int64_t>(c0 + i, columns - 1) * stride;  // the last fills the width
    for (; done + W * PER <= k; done += W * PER) transpose(rows, done / PER, b + done / PER * width + c0, width);
    if (done == k) continue;
    Scalar parts[W][W * PER] = {};
    for (int i = 0; i < W; ++i) {
      copy_few(rows[i] + done, k - done, parts[i]);
      rows[i] = parts[i];
    }
    Unit turned[W * W];
    transpose(rows, 0, turned, W);
    for (int64_t u = done / PER; u < all; ++u) std::copy_n(turned + (u - done / PER) * W, W, b + u * width + c0);
  }
}

// Packs columns that lie side by side in k rows: b[u][c] = (row(u * PER)[c], row(u * PER + 1)[c]); a null row is zeros.
template <class Row>
void pack_rows(Row row, int64_t columns, int64_t k, Unit* b, int64_t width) {
  const Scalar zeros[W] = {};
  for (int64_t u = 0; u < units(k); ++u) {
    const Scalar* source[PER];
    for (int i = 0; i < PER; ++i) source[i] = u * PER + i < k ? row(u * PER + i) : nullptr;
    for (int64_t c = 0; c < width; c += W) {
      Unit* out = b + u * width + c;
#if !KLOSS_BF16
      if (c + W > columns || !source[0]) {
        std::fill_n(out, W, 0.0f);
        if (source[0] && c < columns) copy_few(source[0] + c, columns - c, out);
        continue;
      }
#endif
      Scalar part[PER][W];
      const Scalar* from[PER];
      for (int i = 0; i < PER; ++i) {
        from[i] = source[i] && c < columns ? source[i] + c : zeros;
        if (c < columns && c + W > columns && source[i]) {
          std::fill_n(part[i], W, Scalar(0));
          std::copy_n(source[i] + c, columns - c, part[i]);
          from[i] = part[i];
        }
      }
#if KLOSS_BF16
      __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from[0]));
      __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from[1]));
      _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
      std::memcpy(out, from[0], W * sizeof(Unit));
#endif
    }
  }
}

inline Unit read(const Unit* p) {  // two bf16 may lie at an odd element
  Unit out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

// at(u): where the V vectors of row u of B lie.
template <int V, class At>
inline void tile(const Unit* const* a, int64_t step, At at, int64_t k, float (*out)[COLUMNS]) {
  Floats sum[ROWS][V] = {};
  for (int64_t u = 0; u < k; ++u) {
    const Unit* b = at(u);
#if KLOSS_BF16
    Ints column[V];
#else
    Floats column[V];
#endif
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) std::memcpy(&column[v], b + v * W, sizeof column[v]);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = dot(sum[i][v], read(a[i] + u * step), column[v]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) std::memcpy(&out[i][v * W], &sum[i][v], sizeof sum[i][v]);
}

constexpr int64_t PACKED = 1 << 16;  // units of B that are packed at once: they fit the second-level cache

// C [m, columns] = A B. A tile of rows meets all packed columns before the next tile does.
//
// a(i): row i of A, its units `step` apart.
// pack(c, width, b): packs columns c..c+width-1 of B into b.
// put(i, c, width, values): stores row i's columns c..c+width-1 of C.
template <class A, class Pack, class Put>
void product(int64_t m, int64_t columns, int64_t k, int64_t step, A a, Pack pack, Put put) {
  int64_t block = std::max<int64_t>(1, PACKED / (k * COLUMNS)) * COLUMNS;
  Unit* packed = scratch<0, Unit>(k * std::min(block, (columns + COLUMNS - 1) / COLUMNS * COLUMNS));
  alignas(64) float out[ROWS][COLUMNS];
  for (int64_t first = 0; first < columns; first += block) {
    int64_t last = std::min(columns, first + block);
    for (int64_t c = first; c < last; c += COLUMNS) pack(c, std::min<int64_t>(last - c, COLUMNS), packed + (c - first) * k);
    for (int64_t i = 0; i < m; i += ROWS) {
      const Unit* rows[ROWS];
      for (int j = 0; j < ROWS; ++j) rows[j] = a(std::min(i + j, m - 1));
      for (int64_t c = first; c < last; c += COLUMNS) {
        int64_t width = std::min<int64_t>(last - c, COLUMNS);
        const Unit* b = packed + (c - first) * k;
        if (width > W)
          tile<VECTORS>(rows, step, [=](int64_t u) { return b + u * COLUMNS; }, k, out);
        else
          tile<1>(rows, step, [=](int64_t u) { return b + u * W; }, k, out);
        for (int64_t j = 0; j < std::min<int64_t>(ROWS, m - i); ++j) put(i + j, c, width, out[j]);
      }
    }
  }
}

#if !KLOSS_BF16
// Asks for a row, front to back as memory likes it; columns of many rows would be asked for a line here and a line there.
inline void fetch(const float* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(row + i, 0, 2);
}

constexpr int64_t THIN = 2 * ROWS;  // rows of A, for so few of which it does not pay to pack B

// `product` of a thin A with rows b[0]..b[k-1], read in place. columns: a multiple of COLUMNS. put(i, c, values): COLUMNS of them.
template <class A, class Put>
void thin_product(int64_t m, int64_t columns, int64_t k, int64_t step, A a, const float* const* b, Put put) {
  alignas(64) float out[ROWS][COLUMNS];
  for (int64_t c = 0; c < columns; c += COLUMNS)
    for (int64_t i = 0; i < m; i += ROWS) {
      const Unit* rows[ROWS];
      for (int j = 0; j < ROWS; ++j) rows[j] = a(std::min(i + j, m - 1));
      tile<VECTORS>(rows, step, [=](int64_t u) { return b[u] + c; }, k, out);
      for (int64_t j = 0; j < std::min<int64_t>(ROWS, m - i); ++j) put(i + j, c, out[j]);
    }
}
#endif

// Stores `width` values, scaled and rounded.
inline void put_row(Scalar* out, const float* values, float scale, int64_t width) {
  int64_t c = 0;
  Floats v;
  for (; c + W <= width; c += W) {
    std::memcpy(&v, values + c, sizeof v);
    store(out + c, v * scale);
  }
  for (; c < width; ++c) out[c] = narrow(values[c] * scale);
}

// Sums a product over an adapter's rows from..to-1, ROW_BLOCK of them at a time: C [m, columns], scaled, row i stored at out(i).
// block(first, last, put): computes the product over rows first..last-1.
template <class Block, class Out>
void reduce(int64_t from, int64_t to, int64_t m, int64_t columns, float scale, Block block, Out out) {
  bool once = to - from <= ROW_BLOCK;
  float* sums = once ? nullptr : scratch<3, float>(m * columns);
  if (!once) std::fill_n(sums, m * columns, 0.0f);
  for (int64_t first = from; first < to; first += ROW_BLOCK) {
    block(first, std::min(to, first + ROW_BLOCK), [&](int64_t i, int64_t c, int64_t width, const float* values) {
      if (once)
        put_row(out(i) + c, values, scale, width);
      else
        for (int64_t w = 0; w < width; ++w) sums[i * columns + c + w] += values[w];
    });
  }
  if (!once)
    for (int64_t i = 0; i < m; ++i) put_row(out(i), sums + i * columns, scale, columns);
}

// Stride of a packed matrix: not a multiple of 4 KiB, whose rows would share cache sets.
inline int64_t packed_stride(int64_t columns) { return (columns + W - 1) / W * W + W; }

// A of a reduction: the columns of row(0)..row(n-1) become its rows.
template <class Row>
Unit* columns_as_rows(Row row, int64_t columns, int64_t n) {
  int64_t width = packed_stride(columns);
  Unit* packed = scratch<4, Unit>(units(n) * width);
  pack_rows(row, columns, n, packed, width);
  return packed;
}

}  // namespace
}  // namespace kloss::cpu::KLOSS_NAME
