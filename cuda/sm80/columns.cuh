// The columns that a tile's rows see together, as a list: a box of positions, last axis fastest,
// once for each head that a key's gradients come from.
#pragma once

#include <cstdint>

#include "cpu/tiling.h"

namespace jax_natten::sm80 {

// A row's interval of columns: two places with a field for each axis, see ColumnList.
struct RowSpan {
  uint32_t low;
  uint32_t high;
};

// Whether a column lies in a row's interval; `guard` has all guard bits.
__device__ inline bool sees(RowSpan row, uint32_t place, uint32_t guard) {
  return (~((place - row.low) & (row.high - place)) & guard) == 0;
}

// What a column is known by.
struct Column {
  int32_t row;     // number of its row in the arrays
  uint32_t place;  // see ColumnList
  int32_t entry;   // its share of the entry of a pair, see Plan

  __device__ void add(const Column& step) {
    row += step.row;
    place += step.place;
    entry += step.entry;
  }
  __device__ Column operator*(int times) const {
    return {row * times, place * static_cast<uint32_t>(times), entry * times};
  }
};

// A column of the list, and where it is in the box.
struct ListedColumn {
  Column column;
  int at[kAxes];
};

// Positions in the box, counted from 1, are packed into one word, a place, each with a guard bit
// above its field. In place - low the guard of an axis stays where the position is not below low,
// so that one word tells whether a column lies in a row's interval on all axes. A row's high is
// stored with two guards more, one for the place to take away and one to stay.
struct ColumnList {
  int size;           // columns of all heads
  int count[kAxes];   // of the box
  uint32_t guard;     // all guard bits
  RowSpan inner;      // what all rows see
  Column first;       // of the list
  Column one[kAxes];  // from a position to the next
  Column head;        // from a head to the next

  __device__ ListedColumn at(int number) const {
    ListedColumn result{first, {}};
    int rest = number;
    for (int a = kAxes - 1; a >= 0; --a) {
      result.at[a] = rest % max(count[a], 1);
      rest /= max(count[a], 1);
      result.column.add(one[a] * result.at[a]);
    }
    result.column.add(head * rest);
    return result;
  }
};

}  // namespace jax_natten::sm80
