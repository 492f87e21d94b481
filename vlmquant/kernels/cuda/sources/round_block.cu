// Columns of a weight rounded one after the other, each from what the errors of those before it have left of it: the
// loop inside GPTQ, as vlmquant.kernels.cuda.rounding.by_torch defines it. On any architecture from sm_80. By arithmetic
// bound by the way from one column to the next; not timed on a GPU yet.
//
// Grid: rows / ROUND_ROWS, rounded up. Block: a thread for each row. ROUND_STEP columns at a time wait in a thread's
// registers; what earlier steps have lost lies in shared memory, of which a thread reads only its own row. Errors are
// added to a column in the order of the columns, each product and sum rounded once: the loop's own order.
#include "primitives.cuh"
namespace vq {

constexpr int ROUND_COLUMNS = 128;  // of a block, at most
constexpr int ROUND_ROWS = 64;
constexpr int ROUND_STEP = 16;

// A floating point format: its largest value, and of its least power of two with steps of its own that power, and step.
struct FloatGrid {
  float largest, least, step;
};
VQ_DEVICE FloatGrid float_grid(int bits) {
  return bits == 4 ? FloatGrid{6.f, 1.f, 0.5f} : FloatGrid{448.f, 0.015625f, 0.125f};  // E2M1, E4M3
}

VQ_DEVICE float clamp(float value, float low, float high) {  // NaN stays NaN
  value = value < low ? low : value;
  return value > high ? high : value;
}

// The nearest multiple of `step` times the power of two below, ties to the even one. Both scalings are exact.
VQ_DEVICE float round_by_steps(float value, const FloatGrid& grid) {
  const float power = float_of_bits(bits_of(value) & 0x7f800000u);
  const float step = (power > grid.least ? power : grid.least) * grid.step;
  const float inverse = float_of_bits(0x7f000000u - bits_of(step));
  return round_even(value * inverse) * step;
}

// wanted           [columns][rows]: what a column is to be rounded from, but for the errors made in this block; becomes
//                  what it was rounded from, less its value
// target           [columns][rows]: what errors are counted from
// values, errors   [columns][rows], written: the value on the grid; target, less value times scale
// feedback         [columns][columns], rows feedback_stride apart; read below the diagonal: what an error adds to a
//                  later column
// scales, zeros    [groups][rows]; zeros only if ASYMMETRIC
// group_of         [columns]
// columns          at most ROUND_COLUMNS
// bits             of a code: integers of 1 to 8, or E2M1 (4) and E4M3 (8)
// Dynamic shared memory: 4 * ROUND_COLUMNS * (ROUND_ROWS + ROUND_STEP) bytes.
template <bool INTEGERS, bool ASYMMETRIC>
VQ_DEVICE void round_block(float* __restrict__ wanted, const float* __restrict__ target, float* __restrict__ values,
                           float* __restrict__ errors, const float* __restrict__ feedback,
                           const float* __restrict__ scales, const float* __restrict__ zeros,
                           const uint64_t* __restrict__ group_of, int rows, int columns, int feedback_stride,
                           int bits) {
  VQ_SHARED_MEMORY(shared);
  float* const lost = (float*)shared + threadIdx.x;                       // [ROUND_COLUMNS], ROUND_ROWS apart
  float* const factors = (float*)shared + ROUND_COLUMNS * ROUND_ROWS;     // [ROUND_STEP][ROUND_COLUMNS]: a step's
  const int row = blockIdx.x * ROUND_ROWS + threadIdx.x;
  const FloatGrid grid = float_grid(bits);
  const float most = (float)((1 << bits) - 1), middle = (float)(1 << (bits - 1));
  for (int first = 0; first < columns; first += ROUND_STEP) {
    const int count = columns - first < ROUND_STEP ? columns - first : ROUND_STEP;
    sync_block();  // everyone is done with the factors of the step before
    for (int j = threadIdx.x; j < first + ROUND_STEP; j += ROUND_ROWS) {
      VQ_UNROLL for (int k = 0; k < ROUND_STEP; ++k) {
        const bool below = k < count && j < first + k;
        factors[k * ROUND_COLUMNS + j] = below ? feedback[(size_t)(first + k) * feedback_stride + j] : 0.f;
      }
    }
    float value[ROUND_STEP], goal[ROUND_STEP], scale[ROUND_STEP], low[ROUND_STEP];
    VQ_UNROLL for (int k = 0; k < ROUND_STEP; ++k) {
      value[k] = goal[k] = low[k] = 0.f;
      scale[k] = 1.f;
      if (row < rows && k < count) {
        const size_t at = (size_t)(first + k) * rows + row, of_group = (size_t)group_of[first + k] * rows + row;
        value[k] = wanted[at];
        goal[k] = target[at];
        scale[k] = scales[of_group];
        low[k] = ASYMMETRIC ? -zeros[of_group] : -middle;
      }
      // It waits where the column's error will lie: from a register the compiler would move the division, which
      // branches, into the way from column to column.
      lost[(first + k) * ROUND_ROWS] = 1.f / scale[k];
    }
    sync_block();
    for (int j = 0; j < first; j += 4) {
      float four[4];
      VQ_UNROLL for (int i = 0; i < 4; ++i) four[i] = lost[(j + i) * ROUND_ROWS];
      VQ_UNROLL for (int k = 0; k < ROUND_STEP; ++k) {
        const float4 factor = *(const float4*)(factors + k * ROUND_COLUMNS + j);
        value[k] = multiply_add(factor.x, four[0], value[k]);
        value[k] = multiply_add(factor.y, four[1], value[k]);
        value[k] = multiply_add(factor.z, four[2], value[k]);
        value[k] = multiply_add(factor.w, four[3], value[k]);
      }
    }
    VQ_UNROLL for (int k = 0; k < ROUND_STEP; ++k) {
      const float ratio = value[k] * lost[(first + k) * ROUND_ROWS];
      const float on_grid = INTEGERS ? clamp(round_even(ratio), low[k], low[k] + most)
                                     : round_by_steps(clamp(ratio, -grid.largest, grid.largest), grid);
      const float rounded = multiply(on_grid, scale[k]), error = goal[k] - rounded;
      VQ_UNROLL for (int later = k + 1; later < ROUND_STEP; ++later) {
        value[later] = multiply_add(factors[later * ROUND_COLUMNS + first + k], error, value[later]);
      }
      goal[k] = error;  // written once all are rounded: stores would keep the factors from being read ahead
      low[k] = on_grid;
      value[k] -= rounded;
    }
    VQ_UNROLL for (int k = 0; k < ROUND_STEP; ++k) {
      lost[(first + k) * ROUND_ROWS] = goal[k];
      if (row < rows && k < count) {
        const size_t at = (size_t)(first + k) * rows + row;
        wanted[at] = value[k];
        values[at] = low[k];
        errors[at] = goal[k];
      }
    }
  }
}

}  // namespace vq

#define VQ_ROUND_BLOCK(NAME, INTEGERS, ASYMMETRIC)                                                                   \
  VQ_KERNEL(vq::ROUND_ROWS)                                                                                          \
  NAME(float* wanted, const float* target, float* values, float* errors, const float* feedback, const float* scales, \
       const float* zeros, const uint64_t* group_of, int rows, int columns, int feedback_stride, int bits) {         \
    vq::round_block<INTEGERS, ASYMMETRIC>(wanted, target, values, errors, feedback, scales, zeros, group_of, rows,   \
                                          columns, feedback_stride, bits);                                           \
  }
