// Activations to int8 codes with one scale per token, as vlmquant.kernels.reference.activation_codes defines them: the
// same bits. On any architecture from sm_80; bound by memory.
//
// Grid: tokens / (8 / WARPS), rounded up. Block: 8 warps; WARPS of them share a token. A token is read once: up to 64
// values of it wait in each thread's registers for the scale; what is longer than that is read again.
#include "hopper.cuh"
namespace vq {

constexpr float ACTIVATION_STEPS = 127.5f;   // code of the largest magnitude
constexpr float ACTIVATION_FLOOR = 1e-12f;   // smallest scale

// Eight values from `column` on, zeros past the last; `misaligned` are the low bits that any row's address may have.
VQ_DEVICE uint4 load_eight(const uint16_t* row, int column, int columns, uint32_t misaligned) {
  uint4 eight;
  uint32_t words[4];
  const uint16_t* at = row + column;
  if (column + 8 <= columns) {
    if (misaligned == 0) return *(const uint4*)at;
    if (misaligned % 8 == 0) {
      const uint2 low = *(const uint2*)at, high = *(const uint2*)(at + 4);
      eight.x = low.x;
      eight.y = low.y;
      eight.z = high.x;
      eight.w = high.y;
      return eight;
    }
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      words[i] = misaligned % 4 == 0 ? *(const uint32_t*)(at + 2 * i) : at[2 * i] | (uint32_t)at[2 * i + 1] << 16;
    }
  } else {
    VQ_UNROLL for (int i = 0; i < 4; ++i) {
      const uint32_t low = column + 2 * i < columns ? at[2 * i] : 0;
      const uint32_t high = column + 2 * i + 1 < columns ? at[2 * i + 1] : 0;
      words[i] = low | high << 16;
    }
  }
  eight.x = words[0];
  eight.y = words[1];
  eight.z = words[2];
  eight.w = words[3];
  return eight;
}

// The larger of `largest` and the magnitudes of a pair, as bits: these order 16-bit floats, and NaN is above all.
VQ_DEVICE uint32_t larger(uint32_t largest, uint32_t pair) {
  const uint32_t low = pair & 0x7fffu, high = pair >> 16 & 0x7fffu, of_pair = low > high ? low : high;
  return largest > of_pair ? largest : of_pair;
}

// value / scale rounded half to even, at most 127, in the lowest byte. inverse: 1 / scale, rounded to nearest. The first
// correction brings the quotient within one unit in its last place; the second then makes it the correctly rounded one
// (Markstein). Adding 1.5 * 2^23 leaves the integer in a float's low bits, rounded half to even.
VQ_DEVICE uint32_t code_of(float value, float scale, float inverse) {
  float quotient = value * inverse;
  quotient = multiply_add(multiply_add(-quotient, scale, value), inverse, quotient);
  quotient = multiply_add(multiply_add(-quotient, scale, value), inverse, quotient);
  return bits_of((quotient < 127.f ? quotient : 127.f) + 12582912.f);
}

// inputs          [tokens][columns] of T
// codes           [tokens][packed_columns] int8, 8-byte aligned; zeros from `columns` on
// scales          [tokens]
// packed_columns  columns, rounded up to a multiple of 16
// Dynamic shared memory: 32 bytes.
template <class T, int WARPS, bool DEPENDENT>
VQ_DEVICE void quantize_rows(const uint16_t* __restrict__ inputs, uint2* __restrict__ codes,
                             float* __restrict__ scales, int tokens, int columns, int packed_columns) {
  constexpr int THREADS = 32 * WARPS;   // that share a token
  constexpr int KEPT = 8;               // chunks of eight values that a thread keeps
  VQ_SHARED_MEMORY(shared);
  uint32_t* largest_of_warp = (uint32_t*)shared;
  if (DEPENDENT) {
    dependency_launch();
    dependency_wait();
  }
  const int token = blockIdx.x * (8 / WARPS) + threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
  if (token >= tokens) return;  // all threads that share it
  const uint16_t* row = inputs + (size_t)token * columns;
  const uint32_t misaligned = ((uint32_t)(uint64_t)inputs | (uint32_t)columns * 2) & 15;
  const int chunks = packed_columns / 8;
  uint4 kept[KEPT];
  uint32_t largest = 0;
  auto look = [&](const uint4& eight) {
    largest = larger(larger(larger(larger(largest, eight.x), eight.y), eight.z), eight.w);
  };
  VQ_UNROLL for (int i = 0; i < KEPT; ++i) kept[i].x = kept[i].y = kept[i].z = kept[i].w = 0;
  if (misaligned == 0) {  // nothing between the loads, and columns are whole chunks
    VQ_UNROLL for (int i = 0; i < KEPT; ++i) {
      const int column = (i * THREADS + thread) * 8;
      if (column < columns) kept[i] = *(const uint4*)(row + column);
    }
  } else {
    VQ_UNROLL for (int i = 0; i < KEPT; ++i) {
      const int column = (i * THREADS + thread) * 8;
      if (column < columns) kept[i] = load_eight(row, column, columns, misaligned);
    }
  }
  VQ_UNROLL for (int i = 0; i < KEPT; ++i) look(kept[i]);
  for (int chunk = KEPT * THREADS + thread; chunk < chunks; chunk += THREADS) {
    look(load_eight(row, chunk * 8, columns, misaligned));
  }
  VQ_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(largest, mask);
    largest = largest > other ? largest : other;
  }
  if (WARPS > 1) {
    if (thread % 32 == 0) largest_of_warp[thread / 32] = largest;
    sync_block();
    VQ_UNROLL for (int w = 0; w < WARPS; ++w) {
      const uint32_t other = largest_of_warp[w];
      largest = largest > other ? largest : other;
    }
  }
  float scale = low_float<T>(largest) / ACTIVATION_STEPS;
  if (scale < ACTIVATION_FLOOR) scale = ACTIVATION_FLOOR;
  const float inverse = 1.f / scale;
  uint2* to = codes + (size_t)token * chunks;
  auto store = [&](const uint4& eight, int chunk) {
    auto four = [&](uint32_t first, uint32_t second) {
      return pack_bytes(code_of(low_float<T>(first), scale, inverse), code_of(high_float<T>(first), scale, inverse),
                        code_of(low_float<T>(second), scale, inverse), code_of(high_float<T>(second), scale, inverse));
    };
    uint2 made;
    made.x = four(eight.x, eight.y);
    made.y = four(eight.z, eight.w);
    to[chunk] = made;
  };
  VQ_UNROLL for (int i = 0; i < KEPT; ++i) {
    const int chunk = i * THREADS + thread;
    if (chunk < chunks) store(kept[i], chunk);
  }
  for (int chunk = KEPT * THREADS + thread; chunk < chunks; chunk += THREADS) {
    store(load_eight(row, chunk * 8, columns, misaligned), chunk);
  }
  if (thread == 0) scales[token] = scale;
}

}  // namespace vq

// DEPENDENT: by dependent launch, on sm_90 and later.
#define VQ_QUANTIZE_ROWS(NAME, T, WARPS, DEPENDENT)                                                              \
  VQ_KERNEL(256)                                                                                                 \
  NAME(const uint16_t* inputs, uint2* codes, float* scales, int tokens, int columns, int packed_columns) {       \
    vq::quantize_rows<T, WARPS, DEPENDENT>(inputs, codes, scales, tokens, columns, packed_columns);              \
  }
