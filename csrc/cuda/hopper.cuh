// What only Hopper has, as PTX: clusters of CTAs, barriers that count bytes, TMA's boxes, products of a warpgroup.
// Source: PTX ISA 8.x, sections on mbarrier, cp.async.bulk.tensor and wgmma.
#pragma once

#include <cstdint>
#include <cuda.h>
#include <cuda_bf16.h>
#include <type_traits>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace kloss {

__device__ __forceinline__ uint32_t shared(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// A warpgroup gives registers back to its block, or takes what others have given: N for each of its threads from now on.
template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Shows barriers that have been made to the cluster.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier of another CTA of the cluster, or of this one.
__device__ __forceinline__ void arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank) : "memory");
}

// A barrier of some warps of a block. name: 1 to 15. threads: how many of them there are in all.
__device__ __forceinline__ void sync(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\nbra again;\nover:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// A box of global memory, to the same place of every CTA in `mask`, or to this one alone.
__device__ __forceinline__ void load(const CUtensorMap& map, uint32_t to, uint32_t barrier, int i, int j, uint16_t mask = 0) {
  if (mask)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], "
        "[%2], %5;" ::"r"(to), "l"(&map), "r"(barrier), "r"(i), "r"(j), "h"(mask) : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(i), "r"(j) : "memory");
}

__device__ __forceinline__ void load(const CUtensorMap& map, uint32_t to, uint32_t barrier, int i, int j, int k) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(i), "r"(j), "r"(k) : "memory");
}

// Four matrices of 8 x 8 halves from the registers of a warp, as accumulators lie there, to shared memory. row: the address of
// eight halves; lane l gives that of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Eight halves of shared memory.
__device__ __forceinline__ uint4 read(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// A matrix in shared memory as wgmma addresses it: boxes of 128 bytes a row, swizzled. across: bytes from one 64 of the outer
// dimension to the next where the contraction is the outer one of a box.
__device__ __forceinline__ uint64_t matrix(uint32_t address, int across = 0) {
  return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)(across >> 4) << 16 | (address >> 4 & 0x3fff);
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void finish() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The accumulators as operands of an instruction, and their numbers in it.
#define KLOSS_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KLOSS_D16(i) KLOSS_D4(i), KLOSS_D4(i + 4), KLOSS_D4(i + 8), KLOSS_D4(i + 12)
#define KLOSS_D64(i) KLOSS_D16(i), KLOSS_D16(i + 16), KLOSS_D16(i + 32), KLOSS_D16(i + 48)
#define KLOSS_NUMBERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KLOSS_NUMBERS_128 \
  KLOSS_NUMBERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define KLOSS_WGMMA(COLUMNS, TYPE, NUMBERS, A, B, TURN, ...) \
  asm volatile( \
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, 1, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" NUMBERS "}, %" #A ", %" #B \
      ", keep, 1, 1, 0, %" #TURN ";\n}" \
      : __VA_ARGS__ : "l"(a), "l"(b), "n"(TURNED))

// d += a b: 64 rows, 2 N columns, a contraction of 16, which is b's outer dimension if TURNED. T: __nv_bfloat162 or __half2.
template <class T, bool TURNED, int N>
__device__ __forceinline__ void multiply(float (&d)[N], uint64_t a, uint64_t b) {
  static_assert(N == 64 || N == 128);
  constexpr bool BF16 = std::is_same_v<T, __nv_bfloat162>;
  if constexpr (N == 128 && BF16)
    KLOSS_WGMMA(256, "bf16", KLOSS_NUMBERS_128, 128, 129, 130, KLOSS_D64(0), KLOSS_D64(64));
  else if constexpr (N == 128)
    KLOSS_WGMMA(256, "f16", KLOSS_NUMBERS_128, 128, 129, 130, KLOSS_D64(0), KLOSS_D64(64));
  else if constexpr (BF16)
    KLOSS_WGMMA(128, "bf16", KLOSS_NUMBERS_64, 64, 65, 66, KLOSS_D64(0));
  else
    KLOSS_WGMMA(128, "f16", KLOSS_NUMBERS_64, 64, 65, 66, KLOSS_D64(0));
}

}  // namespace kloss

#endif
