// The multi-adapter linear's products on Hopper: y = S B_gᵀ + b + x Wᵀ, and dx = mask (dS A_g) + dy W, each in one accumulator.
// Rows lie in order, so a tile of 64 rows of one adapter is a box of memory.
//
// A cluster of two CTAs computes four tiles, one below the other, of COLUMNS columns. A CTA has two of them, one for each of two
// warpgroups that multiply by wgmma; a thread of a third warpgroup loads by TMA, some steps of the contraction ahead. Each CTA
// loads half of the base weight's boxes, for both. LoRA's steps come first. There is one CTA on each multiprocessor, and a cluster
// walks its items; while products run, the next item is looked up and its dropout drawn. Tiles start at multiples of 64 from the
// adapter's own first row and the order of summation is fixed: an adapter's bits do not depend on who shares the batch.

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
constexpr int GROUP = 128, THREADS = 3 * GROUP;  // threads of a warpgroup; one of three loads
constexpr int BOX = 64 * STEP * 2;               // bytes of 64 rows, or columns, of a step
constexpr int STAGING = 16 * 64 * 2;             // bytes of a warp's 16 rows of 64 columns on their way out
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

__host__ __device__ constexpr int stages_of(int columns) { return columns == 256 ? 4 : 6; }  // that fit beside each other

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

// Which of a thread's LoRA features are kept, a bit for each of its accumulators. It is drawn in PIECES pieces of 16 bits.
template <int COLUMNS>
struct Mask {
  static constexpr int PIECES = COLUMNS / 32;
  uint64_t bits[PIECES / 4], key, below;  // those of the thread's rows, 8 apart
  uint32_t pair;                          // the first of its pairs of features
  int threshold;
  bool drops;

  // Loads what the draws need. lane, row: the thread's lane, and the first row of its warp.
  __device__ __forceinline__ void begin(const Linear& l, const Part& part, int lane, int row) {
    drops = part.g >= 0, row += lane / 4, pair = part.column / 2 + lane % 4;
    threshold = drops ? min((int)rintf(l.p[part.g] * 65536.0f), 65535) : 0;
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
        kept |= (uint32_t)((int)(h & 0xffff) >= threshold | ((int)(h >> 16) >= threshold) << 1) << (4 * j + 2 * r);
      }
#pragma unroll
    for (int i = 0; i + 1 < PIECES / 4; ++i) bits[i] = bits[i] >> 16 | bits[i + 1] << 48;
    bits[PIECES / 4 - 1] = bits[PIECES / 4 - 1] >> 16 | (uint64_t)kept << 48;
    pair += 16;
  }

  __device__ __forceinline__ bool kept(int i) const { return bits[i / 64] >> i % 64 & 1; }
  __device__ __forceinline__ float scale() const { return __fdiv_rn(65536.0f, (float)(65536 - threshold)); }
};

template <class T, int COLUMNS, bool TURNED>
__global__ void __launch_bounds__(THREADS, 1)
    linear_kernel(const __grid_constant__ Linear l, const __grid_constant__ Maps maps) {
  constexpr int BOXES = COLUMNS / 64, STAGE = (2 + BOXES) * BOX, STAGES = stages_of(COLUMNS);
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t barriers[2 * STAGES];
  uint8_t* base = (uint8_t*)(((uintptr_t)memory + 1023) & ~(uintptr_t)1023);
  Half* bias = (Half*)(base + STAGES * STAGE + 8 * STAGING);
  uint32_t stages = shared(base), full = shared(barriers), empty = full + 8 * STAGES, rank = cluster_rank();
  int group = threadIdx.x / GROUP, begin = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER, at = 0;  // at: stages used
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) init(full + 8 * s, 1), init(empty + 8 * s, 2 * CLUSTER);
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
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    constexpr int ALONG = TURNED ? 128 : 2;  // from 16 of the contraction to the next, in b; 2 in a
    int thread = threadIdx.x % GROUP, lane = thread % 32, warp = thread / 32, half = group - 1;
    uint8_t* staging = base + STAGES * STAGE + (half * 4 + warp) * STAGING;
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
    // What is done for the next item, a step at a time: look it up, load for its mask, draw the pieces.
    Item item;
    Mask<COLUMNS> mask{};
    bool more = true;
    int i = begin, ahead = 0, steps = TURNED && l.p ? 2 + Mask<COLUMNS>::PIECES : 1;
    auto prepare = [&] {
      if (ahead == 0) {
        more = find<COLUMNS>(l, i, rank, item), i += clusters;
        if (!more) ahead = steps;
      } else if (ahead == 1) {
        const Part next(item, half);
        mask.begin(l, next, lane, next.first + warp * 16);
      } else
        mask.piece();
      ++ahead;
    };
    while (ahead < steps) prepare();
    while (more) {
      const Part now(item, half);
      int last = now.last, row = now.first + warp * 16;  // row: this warp's first
      bool idle = now.first == last;
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
      if (TURNED && mask.drops) {
        float scale = mask.scale();
#pragma unroll
        for (int j = 0; j < COLUMNS / 2; ++j) d[j] = mask.kept(j) ? d[j] * scale : 0;
      }
      ahead = 0;
      if (idle) {
#pragma unroll 1
        for (int k = 0; k < l.steps; ++k, ++at) filled(), release(at);
        while (ahead < steps) prepare();
        continue;
      }
      filled(), products(Count<4>()), ++at;  // apart: else the compiler runs products one after another
#pragma unroll 1
      for (int k = 1; k < l.steps; ++k, ++at) {
        filled(), products(Count<4>());
        if (ahead < steps) prepare();
        finish<1>();
        release(at - 1);
      }
      while (ahead < steps) prepare();
      finish<0>();
      release(at - 1);
      // Out, 64 columns at a time: by way of shared memory, so that eight lanes write 128 neighbouring bytes.
#pragma unroll
      for (int part = 0; part < COLUMNS / 64; ++part) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {  // two blocks of 8 columns, each of 16 lines
          const float* from = d + 4 * (8 * part + j);
          int line = lane % 16, block = j + lane / 16;
          store_matrices(
              shared(staging + line * 128 + (block ^ line & 7) * 16), halves<T>(from[0], from[1]), halves<T>(from[2], from[3]),
              halves<T>(from[4], from[5]), halves<T>(from[6], from[7]));
        }
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          int line = 4 * r + lane / 8, chunk = lane % 8, column = now.column + part * 64 + chunk * 8;
          uint4 eight = *(uint4*)(staging + line * 128 + (chunk ^ line & 7) * 16);
          if (row + line < last && column < l.width) *(uint4*)((Half*)l.y + (row + line) * l.stride + column) = eight;
        }
        __syncwarp();
      }
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
  constexpr int BYTES = 1024 + stages_of(COLUMNS) * (2 + COLUMNS / 64) * BOX + 8 * STAGING + 2 * WIDEST;
  static_assert(BYTES <= 232448 - 64, "more than a block may have");
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
