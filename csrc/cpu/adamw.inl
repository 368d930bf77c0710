// The parts of AdamW, compiled for one instruction set in the namespace KLOSS_NAME.

namespace kloss::cpu {
namespace {
namespace KLOSS_NAME {

template <class Grad>
void squares(const AdamW& a, int64_t g, int64_t chunk) {
  float sums[AdamW::LANES] = {};
  a.squares<Grad>(g, chunk, 0, AdamW::LANES, sums);
  for (int half = AdamW::LANES / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) AdamW::fold(sums, half, l);
  a.partial[g * a.chunks() + chunk] = sums[0];
}

template <class Grad, class Work>
void update(const AdamW& a, int64_t g, int64_t chunk) {
  int64_t first = chunk * AdamW::CHUNK, count = a.last_of(chunk) - first;
  const AdamW::Row row = a.row[g];
  const AdamW::Factors factors = a.factors();
  const Grad* d = (const Grad*)a.grad + g * a.grad_stride + first;
  float* __restrict__ p = a.param + g * a.param_stride + first;
  float* __restrict__ m = a.exp_avg + g * a.exp_avg_stride + first;
  float* __restrict__ v = a.exp_avg_sq + g * a.exp_avg_sq_stride + first;
  int64_t before = a.tail <= first ? 0 : a.tail - first < count ? a.tail - first : count;
  for (int64_t i = 0; i < before; ++i) AdamW::update(row, factors, widen(d[i]), p[i], m[i], v[i]);
  const AdamW::Row tail = row.of(true);
  for (int64_t i = before; i < count; ++i) AdamW::update(tail, factors, widen(d[i]), p[i], m[i], v[i]);
  if (!a.work) return;
  Work* __restrict__ work = (Work*)a.work + g * a.work_stride + first;
  for (int64_t i = 0; i < count; ++i) narrow(p[i], work[i]);
}

constexpr AdamWParts PARTS[] = {
    {squares<float>, {update<float, float>, update<float, BF16>, update<float, FP16>}},
    {squares<BF16>, {nullptr, update<BF16, BF16>, nullptr}},
    {squares<FP16>, {nullptr, nullptr, update<FP16, FP16>}},
};

}  // namespace KLOSS_NAME
}  // namespace
}  // namespace kloss::cpu

#undef KLOSS_NAME
