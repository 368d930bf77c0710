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

using Bytes = __m256i;
constexpr int64_t ROWS = 8;  // that are read at once

Bytes load(const void* from) { return _mm256_loadu_si256((const Bytes*)from); }
Bytes all(int value) { return _mm256_set1_epi8((char)value); }
uint64_t bits(Bytes bytes) { return (uint32_t)_mm256_movemask_epi8(bytes); }
uint64_t below(uint64_t bit) { return ((uint64_t)1 << bit) - 1; }
int64_t count(uint64_t bits) { return __builtin_popcountll(bits); }

// For each set of 8 rows, where the bytes of its rows stand in `Kept::pack`'s 16: gold's, then pred's.
struct Orders {
  alignas(16) uint8_t of[256][16] = {};

  constexpr Orders() {
    constexpr uint8_t PLACES[ROWS] = {0, 1, 8, 9, 2, 3, 10, 11};
    for (int rows = 0; rows < 256; ++rows)
      for (int row = 0, kept = 0; row < ROWS; ++row)
        if (rows >> row & 1) of[rows][kept] = PLACES[row], of[rows][kept++ + 8] = PLACES[row] + 4;
  }
};
constexpr Orders ORDERS;

// 64 rows that count.
struct Word {
  uint64_t pred, gold, met, missed;  // spans that start on a side; that start on both; ends of these that are no hits
  int64_t sums[3];                   // hits, predicted and gold spans before

  int64_t hits(uint64_t mask) const { return count(met & mask) - count(missed & mask); }
  void until(uint64_t mask, int64_t sign, int64_t* to) const {
    to[0] += sign * (sums[0] + hits(mask)), to[1] += sign * (sums[1] + count(pred & mask)), to[2] += sign * (sums[2] + count(gold & mask));
  }
};

// The rows that count, of some rows.
struct Kept {
  int64_t blocks, size = 0;
  std::unique_ptr<uint8_t[]> memory;
  uint8_t *pred, *gold, *first;  // labels, then their codes; 255 where a sequence begins. Before pred and gold is one more
  uint8_t* rows;                 // [blocks], which of 8 rows count
  int32_t* before;               // [blocks], how many before them do
  Bytes found = _mm256_setzero_si256();  // that was strange

  explicit Kept(int64_t all_rows) : blocks(all_rows / ROWS + 1) {
    int64_t side = blocks * ROWS + 128, counts = blocks * (int64_t)sizeof(int32_t);
    memory.reset(new uint8_t[3 * side + counts + blocks]);
    before = (int32_t*)memory.get(), rows = memory.get() + counts;
    pred = rows + blocks + 32, gold = pred + side, first = gold + side - 32;
  }

  // The low halves of 8 numbers, in the order 0 1 4 5 2 3 6 7.
  static Bytes halves(Bytes a, Bytes b) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
  }

  static uint64_t signs(Bytes numbers) { return (uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(numbers)); }

  // 0 for each row that counts, with labels below 256, or is ignored.
  static Bytes strange(Bytes gold, Bytes pred) {
    Bytes high = _mm256_srli_epi64(_mm256_or_si256(gold, pred), 8), other = _mm256_xor_si256(gold, _mm256_set1_epi64x(IGNORED));
    return _mm256_castpd_si256(_mm256_blendv_pd(_mm256_castsi256_pd(high), _mm256_castsi256_pd(other), _mm256_castsi256_pd(gold)));
  }

  // Takes rows, 8 of each block; behind the last one come rows that do not count.
  void read(const int64_t* p, const int64_t* g, int64_t all_rows) {
    int64_t whole = blocks - 1, kept = 0, last_p[ROWS] = {}, last_g[ROWS];
    for (int64_t& label : last_g) label = IGNORED;
    memcpy(last_p, p + whole * ROWS, (all_rows - whole * ROWS) * sizeof *p);
    memcpy(last_g, g + whole * ROWS, (all_rows - whole * ROWS) * sizeof *g);
    Bytes any = _mm256_setzero_si256();
    auto read_block = [&](int64_t block, const int64_t* p, const int64_t* g) {
      Bytes p0 = load(p), p1 = load(p + 4), g0 = load(g), g1 = load(g + 4);
      any = _mm256_or_si256(any, _mm256_or_si256(strange(g0, p0), strange(g1, p1)));
      uint64_t counted = 255 ^ (signs(g0) | signs(g1) << 4);
      Bytes words = _mm256_packs_epi32(halves(g0, g1), halves(p0, p1));
      __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      bytes = _mm_shuffle_epi8(bytes, _mm_load_si128((const __m128i*)ORDERS.of[counted]));
      _mm_storel_epi64((__m128i*)(gold + kept), bytes);
      _mm_storeh_pd((double*)(pred + kept), _mm_castsi128_pd(bytes));
      rows[block] = (uint8_t)counted, before[block] = (int32_t)kept, kept += count(counted);
    };
    for (int64_t block = 0; block < whole; ++block) read_block(block, p + block * ROWS, g + block * ROWS);
    read_block(whole, last_p, last_g);
    size = kept, found = any;
  }

  // How many of the rows before this one count.
  int64_t until(uint64_t row) const { return before[row / ROWS] + count(rows[row / ROWS] & below(row % ROWS)); }

  bool fits() const { return _mm256_testz_si256(found, found); }

  // A code for each label, and O behind the last. The table is looked up 16 labels at a time: 112 more sends all others beyond 127.
  void encode(const SpanLabels& labels) const {
    for (int64_t i = 0; i < size; i += 32) {
      Bytes p = load(pred + i), g = load(gold + i), code_p = _mm256_setzero_si256(), code_g = code_p;
      for (int64_t part = 0; part < labels.known; part += 16) {
        Bytes table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)(labels.code + part)));
        code_p = _mm256_or_si256(code_p, _mm256_shuffle_epi8(table, _mm256_adds_epu8(p, all(112))));
        code_g = _mm256_or_si256(code_g, _mm256_shuffle_epi8(table, _mm256_adds_epu8(g, all(112))));
        p = _mm256_sub_epi8(p, all(16)), g = _mm256_sub_epi8(g, all(16));
      }
      _mm256_storeu_si256((Bytes*)(pred + i), code_p), _mm256_storeu_si256((Bytes*)(gold + i), code_g);
    }
    memset(pred + size, 1, 64), memset(gold + size, 1, 64);
  }

  // Fills words 0..size / 64. Returns whether each label has a code.
  bool count_words(Word* words) const {
    Bytes least = all(1);
    uint64_t lasts = 0;  // whether a span of `met` reaches the next word
    int64_t sums[3] = {};
    for (int64_t i = 0; i <= size; i += 64) {
      uint64_t goes_on_p = 0, goes_on_g = 0, other_p = 0, other_g = 0, same = 0;
      for (int64_t j = 0; j < 64; j += 32) {
        Bytes p = load(pred + i + j), g = load(gold + i + j), border = load(first + i + j), one = all(1), slot = all(254);
        Bytes before_p = load(pred + i + j - 1), before_g = load(gold + i + j - 1);
        goes_on_p |= bits(_mm256_andnot_si256(border, _mm256_cmpeq_epi8(p, _mm256_and_si256(before_p, slot)))) << j;
        goes_on_g |= bits(_mm256_andnot_si256(border, _mm256_cmpeq_epi8(g, _mm256_and_si256(before_g, slot)))) << j;
        other_p |= (~bits(_mm256_cmpeq_epi8(p, one)) & below(32)) << j, other_g |= (~bits(_mm256_cmpeq_epi8(g, one)) & below(32)) << j;
        same |= bits(_mm256_cmpeq_epi8(_mm256_and_si256(p, slot), _mm256_and_si256(g, slot))) << j;
        least = _mm256_min_epu8(least, _mm256_min_epu8(p, g));
      }
      Word& word = words[i / 64];
      uint64_t both = goes_on_p & goes_on_g;
      word.pred = other_p & ~goes_on_p, word.gold = other_g & ~goes_on_g, word.met = word.pred & word.gold & same;
      uint64_t reached = word.met << 1 | lasts, ends = both + (reached & both);
      word.missed = (ends | reached) & (goes_on_p ^ goes_on_g);
      lasts = word.met >> 63 | (ends < both);
      memcpy(word.sums, sums, sizeof sums);
      sums[0] += word.hits(~(uint64_t)0), sums[1] += count(word.pred), sums[2] += count(word.gold);
    }
    return bits(_mm256_cmpeq_epi8(least, _mm256_setzero_si256())) == 0;
  }
};

bool count_sequences(const SpanCounts& c, const SpanLabels& labels, int64_t first, int64_t last) {
  const int64_t start = c.cu_seqlens[first], rows = c.cu_seqlens[last] - start;
  Kept kept(rows);
  kept.read(c.pred + start, c.gold + start, rows);
  if (!kept.fits()) return false;
  kept.encode(labels);
  memset(kept.first, 0, kept.size + 64);
  for (int64_t s = first; s < last; ++s) kept.first[kept.until(c.cu_seqlens[s] - start)] = 255;
  std::unique_ptr<Word[]> words(new Word[kept.size / 64 + 1]);
  if (!kept.count_words(words.get())) return false;
  auto until = [&](int64_t s, int64_t sign, int64_t* sums) {
    int64_t row = kept.until(c.cu_seqlens[s] - start);
    words[row / 64].until(below(row % 64), sign, sums);
  };
  while (first < last) {  // sequences of the same group together: atomic sums are slow
    int64_t sums[3] = {}, group = c.group[first];
    until(first, -1, sums);
    while (first < last && c.group[first] == group) ++first;
    until(first, 1, sums);
    c.flush(group, sums);
  }
  return true;
}

}  // namespace

SpanCounter span_counter() { return has_avx2() ? count_sequences : nullptr; }

}  // namespace kloss::cpu
#pragma GCC pop_options
#else

namespace kloss::cpu {

SpanCounter span_counter() { return nullptr; }

}  // namespace kloss::cpu
#endif
