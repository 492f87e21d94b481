// Many tokens times a packed weight, on any architecture from sm_80; correct, not tuned.
//
// Grid: (rows / 128, tokens / TOKEN_TILE), both rounded up. Block: 8 warps; warp w takes sub-tile w % 4 of strip w / 4
// of the block's two, and all of its tokens. A ring of STAGES k-blocks of codes and inputs in shared memory is filled by
// cp.async; codes become weights in registers, rounded once with their scale as the dequantized reference is.
// Dynamic shared memory: STAGES * (TOKEN_TILE * 128 + 2 * 2048) bytes.
#include "vq4.cuh"
namespace vq {

// codes, scales, zeros  see skinny.cu
// inputs      [tokens][columns] of T, 16-byte aligned
// outputs     [tokens][rows] of T
// rows        a multiple of 64; in an odd number of strips, warps 4 to 7 of the last block repeat what the others do
// group_size  32 if GROUPS_OF_32, else a multiple of 64
template <class T, bool GROUPS_OF_32, bool ASYMMETRIC>
VQ_DEVICE void gemm(const uint4* __restrict__ codes, const uint32_t* __restrict__ scales,
                    const uint8_t* __restrict__ zeros, const uint16_t* __restrict__ inputs,
                    uint16_t* __restrict__ outputs, int tokens, int rows, int columns, int group_size) {
  constexpr int STAGES = 4, TOKEN_TILE = 64, TOKEN_TILES = TOKEN_TILE / 8;
  constexpr int INPUT_ROW = TILE_K * 2;  // bytes of a token in a stage; its 16-byte chunk c lies at c ^ (token % 8)
  constexpr int INPUT_BYTES = TOKEN_TILE * INPUT_ROW, STAGE_BYTES = INPUT_BYTES + 2 * TILE_BYTES;
  VQ_SHARED_MEMORY(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = lane / 4, pair = lane % 4;
  const int last_strip = rows / TILE_ROWS - 1, sub_tile = warp % 4, first_token = blockIdx.y * TOKEN_TILE;
  auto strip_of = [&](int half_of_block) {
    const int strip = blockIdx.x * 2 + half_of_block;
    return strip < last_strip ? strip : last_strip;
  };
  const int strip = strip_of(warp / 4);
  const int k_blocks = columns / TILE_K, groups = columns / group_size;
  const int blocks_per_group = GROUPS_OF_32 ? 1 : group_size / TILE_K;
  auto load = [&](int k_block, int stage) {
    if (k_block < k_blocks) {
      unsigned char* stage_inputs = shared + stage * STAGE_BYTES;
      unsigned char* stage_codes = stage_inputs + INPUT_BYTES;
      for (int i = threadIdx.x; i < TOKEN_TILE * 8; i += blockDim.x) {
        int r = i / 8, chunk = i % 8, token = first_token + r;
        cp_async_16(stage_inputs + r * INPUT_ROW + ((chunk ^ (r % 8)) * 16),
                    inputs + (size_t)(token < tokens ? token : 0) * columns + k_block * TILE_K + chunk * 8,
                    token < tokens);
      }
      for (int i = threadIdx.x; i < 2 * TILE_VECTORS; i += blockDim.x) {
        const size_t tile = (size_t)strip_of(i / TILE_VECTORS) * k_blocks + k_block;
        cp_async_16(stage_codes + i * 16, codes + tile * TILE_VECTORS + i % TILE_VECTORS, true);
      }
    }
    cp_async_commit();  // also when empty, so that the count of groups goes on
  };
  VQ_UNROLL for (int s = 0; s < STAGES - 1; ++s) load(s, s);
  float sums[TOKEN_TILES][4] = {};
  uint32_t scale_pair = 0, zero_top = zero_constant_top<T>(8), zero_bottom = zero_constant_bottom<T>(8);
  auto load_scales = [&](int group) {
    const size_t index = ((size_t)strip * groups + group) * SCALE_PAIRS + sub_tile * 8 + row;
    scale_pair = scales[index];
    if (ASYMMETRIC) {
      zero_top = zero_constant_top<T>(zeros[2 * index]);
      zero_bottom = zero_constant_bottom<T>(zeros[2 * index + 1]);
    }
  };
  for (int k_block = 0; k_block < k_blocks; ++k_block) {
    cp_async_wait<STAGES - 2>();
    sync_block();
    load(k_block + STAGES - 1, (k_block + STAGES - 1) % STAGES);
    const unsigned char* stage_inputs = shared + (k_block % STAGES) * STAGE_BYTES;
    const unsigned char* stage_codes = stage_inputs + INPUT_BYTES;
    if (!GROUPS_OF_32 && k_block % blocks_per_group == 0) load_scales(k_block / blocks_per_group);
    const uint4 vector = *(const uint4*)(stage_codes + (warp * 32 + lane) * 16);
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    VQ_UNROLL for (int half = 0; half < 2; ++half) {  // two k-steps each
      if (GROUPS_OF_32) load_scales(k_block * 2 + half);
      const uint32_t scale_top = scale_twice_top(scale_pair), scale_bottom = scale_twice_bottom(scale_pair);
      uint32_t a_0[4], a_1[4];
      codes_minus_zeros<T>(words[2 * half], zero_top, zero_bottom, a_0);
      codes_minus_zeros<T>(words[2 * half + 1], zero_top, zero_bottom, a_1);
      apply_scales<T>(a_0, scale_top, scale_bottom);
      apply_scales<T>(a_1, scale_top, scale_bottom);
      VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) {
        const int r = m * 8 + lane % 8, chunk = half * 4 + lane / 8;
        uint32_t fragment[4];
        ldmatrix_x4(fragment, stage_inputs + r * INPUT_ROW + ((chunk ^ (r % 8)) * 16));
        const uint32_t b_0[2] = {fragment[0], fragment[1]}, b_1[2] = {fragment[2], fragment[3]};
        mma_m16n8k16<T>(sums[m], a_0, b_0);
        mma_m16n8k16<T>(sums[m], a_1, b_1);
      }
    }
    sync_block();
  }
  VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) VQ_UNROLL for (int e = 0; e < 4; ++e) {
    int token = first_token + m * 8 + 2 * pair + e % 2;
    int r = strip * TILE_ROWS + sub_tile * 16 + row + (e / 2) * 8;
    if (token < tokens) outputs[(size_t)token * rows + r] = round_to<T>(sums[m][e]);
  }
}

}  // namespace vq

#define VQ_GEMM(NAME, T, GROUPS_OF_32, ASYMMETRIC)                                                                   \
  VQ_KERNEL(256)                                                                                                     \
  NAME(const uint4* codes, const uint32_t* scales, const uint8_t* zeros, const uint16_t* inputs, uint16_t* outputs,  \
       int tokens, int rows, int columns, int group_size) {                                                          \
    vq::gemm<T, GROUPS_OF_32, ASYMMETRIC>(codes, scales, zeros, inputs, outputs, tokens, rows, columns, group_size); \
  }
