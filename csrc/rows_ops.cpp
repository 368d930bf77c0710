// Schemas, checks and dispatch of the ops on rows (cpu/rows.h), and the keys of dropout, on a CPU.

#include "checks.h"
#include "cpu/rows.h"
#include "variants.h"

#include <cmath>
#include <tuple>
#include <vector>

namespace {

using namespace kloss;

struct Kind {
  bool supported;
  const cpu::RowJobs* jobs;
};

#if KLOSS_X86
const Kind BF16[] = {{has_avx512_bf16(), &cpu::avx512_bf16::ROW_JOBS}};
const Kind F32[] = {
    {has_avx512(), &cpu::avx512_f32::ROW_JOBS}, {has_avx2(), &cpu::avx2_f32::ROW_JOBS}, {true, &cpu::generic_f32::ROW_JOBS}};
#else
const Kind BF16[] = {{false, nullptr}};
const Kind F32[] = {{true, &cpu::generic_f32::ROW_JOBS}};
#endif

const Kind* kind_for(ScalarType type, int64_t variant) {
  if (type == ScalarType::BFloat16) return pick(BF16, variant);
  return type == ScalarType::Float ? pick(F32, variant) : nullptr;
}

const cpu::RowJobs& jobs_for(const Tensor& x, int64_t variant) {
  const Kind* kind = kind_for(x.scalar_type(), variant);
  STD_TORCH_CHECK(kind != nullptr, "no such kernel for this type on this processor");
  return *kind->jobs;
}

// The number of variants for x's type on this processor.
int64_t variants(Tensor x) {
  int64_t count = 0;
  while (x.is_cpu() && kind_for(x.scalar_type(), count)) ++count;
  return count;
}

constexpr int64_t ELEMENTS = 1 << 16;  // of a job: threads that take less wait for each other, and share new pages

cpu::RowsOf rows_of(const Tensor& x, int64_t block = 0) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) > 0, "x must be [T, H] on a CPU");
  return {x.size(0), x.size(1), block ? block : std::max<int64_t>(1, ELEMENTS / x.size(1))};
}

int64_t jobs_of(const cpu::RowsOf& rows) { return (rows.rows + rows.block - 1) / rows.block; }

using Optional = std::optional<Tensor>;

cpu::Drop drop_of(int64_t rows, const Optional& keys, const Optional& threshold, const Optional& scale) {
  STD_TORCH_CHECK(
      keys.has_value() == threshold.has_value() && keys.has_value() == scale.has_value(), "keys, threshold and scale belong together");
  if (!keys) return {};
  return {
      data<int64_t>(*keys, ScalarType::Long, {rows}, "keys"), data<int16_t>(*threshold, ScalarType::Short, {rows}, "threshold"),
      data<float>(*scale, ScalarType::Float, {rows}, "scale")};
}

std::tuple<Tensor, Tensor, Tensor> add_norm(
    Tensor x, Tensor residual, Tensor weight, Tensor bias, double eps, Optional keys, Optional threshold, Optional scale,
    int64_t variant) {
  const cpu::RowJobs& jobs = jobs_for(x, variant);
  ScalarType type = x.scalar_type();
  cpu::AddNorm a{rows_of(x)};
  int64_t T = a.rows, H = a.width;
  a.x = data(x, type, {T, H}, "x"), a.residual = data(residual, type, {T, H}, "residual");
  a.weight = data(weight, type, {H}, "weight"), a.bias = data(bias, type, {H}, "bias");
  a.eps = (float)eps, a.drop = drop_of(T, keys, threshold, scale);
  Tensor y = new_empty(x, {T, H}), mean = new_empty(x, {T}, ScalarType::Float), rstd = new_empty(x, {T}, ScalarType::Float);
  a.y = y.mutable_data_ptr(), a.mean = (float*)mean.mutable_data_ptr(), a.rstd = (float*)rstd.mutable_data_ptr();
  parallel(jobs_of(a), jobs.add_norm, &a);
  return {y, mean, rstd};
}

// dx, dresidual, dweight and dbias; empty where not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(
    Tensor dy, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd, Optional keys, Optional threshold,
    Optional scale, bool need_x, bool need_residual, bool need_weight, int64_t variant) {
  constexpr int64_t ROWS = 128;  // whose sums for the weight one job adds up: a number that no thread changes
  const cpu::RowJobs& jobs = jobs_for(x, variant);
  ScalarType type = x.scalar_type();
  cpu::AddNorm a{rows_of(x, need_weight ? ROWS : 0)};
  int64_t T = a.rows, H = a.width, count = jobs_of(a);
  a.dy = data(dy, type, {T, H}, "dy");
  a.x = data(x, type, {T, H}, "x"), a.residual = data(residual, type, {T, H}, "residual");
  a.weight = data(weight, type, {H}, "weight");
  a.mean = data<float>(mean, ScalarType::Float, {T}, "mean"), a.rstd = data<float>(rstd, ScalarType::Float, {T}, "rstd");
  a.drop = drop_of(T, keys, threshold, scale);
  auto matrix = [&](bool needed) { return needed ? new_empty(x, {T, H}) : new_empty(x, {0}); };
  Tensor dx = matrix(need_x), dresidual = matrix(need_residual);
  Tensor dweight = new_empty(x, {need_weight ? H : 0}), dbias = new_empty(x, {need_weight ? H : 0});
  if (need_x) a.dx = dx.mutable_data_ptr();
  if (need_residual) a.dresidual = dresidual.mutable_data_ptr();
  std::vector<float> parts(need_weight ? count * 2 * H : 0), sums(need_weight ? 2 * H : 0);
  if (need_weight) a.parts = parts.data();
  parallel(count, jobs.add_norm_backward, &a);
  if (need_weight) {
    for (int64_t job = 0; job < count; ++job)
      for (int64_t i = 0; i < 2 * H; ++i) sums[i] += parts[job * 2 * H + i];
    cpu::Sums s{H, sums.data(), dweight.mutable_data_ptr(), dbias.mutable_data_ptr()};
    jobs.round(0, &s);
  }
  return {dx, dresidual, dweight, dbias};
}

Tensor dropout(Tensor x, Tensor keys, Tensor threshold, Tensor scale, int64_t variant) {
  const cpu::RowJobs& jobs = jobs_for(x, variant);
  cpu::Dropped d{rows_of(x)};
  d.x = data(x, x.scalar_type(), {d.rows, d.width}, "x"), d.drop = drop_of(d.rows, keys, threshold, scale);
  Tensor y = new_empty(x, {d.rows, d.width});
  d.y = y.mutable_data_ptr();
  parallel(jobs_of(d), jobs.dropout, &d);
  return y;
}

uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// The entry of each row, null for entry 0; below 0 for none.
const int32_t* entries(const Optional& adapter, int64_t rows, int64_t count) {
  STD_TORCH_CHECK(count > 0 || !rows || adapter, "there must be an entry");
  if (!adapter) return nullptr;
  const int32_t* entry = data<int32_t>(*adapter, ScalarType::Int, {rows}, "adapter");
  bool fits = true;
  for (int64_t t = 0; t < rows; ++t) fits &= entry[t] < count;
  STD_TORCH_CHECK(fits, "adapter has a value above ", count - 1);
  return entry;
}

// The keys [sites, T] of sites first_site..first_site + sites - 1; see kloss/kernels/dropout.py.
Tensor dropout_keys(Tensor seed, Tensor row_key, Optional adapter, int64_t first_site, int64_t sites) {
  STD_TORCH_CHECK(seed.dim() == 1 && row_key.dim() == 1 && sites >= 0, "seed must be [G], row_key [T], and sites at least 0");
  int64_t G = seed.size(0), T = row_key.size(0);
  const int64_t* seeds = data<int64_t>(seed, ScalarType::Long, {G}, "seed");
  const int64_t* key = data<int64_t>(row_key, ScalarType::Long, {T}, "row_key");
  const int32_t* entry = entries(adapter, T, G);
  STD_TORCH_CHECK(G > 0 || !T, "there must be a seed");
  Tensor keys = new_empty(row_key, {sites, T});
  uint64_t* out = (uint64_t*)keys.mutable_data_ptr();
  constexpr int64_t BLOCK = 8192;
  int64_t blocks = (T + BLOCK - 1) / BLOCK;
  each(sites * blocks, [&](int64_t job) {
    int64_t site = job / blocks, first = job % blocks * BLOCK;
    uint64_t start = ((uint64_t)first_site + (uint64_t)site + 1) * 0x9E3779B97F4A7C15u;
    int64_t of = -1;
    uint64_t mixed = 0;
    for (int64_t t = first; t < std::min(T, first + BLOCK); ++t) {
      int64_t g = entry ? std::max(entry[t], 0) : 0;
      if (g != of) of = g, mixed = mix64((uint64_t)seeds[g] + start);
      out[site * T + t] = mix64(mixed + (uint64_t)key[t] * 0xD1B54A32D192ED03u);
    }
  });
  return keys;
}

// round(p * 65536), at most 65535; 0 for NaN.
int32_t threshold_of(float p) {
  double limit = std::nearbyint((double)p * 65536);
  return limit > 0 ? (int32_t)std::min(limit, 65535.0) : 0;
}

// LoRA's scaling times dropout's 1 / (1 - p) of each adapter.
Tensor kept_scaling(Tensor scaling, Tensor p) {
  STD_TORCH_CHECK(p.dim() == 1, "p must be [G]");
  int64_t G = p.size(0);
  const float *chance = data<float>(p, ScalarType::Float, {G}, "p"), *scale = data<float>(scaling, ScalarType::Float, {G}, "scaling");
  Tensor kept = new_empty(scaling, {G});
  for (int64_t g = 0; g < G; ++g) ((float*)kept.mutable_data_ptr())[g] = scale[g] / (1 - threshold_of(chance[g]) / 65536.0f);
  return kept;
}

// RowDropout's threshold and scale of each row.
std::tuple<Tensor, Tensor> dropout_limits(Tensor p, Optional adapter, int64_t rows) {
  STD_TORCH_CHECK(p.dim() == 1 && rows >= 0, "p must be [G], and rows at least 0");
  int64_t G = p.size(0);
  const float* chance = data<float>(p, ScalarType::Float, {G}, "p");
  const int32_t* entry = entries(adapter, rows, G);
  STD_TORCH_CHECK(entry || G > 0, "there must be a p");
  std::vector<int16_t> thresholds(G + 1, -32768);  // the first is that of rows without dropout
  std::vector<float> scales(G + 1, 1.0f);
  for (int64_t g = 0; g < G; ++g) {
    int32_t limit = threshold_of(chance[g]);
    thresholds[g + 1] = (int16_t)(limit - 32768), scales[g + 1] = (float)(1 / (1 - limit / 65536.0));
  }
  Tensor threshold = new_empty(p, {rows}, ScalarType::Short), scale = new_empty(p, {rows});
  int16_t* of_threshold = (int16_t*)threshold.mutable_data_ptr();
  float* of_scale = (float*)scale.mutable_data_ptr();
  for (int64_t t = 0; t < rows; ++t) {
    int64_t g = entry ? std::max(entry[t], -1) + 1 : 1;
    of_threshold[t] = thresholds[g], of_scale[t] = scales[g];
  }
  return {threshold, scale};
}

// row_keys of kloss/kernels/dropout.py. T: rows of the batch, those behind the last offset get 0.
Tensor row_keys(Tensor step, Tensor sequence, Tensor cu_seqlens, int64_t T) {
  STD_TORCH_CHECK(step.dim() == 1 && T >= 0, "step must be [S], and rows at least 0");
  int64_t S = step.size(0);
  const int64_t* steps = data<int64_t>(step, ScalarType::Long, {S}, "step");
  const int64_t* number = data<int64_t>(sequence, ScalarType::Long, {S}, "sequence");
  const int32_t* offset = data<int32_t>(cu_seqlens, ScalarType::Int, {S + 1}, "cu_seqlens");
  check_range(steps, S, 0, (int64_t(1) << 31) - 1, "step");
  check_range(number, S, 0, (int64_t(1) << 16) - 1, "sequence");
  bool fits = offset[0] == 0 && offset[S] <= T;
  for (int64_t s = 0; s < S; ++s) fits &= offset[s] <= offset[s + 1];
  STD_TORCH_CHECK(fits, "cu_seqlens must start at 0, not decrease and end within the rows");
  Tensor keys = new_empty(step, {T});
  int64_t* out = (int64_t*)keys.mutable_data_ptr();
  for (int64_t s = 0; s < S; ++s)
    for (int64_t t = offset[s]; t < offset[s + 1]; ++t) out[t] = (steps[s] << 32 | number[s] << 16) + (t - offset[s]);
  std::fill(out + offset[S], out + T, 0);
  return keys;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kloss, m) {
  m.def(
      "cpu_add_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor? keys, Tensor? threshold, "
      "Tensor? scale, int variant) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_add_norm_backward(Tensor dy, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd, Tensor? keys, "
      "Tensor? threshold, Tensor? scale, bool need_x, bool need_residual, bool need_weight, int variant) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_dropout(Tensor x, Tensor keys, Tensor threshold, Tensor scale, int variant) -> Tensor");
  m.def("cpu_row_variants(Tensor x) -> int");
  m.def("dropout_keys(Tensor seed, Tensor row_key, Tensor? adapter, int first_site, int sites) -> Tensor");
  m.def("dropout_limits(Tensor p, Tensor? adapter, int rows) -> (Tensor, Tensor)");
  m.def("kept_scaling(Tensor scaling, Tensor p) -> Tensor");
  m.def("row_keys(Tensor step, Tensor sequence, Tensor cu_seqlens, int rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kloss, CPU, m) {
  m.impl("cpu_add_norm", TORCH_BOX(&add_norm));
  m.impl("cpu_add_norm_backward", TORCH_BOX(&add_norm_backward));
  m.impl("cpu_dropout", TORCH_BOX(&dropout));
  m.impl("cpu_row_variants", TORCH_BOX(&variants));
  m.impl("dropout_keys", TORCH_BOX(&dropout_keys));
  m.impl("dropout_limits", TORCH_BOX(&dropout_limits));
  m.impl("kept_scaling", TORCH_BOX(&kept_scaling));
  m.impl("row_keys", TORCH_BOX(&row_keys));
}
