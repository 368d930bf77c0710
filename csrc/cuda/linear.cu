// The multi-adapter linear's products on Hopper: y = S B_gᵀ + b + x Wᵀ, and dx = mask (dS A_g) + dy W, each in one accumulator.
// Rows lie in order, so a tile of 64 rows of one adapter is a box of memory.
//
// A cluster of two CTAs computes four tiles, one below the other, of COLUMNS columns. A CTA has two of them, one for each of two
// warpgroups that multiply by wgmma. Of a third warpgroup, a thread loads by TMA, some steps of the contraction ahead, and three
// warps help: they draw the next item's dropout and write the last one's outputs, while products run. Each CTA loads half of the
// base weight's boxes, for both. LoRA's steps come first. There is one CTA on each multiprocessor, and a cluster walks its items.
// Tiles start at multiples of 64 from the adapter's own first row and the order of summation is fixed: an
// adapter's bits do not depend on who shares the batch.

#include "../shared/host_device.h"
#include "entry.cuh"
#include "hopper.cuh"

namespace {

using BFPair = __nv_bfloat162;  // two neighbours
using FPPair = __half2;
using Half = uint16_t;

template <int N>
using Count = std::integral_constant<int, N>;

constexpr int STEP = 64, CLUSTER = 2;            // contraction of a step, CTAs of a cluster
constexpr int GROUP = 128, THREADS = 3 * GROUP;  // threads of a warpgroup; one of three loads and helps
[[maybe_unused]] constexpr int HELPERS = 3;  // warps
constexpr int BOX = 64 * STEP * 2;               // bytes of 64 rows, or columns, of a step
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

__host__ __device__ constexpr int stages_of(int columns) { return columns == 256 ? 3 : 5; }  // that fit beside what follows
__host__ __device__ constexpr int line_of(int columns) { return 2 * columns; }  // bytes of a row on its way out

// Where the tensors lie. x: [T, K]. w: [N, K]. s: [T, slices R]. f: [G, N, R], or [G, slices R, K] in backward.
struct Maps {
  CUtensorMap x, w, s, f;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using namespace kloss;

// What a pair of neighbouring features draws at a site, 16 bits each: kloss/kernels/dropout.py.
__device__ __forceinline__ uint32_t draw(uint32_t pair, uint64_t key) {
  uint32_t h = pair * 0x9E3779B1u ^ (uint32_t)key;
  h = (h ^ h >> 16) * 0x7FEB352Du;
  h ^= h >> 15;
  h = (h ^ (uint32_t)(key >> 32)) * 0x846CA68Bu;
  return h ^ h >> 16;
}

__device__ __forceinline__ float2 unpack(BFPair two) { return __bfloat1622float2(two); }
__device__ __forceinline__ float2 unpack(FPPair two) { return __half22float2(two); }
template <class T>
__device__ __forceinline__ uint32_t halves(float a, float b) {
  T two;
  if constexpr (std::is_same_v<T, BFPair>)
    two = __floats2bfloat162_rn(a, b);
  else
    two = __floats2half2_rn(a, b);
  return *(uint32_t*)&two;
}

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

// False behind the last item.
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

__device__ __forceinline__ int threshold_of(const Linear& l, int g) { return min((int)rintf(l.p[g] * 65536.0f), 65535); }

// Draws the bits of an item's two tiles: which LoRA features are kept, COLUMNS / 64 words for each thread that multiplies, a bit
// for each of its accumulators. helper: this one's thread.
template <int COLUMNS>
__device__ __forceinline__ void draw_bits(const Linear& l, const Item& item, int helper, uint32_t* bits) {
  constexpr int WORDS = COLUMNS / 64;
#pragma unroll 1
  for (int i = helper; i < 2 * GROUP; i += 32 * HELPERS) {
    const Part part(item, i / GROUP);
    if (part.g < 0) continue;
    int lane = i % 32, row = part.first + i % GROUP / 32 * 16 + lane / 4;
    uint64_t key = row < part.last ? l.keys[row] : 0, below = row + 8 < part.last ? l.keys[row + 8] : 0;
    uint32_t threshold = threshold_of(l, part.g);
#pragma unroll 1
    for (int word = 0; word < WORDS; ++word) {
      uint32_t kept = 0, first = (part.column + 64 * word) / 2 + lane % 4;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t h = draw(first + 4 * j, r ? below : key);
          kept |= ((h & 0xffff) >= threshold | (uint32_t)((h >> 16) >= threshold) << 1) << (4 * j + 2 * r);
        }
      bits[i * WORDS + word] = kept;
    }
  }
}

// Writes a tile that lies in shared memory, a chunk of 16 bytes where its number crossed with the row's says, to y.
template <int COLUMNS>
__device__ __forceinline__ void write_out(const Linear& l, const Part& part, int helper, const uint8_t* from) {
  constexpr int CHUNKS = COLUMNS / 8, ROWS = 32 * HELPERS / CHUNKS;  // of a row; at a time
  int chunk = helper % CHUNKS, column = part.column + 8 * chunk, rows = part.last - part.first;
  if (column >= l.width) return;
  Half* to = (Half*)l.y + (int64_t)part.first * l.stride + column;
#pragma unroll 2
  for (int row = helper / CHUNKS; row < rows; row += ROWS)
    *(uint4*)(to + row * l.stride) = *(const uint4*)(from + row * line_of(COLUMNS) + (chunk ^ row & 7) * 16);
}

template <class T, int COLUMNS, bool TURNED>
__global__ void __launch_bounds__(THREADS, 1)
    linear_kernel(const __grid_constant__ Linear l, const __grid_constant__ Maps maps) {
  constexpr int BOXES = COLUMNS / 64, STAGE = (2 + BOXES) * BOX, STAGES = stages_of(COLUMNS);
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t barriers[2 * STAGES + 6];
  uint8_t *base = (uint8_t*)(((uintptr_t)memory + 1023) & ~(uintptr_t)1023), *outputs = base + STAGES * STAGE;
  Half* bias = (Half*)(outputs + 2 * 64 * line_of(COLUMNS));
  uint32_t* bits = (uint32_t*)bias;  // there is no bias then
  uint32_t stages = shared(base), full = shared(barriers), empty = full + 8 * STAGES, rank = cluster_rank();
  // Of each tile's outputs: they are there, they are written. Of the bits: likewise.
  uint32_t made = empty + 8 * STAGES, written = made + 16, drawn = written + 16, read = drawn + 8;
  const bool dropout = TURNED && l.p;
  int group = threadIdx.x / GROUP, begin = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER, at = 0;  // at: stages used
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) init(full + 8 * s, 1), init(empty + 8 * s, 2 * CLUSTER);
    for (int half = 0; half < 2; ++half) init(made + 8 * half, 4), init(written + 8 * half, HELPERS);
    init(drawn, HELPERS), init(read, 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (!TURNED)
    for (int c = threadIdx.x; c < l.blocks * COLUMNS; c += THREADS) bias[c] = l.bias && c < l.width ? ((const Half*)l.bias)[c] : 0;
  cluster_sync();
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (threadIdx.x == 0) {
      Item now;
      auto next = [&](uint32_t& a, uint32_t& b, uint32_t& ready) {  // a stage that is free
        int s = at % STAGES;
        a = stages + s * STAGE, b = a + 2 * BOX, ready = full + 8 * s;
        wait(empty + 8 * s, at++ / STAGES & 1 ^ 1);
        expect(ready, STAGE);
      };
      for (int i = begin; find<COLUMNS>(l, i, rank, now); i += clusters) {
        uint32_t a, b, ready;
#pragma unroll 1
        for (int round = 0; round < now.rounds; ++round)
#pragma unroll 1
          for (int r = 0; r < l.rank; r += STEP) {
            int g = round ? now.g[1] : max(now.g[0], 0);
            next(a, b, ready);
            for (int half = 0; half < 2; ++half)
              load(maps.s, a + half * BOX, ready, now.slice * l.slice_step + r, now.first[half]);
            for (int j = 0; j < BOXES; ++j) {
              int column = now.column + 64 * j;
              load(maps.f, b + j * BOX, ready, TURNED ? column : r, TURNED ? r : column, g);
            }
          }
#pragma unroll 1
        for (int k = 0; k < l.steps; ++k) {
          int r = k * STEP;
          next(a, b, ready);
          for (int half = 0; half < 2; ++half) load(maps.x, a + half * BOX, ready, r, now.first[half]);
          for (int j = rank; j < BOXES; j += CLUSTER) {
            int column = now.column + 64 * j;
            load(maps.w, b + j * BOX, ready, TURNED ? column : r, TURNED ? r : column, (uint16_t)((1 << CLUSTER) - 1));
          }
        }
      }
    } else if (threadIdx.x >= 32) {
      int helper = threadIdx.x - 32, turn = 0, outs[2] = {};  // turn: items drawn; outs: tiles written
      auto draws = [&](const Item& item) {
        wait(read, turn++ & 1 ^ 1);
        draw_bits<COLUMNS>(l, item, helper, bits);
        arrive_here(drawn);
      };
      Item now, next;
      bool more = find<COLUMNS>(l, begin, rank, now);
      if (more && dropout) draws(now);
#pragma unroll 1
      for (int i = begin; more; now = next) {
        more = find<COLUMNS>(l, i += clusters, rank, next);
        if (more && dropout) draws(next);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Part part(now, half);
          if (part.first == part.last) continue;
          wait(made + 8 * half, outs[half]++ & 1);
          write_out<COLUMNS>(l, part, helper, outputs + half * 64 * line_of(COLUMNS));
          arrive_here(written + 8 * half);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    constexpr int ALONG = TURNED ? 128 : 2;  // from 16 of the contraction to the next, in b; 2 in a
    int thread = threadIdx.x % GROUP, lane = thread % 32, warp = thread / 32, half = group - 1;
    // The row of outputs that this lane gives to `store_matrices`.
    uint32_t line = shared(outputs + (half * 64 + warp * 16 + lane % 16) * line_of(COLUMNS));
    int turn = 0, outs = 0;  // turn: items begun; outs: tiles handed over
    float d[COLUMNS / 2];
    uint64_t a, b;
    auto filled = [&] {  // waits for the next stage
      int s = at % STAGES;
      wait(full + 8 * s, at / STAGES & 1);
      a = matrix(stages + s * STAGE + half * BOX), b = matrix(stages + s * STAGE + 2 * BOX, TURNED ? BOX : 0);
    };
    auto release = [&](int used) {  // a stage that this warpgroup has read, to both CTAs that write there
      if (thread < CLUSTER) arrive(empty + 8 * (used % STAGES), thread);
      __syncwarp();
    };
    auto products = [&](auto substeps) {
      fence();
#pragma unroll
      for (int j = 0; j < decltype(substeps)::value; ++j) multiply<T, TURNED>(d, a + 2 * j, b + ALONG * j);
      commit();
    };
    Item item;
    bool more = find<COLUMNS>(l, begin, rank, item);
    for (int i = begin; more;) {
      const Part now(item, half);
      bool idle = now.first == now.last, drops = dropout && now.g >= 0;
      uint32_t kept[COLUMNS / 64];  // of the LoRA term's features, a bit for each of d
      float scale = drops ? __fdiv_rn(65536.0f, (float)(65536 - threshold_of(l, now.g))) : 1;
      if (dropout) {
        wait(drawn, turn++ & 1);
#pragma unroll
        for (int j = 0; j < COLUMNS / 64; ++j) kept[j] = bits[(half * GROUP + thread) * (COLUMNS / 64) + j];
        arrive_here(read);
      }
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
        float2 both = {0, 0};
        if (!TURNED) both = unpack(*(T*)(bias + now.column + 8 * j + lane % 4 * 2));
        d[4 * j] = d[4 * j + 2] = both.x, d[4 * j + 1] = d[4 * j + 3] = both.y;
      }
#pragma unroll 1
      for (int round = 0; round < now.rounds; ++round)
#pragma unroll 1
        for (int left = l.rank / 16; left > 0; left -= STEP / 16, ++at) {
          filled();
          if (now.round == round) {
            if (left >= 4)
              products(Count<4>()), finish<0>();
            else if (left == 3)
              products(Count<3>()), finish<0>();
            else if (left == 2)
              products(Count<2>()), finish<0>();
            else
              products(Count<1>()), finish<0>();
          }
          release(at);
        }
      if (drops) {
#pragma unroll
        for (int j = 0; j < COLUMNS / 2; ++j) d[j] = kept[j / 32] >> j % 32 & 1 ? d[j] * scale : 0;
      }
      if (idle) {
#pragma unroll 1
        for (int k = 0; k < l.steps; ++k, ++at) filled(), release(at);
        more = find<COLUMNS>(l, i += clusters, rank, item);
        continue;
      }
      filled(), products(Count<4>()), ++at;  // apart: else the compiler runs products one after another
#pragma unroll 1
      for (int k = 1; k < l.steps; ++k, ++at) {
        filled(), products(Count<4>());
        finish<1>();
        release(at - 1);
      }
      more = find<COLUMNS>(l, i += clusters, rank, item);  // while the last products run
      finish<0>();
      release(at - 1);
      wait(written + 8 * half, outs++ & 1 ^ 1);
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j += 2) {  // two blocks of 8 columns, each of 16 lines
        const float* from = d + 4 * j;
        uint32_t chunk = j + lane / 16 ^ lane & 7;
        store_matrices(
            line + chunk * 16, halves<T>(from[0], from[1]), halves<T>(from[2], from[3]), halves<T>(from[4], from[5]),
            halves<T>(from[6], from[7]));
      }
      arrive_here(made + 8 * half);
    }
  }
  __syncwarp();
  cluster_sync();  // nobody ends while another may still write into its memory
}

#else

template <class T, int COLUMNS, bool TURNED>
__global__ void linear_kernel(const __grid_constant__ Linear, const __grid_constant__ Maps) {}

#endif

template <class T, int COLUMNS, bool TURNED>
int launch(const Linear& l, const Maps& maps, int processors, cudaStream_t stream) {
  constexpr int BYTES = 1024 + stages_of(COLUMNS) * (2 + COLUMNS / 64) * BOX + 2 * 64 * line_of(COLUMNS) + 2 * WIDEST;
  static_assert(BYTES <= 232448 - 128, "more than a block may have");
  auto* kernel = linear_kernel<T, COLUMNS, TURNED>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error) return error;
  int64_t items = kloss::ceil_div(l.tiles, 2 * CLUSTER) * l.blocks, clusters = processors / CLUSTER;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = CLUSTER, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = (unsigned)(CLUSTER * (items < clusters ? items : clusters)), config.blockDim = THREADS;
  config.dynamicSmemBytes = BYTES, config.stream = stream, config.attrs = &cluster, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, l, maps);
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// A tensor of `dims` dimensions, the innermost first. strides: bytes, of all but the innermost.
int describe(CUtensorMap& map, const void* data, int bf16, int dims, const int64_t* sizes, const int64_t* strides) {
  static void* encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return found == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t size[3], stride[2];
  cuuint32_t box[3] = {64, 64, 1}, unit[3] = {1, 1, 1};
  for (int i = 0; i < dims; ++i) size[i] = (cuuint64_t)sizes[i];
  for (int i = 0; i + 1 < dims; ++i) stride[i] = (cuuint64_t)strides[i];
  auto type = bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return ((Encode)encode)(
      &map, type, (cuuint32_t)dims, (void*)data, size, stride, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <class T, bool TURNED>
int choose(const Linear& l, const Maps& maps, int columns, int processors, cudaStream_t stream) {
  if (columns == 256) return launch<T, 256, TURNED>(l, maps, processors, stream);
  return launch<T, 128, TURNED>(l, maps, processors, stream);
}

}  // namespace

// sizes: T, K (contraction), N (columns), G, SR (columns of S), rank of a block's contraction, slices (1: all are summed), turned,
// bf16, columns of a tile (256 or 128). strides in elements: of x's rows, w's, s's, an adapter's factor, y's rows.
// w and f are [N, K] and [G, N, R]; turned: [K, N] and [G, SR, N]. All addresses and strides are multiples of 16 bytes.
KLOSS_ENTRY kloss_linear(
    const int64_t* sizes, const int64_t* strides, const void* x, const void* w, const void* s, const void* f, const void* bias,
    void* y, int64_t tiles, const void* tile, const void* p, const void* keys, void* stream) {
  int64_t T = sizes[0], K = sizes[1], N = sizes[2], G = sizes[3], SR = sizes[4], rank = sizes[5], slices = sizes[6];
  bool turned = sizes[7], bf16 = sizes[8];
  int columns = (int)sizes[9];
  int device, processors, code = 0;
  if ((code = cudaGetDevice(&device))) return code;
  if ((code = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))) return code;
  Linear l{};
  l.tiles = (int)tiles, l.blocks = (int)kloss::ceil_div(N, columns), l.width = (int)N, l.per_slice = (int)(N / slices);
  l.steps = (int)kloss::ceil_div(K, STEP), l.rank = (int)rank, l.slice_step = slices > 1 ? (int)rank : 0;
  l.tile = (const int32_t*)tile, l.bias = bias, l.p = (const float*)p, l.keys = (const int64_t*)keys;
  l.y = y, l.stride = strides[4];
  if (tiles == 0 || N == 0) return 0;
  Maps maps;
  int64_t of_x[] = {K, T}, of_w[] = {turned ? N : K, turned ? K : N}, of_s[] = {SR, T};
  int64_t of_f[] = {turned ? N : rank, turned ? SR : N, G};
  int64_t x_step[] = {2 * strides[0]}, w_step[] = {2 * strides[1]}, s_step[] = {2 * strides[2]};
  int64_t f_step[] = {2 * of_f[0], 2 * strides[3]};
  if ((code = describe(maps.x, x, bf16, 2, of_x, x_step))) return code;
  if ((code = describe(maps.w, w, bf16, 2, of_w, w_step))) return code;
  if ((code = describe(maps.s, s, bf16, 2, of_s, s_step))) return code;
  if ((code = describe(maps.f, f, bf16, 3, of_f, f_step))) return code;
  auto* function = turned ? choose<BFPair, true> : choose<BFPair, false>;
  if (!bf16) function = turned ? choose<FPPair, true> : choose<FPPair, false>;
  return function(l, maps, columns, processors, (cudaStream_t)stream);
}
