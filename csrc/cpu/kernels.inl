// All kernels, in the order in which they build on one another. Included once per instruction set,
// inside its target region and namespace, after vector.inl.
#include "cpu/philox.inl"
#include "cpu/tile.inl"
#include "cpu/add_norm.inl"
#include "cpu/activate.inl"
#include "cpu/activation.inl"
#include "cpu/rotary.inl"
#include "cpu/cross_entropy.inl"
#include "cpu/operands.inl"
#include "cpu/attention.inl"
#include "cpu/narrow.inl"
#include "cpu/attention_decode.inl"
#include "cpu/cache_write.inl"
