// The work lists on a GPU: the phases in one block, then every entry by itself.

#include "../shared/lists.h"
#include "entry.cuh"

namespace {

using kloss::Lists;

__global__ void __launch_bounds__(Lists::THREADS) phases_kernel(const __grid_constant__ Lists l) {
  for (int64_t s = threadIdx.x; s < l.sequences; s += Lists::THREADS) {
    kloss::demand(l.length(s) >= 0 && l.adapter[s] >= -1 && l.adapter[s] < l.adapters);
    if (l.step) kloss::demand(l.sequence[s] >= 0 && l.sequence[s] < 1 << 16);
  }
  if (threadIdx.x == 0) kloss::demand(l.cu_seqlens[0] == 0 && l.cu_seqlens[l.sequences] <= l.rows);
#pragma unroll
  for (int number = 0; number < Lists::PHASES; ++number) {
    __syncthreads();
    l.phase(number, threadIdx.x);
  }
}

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS) entries_kernel(const __grid_constant__ Lists l) {
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i < l.entries()) l.entry(i);
}

}  // namespace

// How many int32 of scratch kloss_work_lists needs.
extern "C" __attribute__((visibility("default"))) int64_t kloss_work_lists_scratch(int64_t sequences, int64_t adapters) {
  return Lists::scratch_size(sequences, adapters);
}

// lists: row_adapter, order, ends, tiles_64, tiles_128, chunks, slots, three short classes of attention, longer, row_key, position;
// null where a batch has none. capacities: entries of tiles_64, tiles_128, chunks, the short classes, longer. classes: short ones.
KLOSS_ENTRY kloss_work_lists(
    int64_t rows, int64_t sequences, int64_t adapters, int classes, const void* cu_seqlens, const void* adapter, const void* step,
    const void* sequence, void* const* lists, const int64_t* capacities, void* scratch, void* stream) {
  Lists l{};
  l.rows = rows, l.sequences = sequences, l.adapters = adapters, l.classes = classes ? classes : -1;
  l.cu_seqlens = (const int32_t*)cu_seqlens, l.adapter = (const int32_t*)adapter;
  l.step = (const int64_t*)step, l.sequence = (const int64_t*)sequence;
  l.row_adapter = (int32_t*)lists[0], l.order = (int64_t*)lists[1], l.ends = (int64_t*)lists[2];
  l.tiles_short = (int32_t*)lists[3], l.tiles_long = (int32_t*)lists[4], l.chunks = (int32_t*)lists[5];
  l.slots = (int32_t*)lists[6], l.row_key = (int64_t*)lists[11], l.position = (int32_t*)lists[12];
  l.capacity_short = capacities[0], l.capacity_long = capacities[1], l.capacity_chunks = capacities[2];
  for (int c = 0; c <= classes && classes; ++c) {
    int from = c < classes ? c : 3;
    l.attention[c] = (int32_t*)lists[7 + from], l.capacity_attention[c] = capacities[3 + from];
  }
  l.place_scratch((int32_t*)scratch);
  phases_kernel<<<1, Lists::THREADS, 0, (cudaStream_t)stream>>>(l);
  int64_t entries = l.entries();
  if (entries) entries_kernel<<<(unsigned)kloss::ceil_div(entries, THREADS), THREADS, 0, (cudaStream_t)stream>>>(l);
  return cudaGetLastError();
}
