// Span counts on a GPU: a sequence each thread, sums of integers by atomics, whose order does not matter.

#include "../shared/spans.h"
#include "entry.cuh"

namespace {

using kloss::SpanCounts;

constexpr int THREADS = 64;

__global__ void __launch_bounds__(THREADS) spans_kernel(const __grid_constant__ SpanCounts c) {
  int64_t s = (int64_t)blockIdx.x * THREADS + threadIdx.x, sums[3] = {};
  if (s >= c.sequences) return;
  kloss::demand(c.group[s] >= 0 && c.group[s] < c.groups && c.cu_seqlens[s] >= 0 && c.cu_seqlens[s + 1] <= c.rows);
  kloss::demand(c.count<1>(s, sums));
  c.flush(c.group[s], sums);
}

}  // namespace

// labels: C, with tags and types; without them any number. Adds to counts.
KLOSS_ENTRY kloss_span_counts(
    int64_t rows, int64_t sequences, int64_t labels, int64_t groups, const void* pred, const void* gold, const void* cu_seqlens,
    const void* group, const void* tags, const void* types, void* counts, void* stream) {
  SpanCounts c{};
  c.rows = rows, c.sequences = sequences, c.labels = labels, c.groups = groups;
  c.pred = (const int64_t*)pred, c.gold = (const int64_t*)gold, c.cu_seqlens = (const int32_t*)cu_seqlens;
  c.group = (const int64_t*)group, c.tags = (const int64_t*)tags, c.types = (const int64_t*)types;
  c.counts = (int64_t*)counts;
  if (sequences == 0) return 0;
  spans_kernel<<<(unsigned)kloss::ceil_div(sequences, THREADS), THREADS, 0, (cudaStream_t)stream>>>(c);
  return cudaGetLastError();
}
