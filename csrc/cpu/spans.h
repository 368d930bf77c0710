// Span counts of many short sequences on a CPU: the counts of shared/spans.h, 64 rows at a time. Raw pointers, no torch.
//
// Rows that count stand one behind another, a bit each, bit 0 the first; p is pred's and g is gold's side.
//
//   goes_on = I of the slot of the row before, in the same sequence    starts = neither O nor goes_on
//   both = goes_on_p & goes_on_g           one = goes_on_p ^ goes_on_g           met = starts_p & starts_g & same slot
//   A span of `met` lasts as long as the rows behind it are `both`. It is a hit unless the row that ends it is `one`.
//
// A carry runs through ones as a span through `both`, so an addition finds the ends of 64 rows' spans.
#pragma once

#include "../shared/spans.h"

namespace kloss::cpu {

// Labels as bytes: 1 for O; 2k + 2 for I of slot k, 2k + 3 for B; 0 for one that has none.
struct SpanLabels {
  static constexpr int64_t LABELS = 256, SLOTS = 127;
  alignas(32) uint8_t code[LABELS] = {};
  int64_t known = 0;  // labels from here on have no byte

  explicit SpanLabels(const SpanCounts& c) {
    int64_t labels = c.tags && c.labels < LABELS ? c.labels : LABELS;
    for (int64_t i = 0; i < labels; ++i) {
      int32_t label = c.code_of(i), slot = label >> 2;
      if (label != 1 && (slot < 0 || slot >= SLOTS)) continue;
      code[i] = (uint8_t)(label == 1 ? 1 : 2 * slot + 2 + label % 2);
      known = i + 1;
    }
  }
};

constexpr int64_t IGNORED = -100;  // gold's label of a row that does not count

// Adds the counts of sequences first..last-1. Returns false, and adds nothing, if a label that counts has no byte, or one of gold is
// below 0 and not IGNORED.
using SpanCounter = bool (*)(const SpanCounts& c, const SpanLabels& labels, int64_t first, int64_t last);

// For this processor, or null: then the shared body counts.
SpanCounter span_counter();

}  // namespace kloss::cpu
