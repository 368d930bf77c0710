// The LoRA terms of all adapters of a batch on a CPU. Raw pointers, no torch.
//
//   S = drop(x) A_g^T            y  += scale_g S B_g^T                g = adapter of the row
//   dS = scale_g dy B_g          dx += mask * (dS A_g)
//   dA_g = dS^T drop(x)          dB_g = scale_g dy^T S
//
// Work is cut into jobs by an adapter's own rows alone and a job's sums run in one order, so an adapter's bits
// depend neither on the other adapters nor on the threads. Sums are fp32; S and dS are rounded to the tensors' type.
#pragma once

#include <cstdint>

namespace kloss::cpu {

struct Lora {
  int64_t adapters, inputs, outputs, rank, slices;  // G, K, N, R; K and N / slices are multiples of LANES
  int64_t a_stride, b_stride;  // elements from an adapter to the next
  const void* a;         // [G, slices*R, K]
  const void* b;         // [G, N, R]
  const float* scale;    // [G], LoRA's scaling times dropout's 1 / (1 - p)
  const int64_t* order;  // [T], the row of x that is row i of s and ds: an adapter's rows are neighbours there
  const int64_t* ends;   // [G], adapter g has rows ends[g-1]..ends[g] of order
  const int64_t* ranks;  // [G], or null: all R
  const int64_t* keys;   // [rows of x], dropout's z; null: no dropout
  const int16_t* least;  // [rows of x], the smallest u - 32768 that is kept
  const void* x;         // [rows of x, K]
  void* y;               // [rows of x, N], has the base product; backward: dy
  void* s;               // [T, slices*R]
  // Backward only; of dx, da and db any may be null.
  void* ds;              // [T, slices*R], scratch
  void* dx;              // [rows of x, K], has the base product's gradient
  void* da;              // [G, slices*R, K], written whole
  void* db;              // [G, N, R], written whole
};

constexpr int64_t LANES = 32;       // what K and N / slices are multiples of
constexpr int64_t ROW_BLOCK = 256;  // rows of an adapter that a job takes at once

// Runs job(i) for i in 0..jobs-1, on several threads.
using Parallel = void (*)(int64_t jobs, void (*job)(int64_t, const void*), const void* context);

// One set for each instruction set and type; `ops.cpp` chooses.
#define KLOSS_DECLARE_LORA(NAME)               \
  namespace NAME {                             \
  void forward(const Lora&, Parallel);         \
  void backward(const Lora&, Parallel);        \
  }
KLOSS_DECLARE_LORA(generic_f32)
KLOSS_DECLARE_LORA(avx2_f32)
KLOSS_DECLARE_LORA(avx512_f32)
KLOSS_DECLARE_LORA(avx512_bf16)

}  // namespace kloss::cpu
