// What `linear.cu` walks and draws: items of four tiles, which parts of them a warpgroup has, and the masks of dropout.
#pragma once

#include "../shared/host_device.h"
#include "halves.cuh"
#include "hopper.cuh"

namespace kloss {

template <int N>
using Count = std::integral_constant<int, N>;

constexpr int STEP = 64, CLUSTER = 2;            // contraction of a step, CTAs of a cluster
constexpr int GROUP = 128, THREADS = 3 * GROUP;  // threads of a warpgroup; one of three loads
constexpr int BOX = 64 * STEP * 2;               // bytes of 64 rows, or columns, of a step
constexpr int STAGED = 16 * 64 * 2;              // bytes of a warp's 16 rows of 64 columns on their way out
constexpr int WIDEST = 8192;                     // columns that fit beside the stages, as bias

struct Linear {
  int tiles, blocks;     // entries of `tile`, blocks of columns
  int width, per_slice;  // columns in all, and of a slice: N and N / slices; K in backward
  int steps, rank;       // steps of the base product's contraction; LoRA's contraction: R, slices * R in backward
  int slice_step;        // columns of S from one slice to the next; 0 where there is one
  const int32_t* tile;   // [tiles, 3]: adapter or -1, first row, last row; used ones come first
  const void* bias;      // [width] or null
  const float* p;        // [G], dropout of the LoRA term's features, or null
  const int64_t* keys;   // [T]
  void* y;               // [T, width]
  int64_t stride;        // of y's rows
};

// A block's shared memory: stages of two boxes of x, or of S, and BOXES of the weight, or of a factor; outputs on their way; bias.
template <int COLUMNS>
struct Memory {
  static constexpr int BOXES = COLUMNS / 64, STAGE = (2 + BOXES) * BOX, STAGES = COLUMNS == 256 ? 4 : 6;
  static constexpr int STAGING = STAGES * STAGE, BIAS = STAGING + 8 * STAGED, BYTES = BIAS + 2 * WIDEST;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a cluster computes at a time: two tiles of 64 rows each CTA, COLUMNS columns. This CTA's part of it.
struct Item {
  int g[2], first[2], last[2];  // of a tile: adapter or -1, rows; nothing to do where first == last
  int rounds;                   // of LoRA's steps: one for each tile if a CTA's two have different adapters, else one for both
  int column, slice;            // first column, slice of S
};

// That of one warpgroup. round: in which LoRA's steps are its own; -1: in none.
struct Part {
  int g, first, last, rounds, round, column;
  __device__ Part(const Item& item, int half)
      : g(half ? item.g[1] : item.g[0]), first(half ? item.first[1] : item.first[0]), last(half ? item.last[1] : item.last[0]),
        rounds(item.rounds), round(g < 0 ? -1 : half && item.g[0] != g), column(item.column) {}
};

// A cluster's item: its `i`th. False behind the last.
template <int COLUMNS>
__device__ __forceinline__ bool find(const Linear& l, int i, uint32_t rank, Item& out) {
  constexpr int TILES = 2 * CLUSTER;
  const int32_t* tile = l.tile + i / l.blocks * TILES * 3;
  int most = l.tiles - i / l.blocks * TILES, g[TILES];
  if (most <= 0 || tile[1] >= tile[2]) return false;
  for (int j = 0; j < TILES; ++j) g[j] = j < most ? tile[3 * j] : -1;
  out.rounds = 1;
  for (int j = 0; j < TILES; j += 2)
    if (g[j + 1] >= 0 && g[j] != g[j + 1]) out.rounds = 2;
  for (int half = 0; half < 2; ++half) {
    int j = 2 * rank + half;
    bool there = j < most;
    out.g[half] = there ? tile[3 * j] : -1;
    out.first[half] = there ? tile[3 * j + 1] : 0, out.last[half] = there ? tile[3 * j + 2] : 0;
  }
  out.column = i % l.blocks * COLUMNS, out.slice = l.slice_step ? out.column / l.per_slice : 0;
  return true;
}

// Which of a thread's LoRA features are kept, a bit for each of its accumulators. It is drawn in PIECES pieces of 16 bits.
template <int COLUMNS>
struct Mask {
  static constexpr int PIECES = COLUMNS / 32;
  uint64_t bits[PIECES / 4], key, below;  // those of the thread's rows, 8 apart
  uint32_t pair;                          // the first of its pairs of features
  uint32_t threshold;
  bool drops;

  // Loads what the draws need. lane, row: the thread's lane, and the first row of its warp.
  __device__ __forceinline__ void begin(const Linear& l, const Part& part, int lane, int row) {
    drops = part.g >= 0, row += lane / 4, pair = part.column / 2 + lane % 4;
    threshold = drops ? threshold_of(l.p[part.g]) : 0;
    key = row < part.last ? l.keys[row] : 0, below = row + 8 < part.last ? l.keys[row + 8] : 0;
  }

  // Draws the next piece; the one before them all goes out of `bits`.
  __device__ __forceinline__ void piece() {
    uint32_t kept = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t h = draw(pair + 4 * j, r ? below : key);
        kept |= (uint32_t)((h & 0xffff) >= threshold | (h >> 16 >= threshold) << 1) << (4 * j + 2 * r);
      }
#pragma unroll
    for (int i = 0; i + 1 < PIECES / 4; ++i) bits[i] = bits[i] >> 16 | bits[i + 1] << 48;
    bits[PIECES / 4 - 1] = bits[PIECES / 4 - 1] >> 16 | (uint64_t)kept << 48;
    pair += 16;
  }

  __device__ __forceinline__ bool kept(int i) const { return bits[i / 64] >> i % 64 & 1; }
};

#endif

}  // namespace kloss
