// What a batch's kernels walk, from its offsets and owners: rows by adapter, tiles, chunks, attention's tiles, row keys, positions.
//
// Seven phases of one block of THREADS threads, with a barrier behind each, do what is counted by sequence and adapter. No phase
// reads what another thread of the same phase writes, so a CPU may run its threads in any order. Behind them `entry` fills every
// entry of every list by itself, by a search in the phases' sums. Sizes follow from numbers that the host knows.
#pragma once

#include "host_device.h"

namespace kloss {

struct Lists {
  constexpr static int THREADS = 512;
  constexpr static int STRETCHES = 128;  // of neighbouring sequences, a thread each
  constexpr static int PARTS = 64;       // stretches of neighbouring adapters
  constexpr static int SHORT = 64, LONG = 128, CHUNK = 1024;  // rows of a tile and of a chunk
  constexpr static int CLASSES = 4;      // of attention, at most: 16, 32, 64 and longer
  enum Column { ROWS, TILES_SHORT, TILES_LONG, CHUNKS, SLOTS, COLUMNS };

  int64_t rows, sequences, adapters;  // T, S, G
  int classes;                        // short classes of attention, 16 << c rows at most; -1: no lists for attention
  int64_t capacity_short, capacity_long, capacity_chunks, capacity_attention[CLASSES];  // entries; 0 of a class that is not there
  // In.
  const int32_t* cu_seqlens;  // [S+1]
  const int32_t* adapter;     // [S], -1: base only
  const int64_t* step;        // [G], or null: no row keys
  const int64_t* sequence;    // [S], each one's number within its learner's batch
  // Out.
  int32_t* row_adapter;  // [T]
  int64_t* order;        // [T]
  int64_t* ends;         // [G+1]
  int32_t* tiles_short;  // [capacity, 3]
  int32_t* tiles_long;   // [capacity, 3]
  int32_t* chunks;       // [capacity, 4]
  int32_t* slots;        // [G+1]
  int32_t* attention[CLASSES];  // [capacity, 3]; the longer ones' stand behind the last short class
  int64_t* row_key;      // [T] or null
  int32_t* position;     // [T], within its sequence; behind the last one, counted from there
  // Scratch.
  int32_t* count;   // [G+1, STRETCHES], rows of an adapter in a stretch, then those in the stretches before it
  int32_t* total;   // [G+1], rows of an adapter; entry G is for rows without one
  int32_t* part;    // [COLUMNS, PARTS]
  int32_t* until;   // [COLUMNS, G+1], sums of a column up to and with an adapter
  int32_t* pieces;  // [CLASSES, STRETCHES], tiles of a class in a stretch, then those in the stretches before it
  int32_t* passed;  // [CLASSES, S], tiles of a class up to and with a sequence
  int32_t* offset;  // [S], a sequence's first row in `order`

  KLOSS_HD static int64_t scratch_size(int64_t sequences, int64_t adapters) {
    int64_t groups = adapters + 1;
    return groups * (STRETCHES + 1 + COLUMNS) + COLUMNS * PARTS + CLASSES * STRETCHES + (CLASSES + 1) * sequences;
  }
  KLOSS_HD void place_scratch(int32_t* p) {
    int64_t groups = adapters + 1;
    count = p, p += groups * STRETCHES;
    total = p, p += groups;
    part = p, p += COLUMNS * PARTS;
    until = p, p += COLUMNS * groups;
    pieces = p, p += CLASSES * STRETCHES;
    passed = p, p += CLASSES * sequences;
    offset = p;
  }

  KLOSS_HD int height(int c) const { return 16 << (c < classes ? c : classes - 1); }
  KLOSS_HD int64_t owner(int64_t s) const { return adapter[s] < 0 ? adapters : adapter[s]; }
  KLOSS_HD int32_t length(int64_t s) const { return cu_seqlens[s + 1] - cu_seqlens[s]; }

  // Tiles of class c that sequence s is cut into: one, or several for the longer ones, or none.
  KLOSS_HD int32_t tiles_of(int64_t s, int c) const {
    int32_t n = length(s);
    bool mine = c <= classes && n > (c ? 16 << (c - 1) : 0) && (c == classes || n <= 16 << c);
    return mine ? (int32_t)ceil_div(n, height(c)) : 0;
  }

  // What a column counts for adapter g.
  KLOSS_HD int32_t value(int column, int64_t g) const {
    int32_t n = total[g], cut = (int32_t)ceil_div(n, CHUNK);
    switch (column) {
      case ROWS: return n;
      case TILES_SHORT: return (int32_t)ceil_div(n, SHORT);
      case TILES_LONG: return (int32_t)ceil_div(n, LONG);
      case CHUNKS: return g == adapters ? 0 : cut > 1 ? cut : 1;
      default: return g < adapters && cut > 1 ? cut : 0;
    }
  }

  constexpr static int PHASES = 7;

  KLOSS_HD void phase(int number, int thread) const {
    switch (number) {
      case 0: return clear(thread);
      case 1: return count_stretch(thread);
      case 2: return sum_stretches(thread);
      case 3: return sum_part(thread);
      case 4: return sum_parts(thread);
      case 5: return spread_part(thread);
      default: return spread_stretch(thread);
    }
  }

  KLOSS_HD void clear(int thread) const {
    for (int64_t i = thread; i < (adapters + 1) * STRETCHES; i += THREADS) count[i] = 0;
  }

  KLOSS_HD void count_stretch(int k) const {
    if (k >= STRETCHES) return;
    int32_t tiles[CLASSES] = {};
    for (int64_t s = first_of(k); s < first_of(k + 1); ++s) {
      count[owner(s) * STRETCHES + k] += length(s);
      for (int c = 0; c < CLASSES; ++c) tiles[c] += tiles_of(s, c);
    }
    for (int c = 0; c < CLASSES; ++c) pieces[c * STRETCHES + k] = tiles[c];
  }

  KLOSS_HD int64_t first_of(int stretch) const { return sequences * stretch / STRETCHES; }

  KLOSS_HD void sum_stretches(int thread) const {
    for (int64_t g = thread; g <= adapters; g += THREADS) {
      total[g] = before(count + g * STRETCHES, STRETCHES);
      if (g == adapters) total[g] += (int32_t)rows - cu_seqlens[sequences];
    }
    int c = THREADS - 1 - thread;
    if (c < CLASSES) before(pieces + c * STRETCHES, STRETCHES);
  }

  // Each value becomes the sum of those before it. Returns the sum of all.
  KLOSS_HD static int32_t before(int32_t* values, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
      int32_t value = values[i];
      values[i] = sum;
      sum += value;
    }
    return sum;
  }

  KLOSS_HD int64_t adapter_of(int part_of) const { return (adapters + 1) * part_of / PARTS; }

  KLOSS_HD void sum_part(int thread) const {
    int column = thread / PARTS, k = thread % PARTS;
    if (column >= COLUMNS) return;
    int32_t sum = 0;
    for (int64_t g = adapter_of(k); g < adapter_of(k + 1); ++g) sum += value(column, g);
    part[column * PARTS + k] = sum;
  }

  KLOSS_HD void sum_parts(int thread) const {
    if (thread < COLUMNS) before(part + thread * PARTS, PARTS);
  }

  KLOSS_HD void spread_part(int thread) const {
    int column = thread / PARTS, k = thread % PARTS;
    if (column >= COLUMNS) return;
    int32_t sum = part[column * PARTS + k];
    for (int64_t g = adapter_of(k); g < adapter_of(k + 1); ++g) {
      if (column == SLOTS) slots[g] = sum;  // sums of those before
      sum += value(column, g);
      until[column * (adapters + 1) + g] = sum;
      if (column == ROWS) ends[g] = sum;
    }
  }

  KLOSS_HD void spread_stretch(int k) const {
    if (k >= STRETCHES) return;
    int32_t tiles[CLASSES] = {};
    for (int c = 0; c < CLASSES; ++c) tiles[c] = pieces[c * STRETCHES + k];
    for (int64_t s = first_of(k); s < first_of(k + 1); ++s) {
      int64_t g = owner(s);
      offset[s] = start(ROWS, g) + count[g * STRETCHES + k];
      count[g * STRETCHES + k] += length(s);
      for (int c = 0; c < CLASSES; ++c) passed[c * sequences + s] = tiles[c] += tiles_of(s, c);
    }
  }

  // The sum of a column over the adapters before g.
  KLOSS_HD int32_t start(int column, int64_t g) const { return g ? until[column * (adapters + 1) + g - 1] : 0; }

  // How many of n ascending sums are at most x.
  KLOSS_HD static int64_t search(const int32_t* sums, int64_t n, int64_t x) {
    int64_t low = 0;
    while (low < n) {
      int64_t middle = (low + n) / 2;
      if (sums[middle] <= x)
        low = middle + 1;
      else
        n = middle;
    }
    return low;
  }

  KLOSS_HD int64_t entries() const {
    int64_t all = rows + capacity_short + capacity_long + capacity_chunks;
    for (int c = 0; c < CLASSES; ++c) all += capacity_attention[c];
    return all;
  }

  // Fills entry i of all lists, end to end.
  KLOSS_HD void entry(int64_t i) const {
    if (i < rows) return row(i);
    if ((i -= rows) < capacity_short) return tile(TILES_SHORT, SHORT, tiles_short, 3, i);
    if ((i -= capacity_short) < capacity_long) return tile(TILES_LONG, LONG, tiles_long, 3, i);
    if ((i -= capacity_long) < capacity_chunks) return tile(CHUNKS, CHUNK, chunks, 4, i);
    i -= capacity_chunks;
    for (int c = 0; c < CLASSES; i -= capacity_attention[c++])
      if (i < capacity_attention[c]) return attention_tile(c, i);
  }

  KLOSS_HD void row(int64_t t) const {
    int64_t s = search(cu_seqlens + 1, sequences, t);
    bool behind = s == sequences;  // no sequence's, and last in order
    int32_t g = behind ? -1 : adapter[s], within = (int32_t)t - cu_seqlens[s];
    row_adapter[t] = g, position[t] = within;
    order[behind ? t : offset[s] + within] = t;
    if (row_key) row_key[t] = behind ? 0 : ((g < 0 ? 0 : step[g]) << 32 | sequence[s] << 16) + within;
  }

  KLOSS_HD void tile(int column, int size, int32_t* list, int width, int64_t i) const {
    int64_t g = search(until + column * (adapters + 1), adapters + 1, i);
    int32_t* to = list + i * width;
    bool used = g <= adapters;
    int32_t number = used ? (int32_t)i - start(column, g) : 0, begin = used ? start(ROWS, g) : 0;
    int32_t first = begin + number * size, end = used ? (int32_t)ends[g] : 0;
    to[0] = used && g < adapters ? (int32_t)g : -1;
    to[1] = first;
    to[2] = first + size < end ? first + size : end;
    if (width == 4) to[3] = used && value(SLOTS, g) ? slots[g] + number : -1;
  }

  KLOSS_HD void attention_tile(int c, int64_t i) const {
    const int32_t* sums = passed + c * sequences;
    int64_t s = search(sums, sequences, i);
    int32_t* to = attention[c] + i * 3;
    bool used = s < sequences;
    to[0] = used ? cu_seqlens[s] : 0;
    to[1] = used ? cu_seqlens[s + 1] : 0;
    to[2] = used ? cu_seqlens[s] + ((int32_t)i - (s ? sums[s - 1] : 0)) * height(c) : 0;
  }
};

}  // namespace kloss
