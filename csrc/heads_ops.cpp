// Schemas, checks and dispatch of the tagging heads and of the token loss (cpu/heads.h) on a CPU.

#include "checks.h"
#include "cpu/heads.h"
#include "cpu/lora.h"
#include "variants.h"

#include <cstring>
#include <tuple>
#include <vector>

namespace {

using namespace kloss;

struct Kind {
  bool supported;
  const cpu::HeadJobs* jobs;
};

#if KLOSS_X86
const Kind BF16[] = {{has_avx512_bf16(), &cpu::avx512_bf16::HEAD_JOBS}};
const Kind F32[] = {
    {has_avx512(), &cpu::avx512_f32::HEAD_JOBS}, {has_avx2(), &cpu::avx2_f32::HEAD_JOBS}, {true, &cpu::generic_f32::HEAD_JOBS}};
#else
const Kind BF16[] = {{false, nullptr}};
const Kind F32[] = {{true, &cpu::generic_f32::HEAD_JOBS}};
#endif

const cpu::HeadJobs& jobs_for(const Tensor& x, int64_t variant) {
  const Kind* kind = nullptr;
  if (x.scalar_type() == ScalarType::BFloat16) kind = pick(BF16, variant);
  if (x.scalar_type() == ScalarType::Float) kind = pick(F32, variant);
  STD_TORCH_CHECK(kind != nullptr, "no such kernel for this type on this processor");
  return *kind->jobs;
}

// The ends [G+1] of the adapters' rows in order: each row lies below T. Returns G.
int64_t check_order(const Tensor& order, const Tensor& ends, int64_t T) {
  int64_t covered = order.dim() == 1 ? order.size(0) : 0, G = ends.dim() == 1 ? ends.size(0) - 1 : -1;
  STD_TORCH_CHECK(G >= 0 && covered <= T, "ends must be [G+1], and order have at most a row for each of x");
  const int64_t* end = data<int64_t>(ends, ScalarType::Long, {G + 1}, "ends");
  check_range(data<int64_t>(order, ScalarType::Long, {covered}, "order"), covered, 0, covered - 1, "order");
  check_range(end, G + 1, 0, covered, "ends");
  for (int64_t g = 0; g < G; ++g) STD_TORCH_CHECK(end[g] <= end[g + 1], "ends must not decrease");
  return G;
}

cpu::Heads heads_of(const Tensor& x, const Tensor& weight, const Tensor& order, const Tensor& ends, int64_t G) {
  cpu::Heads h{};
  int64_t N = h.outputs = weight.dim() == 3 ? weight.size(1) : 0, K = h.inputs = weight.dim() == 3 ? weight.size(2) : 0;
  bool fits = weight.is_cpu() && weight.scalar_type() == x.scalar_type() && N > 0 && K > 0 && weight.size(0) == G &&
              (!G || ((K == 1 || weight.stride(2) == 1) && (N == 1 || weight.stride(1) == K)));
  STD_TORCH_CHECK(fits, "weight must be [G, N, K], each adapter's contiguous");
  h.weight = weight.const_data_ptr(), h.weight_stride = weight.stride(0);
  h.order = (const int64_t*)order.const_data_ptr();
  return h;
}

// Rows of an adapter in one job.
std::vector<cpu::HeadJob> row_jobs(const Tensor& ends, int64_t G) {
  const int64_t* end = (const int64_t*)ends.const_data_ptr();
  std::vector<cpu::HeadJob> jobs;
  for (int64_t g = 0; g < G; ++g)
    for (int64_t first = g ? end[g - 1] : 0; first < end[g]; first += cpu::ROW_BLOCK)
      jobs.push_back({g, first, std::min(end[g], first + cpu::ROW_BLOCK), 0, 0});
  return jobs;
}

// All rows of an adapter, some inputs in one job.
std::vector<cpu::HeadJob> weight_jobs(const Tensor& ends, int64_t G, int64_t K) {
  constexpr int64_t INPUTS = 256;
  const int64_t* end = (const int64_t*)ends.const_data_ptr();
  std::vector<cpu::HeadJob> jobs;
  for (int64_t g = 0; g < G; ++g)
    for (int64_t from = 0; from < K; from += INPUTS)
      jobs.push_back({g, g ? end[g - 1] : 0, end[g], from, std::min(K, from + INPUTS)});
  return jobs;
}

// Zeros for the rows without an adapter. element: bytes.
void clear(void* y, int64_t width, int64_t T, int64_t element, const Tensor& order, const Tensor& ends, int64_t G) {
  const int64_t *row = (const int64_t*)order.const_data_ptr(), *end = (const int64_t*)ends.const_data_ptr();
  int64_t covered = order.size(0), bytes = width * element;
  for (int64_t i = G ? end[G - 1] : 0; i < covered; ++i) std::memset((char*)y + row[i] * bytes, 0, bytes);
  if (T > covered) std::memset((char*)y + covered * bytes, 0, (T - covered) * bytes);
}

Tensor forward(Tensor x, Tensor weight, Tensor bias, Tensor order, Tensor ends, int64_t variant) {
  const cpu::HeadJobs& jobs = jobs_for(x, variant);
  STD_TORCH_CHECK(x.dim() == 2, "x must be [T, K]");
  int64_t T = x.size(0), G = check_order(order, ends, T);
  cpu::Heads h = heads_of(x, weight, order, ends, G);
  h.x = data(x, x.scalar_type(), {T, h.inputs}, "x");
  bool fits = bias.is_cpu() && bias.scalar_type() == x.scalar_type() && bias.dim() == 2 && bias.size(0) == G &&
              bias.size(1) == h.outputs && (!G || h.outputs == 1 || bias.stride(1) == 1);
  STD_TORCH_CHECK(fits, "bias must be [G, N], each adapter's contiguous");
  h.bias = bias.const_data_ptr(), h.bias_stride = bias.stride(0);
  Tensor y = new_empty(x, {T, h.outputs});
  h.y = y.mutable_data_ptr();
  clear(h.y, h.outputs, T, x.element_size(), order, ends, G);
  std::vector<cpu::HeadJob> list = row_jobs(ends, G);
  h.jobs = list.data();
  parallel(list.size(), jobs.forward, &h);
  return y;
}

// dx, dW and db, empty where not needed.
std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor dy, Tensor x, Tensor weight, Tensor order, Tensor ends, bool need_x, bool need_w, bool need_b, int64_t variant) {
  const cpu::HeadJobs& jobs = jobs_for(x, variant);
  STD_TORCH_CHECK(x.dim() == 2, "x must be [T, K]");
  int64_t T = x.size(0), G = check_order(order, ends, T);
  cpu::Heads h = heads_of(x, weight, order, ends, G);
  int64_t K = h.inputs, N = h.outputs;
  h.x = data(x, x.scalar_type(), {T, K}, "x"), h.dy = data(dy, x.scalar_type(), {T, N}, "dy");
  Tensor dx = need_x ? new_empty(x, {T, K}) : new_empty(x, {0}), dw = need_w ? new_empty(x, {G, N, K}) : new_empty(x, {0});
  Tensor db = need_b ? new_empty(x, {G, N}) : new_empty(x, {0});
  if (need_x) {
    h.dx = dx.mutable_data_ptr();
    clear(h.dx, K, T, x.element_size(), order, ends, G);
    std::vector<cpu::HeadJob> list = row_jobs(ends, G);
    h.jobs = list.data();
    parallel(list.size(), jobs.input_gradient, &h);
  }
  if (need_w || need_b) {
    h.dw = need_w ? dw.mutable_data_ptr() : nullptr, h.db = need_b ? db.mutable_data_ptr() : nullptr;
    std::vector<cpu::HeadJob> list = weight_jobs(ends, G, K);
    h.jobs = list.data();
    parallel(list.size(), jobs.weight_gradient, &h);
  }
  return {dx, dw, db};
}

cpu::TokenLoss loss_of(const Tensor& logits, const Tensor& labels, const Tensor& row_adapter, int64_t G) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && row_adapter.dim() == 1, "logits must be [T, C], row_adapter [rows]");
  cpu::TokenLoss l{logits.size(0), logits.size(1), row_adapter.size(0)};
  l.block = std::max<int64_t>(1, 4096 / l.labels);
  STD_TORCH_CHECK(l.covered <= l.rows, "row_adapter has more rows than logits");
  l.logits = data(logits, logits.scalar_type(), {l.rows, l.labels}, "logits");
  l.label = data<int64_t>(labels, ScalarType::Long, {l.rows}, "labels");
  l.adapter = data<int32_t>(row_adapter, ScalarType::Int, {l.covered}, "row_adapter");
  bool fits = true;
  for (int64_t t = 0; t < l.covered; ++t) fits &= l.label[t] < l.labels && l.adapter[t] < G;
  STD_TORCH_CHECK(fits, "a label or an adapter is too large");
  return l;
}

// loss and count of each adapter, and the statistics of each row.
std::tuple<Tensor, Tensor, Tensor> token_loss(
    Tensor logits, Tensor labels, Tensor order, Tensor ends, Tensor row_adapter, int64_t variant) {
  const cpu::HeadJobs& jobs = jobs_for(logits, variant);
  int64_t G = check_order(order, ends, logits.dim() ? logits.size(0) : 0);
  cpu::TokenLoss l = loss_of(logits, labels, row_adapter, G);
  STD_TORCH_CHECK(order.size(0) == l.covered, "order and row_adapter must have the same rows");
  Tensor loss = new_empty(logits, {G}, ScalarType::Float), count = new_empty(labels, {G});
  Tensor statistics = new_empty(logits, {l.rows, 2}, ScalarType::Float);
  std::vector<float> row_loss(l.rows);
  l.loss = row_loss.data(), l.statistics = (float*)statistics.mutable_data_ptr();
  parallel((l.rows + l.block - 1) / l.block, jobs.loss, &l);
  const int64_t *row = (const int64_t*)order.const_data_ptr(), *end = (const int64_t*)ends.const_data_ptr();
  for (int64_t g = 0; g < G; ++g) {
    double sum = 0;
    int64_t labelled = 0;
    for (int64_t i = g ? end[g - 1] : 0; i < end[g]; ++i) sum += row_loss[row[i]], labelled += l.label[row[i]] >= 0;
    ((float*)loss.mutable_data_ptr())[g] = (float)(sum / std::max<int64_t>(labelled, 1));
    ((int64_t*)count.mutable_data_ptr())[g] = labelled;
  }
  return {loss, count, statistics};
}

Tensor token_loss_backward(
    Tensor dloss, Tensor logits, Tensor labels, Tensor row_adapter, Tensor count, Tensor statistics, int64_t variant) {
  const cpu::HeadJobs& jobs = jobs_for(logits, variant);
  int64_t G = dloss.numel();
  cpu::TokenLoss l = loss_of(logits, labels, row_adapter, G);
  l.dloss = data<float>(dloss, ScalarType::Float, {G}, "dloss"), l.count = data<int64_t>(count, ScalarType::Long, {G}, "count");
  l.statistics = data<float>(statistics, ScalarType::Float, {l.rows, 2}, "statistics");
  Tensor dlogits = new_empty(logits, {l.rows, l.labels});
  l.dlogits = dlogits.mutable_data_ptr();
  parallel((l.rows + l.block - 1) / l.block, jobs.loss_gradient, &l);
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kloss, m) {
  m.def("cpu_adapter_linear(Tensor x, Tensor weight, Tensor bias, Tensor order, Tensor ends, int variant) -> Tensor");
  m.def(
      "cpu_adapter_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor order, Tensor ends, bool need_x, bool need_w, "
      "bool need_b, int variant) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_token_loss(Tensor logits, Tensor labels, Tensor order, Tensor ends, Tensor row_adapter, int variant) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_token_loss_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor row_adapter, Tensor count, Tensor statistics, "
      "int variant) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kloss, CPU, m) {
  m.impl("cpu_adapter_linear", TORCH_BOX(&forward));
  m.impl("cpu_adapter_linear_backward", TORCH_BOX(&backward));
  m.impl("cpu_token_loss", TORCH_BOX(&token_loss));
  m.impl("cpu_token_loss_backward", TORCH_BOX(&token_loss_backward));
}
