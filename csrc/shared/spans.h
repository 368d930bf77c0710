// Counts for span F1 of one sequence by conlleval's definition of a span: it starts at B, at I behind O, at I behind another slot
// and at the start of a sequence, and lasts to the next label that is not I of the same slot.
#pragma once

#include "host_device.h"

namespace kloss {

// Sums of integers: any order gives the same bits.
KLOSS_HD void add(int64_t* sum, int64_t value) {
#ifdef __CUDA_ARCH__
  atomicAdd((unsigned long long*)sum, (unsigned long long)value);
#else
  __atomic_fetch_add(sum, value, __ATOMIC_RELAXED);
#endif
}

struct SpanCounts {
  int64_t rows, sequences, labels, groups;  // T, S, C, groups
  const int64_t* pred;                // [T], label ids
  const int64_t* gold;                // [T], below 0: the row does not count
  const int32_t* cu_seqlens;          // [S+1]
  const int64_t* group;               // [S]
  const int64_t* tags;                // [C], 0 for O, 1 for B, 2 for I; null: O, then B and I of each slot in turn, C any
  const int64_t* types;               // [C], slots; null with tags
  const int32_t* codes;               // [C], `code_of` each label, or null
  int64_t* counts;                    // [groups, 3], true positives, predicted and gold spans, added to

  // A label as one number: 1 for O; 4k + 2 for I of slot k, 4k + 3 for B. Without its last bit it is the slot, or 0.
  KLOSS_HD int32_t code_of(int64_t label) const {
    int64_t tag = tags ? tags[label] : label ? 2 - label % 2 : 0, type = tags ? types[label] : (label - 1) / 2;
    return tag > 0 ? (int32_t)(type * 4 + 2 + (tag == 1)) : 1;
  }

  // A side's labels as they are read.
  struct Side {
    int32_t slot = 0;  // of the last label
    int starts = 0, goes_on = 0;

    KLOSS_HD void next(int32_t code) {
      goes_on = code == slot;  // I of the last label's slot
      starts = (code != 1) - goes_on;
      slot = code & ~1;
    }
  };

  // Adds the three counts of sequence s to sums. Returns whether all labels are known; if not, nothing is added.
  // BATCH: rows that are looked through before the labels among them are read. A processor cannot foresee which rows count.
  template <int BATCH>
  KLOSS_HD bool count(int64_t s, int64_t* sums) const {
    const uint64_t known = tags ? labels : 1 << 29;  // whose codes fit
    Side p, g;
    int both = 0;  // whether spans of the same slot started together on both sides and still last
    int64_t hits = 0, predicted = 0, golden = 0;
    for (int64_t t = cu_seqlens[s], end = cu_seqlens[s + 1]; t < end; t += BATCH) {
      int counted = 0;
      int32_t rows[BATCH];
      for (int i = 0; i < BATCH && t + i < end; ++i) {
        rows[counted] = i;
        counted += gold[t + i] >= 0;
      }
      for (int i = 0; i < counted; ++i) {
        int64_t one = pred[t + rows[i]], other = gold[t + rows[i]];
        if ((uint64_t)one >= known || (uint64_t)other >= known) return false;
        p.next(codes ? codes[one] : code_of(one)), g.next(codes ? codes[other] : code_of(other));
        hits += both & ~(p.goes_on | g.goes_on);
        both = (both & p.goes_on & g.goes_on) | (p.starts & g.starts & (p.slot == g.slot));
        predicted += p.starts, golden += g.starts;
      }
    }
    sums[0] += hits + both, sums[1] += predicted, sums[2] += golden;
    return true;
  }

  // Adds sums to the counts of a group.
  KLOSS_HD void flush(int64_t to, const int64_t* sums) const {
    for (int i = 0; i < 3; ++i) add(counts + to * 3 + i, sums[i]);
  }
};

}  // namespace kloss
