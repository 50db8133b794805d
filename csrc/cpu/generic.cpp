#include <omp.h>

#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/target.h"

namespace llmos {
namespace generic {

// 8 registers of sums, 4 of b and the broadcast element in 16.
constexpr int kTileRows = 2, kTileVectors = 1, kRegisterLanes = 4;

#include "cpu/vector.inl"

LLMOS_INLINE L multiply_even(U a, U b) { return ((L)a & 0xffffffffull) * ((L)b & 0xffffffffull); }

LLMOS_INLINE I sign_extend(B x) { return __builtin_convertvector(x, I); }

#include "cpu/kernels.inl"

}  // namespace generic

const Kernels generic_kernels = {
    "generic",
    [] { return true; },
    generic::add_norm_forward,
    generic::add_norm_backward,
    generic::activation_forward,
    generic::activation_backward,
    generic::rotary,
    generic::cross_entropy,
    generic::attention_forward,
    generic::attention_backward,
    generic::attention_decode,
    generic::cache_write,
    generic::linear_rows,
    generic::product,
    generic::embedding_forward,
    generic::embedding_backward,
    generic::adamw,
    generic::square_sums,
};

}  // namespace llmos
