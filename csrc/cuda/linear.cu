// The multi-adapter linear's products on Hopper: y = S B_gᵀ + b + x Wᵀ, and dx = mask (dS A_g) + dy W, each in one accumulator.
// Rows lie in order, so a tile of 64 rows of one adapter is a box of memory.
//
// A cluster of two CTAs computes four tiles, one below the other, of COLUMNS columns. A CTA has two of them, one for each of two
// warpgroups that multiply by wgmma; a thread of a third warpgroup loads by TMA, some steps of the contraction ahead. Each CTA
// loads half of the base weight's boxes, for both. LoRA's steps come first. There is one CTA on each multiprocessor, and a cluster
// walks its items; while products run, the next item is looked up and its dropout drawn. Tiles start at multiples of 64 from the
// adapter's own first row and the order of summation is fixed: an adapter's bits do not depend on who shares the batch.

#include "entry.cuh"
#include "linear.cuh"

namespace {

using namespace kloss;

// Where the tensors lie. x: [T, K]. w: [N, K]. s: [T, slices R]. f: [G, N, R], or [G, slices R, K] in backward.
struct Maps {
  CUtensorMap x, w, s, f;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What all threads of a block know: where its stages and their barriers are, and which items are its cluster's.
template <int COLUMNS>
struct Block : Memory<COLUMNS> {
  using Memory<COLUMNS>::STAGE, Memory<COLUMNS>::STAGES;

  uint32_t stages, barriers, rank;  // addresses; the CTA's rank in its cluster
  int begin, clusters;

  // at: stages used before.
  __device__ __forceinline__ uint32_t stage(int at) const { return stages + at % STAGES * STAGE; }
  __device__ __forceinline__ uint32_t full(int at) const { return barriers + 8 * (at % STAGES); }
  __device__ __forceinline__ uint32_t empty(int at) const { return barriers + 8 * (STAGES + at % STAGES); }
};

// What one thread does: loads what the products need, as soon as a stage is free.
template <int COLUMNS, bool TURNED>
__device__ __forceinline__ void load_items(const Linear& l, const Maps& maps, const Block<COLUMNS>& block) {
  using B = Block<COLUMNS>;
  Item now;
  int at = 0;  // stages used
  uint32_t a, b, full;
  auto next = [&] {
    a = block.stage(at), b = a + 2 * BOX, full = block.full(at);
    wait(block.empty(at), at / B::STAGES & 1 ^ 1), ++at;
    expect(full, B::STAGE);
  };
  for (int i = block.begin; find<COLUMNS>(l, i, block.rank, now); i += block.clusters) {
#pragma unroll 1
    for (int round = 0; round < now.rounds; ++round)
#pragma unroll 1
      for (int r = 0; r < l.rank; r += STEP) {
        int g = round ? now.g[1] : max(now.g[0], 0);
        next();
        for (int half = 0; half < 2; ++half) load(maps.s, a + half * BOX, full, now.slice * l.slice_step + r, now.first[half]);
        for (int j = 0; j < B::BOXES; ++j) {
          int column = now.column + 64 * j;
          load(maps.f, b + j * BOX, full, TURNED ? column : r, TURNED ? r : column, g);
        }
      }
#pragma unroll 1
    for (int k = 0; k < l.steps; ++k) {
      int r = k * STEP;
      next();
      for (int half = 0; half < 2; ++half) load(maps.x, a + half * BOX, full, r, now.first[half]);
      for (int j = block.rank; j < B::BOXES; j += CLUSTER) {
        int column = now.column + 64 * j;
        load(maps.w, b + j * BOX, full, TURNED ? column : r, TURNED ? r : column, (uint16_t)((1 << CLUSTER) - 1));
      }
    }
  }
}

// What a warpgroup does: the products of 64 rows of each item. memory: where the stages begin.
template <class T, int COLUMNS, bool TURNED>
__device__ __forceinline__ void multiply_items(const Linear& l, const Block<COLUMNS>& block, uint8_t* memory, int half) {
  using B = Block<COLUMNS>;
  constexpr int ALONG = TURNED ? 128 : 2;  // from 16 of the contraction to the next, in b; 2 in a
  int thread = threadIdx.x % GROUP, lane = thread % 32, warp = thread / 32, at = 0;  // at: stages used
  uint32_t staging = block.stages + B::STAGING + (half * 4 + warp) * STAGED;
  const Half* bias = (const Half*)(memory + B::BIAS);
  float d[COLUMNS / 2];
  uint64_t a, b;
  auto filled = [&] {  // waits for the next stage
    wait(block.full(at), at / B::STAGES & 1);
    a = matrix(block.stage(at) + half * BOX), b = matrix(block.stage(at) + 2 * BOX, TURNED ? BOX : 0);
  };
  auto release = [&](int used) {  // a stage that this warpgroup has read, to both CTAs that write there
    if (thread < CLUSTER) arrive(block.empty(used), thread);
    __syncwarp();
  };
  // Stages that others multiply. Nothing else holds the warps together here, and one that came when a stage had been filled a
  // second time would wait for ever: so one warp looks at them for all, and releases them when each of its threads has seen them.
  auto skip = [&](int count) {
    if (count == 0) return;
    if (warp == 0)
      for (int s = at; s < at + count; ++s) wait(block.full(s), s / B::STAGES & 1), __syncwarp(), release(s);
    at += count;
    sync(1 + half, GROUP);
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
  int round_steps = ceil_div(l.rank, STEP), i = block.begin, ahead = 0, steps = TURNED && l.p ? 2 + Mask<COLUMNS>::PIECES : 1;
  auto prepare = [&] {
    if (ahead == 0) {
      more = find<COLUMNS>(l, i, block.rank, item), i += block.clusters;
      if (!more) ahead = steps;
    } else if (ahead == 1) {
      const Part next(item, half);
      mask.begin(l, next, lane, next.first + warp * 16);
    } else
      mask.piece();
    ++ahead;
  };
  // Outputs leave by way of shared memory, so that neighbouring lanes write neighbouring bytes, 64 columns at a time.
  auto write = [&](int part, int row, int last, int column) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {  // two blocks of 8 columns, each of 16 lines
      const float* from = d + 4 * (8 * part + j);
      int line = lane % 16, eighth = j + lane / 16;
      store_matrices(
          staging + line * 128 + (eighth ^ line & 7) * 16, halves<T>(from[0], from[1]), halves<T>(from[2], from[3]),
          halves<T>(from[4], from[5]), halves<T>(from[6], from[7]));
    }
    __syncwarp();
    uint4 eight[4];  // all are read before one is written: the compiler does not know that these are different memories
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      int line = 4 * r + lane / 8;
      eight[r] = read(staging + line * 128 + (lane % 8 ^ line & 7) * 16);
    }
    __syncwarp();
    column += lane % 8 * 8, row += lane / 8;
    Half* out = (Half*)l.y + row * l.stride + column;
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (row + 4 * r < last && column < l.width) *(uint4*)(out + 4 * r * l.stride) = eight[r];
  };
  while (ahead < steps) prepare();
  while (more) {
    const Part now(item, half);
    if (now.first == now.last) {
      skip(now.rounds * round_steps + l.steps);
      for (ahead = 0; ahead < steps;) prepare();
      continue;
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      float2 both = {0, 0};
      if (!TURNED) both = unpack<T>(*(const uint32_t*)(bias + now.column + 8 * j + lane % 4 * 2));
      d[4 * j] = d[4 * j + 2] = both.x, d[4 * j + 1] = d[4 * j + 3] = both.y;
    }
    skip((now.round < 0 ? now.rounds : now.round) * round_steps);
    if (now.round >= 0) {
#pragma unroll 1
      for (int left = l.rank / 16; left > 0; left -= STEP / 16, ++at) {
        filled();
        if (left >= 4)
          products(Count<4>()), finish<0>();
        else if (left == 3)
          products(Count<3>()), finish<0>();
        else if (left == 2)
          products(Count<2>()), finish<0>();
        else
          products(Count<1>()), finish<0>();
        release(at);
      }
      skip((now.rounds - 1 - now.round) * round_steps);
    }
    if (TURNED && mask.drops) {
      float scale = scale_of(mask.threshold);
#pragma unroll
      for (int j = 0; j < COLUMNS / 2; ++j) d[j] = mask.kept(j) ? d[j] * scale : 0;
    }
    ahead = 0;
    filled(), products(Count<4>()), ++at;  // apart: else the compiler runs products one after another
#pragma unroll 1
    for (int k = 1; k < l.steps; ++k, ++at) {
      filled(), products(Count<4>());
      finish<1>();
      release(at - 1);
      if (ahead < steps) prepare();
    }
    while (ahead < steps) prepare();
    finish<0>();
    release(at - 1);
#pragma unroll
    for (int part = 0; part < COLUMNS / 64; ++part) write(part, now.first + warp * 16, now.last, now.column + 64 * part);
  }
}

template <class T, int COLUMNS, bool TURNED>
__global__ void __launch_bounds__(THREADS, 1)
    linear_kernel(const __grid_constant__ Linear l, const __grid_constant__ Maps maps) {
  using B = Block<COLUMNS>;
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t barriers[2 * B::STAGES];
  uint8_t* base = (uint8_t*)(((uintptr_t)memory + 1023) & ~(uintptr_t)1023);
  const B block{{}, shared(base), shared(barriers), cluster_rank(), (int)blockIdx.x / CLUSTER, (int)gridDim.x / CLUSTER};
  int group = threadIdx.x / GROUP;
  if (threadIdx.x == 0) {
    for (int s = 0; s < B::STAGES; ++s) init(block.full(s), 1), init(block.empty(s), 2 * CLUSTER);
    show_barriers();
  }
  if (!TURNED)
    for (int c = threadIdx.x; c < l.blocks * COLUMNS; c += THREADS)
      ((Half*)(base + B::BIAS))[c] = l.bias && c < l.width ? ((const Half*)l.bias)[c] : 0;
  cluster_sync();
  if (group == 0) {
    fewer_registers<56>();
    if (threadIdx.x == 0) load_items<COLUMNS, TURNED>(l, maps, block);
  } else {
    more_registers<224>();
    multiply_items<T, COLUMNS, TURNED>(l, block, base, group - 1);
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
  constexpr int BYTES = 1024 + Memory<COLUMNS>::BYTES;
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
