// The LoRA terms of all adapters of a batch on a CPU. Raw pointers, no torch.
//
//   S = mask * x A_g^T           y  += scaling_g S B_g^T              g = adapter of the row
//   dS = scaling_g dy B_g        dx += mask * (dS A_g)
//   dA_g = dS^T (mask * x)       dB_g = scaling_g dy^T S
//
// Jobs are cut by an adapter's own rows alone, and each job sums in one order. So an adapter's bits depend neither on the other
// adapters nor on the threads. Sums are fp32; S and dS are rounded to the tensors' type.
#pragma once

#include <cstdint>

namespace kloss::cpu {

struct Lora {
  int64_t adapters, inputs, outputs, rank, slices;  // G, K, N, R; K and N / slices are multiples of LANES
  int64_t a_stride, b_stride, da_stride, db_stride;  // elements from an adapter to the next
  const void* a;                // [G, slices*R, K]
  const void* b;                // [G, N, R]
  const float* scaling_kept;    // [G], LoRA's scaling times dropout's 1 / (1 - p)
  const int64_t* order;         // [T], row i of s and ds is row order[i] of x; an adapter's rows are neighbours in it
  const int64_t* ends;          // [G], adapter g has rows ends[g-1]..ends[g] of order
  const int64_t* ranks;         // [G] in 1..R; null: all R
  const int64_t* keys;          // [rows of x], dropout's z; null: no dropout
  const int16_t* threshold;     // [rows of x], keep iff draw >= threshold, both shifted by -2^15 into int16
  const void* x;                // [rows of x, K]
  void* y;                      // forward: [rows of x, N], holds the base product, gets the LoRA term added
  void* s;                      // [T, slices*R], written forward, read backward
  // Backward only. Of dx, da and db any may be null.
  const void* dy;               // [rows of x, N]
  void* ds;                     // [T, slices*R], scratch
  void* dx;                     // [rows of x, K], holds the base product's gradient, gets the LoRA term added
  void* da;                     // [G, slices*R, K], written whole
  void* db;                     // [G, N, R], written whole
};

constexpr int64_t LANES = 32;       // K and N / slices are multiples of it
constexpr int64_t ROW_BLOCK = 256;  // rows of an adapter in one job

// Runs job(i) for i in 0..jobs-1, on several threads.
using Parallel = void (*)(int64_t jobs, void (*job)(int64_t, const void*), const void* context);

// One pair for each instruction set and type; ops.cpp chooses.
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
