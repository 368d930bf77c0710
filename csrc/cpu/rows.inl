// The code behind rows.h, compiled once for each instruction set and element type; see vectors.inl.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "rows.h"
#include "vectors.inl"

namespace kloss::cpu::KLOSS_NAME {
namespace {

// Calls f(t) for the rows of a job.
template <class F>
inline void each_row(const RowsOf& a, int64_t job, F f) {
  for (int64_t t = job * a.block; t < std::min(a.rows, (job + 1) * a.block); ++t) f(t);
}

inline int64_t pairs_of(int64_t width) { return (width + 2 * W - 1) / (2 * W); }

// Calls f(std::true_type) for a width of whole pairs of vectors, else f(std::false_type).
template <class F>
inline void by_width(int64_t width, F f) {
  if (width % (2 * W))
    f(std::false_type());
  else
    f(std::true_type());
}

// One row's dropout.
struct RowDrop {
  bool drops = false;
  int64_t key = 0;
  int16_t threshold = 0;
  float scale = 1;

  RowDrop(const Drop& drop, int64_t t) {
    if (drop.keys && drop.threshold[t] > -32768) drops = true, key = drop.keys[t], threshold = drop.threshold[t], scale = drop.scale[t];
  }
  Keep at(int64_t column) const { return keep(key, threshold, column); }
};

// z of one row in whole pairs of vectors, behind its end the mean, so that there z - mean is 0.
template <bool WHOLE>
struct Normed {
  int64_t pairs;
  Floats* z;
  Keep* mask;

  explicit Normed(int64_t width) : pairs(pairs_of(width)), z(scratch<0, Floats>(2 * pairs)), mask(scratch<1, Keep>(pairs)) {}

  // Returns the sum of z; without it the padding is 0.
  Floats add(const AddNorm& a, const RowDrop& drop, int64_t t) {
    const Scalar *x = (const Scalar*)a.x + t * a.width, *residual = (const Scalar*)a.residual + t * a.width;
    Floats sums[2] = {};
    for (int64_t i = 0; i < pairs; ++i) {
      int64_t c = i * 2 * W, live = a.width - c;
      Floats low = load<WHOLE>(x + c, live), high = load<WHOLE>(x + c + W, live - W);
      if (drop.drops) {
        mask[i] = drop.at(c);
        low = select(low * drop.scale, mask[i].first), high = select(high * drop.scale, mask[i].second);
      }
      z[2 * i] = low + load<WHOLE>(residual + c, live), z[2 * i + 1] = high + load<WHOLE>(residual + c + W, live - W);
      sums[0] += z[2 * i], sums[1] += z[2 * i + 1];
    }
    return sums[0] + sums[1];
  }

  void pad(int64_t width, float mean) {
    for (int64_t c = width; c < pairs * 2 * W; ++c) z[c / W][c % W] = mean;
  }
};

template <bool WHOLE>
void add_norm_rows(const AddNorm& a, int64_t job) {
  Normed<WHOLE> row(a.width);
  const Scalar *weight = (const Scalar*)a.weight, *bias = (const Scalar*)a.bias;
  each_row(a, job, [&](int64_t t) {
    float mean = total(row.add(a, RowDrop(a.drop, t), t)) / a.width;
    row.pad(a.width, mean);
    Floats squares[2] = {};
    for (int64_t i = 0; i < row.pairs; ++i)
      for (int half = 0; half < 2; ++half) {
        Floats centred = row.z[2 * i + half] - mean;
        squares[half] += centred * centred;
      }
    float rstd = 1 / std::sqrt(total(squares[0] + squares[1]) / a.width + a.eps);
    Scalar* y = (Scalar*)a.y + t * a.width;
    for (int64_t c = 0; c < a.width; c += W) {
      int64_t live = a.width - c;
      store<WHOLE>(y + c, (row.z[c / W] - mean) * rstd * load<WHOLE>(weight + c, live) + load<WHOLE>(bias + c, live), live);
    }
    a.mean[t] = mean, a.rstd[t] = rstd;
  });
}

template <bool WHOLE>
void add_norm_backward_rows(const AddNorm& a, int64_t job) {
  Normed<WHOLE> row(a.width);
  int64_t vectors = 2 * row.pairs;
  Floats* dn = scratch<2, Floats>(vectors);
  Floats* parts = scratch<3, Floats>(2 * vectors);  // the sums for dweight, then those for dbias
  if (a.parts) std::fill_n(parts, 2 * vectors, Floats{});
  const Scalar* weight = (const Scalar*)a.weight;
  each_row(a, job, [&](int64_t t) {
    RowDrop drop(a.drop, t);
    row.add(a, drop, t);
    float mean = a.mean[t], rstd = a.rstd[t];
    row.pad(a.width, mean);
    const Scalar* dy = (const Scalar*)a.dy + t * a.width;
    Floats sums[2] = {}, products[2] = {};
    for (int64_t i = 0; i < vectors; ++i) {
      int64_t c = i * W, live = a.width - c;
      Floats d = load<WHOLE>(dy + c, live), n = (row.z[i] - mean) * rstd;
      if (a.parts) parts[i] += d * n, parts[vectors + i] += d;
      d *= load<WHOLE>(weight + c, live);
      row.z[i] = n, dn[i] = d;
      sums[i % 2] += d, products[i % 2] += d * n;
    }
    float mean_dn = total(sums[0] + sums[1]) / a.width, mean_product = total(products[0] + products[1]) / a.width;
    Scalar *dx = (Scalar*)a.dx + t * a.width, *dresidual = (Scalar*)a.dresidual + t * a.width;
    for (int64_t i = 0; i < vectors; ++i) {
      int64_t c = i * W, live = a.width - c;
      Floats dz = (dn[i] - mean_dn - row.z[i] * mean_product) * rstd;
      if (a.dresidual) store<WHOLE>(dresidual + c, dz, live);
      if (drop.drops) dz = select(dz * drop.scale, i % 2 ? row.mask[i / 2].second : row.mask[i / 2].first);
      if (a.dx) store<WHOLE>(dx + c, dz, live);
    }
  });
  for (int64_t c = 0; a.parts && c < a.width; ++c)
    for (int64_t sum = 0; sum < 2; ++sum) a.parts[(2 * job + sum) * a.width + c] = parts[sum * vectors + c / W][c % W];
}

void round(int64_t, const void* context) {
  const Sums& a = *(const Sums*)context;
  for (int64_t c = 0; c < a.width; ++c)
    ((Scalar*)a.first)[c] = narrow(a.sums[c]), ((Scalar*)a.second)[c] = narrow(a.sums[a.width + c]);
}

template <bool WHOLE>
void dropout_rows(const Dropped& a, int64_t job) {
  each_row(a, job, [&](int64_t t) {
    const Scalar* x = (const Scalar*)a.x + t * a.width;
    Scalar* y = (Scalar*)a.y + t * a.width;
    RowDrop drop(a.drop, t);
    if (!drop.drops) std::copy_n(x, a.width, y);
    for (int64_t c = 0; drop.drops && c < a.width; c += 2 * W) {
      int64_t live = a.width - c;
      Keep kept = drop.at(c);
      store<WHOLE>(y + c, select(load<WHOLE>(x + c, live) * drop.scale, kept.first), live);
      store<WHOLE>(y + c + W, select(load<WHOLE>(x + c + W, live - W) * drop.scale, kept.second), live - W);
    }
  });
}

void add_norm(int64_t job, const void* context) {
  const AddNorm& a = *(const AddNorm*)context;
  by_width(a.width, [&](auto whole) { add_norm_rows<whole>(a, job); });
}

void add_norm_backward(int64_t job, const void* context) {
  const AddNorm& a = *(const AddNorm*)context;
  by_width(a.width, [&](auto whole) { add_norm_backward_rows<whole>(a, job); });
}

void dropout(int64_t job, const void* context) {
  const Dropped& a = *(const Dropped*)context;
  by_width(a.width, [&](auto whole) { dropout_rows<whole>(a, job); });
}

}  // namespace

const RowJobs ROW_JOBS = {add_norm, add_norm_backward, round, dropout};

}  // namespace kloss::cpu::KLOSS_NAME
