// What a C entry point of the GPU's library is: raw device pointers, sizes, and the stream to launch on, never the null stream's
// default. Returns 0 or CUDA's error code. Nothing waits for the device.
#pragma once

#include <cuda_runtime.h>

#define KLOSS_ENTRY extern "C" __attribute__((visibility("default"))) int

namespace kloss {

// Stops the device: a wrong index has been found, and nothing may go on with it.
__device__ __forceinline__ void demand(bool holds) {
  if (!holds) __trap();
}

}  // namespace kloss
