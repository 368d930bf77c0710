// Schemas, checks and dispatch of the LoRA operators on a CPU.

#include "checks.h"
#include "cpu/lora.h"
#include "variants.h"

namespace {

using namespace kloss;

// The code for one instruction set and type. supported: by this processor.
struct Kind {
  bool supported;
  void (*forward)(const kloss::cpu::Lora&, kloss::cpu::Parallel);
  void (*backward)(const kloss::cpu::Lora&, kloss::cpu::Parallel);
};

#define KLOSS_KIND(NAME, SUPPORTED) {SUPPORTED, kloss::cpu::NAME::forward, kloss::cpu::NAME::backward}

#if KLOSS_X86
const Kind BF16[] = {KLOSS_KIND(avx512_bf16, has_avx512_bf16())};
const Kind F32[] = {
    KLOSS_KIND(avx512_f32, has_avx512()),
    KLOSS_KIND(avx2_f32, has_avx2()),
    KLOSS_KIND(generic_f32, true),
};
#else
const Kind BF16[] = {{false, nullptr, nullptr}};
const Kind F32[] = {KLOSS_KIND(generic_f32, true)};
#endif

// The variant for a type on this processor, 0 being the fastest; null if there are fewer.
const Kind* kind_for(ScalarType type, int64_t variant) {
  if (type == ScalarType::BFloat16) return pick(BF16, variant);
  return type == ScalarType::Float ? pick(F32, variant) : nullptr;
}

// Checks a tensor [G, rows, columns] whose matrices are each contiguous. A dimension of 1 may have any stride.
void check_rows(const Tensor& tensor, ScalarType type, const char* name) {
  bool fits = tensor.is_cpu() && tensor.scalar_type() == type && tensor.dim() == 3;
  fits = fits && (!tensor.numel() || ((tensor.size(2) == 1 || tensor.stride(2) == 1) &&
                                      (tensor.size(1) == 1 || tensor.stride(1) == tensor.size(2))));
  STD_TORCH_CHECK(fits, name, " has another type, device or layout");
}

// The rows of a contiguous tensor [..., columns], after checks. More than two dimensions must not end in one of 0.
int64_t rows_of(const Tensor& tensor, ScalarType type, int64_t columns, const char* name) {
  int64_t last = tensor.dim() < 2 ? 0 : tensor.size(tensor.dim() - 1);
  bool fits = tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && (tensor.dim() == 2 || last > 0);
  STD_TORCH_CHECK(fits, name, " has another type, device or layout");
  STD_TORCH_CHECK(last > 0 && last == columns, "shapes do not fit each other: ", name);
  return tensor.numel() / last;
}

// The address of a factor's gradient, null for none. stride: gets the elements from an adapter to the next.
void* gradient(const std::optional<Tensor>& tensor, const Tensor& factor, const char* name, int64_t& stride) {
  if (!tensor) return nullptr;
  check_rows(*tensor, factor.scalar_type(), name);
  bool fits = tensor->size(0) == factor.size(0) && tensor->size(1) == factor.size(1) && tensor->size(2) == factor.size(2) &&
              (tensor->size(0) < 2 || tensor->stride(0) >= tensor->size(1) * tensor->size(2));
  STD_TORCH_CHECK(fits, name, " must have its factor's shape, and no adapter's within another's");
  stride = tensor->stride(0);
  return tensor->mutable_data_ptr();
}

struct Call {
  kloss::cpu::Lora lora;
  const Kind* kind;
};

// Checks the arguments that both operators share. output: y forward, dy backward.
Call call(
    const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& scaling_kept, const Tensor& order, const Tensor& ends,
    const std::optional<Tensor>& ranks, const std::optional<Tensor>& keys, const std::optional<Tensor>& threshold, int64_t slices,
    int64_t variant, const Tensor& output, const Tensor& s) {
  ScalarType type = x.scalar_type();
  const Kind* kind = kind_for(type, variant);
  STD_TORCH_CHECK(kind != nullptr, "no such kernel for this type on this processor");
  check_rows(a, type, "lora_a");
  check_rows(b, type, "lora_b");
  check(s, type, 2, "s");
  check(scaling_kept, ScalarType::Float, 1, "scaling_kept");
  check(order, ScalarType::Long, 1, "order");
  check(ends, ScalarType::Long, 1, "ends");
  int64_t adapters = a.size(0), rank = b.size(2), k = a.size(2), n = b.size(1), all = order.size(0);
  int64_t rows = rows_of(x, type, k, "x");
  bool fits = rank > 0 && slices > 0 && n % slices == 0 && a.size(1) % slices == 0 &&
              a.size(1) / slices == rank && b.size(0) == adapters && scaling_kept.size(0) == adapters &&
              ends.size(0) >= adapters && rows_of(output, type, n, "y") == rows && all <= rows && s.size(0) == all &&
              s.size(1) == a.size(1) && (!ranks || ranks->size(0) == adapters) &&
              (!keys || (keys->size(0) >= all && threshold && threshold->size(0) >= all));
  STD_TORCH_CHECK(fits, "shapes do not fit each other");
  STD_TORCH_CHECK(
      k % kloss::cpu::LANES == 0 && n / slices % kloss::cpu::LANES == 0, "widths must be multiples of ", kloss::cpu::LANES);
  kloss::cpu::Lora lora{};
  lora.adapters = adapters, lora.inputs = k, lora.outputs = n, lora.rank = rank, lora.slices = slices;
  lora.a_stride = a.stride(0), lora.b_stride = b.stride(0);
  lora.a = a.const_data_ptr(), lora.b = b.const_data_ptr(), lora.x = x.const_data_ptr();
  lora.scaling_kept = static_cast<const float*>(scaling_kept.const_data_ptr());
  lora.order = static_cast<const int64_t*>(order.const_data_ptr());
  lora.ends = static_cast<const int64_t*>(ends.const_data_ptr());
  lora.ranks = static_cast<const int64_t*>(pointer(ranks, ScalarType::Long, 1, "ranks"));
  lora.keys = static_cast<const int64_t*>(pointer(keys, ScalarType::Long, 1, "keys"));
  lora.threshold = static_cast<const int16_t*>(pointer(threshold, ScalarType::Short, 1, "threshold"));
  lora.s = s.mutable_data_ptr();
  check_range(lora.order, all, 0, all - 1, "order");
  check_range(lora.ends, adapters, 0, all, "ends");
  for (int64_t g = 1; g < adapters; ++g) STD_TORCH_CHECK(lora.ends[g - 1] <= lora.ends[g], "ends must not decrease");
  if (lora.ranks) check_range(lora.ranks, adapters, 1, rank, "ranks");
  return {lora, kind};
}

void forward(
    Tensor x, Tensor a, Tensor b, Tensor scaling_kept, Tensor order, Tensor ends, std::optional<Tensor> ranks,
    std::optional<Tensor> keys, std::optional<Tensor> threshold, int64_t slices, int64_t variant, Tensor y,
    Tensor s) {
  Call made = call(x, a, b, scaling_kept, order, ends, ranks, keys, threshold, slices, variant, y, s);
  made.lora.y = y.mutable_data_ptr();
  made.kind->forward(made.lora, parallel);
}

void backward(
    Tensor x, Tensor a, Tensor b, Tensor scaling_kept, Tensor order, Tensor ends, std::optional<Tensor> ranks,
    std::optional<Tensor> keys, std::optional<Tensor> threshold, int64_t slices, int64_t variant, Tensor dy,
    Tensor s, Tensor ds, std::optional<Tensor> dx, std::optional<Tensor> da, std::optional<Tensor> db) {
  Call made = call(x, a, b, scaling_kept, order, ends, ranks, keys, threshold, slices, variant, dy, s);
  check(ds, x.scalar_type(), 2, "ds");
  int64_t k = a.size(2);
  STD_TORCH_CHECK(
      ds.numel() == s.numel() && (!dx || rows_of(*dx, x.scalar_type(), k, "dx") == x.numel() / k),
      "dx and ds must have the sizes of x and s");
  made.lora.dy = dy.const_data_ptr(), made.lora.ds = ds.mutable_data_ptr();
  made.lora.dx = dx ? dx->mutable_data_ptr() : nullptr;
  made.lora.da = gradient(da, a, "da", made.lora.da_stride), made.lora.db = gradient(db, b, "db", made.lora.db_stride);
  made.kind->backward(made.lora, parallel);
}

// The number of variants for x's type on this processor.
int64_t variants(Tensor x) {
  int64_t count = 0;
  while (x.is_cpu() && kind_for(x.scalar_type(), count)) ++count;
  return count;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kloss, m) {
  m.def(
      "cpu_lora_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor scaling_kept, Tensor order, Tensor ends, Tensor? ranks, "
      "Tensor? keys, Tensor? threshold, int slices, int variant, Tensor(a!) y, Tensor(b!) s) -> ()");
  m.def(
      "cpu_lora_backward_(Tensor x, Tensor lora_a, Tensor lora_b, Tensor scaling_kept, Tensor order, Tensor ends, Tensor? ranks, "
      "Tensor? keys, Tensor? threshold, int slices, int variant, Tensor dy, Tensor s, Tensor(a!) ds, Tensor(b!)? dx, "
      "Tensor(c!)? da, Tensor(d!)? db) -> ()");
  m.def("cpu_lora_variants(Tensor x) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kloss, CPU, m) {
  m.impl("cpu_lora_", TORCH_BOX(&forward));
  m.impl("cpu_lora_backward_", TORCH_BOX(&backward));
  m.impl("cpu_lora_variants", TORCH_BOX(&variants));
}
