// The code behind lora.h, compiled once for each instruction set and element type.
//
// The including file sets KLOSS_NAME (the namespace), KLOSS_BF16, KLOSS_LANES and KLOSS_ROWS; see vectors.inl.

#include <vector>

#include "product.inl"

namespace kloss::cpu::KLOSS_NAME {
namespace {

struct Job {
  int64_t g, first, last, part;
};

// The adapter of a job. padded: columns of a slice of S in scratch, whole units. outputs: of a slice.
struct Adapter {
  const Lora& l;
  int64_t g, rank, padded, outputs;
  const Scalar *a, *b;
  float scaling_kept;

  Adapter(const Lora& l, int64_t g)
      : l(l), g(g), rank(l.ranks ? l.ranks[g] : l.rank), padded(units(rank) * PER), outputs(l.outputs / l.slices),
        a((const Scalar*)l.a + g * l.a_stride), b((const Scalar*)l.b + g * l.b_stride),
        scaling_kept(l.scaling_kept[g]) {}

  const Scalar* a_row(int64_t slice, int64_t r) const { return a + (slice * l.rank + r) * l.inputs; }
  const Scalar* b_row(int64_t slice, int64_t n) const { return b + (slice * outputs + n) * l.rank; }
  int64_t row(int64_t i) const { return l.order[i]; }  // row of x that is row i of S
  Scalar* of_s(void* s, int64_t i, int64_t slice) const { return (Scalar*)s + (i * l.slices + slice) * l.rank; }
};

// drop(x) of rows first..last-1 of order, [n, K]. Without dropout rows are read in place.
struct Inputs {
  const Adapter& adapter;
  int64_t first;
  Scalar* dropped = nullptr;

  Inputs(const Adapter& adapter, int64_t first, int64_t last) : adapter(adapter), first(first) {
    if (!adapter.l.keys) return;
    dropped = scratch<1, Scalar>((last - first) * adapter.l.inputs);
    for (int64_t i = first; i < last; ++i) drop_row(adapter.l, adapter.row(i), dropped + (i - first) * adapter.l.inputs);
  }
  const Scalar* operator[](int64_t i) const {
    return dropped ? dropped + i * adapter.l.inputs : (const Scalar*)adapter.l.x + adapter.row(first + i) * adapter.l.inputs;
  }
};

void forward_job(const Lora& l, const Job& job) {
  Adapter adapter(l, job.g);
  int64_t n = job.last - job.first, wide = l.slices * adapter.padded;
  Inputs x(adapter, job.first, job.last);
  Scalar* s = scratch<2, Scalar>(n * wide);
  std::fill_n(s, n * wide, Scalar(0));
  for (int64_t slice = 0; slice < l.slices; ++slice) {
    product(
        n, adapter.rank, units(l.inputs), 1, [&](int64_t i) { return (const Unit*)x[i]; },
        [&](int64_t c, int64_t width, Unit* b) { pack_transposed(adapter.a_row(slice, c), l.inputs, width, l.inputs, b); },
        [&](int64_t i, int64_t c, int64_t width, const float* values) {
          put_row(s + i * wide + slice * adapter.padded + c, values, 1, width);
        });
    for (int64_t i = 0; i < n; ++i)
      std::copy_n(s + i * wide + slice * adapter.padded, adapter.rank, adapter.of_s(l.s, job.first + i, slice));
    product(
        n, adapter.outputs, units(adapter.rank), 1,
        [&](int64_t i) { return (const Unit*)(s + i * wide + slice * adapter.padded); },
        [&](int64_t c, int64_t width, Unit* b) { pack_transposed(adapter.b_row(slice, c), l.rank, width, adapter.rank, b); },
        [&](int64_t i, int64_t c, int64_t width, const float* values) {
          Scalar* y = (Scalar*)l.y + adapter.row(job.first + i) * l.outputs + slice * adapter.outputs + c;
          for (int64_t w = 0; w < width; w += W) {
            Floats v;
            std::memcpy(&v, values + w, sizeof v);
            store(y + w, load(y + w) + v * adapter.scaling_kept);
          }
        });
  }
}

// dS and dx of a block of rows.
void rows_job(const Lora& l, const Job& job) {
  Adapter adapter(l, job.g);
  int64_t n = job.last - job.first, wide = l.slices * adapter.padded;
  Scalar* ds = scratch<2, Scalar>(n * wide);
  std::fill_n(ds, n * wide, Scalar(0));
  for (int64_t slice = 0; slice < l.slices; ++slice) {
    product(
        n, adapter.rank, units(adapter.outputs), 1,
        [&](int64_t i) {
          return (const Unit*)((const Scalar*)l.dy + adapter.row(job.first + i) * l.outputs + slice * adapter.outputs);
        },
        [&](int64_t c, int64_t width, Unit* b) {
          pack_rows([&](int64_t r) { return adapter.b_row(slice, r) + c; }, width, adapter.outputs, b, width > W ? COLUMNS : W);
        },
        [&](int64_t i, int64_t c, int64_t width, const float* values) {
          put_row(ds + i * wide + slice * adapter.padded + c, values, adapter.scaling_kept, width);
        });
    for (int64_t i = 0; i < n; ++i)
      std::copy_n(ds + i * wide + slice * adapter.padded, adapter.rank, adapter.of_s(l.ds, job.first + i, slice));
  }
  if (!l.dx) return;
  product(
      n, l.inputs, units(wide), 1, [&](int64_t i) { return (const Unit*)(ds + i * wide); },
      [&](int64_t c, int64_t width, Unit* b) {
        auto row = [&](int64_t r) {
          int64_t slice = r / adapter.padded, of_slice = r % adapter.padded;
          return of_slice < adapter.rank ? adapter.a_row(slice, of_slice) + c : nullptr;
        };
        pack_rows(row, width, wide, b, width > W ? COLUMNS : W);
      },
      [&](int64_t i, int64_t c, int64_t width, const float* values) {
        int64_t row = adapter.row(job.first + i);
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

constexpr int64_t CHUNK = 512;  // outputs of a slice whose dB one job computes

void da_job(const Lora& l, const Job& job) {
  Adapter adapter(l, job.g);
  Scalar* da = (Scalar*)l.da + job.g * l.da_stride;
  for (int64_t slice = 0; slice < l.slices; ++slice)
    std::fill_n(da + (slice * l.rank + adapter.rank) * l.inputs, (l.rank - adapter.rank) * l.inputs, Scalar(0));
  int64_t m = l.slices * l.rank, step = packed_stride(m);  // m includes the slices' tails
  if (job.first == job.last) {
    std::fill_n(da, m * l.inputs, Scalar(0));
    return;
  }
  auto live = [&](int64_t i) { return i / adapter.rank * l.rank + i % adapter.rank; };
#if !KLOSS_BF16
  if (l.slices * adapter.rank <= THIN && job.last - job.first <= ROW_BLOCK) {
    Inputs x(adapter, job.first, job.last);
    const float* rows[ROW_BLOCK];
    for (int64_t i = 0; i < job.last - job.first; ++i) fetch(rows[i] = x[i], l.inputs);
    const float* ds = adapter.of_s(l.ds, job.first, 0);
    thin_product(
        l.slices * adapter.rank, l.inputs, job.last - job.first, m, [&](int64_t i) { return ds + live(i); }, rows,
        [&](int64_t i, int64_t c, const float* values) { put_row(da + live(i) * l.inputs + c, values, 1, COLUMNS); });
    return;
  }
#endif
  reduce(
      job.first, job.last, l.slices * adapter.rank, l.inputs, 1,
      [&](int64_t first, int64_t last, auto put) {
        Inputs x(adapter, first, last);
        const Unit* ds = columns_as_rows([&](int64_t i) { return adapter.of_s(l.ds, first + i, 0); }, m, last - first);
        product(
            l.slices * adapter.rank, l.inputs, units(last - first), step, [&](int64_t i) { return ds + live(i); },
            [&](int64_t c, int64_t width, Unit* b) {
              pack_rows([&](int64_t i) { return x[i] + c; }, width, last - first, b, width > W ? COLUMNS : W);
            },
            put);
      },
      [&](int64_t i) { return da + live(i) * l.inputs; });
}

void db_job(const Lora& l, const Job& job) {
  Adapter adapter(l, job.g);
  int64_t chunks = (adapter.outputs + CHUNK - 1) / CHUNK, slice = job.part / chunks, from = job.part % chunks * CHUNK;
  int64_t m = std::min(CHUNK, adapter.outputs - from);
  Scalar* db = (Scalar*)l.db + job.g * l.db_stride + (slice * adapter.outputs + from) * l.rank;
  if (job.first == job.last || adapter.rank < l.rank) std::fill_n(db, m * l.rank, Scalar(0));
  if (job.first == job.last) return;
#if !KLOSS_BF16
  if (adapter.rank <= THIN && job.last - job.first <= ROW_BLOCK) {  // its transpose
    const float* rows[ROW_BLOCK];
    for (int64_t i = job.first; i < job.last; ++i)
      rows[i - job.first] = (const float*)l.dy + adapter.row(i) * l.outputs + slice * adapter.outputs + from;
    const float* s = adapter.of_s(l.s, job.first, slice);
    thin_product(
        adapter.rank, m, job.last - job.first, l.slices * l.rank, [&](int64_t r) { return s + r; }, rows,
        [&](int64_t r, int64_t c, const float* values) {
          for (int w = 0; w < COLUMNS; ++w) db[(c + w) * l.rank + r] = values[w] * adapter.scaling_kept;
        });
    return;
  }
#endif
  reduce(
      job.first, job.last, m, adapter.rank, adapter.scaling_kept,
      [&](int64_t first, int64_t last, auto put) {
        auto row = [&](int64_t i) {
          return (const Scalar*)l.dy + adapter.row(first + i) * l.outputs + slice * adapter.outputs + from;
        };
        const Unit* dy = columns_as_rows(row, m, last - first);
        product(
            m, adapter.rank, units(last - first), packed_stride(m), [&](int64_t i) { return dy + i; },
            [&](int64_t c, int64_t width, Unit* b) {
              auto s = [&](int64_t i) { return adapter.of_s(l.s, first + i, slice) + c; };
              pack_rows(s, width, last - first, b, width > W ? COLUMNS : W);
            },
            put);
      },
      [&](int64_t i) { return db + i * l.rank; });
}

int64_t db_parts(const Lora& l) { return (l.outputs / l.slices + CHUNK - 1) / CHUNK * l.slices; }

// All of a small adapter's backward pass, which finds dy in the cache after its first part.
void whole_job(const Lora& l, const Job& job) {
  if ((l.dx || l.da) && job.first < job.last) rows_job(l, job);
  if (l.da) da_job(l, job);
  if (l.db)
    for (int64_t part = 0; part < db_parts(l); ++part) db_job(l, {job.g, job.first, job.last, part});
}

// Whether each adapter is one job of at most ROW_BLOCK rows, and enough of them for all threads.
bool small_adapters(const Lora& l) {
  int64_t active = 0;
  for (int64_t g = 0; g < l.adapters; ++g) {
    int64_t rows = l.ends[g] - (g ? l.ends[g - 1] : 0);
    if (rows > ROW_BLOCK) return false;
    active += rows > 0;
  }
  return active >= 16;
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

std::vector<Job> adapter_jobs(const Lora& l, int64_t count) {
  std::vector<Job> jobs;
  for (int64_t g = 0; g < l.adapters; ++g)
    for (int64_t part = 0; part < count; ++part) jobs.push_back({g, g ? l.ends[g - 1] : 0, l.ends[g], part});
  return jobs;
}

}  // namespace

void forward(const Lora& l, Parallel parallel) { run(l, row_jobs(l), forward_job, parallel); }

void backward(const Lora& l, Parallel parallel) {
  if (small_adapters(l)) return run(l, adapter_jobs(l, 1), whole_job, parallel);
  if (l.dx || l.da) run(l, row_jobs(l), rows_job, parallel);
  if (l.da) run(l, adapter_jobs(l, 1), da_job, parallel);
  if (l.db) run(l, adapter_jobs(l, db_parts(l)), db_job, parallel);
}

}  // namespace kloss::cpu::KLOSS_NAME
