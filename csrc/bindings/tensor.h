// Tensors as bindings take them, without a header of torch: torch.Tensor publishes a table of C
// functions for this, DLPack's (dlpack.h, DLPackExchangeAPI). Reading one takes 0.1 us; asking in
// Python for its address, sizes and strides takes 0.3 and passing these another 0.3.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace llmos {

struct Tensor {                    // DLTensor of DLPack 1; all zeros for None
  void* data;                      // the first element
  int32_t device[2];               // type and index
  int32_t dim;                     // how many sizes and strides there are
  uint8_t code, bits;              // kind and width of an element
  uint16_t lanes;                  // 1
  const int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;            // 0

  DType type() const { return code == kBfloat ? DType::bf16 : DType::f32; }
  CacheType cache_type() const {
    if (code == kFloat8) return CacheType::fp8;
    if (code == kInt) return CacheType::int8;
    return code == kBfloat ? CacheType::bf16 : CacheType::f32;
  }
  Integers integers() const { return {data, bits == 64}; }
  float* floats() const { return static_cast<float*>(data); }
  // Zeros for the dimensions that it has not.
  Strides4 strides4() const {
    const auto stride = [&](int i) { return i < dim ? strides[i] : 0; };
    return {stride(0), stride(1), stride(2), stride(3)};
  }

 private:
  static constexpr uint8_t kInt = 0, kBfloat = 4, kFloat8 = 10;  // of them all, e4m3fn
};

// Throws what Python shall see where `object` is no torch.Tensor.
Tensor read_tensor(pybind11::handle object);

}  // namespace llmos

namespace pybind11::detail {

template <>
struct type_caster<llmos::Tensor> {
  PYBIND11_TYPE_CASTER(llmos::Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = source.is_none() ? llmos::Tensor{} : llmos::read_tensor(source);
    return true;
  }
};

}  // namespace pybind11::detail
