// Schemas, checks and threads of the operators whose bodies are in shared/, on a CPU.

#include "checks.h"
#include "cpu/adamw.h"
#include "cpu/spans.h"
#include "shared/lists.h"

#include <vector>

namespace {

using namespace kloss;

// Runs f(i) for i in 0..jobs-1, on all threads if their work is large: less than a millisecond of it stays on this thread, for on a
// busy machine it may wait ten for another.
template <class F>
void each(int64_t jobs, bool large, const F& f) {
  if (large) return parallel(jobs, [](int64_t i, const void* context) { (*(const F*)context)(i); }, &f);
  for (int64_t i = 0; i < jobs; ++i) f(i);
}

int64_t element(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cpu::OF_F32;
    case ScalarType::BFloat16: return cpu::OF_BF16;
    case ScalarType::Half: return cpu::OF_FP16;
    default: STD_TORCH_CHECK(false, name, " must be fp32, bf16 or fp16");
  }
  return 0;
}

// A matrix [G, P] whose rows are each contiguous and do not overlap. Returns the stride between them.
int64_t row_stride(const Tensor& tensor, const Tensor& like, const char* name) {
  bool fits = tensor.is_cpu() && tensor.dim() == 2 && like.dim() == 2 && tensor.size(0) == like.size(0) &&
              tensor.size(1) == like.size(1) && (tensor.size(1) < 2 || tensor.stride(1) == 1) &&
              (tensor.size(0) < 2 || tensor.stride(0) >= tensor.size(1));
  STD_TORCH_CHECK(fits, name, " must be [G, P] on a CPU, each row contiguous");
  return tensor.stride(0);
}

void adamw(
    Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, Tensor lr, int64_t tail, Tensor tail_lr,
    Tensor weight_decay, Tensor max_norm, Tensor active, double beta_1, double beta_2, double eps, std::optional<Tensor> work,
    int64_t variant, Tensor norms) {
  AdamW a{};
  a.param_stride = row_stride(param, param, "param"), a.grad_stride = row_stride(grad, param, "grad");
  a.exp_avg_stride = row_stride(exp_avg, param, "exp_avg"), a.exp_avg_sq_stride = row_stride(exp_avg_sq, param, "exp_avg_sq");
  for (const Tensor* tensor : {&param, &exp_avg, &exp_avg_sq})
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float, "param, exp_avg and exp_avg_sq must be fp32");
  int64_t grads = element(grad, "grad"), works = grads;
  if (work) {
    a.work_stride = row_stride(*work, param, "work"), works = element(*work, "work"), a.work = work->mutable_data_ptr();
    STD_TORCH_CHECK(!param.numel() || a.work != param.const_data_ptr(), "work must not be param itself");
  }
  const cpu::AdamWParts* parts = cpu::adamw_parts(variant);
  STD_TORCH_CHECK(parts != nullptr, "no such variant on this processor");
  STD_TORCH_CHECK(parts[grads].update[works] != nullptr, "work must have grad's type where that is not fp32");
  int64_t G = a.rows = param.size(0);
  a.width = param.size(1);
  a.param = (float*)param.mutable_data_ptr(), a.grad = grad.const_data_ptr();
  a.exp_avg = (float*)exp_avg.mutable_data_ptr(), a.exp_avg_sq = (float*)exp_avg_sq.mutable_data_ptr();
  a.step = data<int64_t>(step, ScalarType::Long, {G}, "step");
  a.lr = data<float>(lr, ScalarType::Float, {G}, "lr");
  STD_TORCH_CHECK(0 <= tail && tail <= a.width, "tail must be a column, or the width");
  a.tail = tail, a.tail_lr = data<float>(tail_lr, ScalarType::Float, {G}, "tail_lr");
  a.weight_decay = data<float>(weight_decay, ScalarType::Float, {G}, "weight_decay");
  a.max_norm = data<float>(max_norm, ScalarType::Float, {G}, "max_norm");
  a.active = data<bool>(active, ScalarType::Bool, {G}, "active");
  a.norms = data<float>(norms, ScalarType::Float, {G}, "norms");
  a.beta_1 = beta_1, a.beta_2 = beta_2, a.eps = eps;
  check_range(a.step, G, 0, int64_t(1) << 53, "step");

  int64_t chunks = a.chunks();
  std::vector<float> partial(G * chunks);
  std::vector<AdamW::Row> constants(G);
  a.partial = partial.data(), a.row = constants.data();
  // Some rows at a time, whose gradients may still be in a cache when the update reads them. A job has neighbouring chunks: in
  // that order the processor fetches them ahead.
  constexpr int64_t RUN = 16;
  int64_t at_once = std::max<int64_t>(1, (1 << 21) / std::max<int64_t>(1, a.width)), runs = ceil_div(chunks, RUN);
  for (int64_t first = 0; first < G; first += at_once) {
    int64_t last = std::min(G, first + at_once), jobs = (last - first) * runs;
    bool large = (last - first) * a.width > 1 << 20;
    auto run = [&](int64_t job, auto part) {
      int64_t end = std::min(chunks, (job % runs + 1) * RUN);
      for (int64_t chunk = job % runs * RUN; chunk < end; ++chunk) part(a, first + job / runs, chunk);
    };
    each(jobs, large, [&](int64_t job) {
      if (a.active[first + job / runs]) run(job, parts[grads].squares);
    });
    for (int64_t g = first; g < last; ++g) {
      double totals[AdamW::TOTALS];
      for (int l = 0; l < AdamW::TOTALS; ++l) totals[l] = a.total(g, l);
      for (int half = AdamW::TOTALS / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) AdamW::fold(totals, half, l);
      a.finish(g, totals[0]);
    }
    each(jobs, large, [&](int64_t job) {
      if (a.row[first + job / runs].moves()) run(job, parts[grads].update[works]);
    });
  }
}

void span_counts(
    Tensor pred, Tensor gold, Tensor cu_seqlens, Tensor group, std::optional<Tensor> tags, std::optional<Tensor> types,
    Tensor counts, bool strict, bool shared) {
  SpanCounts c{};
  STD_TORCH_CHECK(pred.dim() == 1 && counts.dim() == 2, "pred must be [T] and counts [groups, 3]");
  STD_TORCH_CHECK(tags.has_value() == types.has_value(), "tags and types belong together");
  c.pred = data<int64_t>(pred, ScalarType::Long, {pred.size(0)}, "pred");
  c.gold = data<int64_t>(gold, ScalarType::Long, {pred.size(0)}, "gold");
  c.cu_seqlens = offsets(cu_seqlens, pred.size(0));
  c.rows = pred.size(0), c.sequences = cu_seqlens.size(0) - 1, c.groups = counts.size(0);
  c.group = data<int64_t>(group, ScalarType::Long, {c.sequences}, "group");
  c.counts = data<int64_t>(counts, ScalarType::Long, {c.groups, 3}, "counts");
  check_range(c.group, c.sequences, 0, c.groups - 1, "group");
  if (tags) {
    STD_TORCH_CHECK(tags->dim() == 1, "tags must be [C]");
    c.labels = tags->size(0);
    c.tags = data<int64_t>(*tags, ScalarType::Long, {c.labels}, "tags");
    c.types = data<int64_t>(*types, ScalarType::Long, {c.labels}, "types");
    if (strict) check_range(c.tags, c.labels, 0, 2, "tags"), check_range(c.types, c.labels, -(1 << 28), 1 << 28, "types");
  }
  cpu::SpanCounter counter = shared ? nullptr : cpu::span_counter();
  const cpu::SpanLabels labels(c);
  std::vector<int32_t> codes(c.labels);
  for (int64_t i = 0; i < c.labels; ++i) codes[i] = c.code_of(i);
  if (tags) c.codes = codes.data();
  // Sequences of a job: some 2^15 rows, whose bytes stay in a cache.
  const int64_t block = std::max<int64_t>(1, (c.sequences << 15) / std::max<int64_t>(1, c.rows));
  std::atomic<bool> known{true};
  each(ceil_div(c.sequences, block), c.rows > 1 << 19, [&](int64_t job) {
    int64_t s = job * block, last = std::min(c.sequences, s + block);
    if (counter && counter(c, labels, s, last)) return;
    for (int64_t t = c.cu_seqlens[s]; strict && t < c.cu_seqlens[last]; ++t)
      if (c.gold[t] < 0 && c.gold[t] != cpu::IGNORED) known = false;
    while (s < last) {  // sequences of the same group together: atomic sums are slow
      int64_t sums[3] = {}, first = s;
      for (; s < last && c.group[s] == c.group[first]; ++s)
        if (!c.count<32>(s, sums)) known = false;
      c.flush(c.group[first], sums);
    }
  });
  STD_TORCH_CHECK(known, "pred or gold has a label that is not in tags, is 2^29 or more, or below 0 in a row that counts");
}

// A list [capacity, width].
int32_t* list(const Tensor& tensor, int64_t width, int64_t& capacity, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " has another shape");
  capacity = tensor.size(0);
  return data<int32_t>(tensor, ScalarType::Int, {capacity, width}, name);
}

void work_lists(
    Tensor cu_seqlens, Tensor adapter, std::optional<Tensor> step, std::optional<Tensor> sequence, bool backwards,
    Tensor row_adapter, Tensor order, Tensor ends, Tensor tiles_64, Tensor tiles_128, Tensor chunks, Tensor slots,
    std::optional<Tensor> attention_16, std::optional<Tensor> attention_32, std::optional<Tensor> attention_64,
    std::optional<Tensor> longer, std::optional<Tensor> row_key, Tensor position) {
  Lists l{};
  STD_TORCH_CHECK(row_adapter.dim() == 1 && ends.dim() == 1 && ends.size(0) > 0, "row_adapter must be [T] and ends [G+1]");
  int64_t T = l.rows = row_adapter.size(0), G = l.adapters = ends.size(0) - 1;
  STD_TORCH_CHECK(T < int64_t(1) << 31 && G < int64_t(1) << 24, "too many rows or adapters");
  l.cu_seqlens = offsets(cu_seqlens, T);
  int64_t S = l.sequences = cu_seqlens.size(0) - 1;
  l.adapter = data<int32_t>(adapter, ScalarType::Int, {S}, "adapter");
  for (int64_t s = 0; s < S; ++s)
    STD_TORCH_CHECK(l.adapter[s] >= -1 && l.adapter[s] < G, "adapter ids must lie in [-1, ", G, "), got ", l.adapter[s]);
  l.row_adapter = data<int32_t>(row_adapter, ScalarType::Int, {T}, "row_adapter");
  l.order = data<int64_t>(order, ScalarType::Long, {T}, "order");
  l.ends = data<int64_t>(ends, ScalarType::Long, {G + 1}, "ends");
  l.tiles_short = list(tiles_64, 3, l.capacity_short, "tiles_64");
  l.tiles_long = list(tiles_128, 3, l.capacity_long, "tiles_128");
  l.chunks = list(chunks, 4, l.capacity_chunks, "chunks");
  l.slots = data<int32_t>(slots, ScalarType::Int, {G + 1}, "slots");
  l.position = data<int32_t>(position, ScalarType::Int, {T}, "position");
  STD_TORCH_CHECK(
      step.has_value() == sequence.has_value() && step.has_value() == row_key.has_value(), "step, sequence and row_key belong together");
  if (step) {
    l.step = data<int64_t>(*step, ScalarType::Long, {G}, "step");
    l.sequence = data<int64_t>(*sequence, ScalarType::Long, {S}, "sequence");
    l.row_key = data<int64_t>(*row_key, ScalarType::Long, {T}, "row_key");
    check_range(l.step, G, 0, (int64_t(1) << 31) - 1, "step");
    check_range(l.sequence, S, 0, (int64_t(1) << 16) - 1, "sequence");
  }
  l.classes = -1;
  for (const std::optional<Tensor>* tiles : {&attention_16, &attention_32, &attention_64})
    if (*tiles) ++l.classes, l.attention[l.classes] = list(**tiles, 3, l.capacity_attention[l.classes], "attention's tiles");
  STD_TORCH_CHECK(
      attention_16.has_value() >= attention_32.has_value() && attention_32.has_value() >= attention_64.has_value() &&
          attention_16.has_value() == longer.has_value(),
      "attention's classes are 16, 16 and 32, or 16, 32 and 64, and longer");
  if (longer) ++l.classes, l.attention[l.classes] = list(*longer, 3, l.capacity_attention[l.classes], "attention's tiles");

  std::vector<int32_t> scratch(Lists::scratch_size(S, G));
  l.place_scratch(scratch.data());
  for (int number = 0; number < Lists::PHASES; ++number)
    for (int i = 0; i < Lists::THREADS; ++i) l.phase(number, backwards ? Lists::THREADS - 1 - i : i);
  constexpr int64_t BLOCK = 8192;  // entries of a job
  int64_t entries = l.entries();
  each(ceil_div(entries, BLOCK), entries > 1 << 16, [&](int64_t job) {
    for (int64_t i = job * BLOCK; i < std::min(entries, (job + 1) * BLOCK); ++i) l.entry(i);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kloss, m) {
  m.def(
      "adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor lr, int tail, "
      "Tensor tail_lr, Tensor weight_decay, Tensor max_norm, Tensor active, float beta_1, float beta_2, float eps, "
      "Tensor(e!)? work, int variant, Tensor(f!) norms) -> ()");
  m.def(
      "span_counts_(Tensor pred, Tensor gold, Tensor cu_seqlens, Tensor group, Tensor? tags, Tensor? types, Tensor(a!) counts, "
      "bool strict=False, bool shared=False) -> ()");
  m.def(
      "work_lists_(Tensor cu_seqlens, Tensor adapter, Tensor? step, Tensor? sequence, bool backwards, Tensor(a!) row_adapter, "
      "Tensor(b!) order, Tensor(c!) ends, Tensor(d!) tiles_64, Tensor(e!) tiles_128, Tensor(f!) chunks, Tensor(g!) slots, "
      "Tensor(h!)? attention_16, Tensor(i!)? attention_32, Tensor(j!)? attention_64, Tensor(k!)? longer, Tensor(l!)? row_key, "
      "Tensor(m!) position) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kloss, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&adamw));
  m.impl("span_counts_", TORCH_BOX(&span_counts));
  m.impl("work_lists_", TORCH_BOX(&work_lists));
}
