#include <cstring>
#include <memory>

// Before the instruction set is chosen: other files share their functions.
#include "../variants.h"
#include "spans.h"

#if KLOSS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
#include <immintrin.h>

namespace kloss::cpu {
namespace {

using Vector = __m256i;
constexpr int64_t ROWS = 8;  // of a block

Vector load(const void* from) { return _mm256_loadu_si256((const Vector*)from); }
Vector bytes(int value) { return _mm256_set1_epi8((char)value); }
uint64_t signs(Vector bytes) { return (uint32_t)_mm256_movemask_epi8(bytes); }
uint64_t signs_of_8(Vector low, Vector high) {  // 64-bit numbers
  return _mm256_movemask_pd(_mm256_castsi256_pd(low)) | _mm256_movemask_pd(_mm256_castsi256_pd(high)) << 4;
}
uint64_t below(uint64_t bit) { return ((uint64_t)1 << bit) - 1; }
int64_t count(uint64_t bits) { return __builtin_popcountll(bits); }

// The low halves of 64-bit numbers 0..7, in the order 0 1 4 5 2 3 6 7.
Vector halves(Vector low, Vector high) {
  return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), 0x88));
}

// For each set of a block's rows, where their bytes lie in `Kept::read`'s 16: gold's in the first half, pred's in the second.
struct Orders {
  alignas(16) uint8_t of[256][16] = {};

  constexpr Orders() {
    constexpr uint8_t GOLD[ROWS] = {0, 1, 8, 9, 2, 3, 10, 11};
    for (int rows = 0; rows < 256; ++rows)
      for (int row = 0, kept = 0; row < ROWS; ++row)
        if (rows >> row & 1) of[rows][kept] = GOLD[row], of[rows][kept++ + 8] = GOLD[row] + 4;
  }
};
constexpr Orders ORDERS;

// 64 rows that count.
struct Word {
  uint64_t pred, gold, met, missed;  // starts on each side; on both; rows that end a span of `met` on one side alone
  int64_t sums[3];                   // hits, predicted and gold spans before

  int64_t hits(uint64_t rows) const { return count(met & rows) - count(missed & rows); }
  int64_t sum(int side, uint64_t rows) const {
    return sums[side] + (side == 0 ? hits(rows) : count((side == 1 ? pred : gold) & rows));
  }
};

// The rows that count, one behind another.
struct Kept {
  const int64_t blocks;
  int64_t size = 0;
  std::unique_ptr<uint8_t[]> memory;
  int32_t* before;               // [blocks], how many rows before a block count
  uint8_t* counted;              // [blocks], which of its 8 rows do
  uint8_t *pred, *gold, *first;  // labels, then their codes; 255 where a sequence begins

  explicit Kept(int64_t rows) : blocks(rows / ROWS + 1) {
    int64_t side = blocks * ROWS + 128, offsets = blocks * (int64_t)sizeof *before;  // a word more, and a vector around it
    memory.reset(new uint8_t[offsets + blocks + 3 * side]);
    before = (int32_t*)memory.get(), counted = memory.get() + offsets;
    pred = counted + blocks + 32, gold = pred + side, first = gold + side - 32;
  }

  // 0 for each row that counts and whose labels are below 256, and for each that is IGNORED.
  static Vector strange(Vector p, Vector g) {
    Vector high = _mm256_srli_epi64(_mm256_or_si256(p, g), 8), other = _mm256_xor_si256(g, _mm256_set1_epi64x(IGNORED));
    return _mm256_castpd_si256(_mm256_blendv_pd(_mm256_castsi256_pd(high), _mm256_castsi256_pd(other), _mm256_castsi256_pd(g)));
  }

  // Takes the labels of rows. The last block is filled up with rows that do not count. Returns whether no row is strange.
  bool read(const int64_t* p, const int64_t* g, int64_t rows) {
    int64_t whole = blocks - 1, kept = 0, last_p[ROWS] = {}, last_g[ROWS];
    for (int64_t& label : last_g) label = IGNORED;
    for (int64_t t = whole * ROWS; t < rows; ++t) last_p[t % ROWS] = p[t], last_g[t % ROWS] = g[t];
    Vector any = _mm256_setzero_si256();
    auto take = [&](int64_t block, const int64_t* p, const int64_t* g) {
      Vector p0 = load(p), p1 = load(p + 4), g0 = load(g), g1 = load(g + 4);
      any = _mm256_or_si256(any, _mm256_or_si256(strange(p0, g0), strange(p1, g1)));
      uint64_t set = 255 ^ signs_of_8(g0, g1);
      Vector words = _mm256_packs_epi32(halves(g0, g1), halves(p0, p1));
      __m128i labels = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      labels = _mm_shuffle_epi8(labels, _mm_load_si128((const __m128i*)ORDERS.of[set]));
      _mm_storel_epi64((__m128i*)(gold + kept), labels);
      _mm_storeh_pi((__m64*)(pred + kept), _mm_castsi128_ps(labels));
      counted[block] = (uint8_t)set, before[block] = (int32_t)kept, kept += count(set);
    };
    for (int64_t block = 0; block < whole; ++block) take(block, p + block * ROWS, g + block * ROWS);
    take(whole, last_p, last_g);
    size = kept;
    return _mm256_testz_si256(any, any);
  }

  // How many of the rows before this one count.
  int64_t until(uint64_t row) const { return before[row / ROWS] + count(counted[row / ROWS] & below(row % ROWS)); }

  // Makes each label its code, 16 labels of the table at a time: 112 more sends all others beyond 127. Behind the last comes O.
  void encode(const SpanLabels& labels) const {
    for (int64_t i = 0; i < size; i += 32) {
      Vector p = load(pred + i), g = load(gold + i), code_p = _mm256_setzero_si256(), code_g = code_p;
      for (int64_t part = 0; part < labels.known; part += 16) {
        Vector table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)(labels.code + part)));
        code_p = _mm256_or_si256(code_p, _mm256_shuffle_epi8(table, _mm256_adds_epu8(p, bytes(112))));
        code_g = _mm256_or_si256(code_g, _mm256_shuffle_epi8(table, _mm256_adds_epu8(g, bytes(112))));
        p = _mm256_sub_epi8(p, bytes(16)), g = _mm256_sub_epi8(g, bytes(16));
      }
      _mm256_storeu_si256((Vector*)(pred + i), code_p), _mm256_storeu_si256((Vector*)(gold + i), code_g);
    }
    memset(pred + size, 1, 64), memset(gold + size, 1, 64);
  }

  // Fills words 0..size / 64. Returns whether each label has a code. `first` is set in row 0, so what lies before it is not used.
  bool fill(Word* words) const {
    Vector least = bytes(1);
    uint64_t lasts = 0;  // whether a span of `met` lasts to the end of the word before
    int64_t sums[3] = {};
    for (int64_t i = 0; i <= size; i += 64) {
      uint64_t goes_on_p = 0, goes_on_g = 0, outside_p = 0, outside_g = 0, same = 0;
      for (int64_t j = i; j < i + 64; j += 32) {
        Vector p = load(pred + j), g = load(gold + j), border = load(first + j), slot = bytes(254);
        Vector last_p = _mm256_and_si256(load(pred + j - 1), slot), last_g = _mm256_and_si256(load(gold + j - 1), slot);
        goes_on_p |= signs(_mm256_andnot_si256(border, _mm256_cmpeq_epi8(p, last_p))) << (j - i);
        goes_on_g |= signs(_mm256_andnot_si256(border, _mm256_cmpeq_epi8(g, last_g))) << (j - i);
        outside_p |= signs(_mm256_cmpeq_epi8(p, bytes(1))) << (j - i);
        outside_g |= signs(_mm256_cmpeq_epi8(g, bytes(1))) << (j - i);
        same |= signs(_mm256_cmpeq_epi8(_mm256_and_si256(p, slot), _mm256_and_si256(g, slot))) << (j - i);
        least = _mm256_min_epu8(least, _mm256_min_epu8(p, g));
      }
      Word& word = words[i / 64];
      word.pred = ~(outside_p | goes_on_p), word.gold = ~(outside_g | goes_on_g), word.met = word.pred & word.gold & same;
      uint64_t both = goes_on_p & goes_on_g, behind = word.met << 1 | lasts, ends = both + (behind & both);
      word.missed = (ends | behind) & (goes_on_p ^ goes_on_g);
      lasts = word.met >> 63 | (ends < both);
      memcpy(word.sums, sums, sizeof sums);
      for (int side = 0; side < 3; ++side) sums[side] = word.sum(side, ~(uint64_t)0);
    }
    return !signs(_mm256_cmpeq_epi8(least, bytes(0)));
  }
};

bool count_spans(const SpanCounts& c, const SpanLabels& labels, int64_t first, int64_t last) {
  const int64_t start = c.cu_seqlens[first], rows = c.cu_seqlens[last] - start;
  Kept kept(rows);
  if (!kept.read(c.pred + start, c.gold + start, rows)) return false;
  kept.encode(labels);
  memset(kept.first, 0, kept.size + 64);
  for (int64_t s = first; s < last; ++s) kept.first[kept.until(c.cu_seqlens[s] - start)] = 255;
  std::unique_ptr<Word[]> words(new Word[kept.size / 64 + 1]);
  if (!kept.fill(words.get())) return false;
  while (first < last) {  // sequences of the same group together: atomic sums are slow
    int64_t sums[3], group = c.group[first], from = kept.until(c.cu_seqlens[first] - start);
    while (first < last && c.group[first] == group) ++first;
    int64_t to = kept.until(c.cu_seqlens[first] - start);
    for (int side = 0; side < 3; ++side)
      sums[side] = words[to / 64].sum(side, below(to % 64)) - words[from / 64].sum(side, below(from % 64));
    c.flush(group, sums);
  }
  return true;
}

}  // namespace

SpanCounter span_counter() { return has_avx2() ? count_spans : nullptr; }

}  // namespace kloss::cpu
#pragma GCC pop_options
#else

namespace kloss::cpu {

SpanCounter span_counter() { return nullptr; }

}  // namespace kloss::cpu
#endif
