// The code behind lora.h, compiled once for each instruction set and element type. Who includes it has set KLOSS_NAME (the
// namespace), KLOSS_BF16 (whether elements are bf16), KLOSS_LANES (numbers in a vector register: wider vectors would be taken
// apart in memory) and KLOSS_ROWS (rows of a register tile, so that all its sums stay in registers).
//
// A product is C [m, n] = A [m, k] B [k, n] in units of k: a unit is one fp32, or two neighbouring bf16, what one step
// of the processor multiplies. A is read where it lies, through a pointer for each row; B is packed, a few columns at a time.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "lora.h"

namespace kloss::cpu::KLOSS_NAME {
namespace {

constexpr int W = KLOSS_LANES;    // numbers in a vector
constexpr int ROWS = KLOSS_ROWS;  // register tile: ROWS x (VECTORS * W)
constexpr int VECTORS = 2;
constexpr int COLUMNS = VECTORS * W;
static_assert(LANES % COLUMNS == 0);

typedef float Floats __attribute__((vector_size(4 * W)));
typedef uint32_t Ints __attribute__((vector_size(4 * W)));

#if KLOSS_BF16
using Scalar = uint16_t;
using Unit = uint32_t;
constexpr int PER = 2;  // elements of a unit

inline Floats dot(Floats sum, Unit a, Ints b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
inline Floats load(const Scalar* p) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline void store(Scalar* p, Floats v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
inline Scalar narrow(float v) {
  Floats all = Floats{} + v;
  Scalar out[W];
  store(out, all);
  return out[0];
}
#else
using Scalar = float;
using Unit = float;
constexpr int PER = 1;

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Floats dot(Floats sum, Unit a, Floats b) { return sum + a * b; }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline Scalar narrow(float v) { return v; }
#endif

inline int64_t units(int64_t elements) { return (elements + PER - 1) / PER; }

// A buffer of this thread and slot, 64-byte aligned, kept for the next job.
template <int SLOT, class T>
T* scratch(int64_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  int64_t bytes = (count * (int64_t)sizeof(T) + 63) / 64 * 64;
  if (bytes > size) {
    memory.reset(std::aligned_alloc(64, bytes));
    size = memory ? bytes : 0;
    if (!memory) throw std::bad_alloc();
  }
  return static_cast<T*>(memory.get());
}

// ---- dropout: as kloss/kernels/dropout.py has it ----

struct Keep {  // all ones where a feature is kept: 2 * W features from `column`, even
  Ints first, second;
};

inline Ints draws(int64_t key, int64_t column) {
  Ints h;
  for (int i = 0; i < W; ++i) h[i] = i;
  h = (h + (uint32_t)(column / 2)) * 0x9E3779B1u ^ (uint32_t)key;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15) ^ (uint32_t)((uint64_t)key >> 32)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

inline Keep keep(const Lora& l, int64_t row, int64_t column) {
  Ints h = draws(l.keys[row], column), least = Ints{} + (uint32_t)(l.least[row] + 32768);
  Ints even = (Ints)((h & 0xFFFF) >= least), odd = (Ints)((h >> 16) >= least);
  Ints low, high;
  for (int i = 0; i < W; ++i) low[i] = i % 2 * W + i / 2, high[i] = low[i] + W / 2;
  return {__builtin_shuffle(even, odd, low), __builtin_shuffle(even, odd, high)};
}

inline Floats select(Floats v, Ints mask) { return (Floats)((Ints)v & mask); }

// drop(x) of one row without its scale: dropped elements are 0 whatever they held.
inline void drop_row(const Lora& l, int64_t row, Scalar* out) {
  const Scalar* x = (const Scalar*)l.x + row * l.inputs;
  for (int64_t c = 0; c < l.inputs; c += 2 * W) {
#if KLOSS_BF16
    Ints h = draws(l.keys[row], c), least = Ints{} + (uint32_t)(l.least[row] + 32768), v;
    Ints mask = ((Ints)((h & 0xFFFF) >= least) & 0xFFFF) | ((Ints)((h >> 16) >= least) & 0xFFFF0000);
    std::memcpy(&v, x + c, sizeof v);
    v &= mask;
    std::memcpy(out + c, &v, sizeof v);
#else
    Keep k = keep(l, row, c);
    store(out + c, select(load(x + c), k.first));
    store(out + c + W, select(load(x + c + W), k.second));
#endif
  }
}

// ---- packing: b[u][COLUMNS or W] from what will be the columns of B ----

inline Unit unit(const Scalar* p, int64_t left) {  // PER elements, 0 behind the first `left`
  Scalar both[PER] = {};
  for (int i = 0; i < PER && i < left; ++i) both[i] = p[i];
  Unit out;
  std::memcpy(&out, both, sizeof out);
  return out;
}

// One round of a transposition: lanes i with bit STEP of v[j] change places with lanes i ^ STEP of v[j ^ STEP].
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

// W units of W rows become W rows of `out`.
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

// Columns are rows of `source` [columns, k], contiguous: b[u][c] = source[c][u].
inline void pack_transposed(const Scalar* source, int64_t stride, int64_t columns, int64_t k, Unit* b) {
  int64_t width = columns > W ? COLUMNS : W, all = units(k);
  for (int64_t c0 = 0; c0 < width; c0 += W) {
    const Scalar* rows[W];
    int64_t done = 0;
    for (int i = 0; i < W; ++i) rows[i] = source + std::min<int64_t>(c0 + i, columns - 1) * stride;  // the rest is not kept
    for (; done + W * PER <= k; done += W * PER) transpose(rows, done / PER, b + done / PER * width + c0, width);
    for (int64_t u = done / PER; u < all; ++u)
      for (int i = 0; i < W; ++i) b[u * width + c0 + i] = unit(rows[i] + u * PER, k - u * PER);
  }
}

// Columns lie side by side in the rows of k: b[u][c] = (row(u * PER)[c], row(u * PER + 1)[c]); a null row is zeros.
template <class Row>
void pack_rows(Row row, int64_t columns, int64_t k, Unit* b, int64_t width) {
  const Scalar zeros[W] = {};
  for (int64_t u = 0; u < units(k); ++u) {
    const Scalar* source[PER];
    for (int i = 0; i < PER; ++i) source[i] = u * PER + i < k ? row(u * PER + i) : nullptr;
    for (int64_t c = 0; c < width; c += W) {
      Unit* out = b + u * width + c;
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

// ---- the product ----

template <int V>
inline void tile(const Unit* const* a, int64_t step, const Unit* b, int64_t k, float (*out)[COLUMNS]) {
  Floats sum[ROWS][V] = {};
  for (int64_t u = 0; u < k; ++u) {
#if KLOSS_BF16
    Ints column[V];
#else
    Floats column[V];
#endif
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) std::memcpy(&column[v], b + (u * V + v) * W, sizeof column[v]);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = dot(sum[i][v], a[i][u * step], column[v]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) std::memcpy(&out[i][v * W], &sum[i][v], sizeof sum[i][v]);
}

constexpr int64_t PACKED = 1 << 16;  // units of B that are packed at once: they stay in the second cache while rows pass by

// C [m, columns] = A B. a(i): row i of A, its units `step` apart. pack(c, width, b): packs columns c.. of B. put(i, c, width,
// values): takes row i's columns c..c+width-1 of C. A few rows of A meet all packed columns before the next rows do.
template <class A, class Pack, class Put>
void product(int64_t m, int64_t columns, int64_t k, int64_t step, A a, Pack pack, Put put) {
  int64_t group = std::max<int64_t>(1, PACKED / (k * COLUMNS)) * COLUMNS;
  Unit* packed = scratch<0, Unit>(k * std::min(group, (columns + COLUMNS - 1) / COLUMNS * COLUMNS));
  alignas(64) float out[ROWS][COLUMNS];
  for (int64_t first = 0; first < columns; first += group) {
    int64_t last = std::min(columns, first + group);
    for (int64_t c = first; c < last; c += COLUMNS) pack(c, std::min<int64_t>(last - c, COLUMNS), packed + (c - first) * k);
    for (int64_t i = 0; i < m; i += ROWS) {
      const Unit* rows[ROWS];
      for (int j = 0; j < ROWS; ++j) rows[j] = a(std::min(i + j, m - 1));
      for (int64_t c = first; c < last; c += COLUMNS) {
        int64_t width = std::min<int64_t>(last - c, COLUMNS);
        const Unit* b = packed + (c - first) * k;
        if (width > W)
          tile<VECTORS>(rows, step, b, k, out);
        else
          tile<1>(rows, step, b, k, out);
        for (int64_t j = 0; j < std::min<int64_t>(ROWS, m - i); ++j) put(i + j, c, width, out[j]);
      }
    }
  }
}

// width numbers, scaled and rounded; whole vectors where there is room for them.
inline void put_row(Scalar* out, const float* values, float scale, int64_t width) {
  int64_t c = 0;
  Floats v;
  for (; c + W <= width; c += W) {
    std::memcpy(&v, values + c, sizeof v);
    store(out + c, v * scale);
  }
  for (; c < width; ++c) out[c] = narrow(values[c] * scale);
}

// ---- jobs ----

struct Job {
  int64_t g, first, last, part;
};

struct Adapter {  // of one job
  const Lora& l;
  int64_t g, rank, padded, outputs;  // padded: a slice of S in local buffers, whole units; outputs: of a slice
  const Scalar *a, *b;
  float scale;

  Adapter(const Lora& l, int64_t g)
      : l(l), g(g), rank(l.ranks ? l.ranks[g] : l.rank), padded(units(rank) * PER), outputs(l.outputs / l.slices),
        a((const Scalar*)l.a + g * l.a_stride), b((const Scalar*)l.b + g * l.b_stride),
        scale(l.scale[g]) {}

  const Scalar* a_row(int64_t slice, int64_t r) const { return a + (slice * l.rank + r) * l.inputs; }
  const Scalar* b_row(int64_t slice, int64_t n) const { return b + (slice * outputs + n) * l.rank; }
  int64_t row(int64_t i) const { return l.order[i]; }  // of x
  Scalar* in(void* s, int64_t i, int64_t slice) const { return (Scalar*)s + (i * l.slices + slice) * l.rank; }
};

// drop(x) of rows first..last-1 of order, [n, K]; without dropout a pointer to each is enough.
struct Inputs {
  const Adapter& one;
  int64_t first;
  Scalar* dropped = nullptr;

  Inputs(const Adapter& one, int64_t first, int64_t last) : one(one), first(first) {
    if (!one.l.keys) return;
    dropped = scratch<1, Scalar>((last - first) * one.l.inputs);
    for (int64_t i = first; i < last; ++i) drop_row(one.l, one.row(i), dropped + (i - first) * one.l.inputs);
  }
  const Scalar* operator[](int64_t i) const {
    return dropped ? dropped + i * one.l.inputs : (const Scalar*)one.l.x + one.row(first + i) * one.l.inputs;
  }
};

void forward_job(const Lora& l, const Job& job) {
  Adapter one(l, job.g);
  int64_t n = job.last - job.first, wide = l.slices * one.padded;
  Inputs x(one, job.first, job.last);
  Scalar* s = scratch<2, Scalar>(n * wide);
  std::fill_n(s, n * wide, Scalar(0));
  for (int64_t slice = 0; slice < l.slices; ++slice) {
    product(
        n, one.rank, units(l.inputs), 1, [&](int64_t i) { return (const Unit*)x[i]; },
        [&](int64_t c, int64_t width, Unit* b) { pack_transposed(one.a_row(slice, c), l.inputs, width, l.inputs, b); },
        [&](int64_t i, int64_t c, int64_t width, const float* values) {
          put_row(s + i * wide + slice * one.padded + c, values, 1, width);
        });
    for (int64_t i = 0; i < n; ++i)
      std::copy_n(s + i * wide + slice * one.padded, one.rank, one.in(l.s, job.first + i, slice));
    product(
        n, one.outputs, units(one.rank), 1, [&](int64_t i) { return (const Unit*)(s + i * wide + slice * one.padded); },
        [&](int64_t c, int64_t width, Unit* b) { pack_transposed(one.b_row(slice, c), l.rank, width, one.rank, b); },
        [&](int64_t i, int64_t c, int64_t width, const float* values) {
          Scalar* y = (Scalar*)l.y + one.row(job.first + i) * l.outputs + slice * one.outputs + c;
          for (int64_t w = 0; w < width; w += W) {
            Floats v;
            std::memcpy(&v, values + w, sizeof v);
            store(y + w, load(y + w) + v * one.scale);
          }
        });
  }
}

// dS and dx of some rows.
void rows_job(const Lora& l, const Job& job) {
  Adapter one(l, job.g);
  int64_t n = job.last - job.first, wide = l.slices * one.padded;
  Scalar* ds = scratch<2, Scalar>(n * wide);
  std::fill_n(ds, n * wide, Scalar(0));
  for (int64_t slice = 0; slice < l.slices; ++slice) {
    product(
        n, one.rank, units(one.outputs), 1,
        [&](int64_t i) {
          return (const Unit*)((const Scalar*)l.y + one.row(job.first + i) * l.outputs + slice * one.outputs);
        },
        [&](int64_t c, int64_t width, Unit* b) {
          pack_rows([&](int64_t r) { return one.b_row(slice, r) + c; }, width, one.outputs, b, width > W ? COLUMNS : W);
        },
        [&](int64_t i, int64_t c, int64_t width, const float* values) {
          put_row(ds + i * wide + slice * one.padded + c, values, one.scale, width);
        });
    for (int64_t i = 0; i < n; ++i)
      std::copy_n(ds + i * wide + slice * one.padded, one.rank, one.in(l.ds, job.first + i, slice));
  }
  if (!l.dx) return;
  product(
      n, l.inputs, units(wide), 1, [&](int64_t i) { return (const Unit*)(ds + i * wide); },
      [&](int64_t c, int64_t width, Unit* b) {
        auto row = [&](int64_t r) { return r % one.padded < one.rank ? one.a_row(r / one.padded, r % one.padded) + c : nullptr; };
        pack_rows(row, width, wide, b, width > W ? COLUMNS : W);
      },
      [&](int64_t i, int64_t c, int64_t width, const float* values) {
        int64_t row = one.row(job.first + i);
        Scalar* dx = (Scalar*)l.dx + row * l.inputs + c;
        Keep kept = {~Ints{}, ~Ints{}};
        if (l.keys) kept = keep(l, row, c);
        for (int64_t w = 0; w < width; w += W) {
          Floats v;
          std::memcpy(&v, values + w, sizeof v);
          store(dx + w, load(dx + w) + select(v, w ? kept.second : kept.first));
        }
      });
}

// Adds up a product over an adapter's rows, ROW_BLOCK of them at a time, and writes it: C [m, columns], row i scaled at out(i).
template <class Block, class Out>
void reduce(const Job& job, int64_t m, int64_t columns, float scale, Block block, Out out) {
  bool once = job.last - job.first <= ROW_BLOCK;
  float* sums = once ? nullptr : scratch<3, float>(m * columns);
  if (!once) std::fill_n(sums, m * columns, 0.0f);
  for (int64_t first = job.first; first < job.last; first += ROW_BLOCK) {
    block(first, std::min(job.last, first + ROW_BLOCK), [&](int64_t i, int64_t c, int64_t width, const float* values) {
      if (once)
        put_row(out(i) + c, values, scale, width);
      else
        for (int64_t w = 0; w < width; ++w) sums[i * columns + c + w] += values[w];
    });
  }
  if (!once)
    for (int64_t i = 0; i < m; ++i) put_row(out(i), sums + i * columns, scale, columns);
}

constexpr int64_t CHUNK = 512;  // outputs whose dB a job computes

inline int64_t apart(int64_t width) { return width + W; }  // rows of a packed matrix: not a multiple of 4 KiB, which share cache sets

// A of a reduction: columns of rows(i), i in 0..n-1, become its rows.
template <class Row>
Unit* columns_as_rows(Row row, int64_t columns, int64_t n) {
  int64_t width = apart((columns + W - 1) / W * W);
  Unit* packed = scratch<4, Unit>(units(n) * width);
  pack_rows(row, columns, n, packed, width);
  return packed;
}

void da_job(const Lora& l, const Job& job) {
  Adapter one(l, job.g);
  Scalar* da = (Scalar*)l.da + job.g * l.slices * l.rank * l.inputs;
  for (int64_t slice = 0; slice < l.slices; ++slice)
    std::fill_n(da + (slice * l.rank + one.rank) * l.inputs, (l.rank - one.rank) * l.inputs, Scalar(0));
  int64_t m = l.slices * l.rank, step = apart((m + W - 1) / W * W);  // with the tails between slices, whose rows are not kept
  if (job.first == job.last) {
    std::fill_n(da, m * l.inputs, Scalar(0));
    return;
  }
  auto live = [&](int64_t i) { return i / one.rank * l.rank + i % one.rank; };
  reduce(
      job, l.slices * one.rank, l.inputs, 1,
      [&](int64_t first, int64_t last, auto put) {
        Inputs x(one, first, last);
        const Unit* ds = columns_as_rows([&](int64_t i) { return one.in(l.ds, first + i, 0); }, m, last - first);
        product(
            l.slices * one.rank, l.inputs, units(last - first), step, [&](int64_t i) { return ds + live(i); },
            [&](int64_t c, int64_t width, Unit* b) {
              pack_rows([&](int64_t i) { return x[i] + c; }, width, last - first, b, width > W ? COLUMNS : W);
            },
            put);
      },
      [&](int64_t i) { return da + live(i) * l.inputs; });
}

void db_job(const Lora& l, const Job& job) {
  Adapter one(l, job.g);
  int64_t chunks = (one.outputs + CHUNK - 1) / CHUNK, slice = job.part / chunks, from = job.part % chunks * CHUNK;
  int64_t m = std::min(CHUNK, one.outputs - from);
  Scalar* db = (Scalar*)l.db + (job.g * l.outputs + slice * one.outputs + from) * l.rank;
  if (job.first == job.last || one.rank < l.rank) std::fill_n(db, m * l.rank, Scalar(0));
  if (job.first == job.last) return;
  reduce(
      job, m, one.rank, one.scale,
      [&](int64_t first, int64_t last, auto put) {
        auto row = [&](int64_t i) {
          return (const Scalar*)l.y + one.row(first + i) * l.outputs + slice * one.outputs + from;
        };
        const Unit* dy = columns_as_rows(row, m, last - first);
        product(
            m, one.rank, units(last - first), apart((m + W - 1) / W * W), [&](int64_t i) { return dy + i; },
            [&](int64_t c, int64_t width, Unit* b) {
              auto s = [&](int64_t i) { return one.in(l.s, first + i, slice) + c; };
              pack_rows(s, width, last - first, b, width > W ? COLUMNS : W);
            },
            put);
      },
      [&](int64_t i) { return db + i * l.rank; });
}

struct Batch {
  const Lora& l;
  std::vector<Job> jobs;
  void (*work)(const Lora&, const Job&);
};

void run(const Lora& l, std::vector<Job> jobs, void (*work)(const Lora&, const Job&), Parallel parallel) {
  Batch batch{l, std::move(jobs), work};
  parallel(
      batch.jobs.size(),
      [](int64_t i, const void* context) {
        const Batch& batch = *(const Batch*)context;
        batch.work(batch.l, batch.jobs[i]);
      },
      &batch);
}

std::vector<Job> row_jobs(const Lora& l) {
  std::vector<Job> jobs;
  for (int64_t g = 0; g < l.adapters; ++g)
    for (int64_t first = g ? l.ends[g - 1] : 0; first < l.ends[g]; first += ROW_BLOCK)
      jobs.push_back({g, first, std::min(l.ends[g], first + ROW_BLOCK), 0});
  return jobs;
}

std::vector<Job> adapter_jobs(const Lora& l, int64_t parts) {
  std::vector<Job> jobs;
  for (int64_t g = 0; g < l.adapters; ++g)
    for (int64_t part = 0; part < parts; ++part) jobs.push_back({g, g ? l.ends[g - 1] : 0, l.ends[g], part});
  return jobs;
}

}  // namespace

void forward(const Lora& l, Parallel parallel) { run(l, row_jobs(l), forward_job, parallel); }

void backward(const Lora& l, Parallel parallel) {
  if (l.dx || l.da) run(l, row_jobs(l), rows_job, parallel);
  if (l.da) run(l, adapter_jobs(l, 1), da_job, parallel);
  if (l.db) run(l, adapter_jobs(l, (l.outputs / l.slices + CHUNK - 1) / CHUNK * l.slices), db_job, parallel);
}

}  // namespace kloss::cpu::KLOSS_NAME
