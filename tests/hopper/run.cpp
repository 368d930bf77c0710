// The multi-adapter linear on the emulated Hopper, as a library with the entry point that the GPU's has.

#include "emulated.h"

#include "matrix.h"

#include "cuda/linear.cu"

// What the next launch meets. late: whether loads and products are done only where nothing else can be. slow: warps, a bit each.
extern "C" void emulate(uint64_t seed, int processors, int late, uint32_t slow) {
  auto& m = emulated::machine;
  m.chance.seed(seed), m.processors = processors, m.late = late, m.slow = slow, m.failure.clear();
}

extern "C" const char* failure() { return emulated::machine.failure.c_str(); }
