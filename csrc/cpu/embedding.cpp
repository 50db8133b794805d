#include "cpu/embedding.h"

#include <cstring>

namespace llmos {

void embedding(const Embedding& call) {
  for (int64_t i = 0; i < call.count; ++i)
    refuse_outside(call.ids[i], call.rows, "embedding: ids", "the rows of weight");
  if (call.width == 0) return;  // memcpy takes no null, whatever the size
  const int64_t size = call.type == DType::bf16 ? 2 : 4;
#pragma omp parallel for schedule(static) if (call.count * call.width > kWorthThreads)
  for (int64_t i = 0; i < call.count; ++i)
    std::memcpy(static_cast<char*>(call.out) + i * call.width * size,
                static_cast<const char*>(call.table) + call.ids[i] * call.stride * size,
                call.width * size);
}

}  // namespace llmos
