// A whole linear layer per adapter, and the mean loss of its labelled rows: the tagging heads. Raw pointers, no torch.
//
//   y[t] = W_g x[t] + b_g        dx[t] = W_g^T dy[t]        dW_g = sum dy[t] x[t]^T        db_g = sum dy[t]        g = adapter of t
//   loss[t] = log(sum over c of exp l[t, c]) - l[t, label]        dl[t, c] = (softmax(l[t])[c] - [c = label]) dloss_g / count_g
//
// Sums are fp32, in an order that an adapter's own rows fix, and rounded once.
#pragma once

#include <cstdint>

namespace kloss::cpu {

// Rows first..last-1 of order, all of adapter g; of a gradient of the weight the inputs from..to-1.
struct HeadJob {
  int64_t g, first, last, from, to;
};

struct Heads {
  int64_t inputs, outputs, weight_stride, bias_stride;  // K, N; elements from an adapter to the next
  const void *weight, *bias;                            // [G, N, K], [G, N]
  const int64_t* order;                                 // an adapter's rows are neighbours in it
  const HeadJob* jobs;
  const void* x;                                        // [T, K]
  void* y;                                              // [T, N], forward
  const void* dy;                                       // [T, N], backward
  void *dx, *dw, *db;                                   // [T, K], [G, N, K], [G, N]; dw and db may be null
};

struct TokenLoss {
  int64_t rows, labels, covered, block;  // T, C; rows of an adapter or of none, the rest have none; rows of a job
  const void* logits;                    // [T, C]
  const int64_t* label;                  // [T], below 0 where there is none
  const int32_t* adapter;                // [covered], -1 for none
  float* loss;                           // [T], written forward, 0 for rows that do not count
  float* statistics;                     // [T, 2], written forward: the largest logit, and the sum of exp(l - largest)
  // Backward only.
  const float* dloss;                    // [G]
  const int64_t* count;                  // [G]
  void* dlogits;                         // [T, C]
};

// Jobs for `parallel` of checks.h; the context is a Heads, of the last two a TokenLoss.
struct HeadJobs {
  void (*forward)(int64_t job, const void* context);
  void (*input_gradient)(int64_t job, const void* context);
  void (*weight_gradient)(int64_t job, const void* context);
  void (*loss)(int64_t job, const void* context);
  void (*loss_gradient)(int64_t job, const void* context);
};

// One for each instruction set and type; heads_ops.cpp chooses.
#define KLOSS_DECLARE_HEADS(NAME)  \
  namespace NAME {                 \
  extern const HeadJobs HEAD_JOBS; \
  }
KLOSS_DECLARE_HEADS(generic_f32)
KLOSS_DECLARE_HEADS(avx2_f32)
KLOSS_DECLARE_HEADS(avx512_f32)
KLOSS_DECLARE_HEADS(avx512_bf16)

}  // namespace kloss::cpu
