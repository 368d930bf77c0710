// Ops on the rows of a batch, each row by itself: dropout, residual and LayerNorm; dropout. Raw pointers, no torch.
//
//   z = drop(x) + residual        n = (z - mean) / sqrt(variance + eps)        y = n weight + bias
//   dn = weight dy        dz = (dn - mean(dn) - n mean(n dn)) / sqrt(variance + eps)        dx = mask scale dz        dresidual = dz
//
// All is fp32 and rounded once, where a result is stored. A row's sums have an order that its width alone fixes. Matrices are
// contiguous and of the type that the code is compiled for.
#pragma once

#include <cstdint>

namespace kloss::cpu {

// RowDropout. keys: null without dropout.
struct Drop {
  const int64_t* keys;       // [T]
  const int16_t* threshold;  // [T]
  const float* scale;        // [T]
};

// Job i is rows i * block..(i + 1) * block - 1.
struct RowsOf {
  int64_t rows, width, block;
};

struct AddNorm : RowsOf {
  const void *x, *residual;     // [T, H]
  const void *weight, *bias;    // [H]
  float eps;
  Drop drop;
  void* y;                      // [T, H], written forward
  float *mean, *rstd;           // [T], written forward, read backward
  // Backward only. Of dx, dresidual and parts any may be null.
  const void* dy;               // [T, H]
  void *dx, *dresidual;         // [T, H]
  float* parts;                 // [jobs, 2, H], each job's sums for dweight and dbias
};

struct Dropped : RowsOf {
  const void* x;  // [T, H]
  Drop drop;
  void* y;        // [T, H]
};

// Sums that are rounded: job 0.
struct Sums {
  int64_t width;
  const float* sums;         // [2, H]
  void *first, *second;      // [H]
};

// Jobs for `parallel` of checks.h; the context is the op's struct.
using Job = void (*)(int64_t job, const void* context);
struct RowJobs {
  Job add_norm, add_norm_backward, round, dropout;
};

// One for each instruction set and type; rows_ops.cpp chooses.
#define KLOSS_DECLARE_ROWS(NAME) \
  namespace NAME {               \
  extern const RowJobs ROW_JOBS; \
  }
KLOSS_DECLARE_ROWS(generic_f32)
KLOSS_DECLARE_ROWS(avx2_f32)
KLOSS_DECLARE_ROWS(avx512_f32)
KLOSS_DECLARE_ROWS(avx512_bf16)

}  // namespace kloss::cpu
