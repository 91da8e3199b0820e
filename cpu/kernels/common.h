// All that the kernels need and that is the same for every instruction set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/call.h"
#include "cpu/number.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"
#include "cpu/problem.h"
#include "cpu/scratch.h"
#include "cpu/sums.h"
#include "cpu/targets.h"
#include "cpu/tile.h"
