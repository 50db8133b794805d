#include <array>

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/recording.h"
#include "bindings/tensor.h"
#include "cpu/kernels.h"

namespace llmos {

namespace {

using Strides = std::array<int64_t, 4>;

Strides4 strides4(const Strides& s) { return {s[0], s[1], s[2], s[3]}; }

struct Scores {  // what both directions share, filled once per call by native/attention.py
  Attention call;
};

}  // namespace

void bind_attention(py::module_& module) {
  static_assert(sizeof(Sequence) == 6 * sizeof(int64_t),
                "native/attention.py fills rows of 6 int64");
  py::class_<Scores>(module, "AttentionCall")
      .def(py::init([](Address query, Address key, Address value, Address mask, Address bias,
                       Address alibi, Address sinks, Address sequences, int64_t count,
                       int64_t heads_q, int64_t heads_kv, int64_t head_dim, int64_t head_dim_v,
                       int64_t seq_q, const Strides& query_strides, const Strides& key_strides,
                       const Strides& value_strides, const Strides& mask_strides,
                       const Strides& bias_strides, int64_t alibi_stride, int64_t window_left,
                       int64_t window_right, int type, bool causal, float scale, float softcap,
                       Address seed, uint64_t threshold, float dropout_scale) {
        return Scores{Attention{pointer<void>(query),
                                pointer<void>(key),
                                pointer<void>(value),
                                pointer<uint8_t>(mask),
                                pointer<float>(bias),
                                pointer<float>(alibi),
                                pointer<float>(sinks),
                                pointer<Sequence>(sequences),
                                count,
                                heads_q,
                                heads_kv,
                                head_dim,
                                head_dim_v,
                                seq_q,
                                strides4(query_strides),
                                strides4(key_strides),
                                strides4(value_strides),
                                strides4(mask_strides),
                                strides4(bias_strides),
                                alibi_stride,
                                window_left,
                                window_right,
                                DType(type),
                                causal,
                                scale,
                                softcap,
                                Dropout{pointer<int64_t>(seed), threshold, dropout_scale}}};
      }));
  module.def(
      "attention_forward",
      [](const Scores& scores, Address out, const Strides& out_strides, Address lse) {
        AttentionForward call;
        static_cast<Attention&>(call) = scores.call;
        call.out = pointer<void>(out);
        call.out_strides = strides4(out_strides);
        call.lse = pointer<float>(lse);
        run(kernels().attention_forward, call);
      },
      ReleaseGil());
  module.def(
      "attention_backward",
      [](const Scores& scores, Address out, const Strides& out_strides, Address d_out,
         const Strides& d_out_strides, Address row_lse, Address d_lse, Address d_query,
         Address d_key, Address d_value, const Strides& d_query_strides,
         const Strides& d_key_strides, const Strides& d_value_strides, Address d_bias,
         int64_t d_bias_columns) {
        AttentionBackward call;
        static_cast<Attention&>(call) = scores.call;
        call.out = pointer<void>(out);
        call.out_strides = strides4(out_strides);
        call.d_out = pointer<void>(d_out);
        call.d_out_strides = strides4(d_out_strides);
        call.row_lse = pointer<float>(row_lse);
        call.d_lse = pointer<float>(d_lse);
        call.d_query = pointer<void>(d_query);
        call.d_key = pointer<void>(d_key);
        call.d_value = pointer<void>(d_value);
        call.d_query_strides = strides4(d_query_strides);
        call.d_key_strides = strides4(d_key_strides);
        call.d_value_strides = strides4(d_value_strides);
        call.d_bias = pointer<float>(d_bias);
        call.d_bias_columns = d_bias_columns;
        run(kernels().attention_backward, call);
      },
      ReleaseGil());
  module.def(
      "attention_decode",
      [](const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& lengths,
         const Tensor& block_table, const Tensor& key_scale, const Tensor& value_scale,
         const Tensor& alibi, const Tensor& sinks, const Tensor& out, float scale,
         int64_t window_left, float softcap) {
        run<AttentionDecode>(kernels().attention_decode,
                             {query.data,
                              keys.data,
                              values.data,
                              lengths.integers(),
                              block_table.integers(),
                              {key_scale.floats(), key_scale.strides4()},
                              {value_scale.floats(), value_scale.strides4()},
                              alibi.floats(),
                              sinks.floats(),
                              out.data,
                              query.strides4(),
                              keys.strides4(),
                              values.strides4(),
                              out.strides4(),
                              query.shape[0],
                              query.shape[1],
                              keys.shape[1],
                              query.shape[2],
                              query.shape[3],
                              values.shape[3],
                              keys.shape[0],
                              keys.shape[2],
                              block_table.dim ? block_table.shape[1] : 1,
                              alibi.dim == 2 ? alibi.shape[1] : 0,
                              window_left,
                              query.type(),
                              keys.cache_type(),
                              scale,
                              softcap});
      },
      ReleaseGil());
  module.def(
      "cache_write",
      [](const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
         const Tensor& lengths, const Tensor& block_table, const Tensor& key_scale,
         const Tensor& value_scale) {
        run<CacheWrite>(kernels().cache_write, {key.data,
                                                value.data,
                                                keys.data,
                                                values.data,
                                                lengths.integers(),
                                                block_table.integers(),
                                                key_scale.floats(),
                                                value_scale.floats(),
                                                key.strides4(),
                                                value.strides4(),
                                                keys.strides4(),
                                                values.strides4(),
                                                key_scale.strides4(),
                                                value_scale.strides4(),
                                                key.shape[0],
                                                key.shape[1],
                                                key.shape[2],
                                                key.shape[3],
                                                value.shape[3],
                                                keys.shape[0],
                                                keys.shape[2],
                                                block_table.dim ? block_table.shape[1] : 1,
                                                key.type(),
                                                keys.cache_type()});
      },
      ReleaseGil());
}

}  // namespace llmos
