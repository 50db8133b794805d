// Not recorded by `capture`: a step's bias corrections are those of its number.
#include <pybind11/stl.h>

#include <cmath>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/kernels.h"

namespace llmos {

namespace {

// Tensors with their addresses, sizes and blocks; `blocks` counts all of them.
struct Model {
  std::vector<OptimizerTensors> tensors;
  int64_t blocks = 0;

  void add(OptimizerTensors added) {
    added.first_block = blocks;
    blocks += blocks_of(added.count);
    tensors.push_back(added);
  }
};

void step(const std::vector<Address>& parameters, const std::vector<Address>& gradients,
          const std::vector<Address>& exp_avgs, const std::vector<Address>& exp_avg_sqs,
          const std::vector<int64_t>& counts, const std::vector<int>& types,
          const std::vector<double>& steps, double gradient_factor, double rate, double beta1,
          double beta2, double eps, double weight_decay) {
  Model model;
  for (size_t i = 0; i < counts.size(); ++i) {
    const double rest1 = 1 - std::pow(beta1, steps[i]), rest2 = 1 - std::pow(beta2, steps[i]);
    model.add({pointer<void>(parameters[i]), pointer<void>(gradients[i]),
               pointer<void>(exp_avgs[i]), pointer<void>(exp_avg_sqs[i]), counts[i], 0,
               DType(types[i]), float(rate / rest1), float(1 / std::sqrt(rest2))});
  }
  kernels().adamw({model.tensors.data(), model.blocks, float(gradient_factor), float(1 - beta1),
                   float(beta2), float(1 - beta2), float(1 - rate * weight_decay), float(eps)});
}

double norm(const std::vector<Address>& gradients, const std::vector<int64_t>& counts,
            const std::vector<int>& types) {
  Model model;
  for (size_t i = 0; i < counts.size(); ++i)
    model.add({nullptr, pointer<void>(gradients[i]), nullptr, nullptr, counts[i], 0,
               DType(types[i]), 0, 0});
  std::vector<float> sums(model.blocks);
  kernels().square_sums({model.tensors.data(), model.blocks, sums.data()});
  double total = 0;
  for (float sum : sums) total += sum;
  return std::sqrt(total);
}

}  // namespace

void bind_optimizer(py::module_& module) {
  module.def("adamw_step", &step, ReleaseGil());
  module.def("gradient_norm", &norm, ReleaseGil());
}

}  // namespace llmos
