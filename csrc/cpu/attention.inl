// The code behind attention.h, compiled once for each instruction set and element type; see vectors.inl.
//
// Scores are computed transposed: a row for each key, a lane for each query, COLUMNS queries at a time. So the sums over keys add
// whole vectors, the keys need no padding, and a probability is read by the next product wherever it lies.

#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "attention.h"
#include "product.inl"

namespace kloss::cpu::KLOSS_NAME {
namespace {

inline Floats floats(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Ints ints(const uint32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void put(T* p, V v) { std::memcpy(p, &v, sizeof v); }

// C [m, columns] = A B. C goes to `out`, rounded, or if that is null to `sums`; add: what `sums` holds is added first.
struct Product {
  const Unit* a;
  int64_t a_row, a_step;  // units from a row of A to the next, and along it
  const Unit* b;
  int64_t b_row;
  int64_t k;  // in units
  float* sums;
  int64_t sums_row;
  bool add;
  Scalar* out;
  int64_t out_row;
  const float* scale;  // of each row of C, or null
};

template <int M, int V>
void tile(const Product& p, int64_t i, int64_t c) {
#if KLOSS_BF16
  using Column = Ints;
#else
  using Column = Floats;
#endif
  Floats sum[M][V] = {};
  const Unit *a = p.a + i * p.a_row, *b = p.b + c;
  for (int64_t u = 0; u < p.k; ++u, a += p.a_step, b += p.b_row) {
    Column column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) std::memcpy(&column[v], b + v * W, sizeof column[v]);
#pragma GCC unroll 16
    for (int j = 0; j < M; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[j][v] = dot(sum[j][v], read(a + j * p.a_row), column[v]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      int64_t column = c + v * W;
      if (p.add) sum[j][v] += floats(p.sums + (i + j) * p.sums_row + column);
      if (p.scale) sum[j][v] *= p.scale[i + j];
      if (p.out)
        store(p.out + (i + j) * p.out_row + column, sum[j][v]);
      else
        put(p.sums + (i + j) * p.sums_row + column, sum[j][v]);
    }
}

using Tile = void (*)(const Product&, int64_t, int64_t);
template <int V, size_t... M>
constexpr std::array<Tile, ROWS> tiles(std::index_sequence<M...>) {
  return {tile<M + 1, V>...};
}
constexpr std::array<Tile, ROWS> TILES[VECTORS] = {
    tiles<1>(std::make_index_sequence<ROWS>()), tiles<2>(std::make_index_sequence<ROWS>())};

// columns: a multiple of W.
void multiply(int64_t m, int64_t columns, const Product& p) {
  for (int64_t c = 0; c < columns; c += COLUMNS) {
    const std::array<Tile, ROWS>& of = TILES[columns - c > W];
    for (int64_t i = 0; i < m; i += ROWS) of[std::min<int64_t>(ROWS, m - i) - 1](p, i, c);
  }
}

// One sequence of n rows, and this thread's memory for it. Matrices over keys and queries have rows of `width` lanes.
struct Sequence {
  const Attention& a;
  int64_t n, row, columns;        // row: the first of T. columns: heads * size
  uint32_t *low, *high, *limit;   // [n, and COLUMNS more], the halves of each row's key, and its threshold; last row repeated
  float* scale;                   // [the same]
  Unit *q, *dout;                 // [units(size), width], transposed
  Unit* rows;                     // [units(n), size], V or K with their rows paired
  Unit* paired;                   // [units(n), width], P or dS with their rows paired
  Unit* queries;                  // [units(COLUMNS), size], rows of dout or Q paired
  float *p, *dp;                  // [n, width]
  Scalar *kept, *ds;              // [n, width]
  float *dk, *dv;                 // [n, size], sums over blocks of queries
  alignas(64) float inverse[COLUMNS];

  Sequence(const Attention& a, int64_t s, bool backward)
      : a(a), n(a.cu_seqlens[s + 1] - a.cu_seqlens[s]), row(a.cu_seqlens[s]), columns(a.heads * a.size) {
    int64_t lanes = n + COLUMNS, square = n * COLUMNS;
    low = scratch<0, uint32_t>(4 * lanes), high = low + lanes, limit = high + lanes, scale = (float*)(limit + lanes);
    for (int64_t i = 0; a.keys && i < lanes; ++i) {
      int64_t t = row + std::min(i, n - 1);
      low[i] = (uint32_t)a.keys[t], high[i] = (uint32_t)((uint64_t)a.keys[t] >> 32);
      limit[i] = (uint32_t)(a.threshold[t] + 32768), scale[i] = a.scale[t];
    }
    q = scratch<1, Unit>(2 * units(a.size) * COLUMNS), dout = q + units(a.size) * COLUMNS;
    p = scratch<2, float>(2 * square), dp = p + square;
    rows = scratch<3, Unit>((units(n) + units(COLUMNS)) * a.size), queries = rows + units(n) * a.size;
    paired = scratch<4, Unit>(units(n) * COLUMNS);
    if (!backward) return;
    kept = scratch<5, Scalar>(2 * square), ds = kept + square;
    dk = scratch<6, float>(2 * n * a.size), dv = dk + n * a.size;
  }

  // part: 0 for q, 1 for k, 2 for v.
  const Scalar* in(int64_t part, int64_t head, int64_t i) const {
    return (const Scalar*)a.qkv + (row + i) * a.stride + part * columns + head * a.size;
  }
  const Scalar* gradient(int64_t head, int64_t i) const {
    return (const Scalar*)a.dout + (row + i) * a.dout_stride + head * a.size;
  }

  // Which probabilities of W queries are kept, for keys j and j + 1, j even. i: the first query.
  Keep keep(int64_t i, int64_t head, int64_t j) const {
    Ints h = draws(Ints{} + ((uint32_t)head << 15 | (uint32_t)(j / 2)), ints(low + i), ints(high + i)), least = ints(limit + i);
    return {(Ints)((h & 0xFFFF) >= least), (Ints)((h >> 16) >= least)};
  }

  // B whose rows 0..k-1 are rows of a matrix: in place, or in bf16 paired in `memory`.
  void set_b(Product& product, const Scalar* first, int64_t stride, int64_t k, Unit* memory, bool pack = true) const {
    product.k = units(k);
#if KLOSS_BF16
    if (pack) pack_rows([&](int64_t i) { return first + i * stride; }, a.size, k, memory, a.size);
    product.b = memory, product.b_row = a.size;
#else
    product.b = first, product.b_row = stride;
#endif
  }
  // A whose rows are queries, summed over keys.
  void set_a_over_keys(Product& product, const float* values, int64_t width) const {
#if KLOSS_BF16
    product.a = paired;
#else
    product.a = values;
#endif
    product.a_row = 1, product.a_step = width;
  }

  // Writes (rows j and j + 1 of) a matrix that the next product reads over keys: in fp32 to `values`.
  void put_pair(float* values, int64_t width, int64_t c, int64_t j, Floats first, Floats second) const {
#if KLOSS_BF16
    Ints halves[2];
    for (int i = 0; i < 2; ++i)
      halves[i] = (Ints)_mm512_maskz_cvtepu16_epi32(-1, (__m256i)_mm512_cvtneps_pbh((__m512)(i ? second : first)));
    put(paired + j / 2 * width + c, halves[0] | halves[1] << 16);
#else
    put(values + j * width + c, first);
    if (j + 1 < n) put(values + (j + 1) * width + c, second);
#endif
  }

  // matrix [n, width] = K or V times a transposed block of queries.
  void over_features(int64_t part, int64_t head, const Unit* block, int64_t width, float* matrix) const {
    Product product{};
    product.a = (const Unit*)in(part, head, 0), product.a_row = a.stride / PER, product.a_step = 1;
    product.b = block, product.b_row = width, product.k = units(a.size);
    product.sums = matrix, product.sums_row = width;
    multiply(n, width, product);
  }

  Floats top_of(int64_t width, int64_t c) const {
    Floats top = floats(p + c);
    for (int64_t j = 1; j < n; ++j) {
      Floats score = floats(p + j * width + c);
      top = score > top ? score : top;
    }
    return top;
  }

  // e^(S - max), which `put` gets for keys j and j + 1; returns the sum. Behind the last key it gets 0.
  template <class Put>
  Floats exponentials(int64_t width, int64_t c, float factor, Put put) const {
    Floats top = top_of(width, c), sums[2] = {};
    for (int64_t j = 0; j < n; j += 2) {
      const float* from = p + j * width + c;
      Floats first = exponential((floats(from) - top) * factor), second{};
      if (j + 1 < n) second = exponential((floats(from + width) - top) * factor);
      sums[0] += first, sums[1] += second;
      put(j, first, second);
    }
    return sums[0] + sums[1];
  }
};

void forward_head(Sequence& s, int64_t head) {
  const Attention& a = s.a;
  float factor = 1 / std::sqrt((float)a.size);
  for (int64_t first = 0; first < s.n; first += COLUMNS) {
    int64_t count = std::min<int64_t>(COLUMNS, s.n - first), width = count > W ? COLUMNS : W;
    pack_transposed(s.in(0, head, first), a.stride, count, a.size, s.q);
    s.over_features(1, head, s.q, width, s.p);
    for (int64_t c = 0; c < width; c += W) {
      Floats sum = s.exponentials(width, c, factor, [&](int64_t j, Floats even, Floats odd) {
        if (a.keys) {
          Keep kept = s.keep(first + c, head, j);
          even = select(even, kept.first), odd = select(odd, kept.second);
        }
        s.put_pair(s.p, width, c, j, even, odd);
      });
      put(s.inverse + c, (a.keys ? floats(s.scale + first + c) : Floats{} + 1.0f) / sum);
    }
    Product product{};
    s.set_a_over_keys(product, s.p, width);
    s.set_b(product, s.in(2, head, 0), a.stride, s.n, s.rows, first == 0);
    product.out = (Scalar*)a.out + (s.row + first) * s.columns + head * a.size, product.out_row = s.columns;
    product.scale = s.inverse;
    multiply(count, a.size, product);
  }
}

// P, dP -> dS of W queries, and the kept P, each for the products that read it.
void softmax_backward(Sequence& s, int64_t head, int64_t first, int64_t width, int64_t c, float factor) {
  const Attention& a = s.a;
  Floats sum = s.exponentials(width, c, factor, [&](int64_t j, Floats even, Floats odd) {
    put(s.p + j * width + c, even);
    if (j + 1 < s.n) put(s.p + (j + 1) * width + c, odd);
  });
  Floats inverse = 1.0f / sum, scale = a.keys ? floats(s.scale + first + c) : Floats{}, delta{};
  Keep kept{};
  for (int64_t j = 0; j < s.n; ++j) {
    float *of_p = s.p + j * width + c, *of_dp = s.dp + j * width + c;
    Floats p = floats(of_p) * inverse, dp = floats(of_dp), live = p;
    if (a.keys) {
      if (j % 2 == 0) kept = s.keep(first + c, head, j);
      Ints mask = j % 2 ? kept.second : kept.first;
      live = select(p * scale, mask), dp = select(dp * scale, mask);
      put(of_dp, dp);
    }
    delta += p * dp;
    put(of_p, p);
    store(s.kept + j * width + c, live);
  }
  for (int64_t j = 0; j < s.n; j += 2) {
    Floats ds[2] = {};
    for (int i = 0; i < 2 && j + i < s.n; ++i) {
      int64_t from = (j + i) * width + c;
      ds[i] = floats(s.p + from) * (floats(s.dp + from) - delta) * factor;
      store(s.ds + from, ds[i]);
    }
#if KLOSS_BF16
    s.put_pair(nullptr, width, c, j, ds[0], ds[1]);
#endif
  }
}

void backward_head(Sequence& s, int64_t head) {
  const Attention& a = s.a;
  float factor = 1 / std::sqrt((float)a.size);
  auto gradient = [&](int64_t part, int64_t i) {
    return (Scalar*)a.dqkv + (s.row + i) * 3 * s.columns + part * s.columns + head * a.size;
  };
  for (int64_t first = 0; first < s.n; first += COLUMNS) {
    int64_t count = std::min<int64_t>(COLUMNS, s.n - first), width = count > W ? COLUMNS : W;
    pack_transposed(s.in(0, head, first), a.stride, count, a.size, s.q);
    pack_transposed(s.gradient(head, first), a.dout_stride, count, a.size, s.dout);
    s.over_features(1, head, s.q, width, s.p);
    s.over_features(2, head, s.dout, width, s.dp);
    for (int64_t c = 0; c < width; c += W) softmax_backward(s, head, first, width, c, factor);

    Product over_keys{};
    over_keys.out_row = 3 * s.columns;
    s.set_a_over_keys(over_keys, (const float*)s.ds, width);
    s.set_b(over_keys, s.in(1, head, 0), a.stride, s.n, s.rows, first == 0);
    over_keys.out = gradient(0, first);
    multiply(count, a.size, over_keys);

    bool last = first + COLUMNS >= s.n;
    auto over_queries = [&](const Scalar* matrix, const Scalar* block, int64_t stride, float* sums, int64_t part) {
      Product product{};
      product.a = (const Unit*)matrix, product.a_row = width / PER, product.a_step = 1;
      s.set_b(product, block, stride, count, s.queries);
      product.sums = sums, product.sums_row = a.size, product.add = first > 0;
      product.out = last ? gradient(part, 0) : nullptr, product.out_row = 3 * s.columns;
      multiply(s.n, a.size, product);
    };
    over_queries(s.ds, s.in(0, head, first), a.stride, s.dk, 1);
    over_queries(s.kept, s.gradient(head, first), a.dout_stride, s.dv, 2);
  }
}

// Some sequences whole, or some heads of a long one.
struct Job {
  int64_t first, last, head, end;
};

constexpr int64_t LONG = 128;       // rows of a sequence of which each head is a job
constexpr int64_t GRAIN = 1 << 15;  // elements of q that short sequences of a job have together, at least

std::vector<Job> jobs_of(const Attention& a) {
  std::vector<Job> jobs;
  int64_t from = 0, elements = 0;
  auto close = [&](int64_t s) {
    if (elements) jobs.push_back({from, s, 0, a.heads});
    from = s, elements = 0;
  };
  for (int64_t s = 0; s < a.sequences; ++s) {
    int64_t n = a.cu_seqlens[s + 1] - a.cu_seqlens[s];
    if (n > LONG) {
      close(s);
      for (int64_t head = 0; head < a.heads; ++head) jobs.push_back({s, s + 1, head, head + 1});
      from = s + 1;
    } else {
      elements += n * a.heads * a.size;
      if (elements >= GRAIN) close(s + 1);
    }
  }
  close(a.sequences);
  return jobs;
}

template <bool BACKWARD>
void run(const Attention& a, Parallel parallel) {
  struct Batch {
    const Attention& a;
    std::vector<Job> jobs;
  } batch{a, jobs_of(a)};
  parallel(
      batch.jobs.size(),
      [](int64_t i, const void* context) {
        const Batch& batch = *(const Batch*)context;
        const Job& job = batch.jobs[i];
        for (int64_t s = job.first; s < job.last; ++s) {
          if (batch.a.cu_seqlens[s] == batch.a.cu_seqlens[s + 1]) continue;
          Sequence sequence(batch.a, s, BACKWARD);
          for (int64_t head = job.head; head < job.end; ++head) (BACKWARD ? backward_head : forward_head)(sequence, head);
        }
      },
      &batch);
}

}  // namespace

void attention(const Attention& a, Parallel parallel) { run<false>(a, parallel); }

void attention_backward(const Attention& a, Parallel parallel) { run<true>(a, parallel); }

}  // namespace kloss::cpu::KLOSS_NAME
