// The code behind heads.h, compiled once for each instruction set and element type; see vectors.inl.

#include <cmath>
#include <limits>

#include "heads.h"
#include "product.inl"

namespace kloss::cpu::KLOSS_NAME {
namespace {

// Rows of a matrix by their place in order, in whole units: rows that end within a unit are copied.
struct Gathered {
  const Scalar* matrix;
  const int64_t* order;
  int64_t width, stride;
  Scalar* copies = nullptr;

  Gathered(const void* matrix, const int64_t* order, int64_t n, int64_t width)
      : matrix((const Scalar*)matrix), order(order), width(width), stride(units(width) * PER) {
    if (stride == width) return;
    copies = scratch<1, Scalar>(n * stride);
    std::fill_n(copies, n * stride, Scalar(0));
    for (int64_t i = 0; i < n; ++i) std::copy_n(row(i), width, copies + i * stride);
  }
  const Scalar* row(int64_t i) const { return matrix + order[i] * width; }
  const Unit* operator()(int64_t i) const { return (const Unit*)(copies ? copies + i * stride : row(i)); }
};

inline void put(Scalar* out, const float* values, const Scalar* bias, int64_t width) {
  for (int64_t w = 0; w < width; w += W) {
    Floats v;
    std::memcpy(&v, values + w, sizeof v);
    if (bias) v += load<false>(bias + w, width - w);
    store<false>(out + w, v, width - w);
  }
}

void forward(int64_t job, const void* context) {
  const Heads& h = *(const Heads*)context;
  auto [g, first, last, from, to] = h.jobs[job];
  const Scalar *weight = (const Scalar*)h.weight + g * h.weight_stride, *bias = (const Scalar*)h.bias + g * h.bias_stride;
  const int64_t *order = h.order + first, K = h.inputs, N = h.outputs;
  product(
      last - first, N, units(K), 1, Gathered(h.x, order, last - first, K),
      [&](int64_t c, int64_t width, Unit* b) { pack_transposed(weight + c * K, K, width, K, b); },
      [&](int64_t i, int64_t c, int64_t width, const float* values) {
        put((Scalar*)h.y + order[i] * N + c, values, bias + c, width);
      });
}

void input_gradient(int64_t job, const void* context) {
  const Heads& h = *(const Heads*)context;
  auto [g, first, last, from, to] = h.jobs[job];
  const Scalar* weight = (const Scalar*)h.weight + g * h.weight_stride;
  const int64_t *order = h.order + first, K = h.inputs, N = h.outputs;
  product(
      last - first, K, units(N), 1, Gathered(h.dy, order, last - first, N),
      [&](int64_t c, int64_t width, Unit* b) {
        pack_rows([&](int64_t r) { return weight + r * K + c; }, width, N, b, width > W ? COLUMNS : W);
      },
      [&](int64_t i, int64_t c, int64_t width, const float* values) {
        put((Scalar*)h.dx + order[i] * K + c, values, nullptr, width);
      });
}

// db of one adapter, block by block of its rows.
void bias_gradient(const Heads& h, int64_t g, int64_t first, int64_t last) {
  constexpr int64_t BLOCK = 64;
  int64_t N = h.outputs, vectors = (N + W - 1) / W;
  Floats* sums = scratch<2, Floats>(2 * vectors);
  std::fill_n(sums, vectors, Floats{});
  for (int64_t block = first; block < last; block += BLOCK) {
    Floats* part = sums + vectors;
    std::fill_n(part, vectors, Floats{});
    for (int64_t i = block; i < std::min(last, block + BLOCK); ++i)
      for (int64_t v = 0; v < vectors; ++v) part[v] += load<false>((const Scalar*)h.dy + h.order[i] * N + v * W, N - v * W);
    for (int64_t v = 0; v < vectors; ++v) sums[v] += part[v];
  }
  for (int64_t v = 0; v < vectors; ++v) store<false>((Scalar*)h.db + g * N + v * W, sums[v], N - v * W);
}

void weight_gradient(int64_t job, const void* context) {
  const Heads& h = *(const Heads*)context;
  auto [g, first, last, from, to] = h.jobs[job];
  int64_t K = h.inputs, N = h.outputs, step = packed_stride(N);
  if (h.db && from == 0) bias_gradient(h, g, first, last);
  if (!h.dw) return;
  Scalar* dw = (Scalar*)h.dw + g * N * K + from;
  if (first == last)
    for (int64_t n = 0; n < N; ++n) std::fill_n(dw + n * K, to - from, Scalar(0));
  int64_t offset = from, columns = to - from;
  reduce(
      first, last, N, columns, 1,
      [&](int64_t first, int64_t last, auto put) {
        auto row = [&](int64_t i) { return (const Scalar*)h.dy + h.order[first + i] * N; };
        const Unit* dy = columns_as_rows(row, N, last - first);
        product(
            N, columns, units(last - first), step, [&](int64_t n) { return dy + n; },
            [&](int64_t c, int64_t width, Unit* b) {
              auto x = [&](int64_t i) { return (const Scalar*)h.x + h.order[first + i] * K + offset + c; };
              pack_rows(x, width, last - first, b, width > W ? COLUMNS : W);
            },
            put);
      },
      [&](int64_t n) { return dw + n * K; });
}

// The adapter of a row that counts, else -1.
inline int64_t adapter_of(const TokenLoss& l, int64_t t) { return t < l.covered && l.label[t] >= 0 ? l.adapter[t] : -1; }

inline Floats lanes() {
  Floats lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane;
}

void loss(int64_t job, const void* context) {
  const TokenLoss& l = *(const TokenLoss*)context;
  const Floats infinite = Floats{} - std::numeric_limits<float>::infinity();
  for (int64_t t = job * l.block; t < std::min(l.rows, (job + 1) * l.block); ++t) {
    l.loss[t] = l.statistics[2 * t] = l.statistics[2 * t + 1] = 0;
    if (adapter_of(l, t) < 0) continue;
    const Scalar* row = (const Scalar*)l.logits + t * l.labels;
    auto logits = [&](int64_t c) {
      Floats v = load<false>(row + c, l.labels - c);
      return l.labels - c >= W ? v : lanes() < (float)(l.labels - c) ? v : infinite;
    };
    Floats tops = infinite, sums = {};
    for (int64_t c = 0; c < l.labels; c += W) tops = logits(c) > tops ? logits(c) : tops;
    float top = tops[0];
    for (int i = 1; i < W; ++i) top = std::max(top, tops[i]);
    for (int64_t c = 0; c < l.labels; c += W) sums += exponential(logits(c) - top);
    float own = load<false>(row + l.label[t], 1)[0], sum = total(sums);
    l.loss[t] = std::log(sum) - (own - top), l.statistics[2 * t] = top, l.statistics[2 * t + 1] = sum;
  }
}

void loss_gradient(int64_t job, const void* context) {
  const TokenLoss& l = *(const TokenLoss*)context;
  for (int64_t t = job * l.block; t < std::min(l.rows, (job + 1) * l.block); ++t) {
    const Scalar* row = (const Scalar*)l.logits + t * l.labels;
    Scalar* out = (Scalar*)l.dlogits + t * l.labels;
    int64_t g = adapter_of(l, t), label = l.label[t];
    if (g < 0) {
      std::fill_n(out, l.labels, Scalar(0));
      continue;
    }
    float top = l.statistics[2 * t], sum = l.statistics[2 * t + 1], each = l.dloss[g] / l.count[g], scale = each / sum;
    for (int64_t c = 0; c < l.labels; c += W)
      store<false>(out + c, exponential(load<false>(row + c, l.labels - c) - top) * scale, l.labels - c);
    out[label] = narrow((exponential(load<false>(row + label, 1) - top)[0] - sum) * scale);
  }
}

}  // namespace

const HeadJobs HEAD_JOBS = {forward, input_gradient, weight_gradient, loss, loss_gradient};

}  // namespace kloss::cpu::KLOSS_NAME
