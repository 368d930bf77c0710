// A Hopper GPU as far as csrc/cuda/linear.cu needs one, on a CPU: clusters of two blocks whose threads are fibers, barriers that
// count bytes, TMA's boxes, products of a warpgroup. Written from the PTX ISA, not from the kernel.
//
// One fiber runs at a time, and where it has to wait, chance says which goes on. Loads and products are done when chance wants, or
// as late as they may be: one that reads what should not have been overwritten, or is not awaited, is seen. Where nobody can go on
// the run ends with a message, and so it does at an address outside shared memory or one arrival too many at a barrier.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <ucontext.h>
#include <vector>

#include "shared/host_device.h"

#define __CUDA_ARCH_FEAT_SM90_ALL
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define KLOSS_ENTRY extern "C" int

struct float2 {
  float x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct __nv_bfloat162 {
  kloss::BF16 x, y;
};
struct __half2 {
  kloss::FP16 x, y;
};
template <class Pair>
Pair pair_of(float a, float b) {
  Pair two;
  kloss::narrow(a, two.x), kloss::narrow(b, two.y);
  return two;
}
inline float2 __bfloat1622float2(__nv_bfloat162 two) { return {kloss::widen(two.x), kloss::widen(two.y)}; }
inline float2 __half22float2(__half2 two) { return {kloss::widen(two.x), kloss::widen(two.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return pair_of<__nv_bfloat162>(a, b); }
inline __half2 __floats2half2_rn(float a, float b) { return pair_of<__half2>(a, b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
using std::max;
using std::min;

// A tensor of 16 bits as TMA knows it, the innermost dimension first; strides in elements.
struct CUtensorMap {
  const uint16_t* data;
  int64_t sizes[3], strides[3];
};

namespace emulated {

constexpr int WARP = 32, GROUP = 128, CTAS = 2, MEMORY = 227 << 10, BARRIERS = 1024;  // bytes of a block's memory, and of that behind

struct Meeting {  // of a number of threads
  int arrived = 0, generation = 0;
};

struct Barrier {
  int count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // still to come
};

struct Product {  // of a warpgroup
  uint64_t a, b;
  int columns, threads = 0;  // threads that have asked for it
  bool turned, bf16;
  float* d[GROUP];
};

struct Group {
  std::vector<Product> products;
  std::vector<size_t> ends;  // products before the end of each committed group
  size_t done = 0;
};

struct Block {
  alignas(1024) uint8_t memory[MEMORY + BARRIERS];
  std::map<uint32_t, Barrier> barriers;
  Meeting named[16], warps[3 * GROUP / WARP];
  Group groups[3];
  uint32_t rows[2][3 * GROUP / WARP][WARP];  // addresses that the lanes of a warp give, by turns
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  int block, thread;
  size_t products = 0, groups = 0, stores = 0;  // that it has asked for, and committed; of matrices
  std::string waits;
  bool ended = false;
};

struct Machine {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::map<const void*, std::vector<int>> waiting;
  std::vector<int> ready;
  std::vector<std::function<void()>> loads;
  ucontext_t scheduler;
  Meeting cluster;
  std::mt19937_64 chance;
  std::function<void()> kernel;
  std::string failure;
  int now = 0, first = 0, grid = 0, processors = 0, late = 0;  // first: of the cluster's blocks. late: loads and products
  uint32_t slow = 0;                                           // warps that go on only where no other can
} machine;

inline Fiber& fiber() { return machine.fibers[machine.now]; }
inline Block& block() { return machine.blocks[fiber().block]; }
inline void leave() { swapcontext(&fiber().context, &machine.scheduler); }
inline void fail(const std::string& why) {
  if (machine.failure.empty()) machine.failure = why;
}
inline void wake(const void* what) {
  auto& them = machine.waiting[what];
  machine.ready.insert(machine.ready.end(), them.begin(), them.end()), them.clear();
}
template <class Condition>
void wait_until(const void* what, const char* name, Condition condition) {
  while (!condition()) machine.waiting[what].push_back(machine.now), fiber().waits = name, leave();
}
inline void meet(Meeting& m, int threads, const char* name) {
  int generation = m.generation;
  if (++m.arrived == threads)
    m.arrived = 0, ++m.generation, wake(&m);
  else
    wait_until(&m, name, [&] { return m.generation != generation; });
}

inline uint8_t* at(Block& b, int64_t address, int bytes) {
  static uint8_t nowhere[16];
  if (address >= 0 && address + bytes <= MEMORY) return b.memory + address;
  return fail("an address outside shared memory"), nowhere;
}
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void settle(Barrier& b) {
  if (b.pending < 0) fail("more arrivals than a barrier awaits");
  if (b.pending == 0 && b.bytes == 0) b.pending = b.count, ++b.phase, wake(&b);
}

// A box of 64 x 64: i, j, k are its first element.
inline void load(const CUtensorMap& map, uint32_t to, uint32_t barrier, int i, int j, int k, uint32_t blocks) {
  if (to % 1024) fail("a box that is not aligned");
  CUtensorMap from = map;
  machine.loads.push_back([=] {
    for (int b = 0; b < CTAS; ++b)
      if (blocks >> b & 1) {
        Block& there = machine.blocks[b];
        for (int r = 0; r < 64; ++r)
          for (int c = 0; c < 64; ++c) {
            int64_t place[] = {i + c, j + r, k}, element = 0;
            bool within = true;
            for (int n = 0; n < 3; ++n) within &= place[n] >= 0 && place[n] < from.sizes[n], element += place[n] * from.strides[n];
            uint16_t value = within ? from.data[element] : 0;
            memcpy(at(there, swizzled(to + r * 128 + c * 2), 2), &value, 2);
          }
        Barrier& bar = there.barriers[barrier];
        bar.bytes -= 64 * 64 * 2, settle(bar);
      }
  });
}

// The next product of a warpgroup, if all of its threads have asked for it.
inline bool multiply_next(Block& b, Group& group) {
  if (group.done == group.products.size() || group.products[group.done].threads < GROUP) return false;
  Product& p = group.products[group.done++];
  auto value = [&](uint32_t address) {
    uint16_t bits;
    memcpy(&bits, at(b, swizzled(address), 2), 2);
    return p.bf16 ? kloss::widen(kloss::BF16{bits}) : kloss::widen(kloss::FP16{bits});
  };
  uint32_t a = (p.a & 0x3fff) << 4, from = (p.b & 0x3fff) << 4, across = (p.b >> 16 & 0x3fff) << 4;
  std::vector<float> left(64 * 16), right(16 * p.columns);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k) left[m * 16 + k] = value(a + m * 128 + k * 2);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < p.columns; ++n)
      right[k * p.columns + n] = value(p.turned ? from + n / 64 * across + k * 128 + n % 64 * 2 : from + n * 128 + k * 2);
  for (int m = 0; m < 64; ++m) {
    std::vector<float> sums(p.columns);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < p.columns; ++n) sums[n] += left[m * 16 + k] * right[k * p.columns + n];
    for (int n = 0; n < p.columns; ++n) {
      int thread = m / 16 * WARP + m % 8 * 4 + n % 8 / 2;
      p.d[thread][n / 8 * 4 + m % 16 / 8 * 2 + n % 2] += sums[n];
    }
  }
  return wake(&group), true;
}

// One of the loads or products that are to be done; false if there are none.
inline bool work() {
  std::vector<std::function<bool()>> some;
  if (!machine.loads.empty())
    some.push_back([] {
      std::swap(machine.loads[machine.chance() % machine.loads.size()], machine.loads.back());
      auto one = machine.loads.back();
      return machine.loads.pop_back(), one(), true;
    });
  for (Block& b : machine.blocks)
    for (Group& group : b.groups) some.push_back([&] { return multiply_next(b, group); });
  for (size_t first = machine.chance(), i = 0; i < some.size(); ++i)
    if (some[(first + i) % some.size()]()) return true;
  return false;
}

inline bool go_on(bool slow) {  // a fiber that can, of the slow ones or of the others
  auto& ready = machine.ready;
  for (size_t first = machine.chance(), i = 0; i < ready.size(); ++i) {
    int& it = ready[(first + i) % ready.size()];
    if ((machine.slow >> machine.fibers[it].thread / WARP & 1) != slow) continue;
    machine.now = it, it = ready.back(), ready.pop_back();
    swapcontext(&machine.scheduler, &fiber().context);
    return true;
  }
  return false;
}

inline void begin() {
  machine.kernel();
  fiber().ended = true;
  leave();
}

inline void run_cluster() {
  machine.blocks = std::vector<Block>(CTAS), machine.fibers = std::vector<Fiber>(CTAS * 3 * GROUP);
  machine.waiting.clear(), machine.ready.clear(), machine.loads.clear(), machine.cluster = {};
  for (Block& b : machine.blocks) std::fill(b.memory, b.memory + MEMORY, 0xff);  // NaN
  for (int i = 0; i < (int)machine.fibers.size(); ++i) {
    Fiber& f = machine.fibers[i];
    f.block = i / (3 * GROUP), f.thread = i % (3 * GROUP), f.stack.resize(64 << 10);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size(), f.context.uc_link = nullptr;
    makecontext(&f.context, begin, 0);
    machine.ready.push_back(i);
  }
  while (machine.failure.empty()) {
    bool wanted = !machine.late && machine.chance() % 64 == 0;
    if ((wanted && work()) || go_on(false) || work() || go_on(true)) continue;
    std::map<std::string, int> held;
    for (Fiber& f : machine.fibers)
      if (!f.ended) ++held[f.waits + " of warp " + std::to_string(f.thread / WARP) + " of block " + std::to_string(f.block)];
    if (held.empty()) return;
    std::string all = "nobody can go on:";
    for (auto& [who, threads] : held) all += " " + who + ",";
    fail(all);
  }
}

}  // namespace emulated

struct Index {
  struct {
    unsigned (*now)();
    operator unsigned() const { return now(); }
  } x;
};
inline const Index threadIdx{{[] { return (unsigned)emulated::fiber().thread; }}};
inline const Index blockIdx{{[] { return (unsigned)(emulated::machine.first + emulated::fiber().block); }}};
inline const Index gridDim{{[] { return (unsigned)emulated::machine.grid; }}};
inline void __syncwarp() {
  auto& f = emulated::fiber();
  emulated::meet(emulated::block().warps[f.thread / emulated::WARP], emulated::WARP, "the warp");
}

// What csrc/cuda/hopper.cuh has.
namespace kloss {

inline uint32_t shared(const void* p) { return (uint32_t)((const uint8_t*)p - emulated::block().memory); }
inline uint32_t cluster_rank() { return emulated::fiber().block; }
inline void cluster_sync() { emulated::meet(emulated::machine.cluster, emulated::CTAS * 3 * emulated::GROUP, "the cluster"); }
inline void sync(int name, int threads) { emulated::meet(emulated::block().named[name], threads, "a named barrier"); }
inline void show_barriers() {}
template <int>
void fewer_registers() {}
template <int>
void more_registers() {}

inline void init(uint32_t barrier, int count) { emulated::block().barriers[barrier] = {count, count, 0, 0}; }
inline void expect(uint32_t barrier, int bytes) {
  auto& b = emulated::block().barriers[barrier];
  b.bytes += bytes, --b.pending, emulated::settle(b);
}
inline void arrive(uint32_t barrier, uint32_t rank) {
  auto& b = emulated::machine.blocks[rank].barriers[barrier];
  --b.pending, emulated::settle(b);
}
inline void wait(uint32_t barrier, uint32_t parity) {
  auto& b = emulated::block().barriers[barrier];
  emulated::wait_until(&b, "a stage", [&] { return (uint32_t)(b.phase & 1) != parity; });
}
inline void load(const CUtensorMap& map, uint32_t to, uint32_t barrier, int i, int j, uint16_t mask = 0) {
  emulated::load(map, to, barrier, i, j, 0, mask ? mask : 1u << emulated::fiber().block);
}
inline void load(const CUtensorMap& map, uint32_t to, uint32_t barrier, int i, int j, int k) {
  emulated::load(map, to, barrier, i, j, k, 1u << emulated::fiber().block);
}

inline void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  auto& f = emulated::fiber();
  int warp = f.thread / emulated::WARP, lane = f.thread % emulated::WARP;
  auto& block = emulated::block();
  auto& rows = block.rows[f.stores++ % 2][warp];
  rows[lane] = row;
  __syncwarp();
  uint32_t values[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) memcpy(emulated::at(block, rows[8 * i + lane / 4] + lane % 4 * 4, 4), &values[i], 4);
}
inline uint4 read(uint32_t address) {
  uint4 v;
  memcpy(&v, emulated::at(emulated::block(), address, 16), 16);
  return v;
}

inline emulated::Group& group() { return emulated::block().groups[emulated::fiber().thread / emulated::GROUP]; }
inline void fence() {}
inline void commit() {
  auto& f = emulated::fiber();
  auto& ends = group().ends;
  if (f.groups++ == ends.size()) ends.push_back(f.products);
}
template <int N>
void finish() {
  auto &f = emulated::fiber();
  auto& g = group();
  if (f.groups > N) emulated::wait_until(&g, "products", [&] { return g.done >= g.ends[f.groups - N - 1]; });
}
template <class T, bool TURNED, int N>
void multiply(float (&d)[N], uint64_t a, uint64_t b) {
  auto& f = emulated::fiber();
  auto& products = group().products;
  if (f.products == products.size()) products.push_back({a, b, 2 * N, 0, TURNED, std::is_same_v<T, __nv_bfloat162>, {}});
  emulated::Product& p = products[f.products++];
  if (p.a != a || p.b != b) emulated::fail("threads of a warpgroup multiply different matrices");
  p.d[f.thread % emulated::GROUP] = d, ++p.threads;
}

}  // namespace kloss

// CUDA's interface, as far as linear.cu's launch uses it.
using cudaStream_t = void*;
using cudaError_t = int;
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize, cudaLaunchAttributeClusterDimension };
enum { cudaEnableDefault, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_INTERLEAVE_NONE };
enum { CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
constexpr int cudaErrorNotSupported = 801, cudaErrorInvalidValue = 1;
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
struct dim3 {
  unsigned x;
  dim3(unsigned x = 1) : x(x) {}
};
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, int, int) { return *value = emulated::machine.processors, 0; }
template <class Kernel>
int cudaFuncSetAttribute(Kernel*, int, int bytes) {
  return bytes > emulated::MEMORY ? cudaErrorInvalidValue : 0;
}
inline int cuTensorMapEncodeTiled(
    CUtensorMap* map, int, cuuint32_t dims, void* data, const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t*,
    const cuuint32_t*, int, int, int, int) {
  *map = {(const uint16_t*)data, {1, 1, 1}, {1, 0, 0}};
  if ((uintptr_t)data % 16) return cudaErrorInvalidValue;
  for (unsigned i = 0; i < dims; ++i) map->sizes[i] = (int64_t)sizes[i];
  for (unsigned i = 0; i + 1 < dims; ++i) {
    map->strides[i + 1] = (int64_t)strides[i] / 2;
    if (strides[i] % 16) return cudaErrorInvalidValue;
  }
  return 0;
}
inline int cudaGetDriverEntryPointByVersion(const char*, void** function, int, int, cudaDriverEntryPointQueryResult* found) {
  return *found = cudaDriverEntryPointSuccess, *function = (void*)cuTensorMapEncodeTiled, 0;
}
template <class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments...), const std::decay_t<Arguments>&... arguments) {
  auto& m = emulated::machine;
  m.kernel = [&] { kernel(arguments...); }, m.grid = (int)config->gridDim.x;
  for (m.first = 0; m.first < m.grid && m.failure.empty(); m.first += emulated::CTAS) emulated::run_cluster();
  return 0;
}
