// Everything that the kernel needs from elsewhere: read it before a target region is opened.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstring>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/quant_matmul.h"
#include "cpu/scratch.h"
#include "cpu/target.h"
