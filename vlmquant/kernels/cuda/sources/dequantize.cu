// Expands a packed weight to dense rows, for any dense matrix product: the fallback that always works, and bit-equal to
// the dequantized reference. Any architecture from sm_80.
//
// Grid: (k-blocks / 2 rounded up, strips to expand). Block: 8 warps; warps 0 to 3 take the four sub-tiles of one
// k-block, warps 4 to 7 those of the next. Dynamic shared memory: 8 * 16 * 144 bytes.
#include "vq4.cuh"
namespace vq {

// codes          VQ4 tiles [rows / 64][columns / 64][128] of uint4
// scales         [rows / 64][columns / group_size][32], a pair of T each (rows r and r + 8 of a sub-tile)
// zeros          [rows / 64][columns / group_size][64] bytes, two for each pair; not read if symmetric (zero 8)
// dense          [64 * strips][columns] of T: the rows from strip `first_strip` on
// rows, columns  of the packed weight, multiples of 64 (`rows` is there for uniformity)
// group_size     a multiple of 16 that divides `columns`
template <class T, bool ASYMMETRIC>
VQ_DEVICE void dequantize(const uint4* __restrict__ codes, const uint32_t* __restrict__ scales,
                          const uint8_t* __restrict__ zeros, uint16_t* __restrict__ dense, int rows, int columns,
                          int group_size, int first_strip) {
  VQ_SHARED_MEMORY(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4, pair = lane % 4, sub_tile = warp % 4;
  const int strip = first_strip + blockIdx.y;
  const int k_block = blockIdx.x * 2 + warp / 4, k_blocks = columns / TILE_K, groups = columns / group_size;
  if (k_block >= k_blocks) return;

  // The sub-tile goes through shared memory, so that each row is written as whole 128-byte lines. Rows are 144 bytes
  // apart: no two lanes meet in a bank.
  constexpr int ROW_BYTES = 144;
  unsigned char* staged = shared + warp * 16 * ROW_BYTES;
  const uint4 vector = load_stream(codes + ((size_t)strip * k_blocks + k_block) * TILE_VECTORS + sub_tile * 32 + lane);
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  VQ_UNROLL for (int step = 0; step < 4; ++step) {
    const int group = (k_block * TILE_K + step * 16) / group_size;
    const size_t index = ((size_t)strip * groups + group) * SCALE_PAIRS + sub_tile * 8 + row;
    const uint32_t scale_pair = scales[index];
    const uint32_t scale_top = scale_twice_top(scale_pair), scale_bottom = scale_twice_bottom(scale_pair);
    uint32_t zero_top = 8, zero_bottom = 8;
    if (ASYMMETRIC) {
      zero_top = zeros[2 * index];
      zero_bottom = zeros[2 * index + 1];
    }
    uint32_t a[4];
    codes_minus_zeros<T>(words[step], zero_constant_top<T>(zero_top), zero_constant_bottom<T>(zero_bottom), a);
    unsigned char* top = staged + row * ROW_BYTES + step * 32 + pair * 4;  // a k-step is 32 bytes, its upper 8 k 16
    unsigned char* bottom = top + 8 * ROW_BYTES;
    *(uint32_t*)top = multiply2<T>(a[0], scale_top);
    *(uint32_t*)(top + 16) = multiply2<T>(a[2], scale_top);
    *(uint32_t*)bottom = multiply2<T>(a[1], scale_bottom);
    *(uint32_t*)(bottom + 16) = multiply2<T>(a[3], scale_bottom);
  }
  sync_warp();
  VQ_UNROLL for (int i = 0; i < 4; ++i) {  // four rows at a time: 8 lanes write the 128 bytes of one
    const int r = i * 4 + lane / 8, chunk = lane % 8;
    uint16_t* line = dense + (size_t)(blockIdx.y * TILE_ROWS + sub_tile * 16 + r) * columns + k_block * TILE_K;
    *(uint4*)(line + chunk * 8) = *(const uint4*)(staged + r * ROW_BYTES + chunk * 16);
  }
}

}  // namespace vq

#define VQ_DEQUANTIZE(NAME, T, ASYMMETRIC)                                                                            \
  VQ_KERNEL(256)                                                                                                      \
  NAME(const uint4* codes, const uint32_t* scales, const uint8_t* zeros, uint16_t* dense, int rows, int columns,      \
       int group_size, int first_strip) {                                                                             \
    vq::dequantize<T, ASYMMETRIC>(codes, scales, zeros, dense, rows, columns, group_size, first_strip);               \
  }
