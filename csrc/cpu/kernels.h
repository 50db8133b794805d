// Raw-pointer contracts of the CPU kernels, and the table that each instruction set fills.
// Tensors are fp32 or bf16 ("DType"); statistics and all arithmetic are fp32. Rows are contiguous;
// strides, where they appear, count elements. A null seed means no dropout; see
// llmos_fast/dropout.py for the bits that (seed, row, column) draw.
#pragma once

#include <cstdint>

#include "cpu/activation.h"

namespace llmos {

enum class DType : int { f32 = 0, bf16 = 1 };

struct Integers {
  const void* data;
  bool wide;  // int64, else int32
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Dropout {
  const int64_t* seed;  // null: keep everything
  uint64_t threshold;   // an element is kept where its 32 bits reach this
  float scale;          // factor of kept elements
};

// total = residual + dropout(x); norm = (total - mean) * rstd * weight + bias, or without the mean
// for rms. x: [batch, heads, seq, columns] of x_type with strides; residual, norm and total are
// contiguous in its order, of type. norm may be null (sum only).
struct AddNormForward {
  const void *x, *residual, *weight, *bias;
  void *norm, *total;
  float *mean, *rstd;  // [rows]; mean unused for rms
  int64_t rows, columns, heads, seq;
  int64_t stride_batch, stride_head, stride_seq;
  DType x_type, type, weight_type, bias_type;
  bool rms;
  float eps;
  Dropout dropout;
};

// d_total = gradient of total through norm, plus d_total_in; d_x = dropout factor * d_total.
struct AddNormBackward {
  const void *d_norm, *d_total_in, *total;  // d_norm or d_total_in may be null
  const float *weight, *mean, *rstd;
  void *d_x, *d_residual;    // either may be null
  float *d_weight, *d_bias;  // [columns]
  int64_t rows, columns;
  DType x_type, type;
  bool rms;
  Dropout dropout;
};

// hidden = dropout(activation(gate) * up), up may be null. All [rows, columns].
struct ActivationForward {
  const void *gate, *up;
  void* hidden;
  int64_t rows, columns;
  DType type;
  Activation activation;
  Dropout dropout;
};

// Gradients of the above; hidden is computed again for the caller. d_up is null where up is.
struct ActivationBackward {
  const void *gate, *up, *d_hidden;
  void *d_gate, *d_up, *hidden;
  int64_t rows, columns;
  DType type;
  Activation activation;
  Dropout dropout;
};

// Pairs (a, b) -> (a cos - b sin, b cos + a sin) of x: [batch, heads, seq, head_dim] with strides;
// out is contiguous in the order of x. cos, sin: [batch, seq, half] with batch stride (0 = shared),
// or tables [table_rows, half] with a row for each of positions, [batch, seq] likewise.
struct Rotary {
  const void* x;
  const float *cos, *sin;
  Integers positions;  // or null
  void* out;
  int64_t batch, heads, seq, head_dim, half, table_rows;
  int64_t stride_batch, stride_head, stride_seq, angle_stride_batch;
  DType type;
  bool interleaved;
  float sin_sign;  // -1 turns back: the gradient
};

// Loss of each row of logits [rows, classes], and in place, where gradient, row_scale times its
// gradient. Targets equal to ignore_index give 0.
struct CrossEntropy {
  void* logits;
  const int64_t* target;
  const float* row_scale;
  float* loss;
  int64_t rows, classes, ignore_index;
  DType type;
  float label_smoothing, z_loss, softcap;
  bool gradient;
};

struct Strides4 {
  int64_t batch, head, row, column;
};

// See llmos_fast/ops/attention.py for the meaning. Keys [first[b], first[b] + length) of sequence b
// are its own; dense tensors have first = 0. One entry of `sequences` per sequence.
struct Sequence {
  int64_t batch;              // index into the batch strides
  int64_t first_q, length_q;  // rows of query
  int64_t first_k, length_k;  // rows of key that exist
  int64_t shift;              // position of query row 0 among the keys
};

struct Attention {
  const void *query, *key, *value;
  const uint8_t* mask;  // null, or with mask_strides (0 where it broadcasts)
  const float* bias;    // null, or with bias_strides
  const float* alibi;   // null, or slope at [batch * alibi_stride + head]
  const float* sinks;   // null, or [heads_q]
  const Sequence* sequences;
  int64_t count, heads_q, heads_kv, head_dim, head_dim_v, seq_q;
  Strides4 query_strides, key_strides, value_strides, mask_strides, bias_strides;
  int64_t alibi_stride, window_left, window_right;  // -1 = open
  DType type;
  bool causal;
  float scale, softcap;
  Dropout dropout;
};

struct AttentionForward : Attention {
  void* out;
  Strides4 out_strides;
  float* lse;  // [batch, heads_q, seq_q], without the sink
};

struct AttentionBackward : Attention {
  const void *out, *d_out;
  Strides4 out_strides, d_out_strides;
  const float* row_lse;  // [batch, heads_q, seq_q], with the sink; -inf in rows without a key
  const float* d_lse;    // null, or [batch, heads_q, seq_q], of row_lse
  void *d_query, *d_key, *d_value;
  Strides4 d_query_strides, d_key_strides, d_value_strides;
  float* d_bias;  // null, or contiguous [batch, heads_q, seq_q, d_bias_columns]
  int64_t d_bias_columns;
};

enum class CacheType : int { f32 = 0, bf16 = 1, int8 = 2, fp8 = 3 };  // fp8: e4m3fn

struct RowScale {
  const float* data;  // null: 1
  Strides4 strides;
};

// See llmos_fast/ops/attention_decode.py. A dense cache is one of a page per sequence.
struct AttentionDecode {
  const void *query, *keys, *values;
  Integers lengths, block_table;  // [batch]; null or [batch, pages_per_sequence]
  RowScale key_scale, value_scale;
  const float* alibi;  // null, or slope at [batch * alibi_stride + head]
  const float* sinks;  // null, or [heads_q]
  void* out;
  Strides4 query_strides, key_strides, value_strides, out_strides;
  int64_t batch, heads_q, heads_kv, seq_q, head_dim, head_dim_v;
  int64_t pages, page_size, pages_per_sequence, alibi_stride;
  int64_t window_left;  // -1 = open
  DType type;           // of query and out
  CacheType cache_type;
  float scale, softcap;
};

// Keys and values of the last seq_new of lengths[b] positions go into their rows of the cache,
// where it has such rows. int8: rounded, x (127 / amax) of each row, and amax / 127 goes to its
// scale.
struct CacheWrite {
  const void *key, *value;
  void *keys, *values;
  Integers lengths, block_table;  // as in AttentionDecode
  float *key_scale, *value_scale;
  Strides4 key_strides, value_strides, keys_strides, values_strides;
  Strides4 key_scale_strides, value_scale_strides;
  int64_t batch, heads, seq_new, head_dim, head_dim_v;
  int64_t pages, page_size, pages_per_sequence;
  DType type;  // of key and value
  CacheType cache_type;
};

// out = x weight^T + bias for few rows of x: [rows, features] by [columns, features], all of type.
struct LinearRows {
  const void *x, *weight, *bias;  // bias may be null
  void* out;                      // [rows, columns]
  int64_t rows, columns, features, x_stride, weight_stride;
  DType type;
};

// ids [outer, seq, inner], `count` altogether, of `rows` rows.
struct EmbeddingRows {
  Integers ids;
  int64_t count, rows, width, seq, inner;
  DType type;
  float scale;
  Dropout dropout;
  int64_t position(int64_t i) const { return i / inner % seq; }
};

// out[i] = dropout(scale * table[ids[i]] + positions[position(i)]). table has a stride between
// rows; positions [seq, width] may be null.
struct EmbeddingForward {
  EmbeddingRows of;
  const void *table, *positions;
  void* out;
  int64_t stride;
};

// Gradients of table [rows, width] and positions, which may be null, from that of out.
struct EmbeddingBackward {
  EmbeddingRows of;
  const void* d_out;
  float *d_table, *d_positions;
};

// What becomes of the sums s of a product.
enum class Finish : int {
  none = 0,       // out = s
  activate = 1,   // out = dropout(activation(s))
  gate = 2,       // out = dropout(activation(gate) * s)
  gradients = 3,  // s belongs to dropout(activation(gate) * up): out = d_gate, d_up, and its hidden
};

// s = a b + bias: a [rows, depth] and b [depth, columns] with strides. All others are of their type
// and contiguous, [rows, columns]; bias, up with d_up, and kept, which takes s, may be null. An out
// of its own type, for Finish::none, is fp32, and keeps what it held where s is added, as do
// row_sums, the sums of a over depth; they need a whose columns are contiguous, or are null.
struct Product {
  const void *a, *b, *bias;
  void* out;
  float* row_sums;
  int64_t rows, columns, depth, a_row, a_depth, b_depth, b_column;
  DType type, b_type, out_type;
  bool add;
  Finish finish;
  Activation activation;
  const void *gate, *up;
  void *kept, *d_up, *hidden;
  Dropout dropout;
};

// A parameter and what its optimizer knows of it: `count` contiguous numbers each, of one type.
struct OptimizerTensors {
  void* parameter;
  const void* gradient;
  void *exp_avg, *exp_avg_sq;
  int64_t count, first_block;  // how many blocks the tensors before have
  DType type;
  float rate, root_factor;  // learning rate / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
};

constexpr int64_t kOptimizerBlock = 16384;
constexpr int64_t blocks_of(int64_t count) {
  return (count + kOptimizerBlock - 1) / kOptimizerBlock;
}

// One step, in place; see torch.optim.AdamW. Gradients count times gradient_factor.
struct AdamW {
  const OptimizerTensors* tensors;
  int64_t blocks;                                                             // of all tensors
  float gradient_factor, exp_avg_share, beta2, exp_avg_sq_share, decay, eps;  // share: 1 - beta
};

// The sum of the squares of each block's gradient: sums [blocks].
struct SquareSums {
  const OptimizerTensors* tensors;
  int64_t blocks;
  float* sums;
};

// Below this many numbers the second thread's start costs more than it saves.
constexpr int64_t kWorthThreads = 16384;

struct Kernels {
  const char* name;
  bool (*runs_here)();
  void (*add_norm_forward)(const AddNormForward&);
  void (*add_norm_backward)(const AddNormBackward&);
  void (*activation_forward)(const ActivationForward&);
  void (*activation_backward)(const ActivationBackward&);
  void (*rotary)(const Rotary&);
  void (*cross_entropy)(const CrossEntropy&);
  void (*attention_forward)(const AttentionForward&);
  void (*attention_backward)(const AttentionBackward&);
  void (*attention_decode)(const AttentionDecode&);
  void (*cache_write)(const CacheWrite&);
  void (*linear_rows)(const LinearRows&);
  void (*product)(const Product&);
  void (*embedding_forward)(const EmbeddingForward&);
  void (*embedding_backward)(const EmbeddingBackward&);
  void (*adamw)(const AdamW&);
  void (*square_sums)(const SquareSums&);
};

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx512_bf16_kernels, avx512_kernels, avx2_kernels;
#endif

// std::invalid_argument, a ValueError of Python, unless 0 <= value < end.
void refuse_outside(int64_t value, int64_t end, const char* what, const char* range);

const Kernels& kernels();  // the table that this CPU, or LLMOS_FAST_CPU, asks for

}  // namespace llmos
