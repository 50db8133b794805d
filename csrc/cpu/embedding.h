// Rows of a table. Copies need no instruction set of their own: memcpy chooses one.
#pragma once

#include "cpu/kernels.h"

namespace llmos {

// out[i] = row ids[i] of table: [rows, width], with a stride between rows.
struct Embedding {
  Integers ids;  // [count]
  const void* table;
  void* out;  // [count, width]
  int64_t count, rows, width, stride;
  DType type;
};

// std::invalid_argument for an id that is no row.
void embedding(const Embedding& call);

}  // namespace llmos
