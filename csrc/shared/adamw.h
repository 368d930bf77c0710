// AdamW over a bank: every row of [G, P] with its own rate, decay, clipping and step count. Three parts, in order:
//
//   squares   a chunk of a row: the sum of its gradients' squares                        for each (row, chunk)
//   finish    a row: its norm, whether it moves, the constants of its update, step += 1   for each row
//   update    elements of a row that moves                                              for each (row, chunk)
//
//   g = grad min(1, max_norm / (norm + 1e-6))        p = p (1 - lr weight_decay)
//   m = m + (1 - beta_1) (g - m)                       v = beta_2 v + (1 - beta_2) g g
//   p = p - lr / (1 - beta_1^step) m / (sqrt(v) / sqrt(1 - beta_2^step) + eps)
//
// The order of every sum follows from P alone, so a row's bits depend neither on other rows nor on threads. The fma's are those of
// torch's fused AdamW on a CPU. A compiler must add none: -fmad=false on a GPU, -ffp-contract=off on a CPU. Then both agree to the
// bit.
#pragma once

#include "host_device.h"

namespace kloss {

struct AdamW {
  constexpr static int64_t CHUNK = 4096;  // elements of a row whose squares make one partial sum
  constexpr static int LANES = 256;       // partial sums within a chunk
  constexpr static int TOTALS = 32;       // partial sums of a row's chunks

  // What a row's update needs; clip -1: the row does not move. Columns from `tail` on have a decay and a rate of their own.
  struct Row {
    float clip, root, decay, rate, tail_decay, tail_rate;
    KLOSS_HD bool moves() const { return clip >= 0; }
    KLOSS_HD Row of(bool in_tail) const { return in_tail ? Row{clip, root, tail_decay, tail_rate, tail_decay, tail_rate} : *this; }
  };

  int64_t rows, width, tail;                             // G, P, first column of the tail, P without one
  float* param;                                          // [G, P], as are the next four, each with its stride between rows
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  void* work;                                            // copy of param in its own type, or null
  int64_t param_stride, grad_stride, exp_avg_stride, exp_avg_sq_stride, work_stride;
  int64_t* step;                                         // [G]
  const float* lr;                                       // [G]
  const float* tail_lr;                                  // [G], lr itself without a tail
  const float* weight_decay;                             // [G]
  const float* max_norm;                                 // [G]
  const bool* active;                                    // [G]
  float* norms;                                          // [G]
  float* partial;                                        // [G, chunks()], scratch
  Row* row;                                              // [G], scratch
  double beta_1, beta_2, eps;

  KLOSS_HD int64_t chunks() const { return ceil_div(width, CHUNK); }
  KLOSS_HD int64_t last_of(int64_t chunk) const { return (chunk + 1) * CHUNK < width ? (chunk + 1) * CHUNK : width; }

  // Adds squares of lanes first..last-1 of a chunk; lane l has its elements l, l + LANES, ... Sums are the chunk's LANES.
  template <class Grad>
  KLOSS_HD void squares(int64_t g, int64_t chunk, int first, int last, float* sums) const {
    const Grad* x = (const Grad*)grad + g * grad_stride + chunk * CHUNK;
    int64_t count = last_of(chunk) - chunk * CHUNK;
    for (int64_t start = 0; start < count; start += LANES) {
      int end = count - start < last ? (int)(count - start) : last;
      for (int l = first; l < end; ++l) square(widen(x[start + l]), sums[l]);
    }
  }
  KLOSS_HD static void square(float value, float& sum) { sum = fmaf(value, value, sum); }

  // One level of a tree over sums: half = LANES / 2, LANES / 4, ..., 1, all l < half; the total is in sums[0].
  template <class T>
  KLOSS_HD static void fold(T* sums, int half, int l) { sums[l] += sums[l + half]; }

  // The sum of a row's chunks l, l + TOTALS, ...
  KLOSS_HD double total(int64_t g, int l) const {
    double sum = 0;
    for (int64_t chunk = l; chunk < chunks(); chunk += TOTALS) sum += partial[g * chunks() + chunk];
    return sum;
  }

  // squared: the sum of all its squares. Counts the step of a row that moves.
  KLOSS_HD void finish(int64_t g, double squared) const {
    float norm = active[g] ? (float)sqrt(squared) : 0.0f;
    norms[g] = norm;
    row[g].clip = -1;
    if (!active[g] || !(norm <= 3.402823466e38f)) return;
    double ratio = ((double)norm + 1e-6) / (double)max_norm[g];
    double count = (double)(step[g] += 1);
    row[g].clip = ratio > 1 ? (float)(1 / ratio) : 1.0f;
    double held = 1 - power(beta_1, count);
    row[g].decay = (float)(1 - (double)lr[g] * (double)weight_decay[g]);
    row[g].rate = (float)-((double)lr[g] / held);
    row[g].tail_decay = (float)(1 - (double)tail_lr[g] * (double)weight_decay[g]);
    row[g].tail_rate = (float)-((double)tail_lr[g] / held);
    row[g].root = (float)sqrt(1 - power(beta_2, count));
  }

  // base^n by squaring, n >= 1: pow() of a GPU and of a CPU may differ.
  KLOSS_HD static double power(double base, double n) {
    double result = 1;
    for (uint64_t left = (uint64_t)n; left; left >>= 1, base *= base)
      if (left & 1) result *= base;
    return result;
  }

  // What all rows share, in fp32.
  struct Factors {
    float toward, keep, gain, least;
    bool from_old;  // torch's lerp starts from the nearer end
  };
  KLOSS_HD Factors factors() const {
    float w = (float)(1 - beta_1);
    return {w < 0.5f ? w : w - 1, (float)beta_2, (float)(1 - beta_2), (float)eps, w < 0.5f};
  }

  // One element: its gradient d, weight p and moments m and v.
  KLOSS_HD static void update(const Row& r, const Factors& f, float d, float& p, float& m, float& v) {
    float x = d * r.clip;
    m = fmaf(f.toward, x - m, f.from_old ? m : x);
    v = fmaf(f.gain * x, x, f.keep * v);
    float change = r.rate * m / (sqrtf(v) / r.root + f.least);
    p = p * r.decay + change;
  }
};

}  // namespace kloss
