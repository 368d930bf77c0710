// The shared AdamW on a GPU: three launches for the whole bank.

#include "../shared/adamw.h"
#include "entry.cuh"

#include <type_traits>

namespace {

using kloss::AdamW;
using kloss::BF16;
using kloss::FP16;
using kloss::narrow;
using kloss::widen;

constexpr int THREADS = 256, WARP = 32;

// N neighbouring elements, read and written by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T of[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N>& pack(T* row, int64_t at) {
  return *(Pack<T, N>*)(row + at);
}

constexpr int CHUNKS = THREADS / WARP;  // of a block of `squares_kernel`, a warp each when lanes are added

// Sums of squares of CHUNKS chunks, N lanes each thread. Grid [cdiv(chunks, CHUNKS), G]. N: as of `update_kernel`.
template <class Grad, int N>
__global__ void __launch_bounds__(THREADS) squares_kernel(const __grid_constant__ AdamW a) {
  constexpr int TEAM = AdamW::LANES / N, HIGH = AdamW::LANES / WARP;  // threads of a chunk; lanes that a thread adds
  __shared__ float sums[CHUNKS][AdamW::LANES];
  int64_t g = blockIdx.y, first = (int64_t)blockIdx.x * CHUNKS;
  int lane = threadIdx.x % TEAM * N;
  if (!a.active[g]) return;
  for (int c = threadIdx.x / TEAM; c < CHUNKS; c += THREADS / TEAM) {
    float own[N] = {};
    if (first + c < a.chunks())
      for (int64_t i = (first + c) * AdamW::CHUNK + lane; i < a.last_of(first + c); i += AdamW::LANES) {
        Pack<Grad, N> d = pack<N>((Grad*)a.grad + g * a.grad_stride, i);
#pragma unroll
        for (int k = 0; k < N; ++k) AdamW::square(widen(d.of[k]), own[k]);
      }
#pragma unroll
    for (int k = 0; k < N; ++k) sums[c][lane + k] = own[k];
  }
  __syncthreads();
  int c = threadIdx.x / WARP, low = threadIdx.x % WARP;
  float own[HIGH];
#pragma unroll
  for (int k = 0; k < HIGH; ++k) own[k] = sums[c][low + WARP * k];
#pragma unroll
  for (int half = HIGH / 2; half; half /= 2)
#pragma unroll
    for (int k = 0; k < half; ++k) AdamW::fold(own, half, k);
  float sum = own[0];
  for (int half = WARP / 2; half; half /= 2) sum += __shfl_down_sync(~0u, sum, half);  // the same tree, further down
  if (low == 0 && first + c < a.chunks()) a.partial[g * a.chunks() + first + c] = sum;
}

// A row each block of one warp. Grid [G].
__global__ void __launch_bounds__(AdamW::TOTALS) finish_kernel(const __grid_constant__ AdamW a) {
  __shared__ double totals[AdamW::TOTALS];
  int64_t g = blockIdx.x;
  int lane = threadIdx.x;
  totals[lane] = a.active[g] ? a.total(g, lane) : 0;
  for (int half = AdamW::TOTALS / 2; half; half /= 2) {
    __syncwarp();
    if (lane < half) AdamW::fold(totals, half, lane);
  }
  if (lane == 0) a.finish(g, totals[0]);
}

// Grid [chunks, G]. N: 4 where all rows start at multiples of 4 elements and have such a width, else 1.
template <class Grad, class Work, int N>
__global__ void __launch_bounds__(THREADS) update_kernel(const __grid_constant__ AdamW a) {
  int64_t g = blockIdx.y, last = a.last_of(blockIdx.x);
  const AdamW::Row row = a.row[g];
  if (!row.moves()) return;
  const AdamW::Factors factors = a.factors();
#pragma unroll 1
  for (int64_t i = blockIdx.x * AdamW::CHUNK + threadIdx.x * N; i < last; i += THREADS * N) {
    Pack<Grad, N> d = pack<N>((Grad*)a.grad + g * a.grad_stride, i);
    Pack<float, N> p = pack<N>(a.param + g * a.param_stride, i), m = pack<N>(a.exp_avg + g * a.exp_avg_stride, i);
    Pack<float, N> v = pack<N>(a.exp_avg_sq + g * a.exp_avg_sq_stride, i);
    Pack<Work, N> copy;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      AdamW::update(row.of(i + k >= a.tail), factors, widen(d.of[k]), p.of[k], m.of[k], v.of[k]);
      narrow(p.of[k], copy.of[k]);
    }
    pack<N>(a.param + g * a.param_stride, i) = p;
    pack<N>(a.exp_avg + g * a.exp_avg_stride, i) = m;
    pack<N>(a.exp_avg_sq + g * a.exp_avg_sq_stride, i) = v;
    if (a.work) pack<N>((Work*)a.work + g * a.work_stride, i) = copy;
  }
}

template <class Grad, class Work>
void update(const AdamW& a, dim3 chunks, bool packed, cudaStream_t stream) {
  if (packed)
    update_kernel<Grad, Work, 4><<<chunks, THREADS, 0, stream>>>(a);
  else
    update_kernel<Grad, Work, 1><<<chunks, THREADS, 0, stream>>>(a);
}

template <class Grad>
void launch(const AdamW& a, int work_type, bool packed, cudaStream_t stream) {
  dim3 chunks((unsigned)a.chunks(), (unsigned)a.rows);
  dim3 blocks((unsigned)kloss::ceil_div(a.chunks(), CHUNKS), (unsigned)a.rows);
  if (packed)
    squares_kernel<Grad, 4><<<blocks, THREADS, 0, stream>>>(a);
  else
    squares_kernel<Grad, 1><<<blocks, THREADS, 0, stream>>>(a);
  finish_kernel<<<(unsigned)a.rows, AdamW::TOTALS, 0, stream>>>(a);
  if constexpr (std::is_same_v<Grad, float>) {
    if (work_type == 1) return update<Grad, BF16>(a, chunks, packed, stream);
    if (work_type == 2) return update<Grad, FP16>(a, chunks, packed, stream);
  }
  update<Grad, Grad>(a, chunks, packed, stream);
}

}  // namespace

// Types: 0 fp32, 1 bf16, 2 fp16; the working copy has the gradients' where they are not fp32. strides: of param, grad, exp_avg,
// exp_avg_sq, work. Scratch: partial fp32 [G, cdiv(P, 4096)], constants fp32 [G, 6]. tail: the first column with the rate tail_lr;
// width without one. At most 65535 rows. packed: all matrices lie at multiples of 16 bytes, strides and P are multiples of 4.
KLOSS_ENTRY kloss_adamw(
    int64_t rows, int64_t width, void* param, const void* grad, void* exp_avg, void* exp_avg_sq, void* work,
    const int64_t* strides, int packed, int grad_type, int work_type, void* step, const void* lr, int64_t tail,
    const void* tail_lr, const void* weight_decay, const void* max_norm, const void* active, double beta_1, double beta_2, double eps,
    void* norms, void* partial, void* constants, void* stream) {
  AdamW a{};
  a.rows = rows, a.width = width, a.tail = tail, a.tail_lr = (const float*)tail_lr;
  a.param = (float*)param, a.grad = grad, a.exp_avg = (float*)exp_avg, a.exp_avg_sq = (float*)exp_avg_sq, a.work = work;
  a.param_stride = strides[0], a.grad_stride = strides[1], a.exp_avg_stride = strides[2], a.exp_avg_sq_stride = strides[3];
  a.work_stride = strides[4];
  a.step = (int64_t*)step, a.lr = (const float*)lr, a.weight_decay = (const float*)weight_decay;
  a.max_norm = (const float*)max_norm, a.active = (const bool*)active;
  a.beta_1 = beta_1, a.beta_2 = beta_2, a.eps = eps;
  a.norms = (float*)norms, a.partial = (float*)partial, a.row = (AdamW::Row*)constants;
  if (rows == 0) return 0;
  if (width == 0) {
    finish_kernel<<<(unsigned)rows, AdamW::TOTALS, 0, (cudaStream_t)stream>>>(a);
    return cudaGetLastError();
  }
  if (grad_type == 1)
    launch<BF16>(a, work_type, packed, (cudaStream_t)stream);
  else if (grad_type == 2)
    launch<FP16>(a, work_type, packed, (cudaStream_t)stream);
  else
    launch<float>(a, work_type, packed, (cudaStream_t)stream);
  return cudaGetLastError();
}
