// Four-bit codes in the layout VQ4, and how a lane makes weights of them. vlmquant/packing.py documents the layout.
// What a kernel needs of it: a tile is 64 rows x 64 k = four sub-tiles of 16 rows, each 32 lanes x 16 bytes. Word s
// (0 to 3) of a lane is its share of k-step s (16 k) of the sub-tile: the A fragment of mma_m16n8k16, and of wgmma.
// Register i of that fragment holds two codes: nibble i of the word is its low half, nibble i + 4 its high half.
// Registers 0 and 2 belong to row lane / 4 of the sub-tile ("top"), registers 1 and 3 to that row + 8 ("bottom").
#pragma once
#include "primitives.cuh"
namespace vq {

// Sizes of the layout, in bytes unless said otherwise.
constexpr int TILE_ROWS = 64;        // rows of a tile; the tiles of the same rows form a strip
constexpr int TILE_K = 64;           // k of a tile, which is called a k-block
constexpr int TILE_VECTORS = 128;    // uint4 in a tile: 4 sub-tiles x 32 lanes
constexpr int TILE_BYTES = 2048;     // codes of a tile
constexpr int SCALE_PAIRS = 32;      // uint32 of scales for a strip and group: rows r and r + 8 of a sub-tile in one
constexpr int SCALE_BYTES = 128;     // scales of a strip and group
constexpr int ZERO_BYTES = 64;       // zeros of a strip and group

// Codes become floats by bit tricks: `(word & mask) | exponent` puts a code n into the mantissa of a number whose unit
// in the last place is 1 (or 16): in bf16 128 + n; in fp16 1024 + n, and 1024 + 16 n for the nibble above. `zero_top`
// and `zero_bottom` (from zero_constant_*) hold what to take away, so that n - zero comes out exactly.
constexpr uint32_t CODE_MASK = 0x000f000f;        // nibble 0 of both halves
constexpr uint32_t CODE_MASK_NEXT = 0x00f000f0;   // nibble 1 of both halves
constexpr uint32_t BF16_128 = 0x43004300;         // 128 twice
constexpr uint32_t F16_1024 = 0x64006400;         // 1024 twice
constexpr uint32_t F16_SIXTEENTH = 0x2c002c00;    // 1 / 16 twice
constexpr uint32_t F16_MINUS_64 = 0xd400d400;     // -64 twice; one unit in the last place is 1 / 16
constexpr int AND_OR = 0xea;                      // lop3: (a & b) | c

// The codes of a word as biased numbers: bf16 128 + n; fp16 1024 + n on top and 1024 + 16 n at the bottom.
template <int I> VQ_DEVICE uint32_t biased_bf16(uint32_t word) {
  return lop3<AND_OR>(I == 0 ? word : word >> (4 * I), CODE_MASK, BF16_128);
}
template <class T> VQ_DEVICE void biased_codes(uint32_t word, uint32_t (&a)[4]) {
  if (T::is_bf16) {
    a[0] = biased_bf16<0>(word);
    a[1] = biased_bf16<1>(word);
    a[2] = biased_bf16<2>(word);
    a[3] = biased_bf16<3>(word);
  } else {
    const uint32_t word_8 = word >> 8;
    a[0] = lop3<AND_OR>(word, CODE_MASK, F16_1024);
    a[1] = lop3<AND_OR>(word, CODE_MASK_NEXT, F16_1024);
    a[2] = lop3<AND_OR>(word_8, CODE_MASK, F16_1024);
    a[3] = lop3<AND_OR>(word_8, CODE_MASK_NEXT, F16_1024);
  }
}

// The codes of a word minus their zeros, exactly. (The order of the lines matters: ptxas schedules by it.)
template <class T>
VQ_DEVICE void codes_minus_zeros(uint32_t word, uint32_t zero_top, uint32_t zero_bottom, uint32_t (&a)[4]) {
  if (T::is_bf16) {
    a[0] = subtract2<T>(biased_bf16<0>(word), zero_top);
    a[1] = subtract2<T>(biased_bf16<1>(word), zero_bottom);
    a[2] = subtract2<T>(biased_bf16<2>(word), zero_top);
    a[3] = subtract2<T>(biased_bf16<3>(word), zero_bottom);
  } else {
    uint32_t biased[4];
    biased_codes<T>(word, biased);
    a[0] = subtract2<T>(biased[0], zero_top);
    a[2] = subtract2<T>(biased[2], zero_top);
    a[1] = multiply_add2_f16(biased[1], F16_SIXTEENTH, zero_bottom);  // (1024 + 16 n) / 16 - (64 + zero)
    a[3] = multiply_add2_f16(biased[3], F16_SIXTEENTH, zero_bottom);
  }
}

// What codes_minus_zeros takes for a zero (0 to 15) of the top row: 128 + zero or 1024 + zero, twice.
template <class T> VQ_DEVICE uint32_t zero_constant_top(uint32_t zero) {
  return (T::is_bf16 ? BF16_128 : F16_1024) | zero * 0x10001u;
}
// And of the bottom row: 128 + zero, or -(64 + zero) in fp16.
template <class T> VQ_DEVICE uint32_t zero_constant_bottom(uint32_t zero) {
  return T::is_bf16 ? BF16_128 | zero * 0x10001u : F16_MINUS_64 + zero * 0x00100010u;
}

// A pair of scales (top row in the low half, bottom row in the high half), each copied to both halves.
VQ_DEVICE uint32_t scale_twice_top(uint32_t scales) { return (scales & 0xffffu) * 0x10001u; }
VQ_DEVICE uint32_t scale_twice_bottom(uint32_t scales) { return (scales >> 16) * 0x10001u; }

// Multiplies a fragment by its scales, each weight rounded once.
template <class T> VQ_DEVICE void apply_scales(uint32_t (&a)[4], uint32_t scale_top, uint32_t scale_bottom) {
  a[0] = multiply2<T>(a[0], scale_top);
  a[1] = multiply2<T>(a[1], scale_bottom);
  a[2] = multiply2<T>(a[2], scale_top);
  a[3] = multiply2<T>(a[3], scale_bottom);
}

}  // namespace vq
