// The shared AdamW on a CPU: its parts for a chunk of a row. Raw pointers, no torch.
#pragma once

#include "../shared/adamw.h"

namespace kloss::cpu {

enum Element { OF_F32, OF_BF16, OF_FP16, ELEMENTS };

// The parts for gradients of one type.
struct AdamWParts {
  void (*squares)(const AdamW&, int64_t g, int64_t chunk);           // writes a partial sum
  void (*update[ELEMENTS])(const AdamW&, int64_t g, int64_t chunk);  // by the working copy's type: the gradients', or they are fp32
};

// For this processor: variant 0 has its widest instructions, the next ones follow; null if there are fewer. By type of gradient.
const AdamWParts* adamw_parts(int64_t variant);

}  // namespace kloss::cpu
