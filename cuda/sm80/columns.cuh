// The columns that a tile's rows see together, as a list: a box of positions, last axis fastest,
// once for each head that a key's gradients come from.
#pragma once

#include <cstdint>

#include "cuda/sm80/tiling.h"

namespace jax_natten::sm80 {

// A row's interval of columns: two places with a field for each axis, see ColumnList.
struct RowSpan {
  uint32_t low;
  uint32_t high;
};

// Whether a column lies in a row's interval; `guard` has all guard bits.
__device__ inline bool sees(RowSpan row, uint32_t place, uint32_t guard) {
  return ((place - row.low) & (row.high - place) & guard) == guard;
}

// A column of the list.
struct Cursor {
  int number;
  int at[kAxes];  // in the box
  int of_group;   // which of the heads
};

// Positions in the box, counted from 1, are packed into one word, a place, each with a guard bit
// above its field. In place - low the guard of an axis stays where the position is not below low,
// so that one word tells whether a column lies in a row's interval on all axes. A row's high is
// stored with two guards more, one for the place to take away and one to stay.
struct ColumnList {
  int size;             // columns of all heads
  int count[kAxes];     // of the box
  int shift[kAxes];     // of the field in a place
  uint32_t guard;       // all guard bits
  RowSpan inner;        // what all rows see
  int first;            // token of the box's first position
  int token[kAxes];     // tokens from a position to the next
  int token_rows;       // rows of the array from a token to the next
  int first_head;       // the number of its first row
  int head_rows;        // rows from a head to the next
  int entry[kAxes];     // entries from a position to the next, see Plan
  int head_entries;     // from a head to the next
  const int* starts;    // entries of the positions of all axes, where they are not evenly spaced
  int step[kAxes + 1];  // from a column to the one so many further that a tile has; last the heads'

  // Sets step to that of so many columns.
  __device__ void set_step(int columns) {
    for (int a = kAxes - 1; a >= 0; --a) {
      step[a] = columns % max(count[a], 1);
      columns /= max(count[a], 1);
    }
    step[kAxes] = columns;
  }

  __device__ Cursor column(int number) const {
    Cursor result;
    result.number = number;
    int rest = number;
    for (int a = kAxes - 1; a >= 0; --a) {
      result.at[a] = rest % max(count[a], 1);
      rest /= max(count[a], 1);
    }
    result.of_group = rest;
    return result;
  }

  __device__ void advance(Cursor& cursor, int columns) const {
    cursor.number += columns;
    int carry = 0;
    for (int a = kAxes - 1; a >= 0; --a) {
      const int next = cursor.at[a] + step[a] + carry;
      carry = next >= count[a];
      cursor.at[a] = carry == 0 ? next : next - count[a];
    }
    cursor.of_group += step[kAxes] + carry;
  }

  __device__ bool has(const Cursor& cursor) const { return cursor.number < size; }

  __device__ uint32_t place(const Cursor& cursor) const {
    uint32_t result = guard;
    for (int a = 0; a < kAxes; ++a) {
      result += static_cast<uint32_t>(cursor.at[a] + 1) << shift[a];
    }
    return result;
  }

  __device__ int32_t row(const Cursor& cursor) const {
    int result = first;
    for (int a = 0; a < kAxes; ++a) result += cursor.at[a] * token[a];
    return result * token_rows + first_head + cursor.of_group * head_rows;
  }

  __device__ int entry_of(const Cursor& cursor) const {
    int result = cursor.of_group * head_entries;
    for (int a = 0, begin = 0; a < kAxes; begin += count[a++]) {
      result += starts == nullptr ? cursor.at[a] * entry[a] : starts[begin + cursor.at[a]];
    }
    return result;
  }
};

}  // namespace jax_natten::sm80
