// int8 activations times an int8 weight, on any architecture from sm_80.
//
// Grid: (rows / 128, tokens / TOKENS), rounded up. Block: 8 warps, 2 along the tokens and 4 along the rows, so a warp
// has TOKENS / 2 tokens x 32 rows. A ring of STAGES parts of 64 columns in shared memory is filled by cp.async, with
// zeros beyond the tensors. Sums are exact integers; outputs are scaled, biased and activated in float32, rounded once.
#include "int8.cuh"
namespace vq {

constexpr int W8_ROWS = 128;   // rows of a tile
constexpr int W8_COLUMNS = 64; // columns of a stage, bytes of a line

// input_codes   [tokens][columns] int8, 16-byte aligned; input_scales [tokens]
// codes         [rows, rounded up to a multiple of 32][columns] int8, in the order of pack_w8, 16-byte aligned
// scales        [rows], 16-byte aligned
// bias          [rows] of T, 16-byte aligned, or null
// outputs       [tokens][rows] of T, 16-byte aligned
// columns       a multiple of 16
// Dynamic shared memory: STAGES * (TOKENS + 128) * 64 bytes; STAGES is 3, 4 or 5 for 128, 64 or 32 tokens.
template <class T, int TOKENS, int ACTIVATION>
VQ_DEVICE void w8_gemm(const uint8_t* __restrict__ input_codes, const float* __restrict__ input_scales,
                       const uint8_t* __restrict__ codes, const float* __restrict__ scales,
                       const uint16_t* __restrict__ bias, uint16_t* __restrict__ outputs, int tokens, int rows,
                       int columns) {
  constexpr int STAGES = TOKENS == 128 ? 3 : TOKENS == 64 ? 4 : 5;
  constexpr int LINES = TOKENS + W8_ROWS, STAGE_BYTES = LINES * W8_COLUMNS;  // lines: tokens, then rows
  constexpr int TOKEN_TILES = TOKENS / 32;                                   // of 16 tokens, for each warp
  VQ_SHARED_MEMORY(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_token = blockIdx.y * TOKENS, first_row = blockIdx.x * W8_ROWS;
  const int warp_token = warp / 4 * (TOKENS / 2), warp_row = warp % 4 * 32;
  const int packed_rows = (rows + 31) / 32 * 32, blocks = (columns + W8_COLUMNS - 1) / W8_COLUMNS;
  // Byte of a 16-byte chunk in a stage: two lines share 128 bytes, and eight lines' chunk c lies in eight places.
  auto place = [](int line, int chunk) { return line * W8_COLUMNS + (chunk ^ (line / 2 % 4)) * 16; };
  auto load = [&](int block, int stage) {
    if (block < blocks) {
      for (int i = threadIdx.x; i < LINES * 4; i += blockDim.x) {
        const int line = i / 4, chunk = i % 4, column = block * W8_COLUMNS + chunk * 16;
        const bool is_input = line < TOKENS;
        const int index = is_input ? first_token + line : first_row + line - TOKENS;
        const bool inside = index < (is_input ? tokens : packed_rows) && column < columns;
        const uint8_t* from = (is_input ? input_codes : codes) + (inside ? (size_t)index * columns + column : 0);
        cp_async_16(shared + stage * STAGE_BYTES + place(line, chunk), from, inside);
      }
    }
    cp_async_commit();  // also when empty, so that the count of groups goes on
  };
  VQ_UNROLL for (int s = 0; s < STAGES - 1; ++s) load(s, s);
  int32_t sums[TOKEN_TILES][4][4] = {};
  int stage = 0;
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<STAGES - 2>();
    sync_block();  // this stage is there for all, and all are done with the one before, which is filled again now
    load(block + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
    const unsigned char* from = shared + stage * STAGE_BYTES;
    VQ_UNROLL for (int step = 0; step < 2; ++step) {  // 32 columns each
      uint32_t weights[4][2];
      VQ_UNROLL for (int j = 0; j < 2; ++j) {  // 16 rows: matrices (rows 0-7, chunk 0), (0-7, 1), (8-15, 0), (8-15, 1)
        uint32_t fragment[4];
        const int line = TOKENS + warp_row + j * 16 + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(fragment, from + place(line, step * 2 + lane / 8 % 2));
        weights[2 * j][0] = fragment[0];
        weights[2 * j][1] = fragment[1];
        weights[2 * j + 1][0] = fragment[2];
        weights[2 * j + 1][1] = fragment[3];
      }
      VQ_UNROLL for (int i = 0; i < TOKEN_TILES; ++i) {
        uint32_t inputs[4];  // matrices (tokens 0-7, chunk 0), (8-15, 0), (0-7, 1), (8-15, 1)
        ldmatrix_x4(inputs, from + place(warp_token + i * 16 + lane % 16, step * 2 + lane / 16));
        VQ_UNROLL for (int j = 0; j < 4; ++j) mma_m16n8k32_int8(sums[i][j], inputs, weights[j]);
      }
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  const Finish to = {input_scales, scales, bias, outputs, tokens, rows};
  const RowTerms<T> row_terms(to, first_row + warp_row, lane);
  VQ_UNROLL for (int i = 0; i < TOKEN_TILES; ++i) {
    const TokenScales token_scales(to, first_token + warp_token + i * 16, lane);
    store_outputs<T, ACTIVATION>(to, token_scales, row_terms, [&](int j, int e) { return sums[i][j][e]; });
  }
}

}  // namespace vq

#define VQ_W8_GEMM(NAME, T, TOKENS, ACTIVATION)                                                                      \
  VQ_KERNEL_RESIDENT(256, 2)                                                                                         \
  NAME(const uint8_t* input_codes, const float* input_scales, const uint8_t* codes, const float* scales,             \
       const uint16_t* bias, uint16_t* outputs, int tokens, int rows, int columns) {                                 \
    vq::w8_gemm<T, TOKENS, ACTIVATION>(input_codes, input_scales, codes, scales, bias, outputs, tokens, rows,        \
                                       columns);                                                                     \
  }
