// Span counts of many sequences on a CPU: those of shared/spans.h, 64 rows at a time. Raw pointers, no torch.
//
// Rows that count follow one another, a bit each; _p is pred's side and _g gold's.
//
//   goes_on = I of the slot of the row before, in the same sequence          starts = neither O nor goes_on
//   both = goes_on_p & goes_on_g     met = starts_p & starts_g & same slot     hits = met - missed
//
// A span of `met` lasts through the rows of `both` behind it, as an addition's carry runs through ones. The row behind these ends
// it on one side alone, and so is `missed`, if it is goes_on_p ^ goes_on_g. No span reaches another sequence, for whose first row
// goes_on is 0: all sequences of a job are one stream.
#pragma once

#include "../shared/spans.h"

namespace kloss::cpu {

constexpr int64_t IGNORED = -100;  // gold's label of a row that does not count

// Labels as bytes: 1 for O; 2k + 2 for I of slot k, 2k + 3 for B; 0 for a label that has none.
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

// Adds the counts of sequences first..last-1. Returns false, and adds nothing, if a label that counts has no byte, or one of gold
// is below 0 and not IGNORED: then the shared body counts.
using SpanCounter = bool (*)(const SpanCounts& c, const SpanLabels& labels, int64_t first, int64_t last);

// For this processor; null if it has none.
SpanCounter span_counter();

}  // namespace kloss::cpu
