#include "bindings/bindings.h"
#include "bindings/recording.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"

namespace llmos {

namespace {

Dropout dropout_from(Address seed, uint64_t threshold, float scale) {
  return {pointer<const int64_t>(seed), threshold, scale};
}

}  // namespace

void bind_elementwise(py::module_& module) {
  module.def(
      "add_norm_forward",
      [](Address x, Address residual, Address weight, Address bias, Address norm, Address total,
         Address mean, Address rstd, int64_t rows, int64_t columns, int64_t heads, int64_t seq,
         int64_t stride_batch, int64_t stride_head, int64_t stride_seq, int x_type, int type,
         int weight_type, int bias_type, bool rms, float eps, Address seed, uint64_t threshold,
         float scale) {
        run<AddNormForward>(kernels().add_norm_forward, {pointer<void>(x),
                                                         pointer<void>(residual),
                                                         pointer<void>(weight),
                                                         pointer<void>(bias),
                                                         pointer<void>(norm),
                                                         pointer<void>(total),
                                                         pointer<float>(mean),
                                                         pointer<float>(rstd),
                                                         rows,
                                                         columns,
                                                         heads,
                                                         seq,
                                                         stride_batch,
                                                         stride_head,
                                                         stride_seq,
                                                         DType(x_type),
                                                         DType(type),
                                                         DType(weight_type),
                                                         DType(bias_type),
                                                         rms,
                                                         eps,
                                                         dropout_from(seed, threshold, scale)});
      },
      ReleaseGil());
  module.def(
      "add_norm_backward",
      [](Address d_norm, Address d_total_in, Address total, Address weight, Address mean,
         Address rstd, Address d_x, Address d_residual, Address d_weight, Address d_bias,
         int64_t rows, int64_t columns, int x_type, int type, bool rms, Address seed,
         uint64_t threshold, float scale) {
        run<AddNormBackward>(
            kernels().add_norm_backward,
            {pointer<void>(d_norm), pointer<void>(d_total_in), pointer<void>(total),
             pointer<float>(weight), pointer<float>(mean), pointer<float>(rstd), pointer<void>(d_x),
             pointer<void>(d_residual), pointer<float>(d_weight), pointer<float>(d_bias), rows,
             columns, DType(x_type), DType(type), rms, dropout_from(seed, threshold, scale)});
      },
      ReleaseGil());
  module.def(
      "activation_forward",
      [](Address gate, Address up, Address hidden, int64_t rows, int64_t columns, int type,
         int activation, Address seed, uint64_t threshold, float scale) {
        run<ActivationForward>(
            kernels().activation_forward,
            {pointer<void>(gate), pointer<void>(up), pointer<void>(hidden), rows, columns,
             DType(type), Activation(activation), dropout_from(seed, threshold, scale)});
      },
      ReleaseGil());
  module.def(
      "activation_backward",
      [](Address gate, Address up, Address d_hidden, Address d_gate, Address d_up, Address hidden,
         int64_t rows, int64_t columns, int type, int activation, Address seed, uint64_t threshold,
         float scale) {
        run<ActivationBackward>(
            kernels().activation_backward,
            {pointer<void>(gate), pointer<void>(up), pointer<void>(d_hidden), pointer<void>(d_gate),
             pointer<void>(d_up), pointer<void>(hidden), rows, columns, DType(type),
             Activation(activation), dropout_from(seed, threshold, scale)});
      },
      ReleaseGil());
  module.def(
      "rotary",
      [](Address x, Address cos, Address sin, Address positions, bool wide_positions, Address out,
         int64_t batch, int64_t heads, int64_t seq, int64_t head_dim, int64_t half,
         int64_t table_rows, int64_t stride_batch, int64_t stride_head, int64_t stride_seq,
         int64_t angle_stride_batch, int type, bool interleaved, float sin_sign) {
        run<Rotary>(kernels().rotary,
                    {pointer<void>(x), pointer<float>(cos), pointer<float>(sin),
                     Integers{pointer<void>(positions), wide_positions}, pointer<void>(out), batch,
                     heads, seq, head_dim, half, table_rows, stride_batch, stride_head, stride_seq,
                     angle_stride_batch, DType(type), interleaved, sin_sign});
      },
      ReleaseGil());
  module.def(
      "cross_entropy",
      [](Address logits, Address target, Address row_scale, Address loss, int64_t rows,
         int64_t classes, int64_t ignore_index, int type, float label_smoothing, float z_loss,
         float softcap, bool gradient) {
        run<CrossEntropy>(kernels().cross_entropy,
                          {pointer<void>(logits), pointer<int64_t>(target),
                           pointer<float>(row_scale), pointer<float>(loss), rows, classes,
                           ignore_index, DType(type), label_smoothing, z_loss, softcap, gradient});
      },
      ReleaseGil());
  module.def(
      "linear_rows",
      [](Address x, Address weight, Address bias, Address out, int64_t rows, int64_t columns,
         int64_t features, int64_t x_stride, int64_t weight_stride, int type) {
        run<LinearRows>(
            kernels().linear_rows,
            {pointer<void>(x), pointer<void>(weight), pointer<void>(bias), pointer<void>(out), rows,
             columns, features, x_stride, weight_stride, DType(type)});
      },
      ReleaseGil());
  module.def(
      "product",
      [](Address a, Address b, Address bias, Address out, int64_t rows, int64_t columns,
         int64_t depth, int64_t a_row, int64_t a_depth, int64_t b_depth, int64_t b_column, int type,
         int b_type, int out_type, bool add, Address row_sums) {
        run<Product>(kernels().product,
                     {pointer<void>(a), pointer<void>(b), pointer<void>(bias), pointer<void>(out),
                      pointer<float>(row_sums), rows, columns, depth, a_row, a_depth, b_depth,
                      b_column, DType(type), DType(b_type), DType(out_type), add, Finish::none});
      },
      ReleaseGil());
  module.def(
      "product_activated",
      [](Address a, Address b, Address bias, Address out, int64_t rows, int64_t columns,
         int64_t depth, int64_t a_row, int64_t a_depth, int64_t b_depth, int64_t b_column, int type,
         int b_type, int finish, int activation, Address gate, Address up, Address kept,
         Address d_up, Address hidden, Address seed, uint64_t threshold, float scale) {
        run<Product>(kernels().product, {pointer<void>(a),
                                         pointer<void>(b),
                                         pointer<void>(bias),
                                         pointer<void>(out),
                                         nullptr,
                                         rows,
                                         columns,
                                         depth,
                                         a_row,
                                         a_depth,
                                         b_depth,
                                         b_column,
                                         DType(type),
                                         DType(b_type),
                                         DType(type),
                                         false,
                                         Finish(finish),
                                         Activation(activation),
                                         pointer<void>(gate),
                                         pointer<void>(up),
                                         pointer<void>(kept),
                                         pointer<void>(d_up),
                                         pointer<void>(hidden),
                                         dropout_from(seed, threshold, scale)});
      },
      ReleaseGil());
  module.def("prefer_huge_pages", [](Address memory, int64_t bytes) {
    prefer_huge_pages(pointer<void>(memory), bytes);
  });
  module.def(
      "embedding_forward",
      [](Address ids, bool wide_ids, int64_t count, int64_t rows, int64_t width, int64_t seq,
         int64_t inner, int type, float scale, Address seed, uint64_t threshold,
         float dropout_scale, Address table, Address positions, Address out, int64_t stride) {
        run<EmbeddingForward>(
            kernels().embedding_forward,
            {{Integers{pointer<void>(ids), wide_ids}, count, rows, width, seq, inner, DType(type),
              scale, dropout_from(seed, threshold, dropout_scale)},
             pointer<void>(table),
             pointer<void>(positions),
             pointer<void>(out),
             stride});
      },
      ReleaseGil());
  module.def(
      "embedding_backward",
      [](Address ids, bool wide_ids, int64_t count, int64_t rows, int64_t width, int64_t seq,
         int64_t inner, int type, float scale, Address seed, uint64_t threshold,
         float dropout_scale, Address d_out, Address d_table, Address d_positions) {
        run<EmbeddingBackward>(
            kernels().embedding_backward,
            {{Integers{pointer<void>(ids), wide_ids}, count, rows, width, seq, inner, DType(type),
              scale, dropout_from(seed, threshold, dropout_scale)},
             pointer<void>(d_out),
             pointer<float>(d_table),
             pointer<float>(d_positions)});
      },
      ReleaseGil());
}

}  // namespace llmos
