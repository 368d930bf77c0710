// Schemas, checks and dispatch of attention on a CPU.

#include "checks.h"
#include "cpu/attention.h"
#include "variants.h"

#include <cstring>

namespace {

using namespace kloss;
using kloss::cpu::Attention;

// The code for one instruction set and type. supported: by this processor.
struct Kind {
  bool supported;
  void (*forward)(const Attention&, kloss::cpu::Parallel);
  void (*backward)(const Attention&, kloss::cpu::Parallel);
};

#define KLOSS_KIND(NAME, SUPPORTED) {SUPPORTED, kloss::cpu::NAME::attention, kloss::cpu::NAME::attention_backward}

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

struct Call {
  Attention attention;
  const Kind* kind;
  int64_t behind;  // rows that no sequence has, the last ones

  // Rows behind the sequences become 0.
  void clear(void* matrix, const Tensor& like, int64_t columns) const {
    int64_t bytes = columns * (like.scalar_type() == ScalarType::Float ? 4 : 2);
    if (behind) std::memset((char*)matrix + (like.size(0) - behind) * bytes, 0, behind * bytes);
  }
};

// The rows' stride of a matrix whose rows are contiguous, apart, and in bf16 an even number of elements from each other.
int64_t row_stride(const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns, const char* name) {
  bool fits = tensor.is_cpu() && tensor.scalar_type() == type && tensor.dim() == 2 && tensor.size(0) == rows &&
              tensor.size(1) == columns && (rows == 0 || tensor.stride(1) == 1) &&
              (rows < 2 || (tensor.stride(0) >= columns && tensor.stride(0) % 2 == 0));
  STD_TORCH_CHECK(fits, name, " has another type, device, shape or layout");
  return rows < 2 ? columns : tensor.stride(0);
}

// Checks the arguments that both operators share.
Call call(
    const Tensor& qkv, const Tensor& cu_seqlens, int64_t heads, const std::optional<Tensor>& keys,
    const std::optional<Tensor>& threshold, const std::optional<Tensor>& scale, int64_t variant) {
  ScalarType type = qkv.scalar_type();
  const Kind* kind = type == ScalarType::Float ? pick(F32, variant) : type == ScalarType::BFloat16 ? pick(BF16, variant) : nullptr;
  STD_TORCH_CHECK(kind != nullptr, "no such kernel for this type on this processor");
  STD_TORCH_CHECK(qkv.dim() == 2 && heads > 0, "qkv must be [T, 3H] and heads above 0");
  Attention a{};
  int64_t rows = qkv.size(0), thirds = qkv.size(1) / 3;
  a.heads = heads, a.size = thirds / heads;
  STD_TORCH_CHECK(
      a.size > 0 && a.size % cpu::HEAD_LANES == 0 && qkv.size(1) % 3 == 0 && thirds % heads == 0,
      "qkv must have three times a multiple of ", cpu::HEAD_LANES, " columns for each head");
  a.stride = row_stride(qkv, type, rows, 3 * thirds, "qkv");
  a.qkv = qkv.const_data_ptr();
  a.cu_seqlens = offsets(cu_seqlens, rows), a.sequences = cu_seqlens.size(0) - 1;
  int64_t covered = a.cu_seqlens[a.sequences];
  a.keys = (const int64_t*)pointer(keys, ScalarType::Long, 1, "keys");
  a.threshold = (const int16_t*)pointer(threshold, ScalarType::Short, 1, "threshold");
  a.scale = (const float*)pointer(scale, ScalarType::Float, 1, "scale");
  STD_TORCH_CHECK(
      (!keys && !threshold && !scale) || (keys && threshold && scale && keys->size(0) >= covered &&
                                          threshold->size(0) >= covered && scale->size(0) >= covered),
      "keys, threshold and scale belong together, an entry for each row of the sequences");
  return {a, kind, rows - covered};
}

Tensor forward(
    Tensor qkv, Tensor cu_seqlens, int64_t heads, std::optional<Tensor> keys, std::optional<Tensor> threshold,
    std::optional<Tensor> scale, int64_t variant) {
  Call made = call(qkv, cu_seqlens, heads, keys, threshold, scale, variant);
  Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1) / 3});
  made.attention.out = out.mutable_data_ptr();
  made.clear(made.attention.out, out, out.size(1));
  made.kind->forward(made.attention, parallel);
  return out;
}

Tensor backward(
    Tensor dout, Tensor qkv, Tensor cu_seqlens, int64_t heads, std::optional<Tensor> keys, std::optional<Tensor> threshold,
    std::optional<Tensor> scale, int64_t variant) {
  Call made = call(qkv, cu_seqlens, heads, keys, threshold, scale, variant);
  made.attention.dout_stride = row_stride(dout, qkv.scalar_type(), qkv.size(0), qkv.size(1) / 3, "dout");
  made.attention.dout = dout.const_data_ptr();
  Tensor dqkv = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1)});
  made.attention.dqkv = dqkv.mutable_data_ptr();
  made.clear(made.attention.dqkv, dqkv, dqkv.size(1));
  made.kind->backward(made.attention, parallel);
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kloss, m) {
  m.def(
      "cpu_attention(Tensor qkv, Tensor cu_seqlens, int heads, Tensor? keys, Tensor? threshold, Tensor? scale, int variant) "
      "-> Tensor");
  m.def(
      "cpu_attention_backward(Tensor dout, Tensor qkv, Tensor cu_seqlens, int heads, Tensor? keys, Tensor? threshold, "
      "Tensor? scale, int variant) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kloss, CPU, m) {
  m.impl("cpu_attention", TORCH_BOX(&forward));
  m.impl("cpu_attention_backward", TORCH_BOX(&backward));
}
