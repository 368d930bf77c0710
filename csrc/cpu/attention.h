// Attention within the sequences of a packed batch on a CPU. Raw pointers, no torch. For each sequence and head, with D its width:
//
//   S = q k^T / sqrt(D)      P = softmax(S)      out = (mask * scale P) v
//   dP = mask * scale (dout v^T)      dS = P (dP - sum_j P dP) / sqrt(D)
//   dq = dS k                dk = dS^T q         dv = (mask * scale P)^T dout
//
// A job reads and writes nothing but its sequences' rows, and sums in an order that a sequence's length fixes. So a sequence's bits
// depend neither on the others nor on the threads. Backward computes P anew. Sums and the softmax are fp32; in bf16 P and dS are
// rounded before their products. Scratch grows with the longest sequence, not with its square.
#pragma once

#include "lora.h"

namespace kloss::cpu {

struct Attention {
  int64_t sequences, heads, size;  // size: D, a multiple of HEAD_LANES
  const int32_t* cu_seqlens;       // [sequences + 1]
  const void* qkv;                 // [T, 3 heads D], rows `stride` elements apart; in bf16 an even number
  int64_t stride;
  const int64_t* keys;             // [T], dropout's z; null: no dropout
  const int16_t* threshold;        // [T], keep iff draw >= threshold, both shifted by -2^15 into int16
  const float* scale;              // [T], 1 / (1 - p)
  void* out;                       // forward: [T, heads D], the sequences' rows are written
  // Backward only.
  const void* dout;                // [T, heads D], rows `dout_stride` elements apart
  int64_t dout_stride;
  void* dqkv;                      // [T, 3 heads D], the sequences' rows are written
};

constexpr int64_t HEAD_LANES = 16;

// One pair for each instruction set and type; attention_ops.cpp chooses.
#define KLOSS_DECLARE_ATTENTION(NAME)                      \
  namespace NAME {                                         \
  void attention(const Attention&, Parallel);              \
  void attention_backward(const Attention&, Parallel);     \
  }
KLOSS_DECLARE_ATTENTION(generic_f32)
KLOSS_DECLARE_ATTENTION(avx2_f32)
KLOSS_DECLARE_ATTENTION(avx512_f32)
KLOSS_DECLARE_ATTENTION(avx512_bf16)

}  // namespace kloss::cpu
