// What the persistent Hopper kernels share: how work is cut over the blocks, and how sums are added and stored.
#pragma once
#include "hopper.cuh"
namespace vq {

// `units` of work in a row, cut over blocks as evenly as whole units allow: the first `remainder` blocks have one more.
struct Shares {
  int units, per_block, remainder;
  VQ_DEVICE int begin(int block) const { return block * per_block + (block < remainder ? block : remainder); }
  VQ_DEVICE int owner(int unit) const {
    int in_larger = remainder * (per_block + 1);
    return unit < in_larger ? unit / (per_block + 1) : remainder + (unit - in_larger) / per_block;
  }
};

VQ_DEVICE void add(float (&sums)[4], const float4& part) {
  sums[0] += part.x;
  sums[1] += part.y;
  sums[2] += part.z;
  sums[3] += part.w;
}

// The sums of mma_m16n8k16 as a lane stores them. Outputs have rows as their fast index, so lanes of neighbouring rows
// (row and row ^ 1) trade: the even one gets both rows of token 2 pair, the odd one those of token 2 pair + 1.
struct RowPairs {
  uint32_t top, bottom;  // rows (row & ~1) and + 1 of one token, rounded to T; the same + 8
  bool odd;              // this lane's token is the odd one of the two
};
template <class T> VQ_DEVICE RowPairs row_pairs(const float (&sums)[4], int row) {
  const uint32_t even_token = (uint32_t)round_to<T>(sums[0]) | (uint32_t)round_to<T>(sums[2]) << 16;
  const uint32_t odd_token = (uint32_t)round_to<T>(sums[1]) | (uint32_t)round_to<T>(sums[3]) << 16;
  RowPairs pairs;
  pairs.odd = row & 1;
  const uint32_t got = shuffle_xor(pairs.odd ? even_token : odd_token, 4), own = pairs.odd ? odd_token : even_token;
  pairs.top = pairs.odd ? (got & 0xffffu) | own << 16 : (own & 0xffffu) | got << 16;
  pairs.bottom = pairs.odd ? got >> 16 | (own & 0xffff0000u) : own >> 16 | (got & 0xffff0000u);
  return pairs;
}

}  // namespace vq
