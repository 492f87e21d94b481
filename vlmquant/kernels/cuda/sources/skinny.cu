// Few tokens (up to 32) times a packed weight, on any architecture from sm_80: bound by reading the weight once.
//
// Grid: (strips, splits). A block multiplies one strip of 64 rows; the blocks of a strip share its columns. Block: 8
// warps; warp w takes sub-tile w % 4 (16 rows) and every second unit of 128 columns, from w / 4 on. Weights are operand
// a of mma_m16n8k16 and tokens its columns ("swapped"), so 8 tokens cost as much as one.
//   * Codes, scales and zeros go from global memory to registers, PREFETCH units ahead.
//   * The block's slice of the inputs lies in shared memory; rows are 16 bytes longer than they need be, so that the 8
//     rows of an ldmatrix matrix lie in different banks.
//   * A group's scale multiplies its float32 sum, so no weight is rounded.
//   * The last block of a strip to finish adds the sums of all splits in their order: the same bits every time.
#include "vq4.cuh"
namespace vq {

// codes       VQ4 tiles [rows / 64][columns / 64][128] of uint4
// scales      [rows / 64][groups][32], a pair of T each (rows r and r + 8 of a sub-tile); groups = columns / group_size
// zeros       [rows / 64][groups][64] bytes, two for each pair; not read if symmetric (zero 8)
// inputs      [tokens][columns] of T, 16-byte aligned
// outputs     [tokens][rows] of T
// workspace   [splits][tokens][rows] float; not touched if there is one split
// semaphores  one for each strip: how many of its blocks are done; zero before and after
// tokens      1 to 8 * TOKEN_TILES
// group_size  GROUP; or, if that is 128, a multiple of 128, or `columns` (one group)
// Dynamic shared memory: the larger of tokens * (slice + 8) * 2 bytes, where slice = 128 * the most units of a split,
// and 2 * 64 * 8 * TOKEN_TILES * 4 bytes.
template <class T, int TOKEN_TILES, int GROUP, bool ASYMMETRIC>
VQ_DEVICE void skinny(const uint4* __restrict__ codes, const uint32_t* __restrict__ scales,
                      const uint8_t* __restrict__ zeros, const uint16_t* __restrict__ inputs,
                      uint16_t* __restrict__ outputs, float* __restrict__ workspace,
                      uint32_t* __restrict__ semaphores, int tokens, int rows, int columns, int group_size) {
  constexpr int K_SLICES = 2;                           // warps that share a sub-tile, each with its own units
  constexpr int PREFETCH = TOKEN_TILES == 1 ? 4 : 2;    // units on their way to registers: more tokens leave fewer
  constexpr int UNIT_GROUPS = 128 / GROUP;              // groups of a unit (at least a part of one)
  constexpr int CHAINS = TOKEN_TILES == 1 ? 2 : 1;      // independent sums, where one tile has too few to hide latency
  VQ_SHARED_MEMORY(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sub_tile = warp % 4, k_slice = warp / 4;
  const int row = lane / 4, pair = lane % 4;
  const int strip = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
  const int k_blocks = columns / TILE_K, units = (k_blocks + 1) / 2;
  const int first_unit = (int)((long long)units * split / splits);
  const int end_unit = (int)((long long)units * (split + 1) / splits);
  const int groups = columns / group_size;

  struct Unit {  // this lane's share of 16 rows x 128 columns
    uint4 codes[2];
    uint32_t scales[UNIT_GROUPS];
    uint32_t zeros[UNIT_GROUPS];
  } ahead[PREFETCH];
  const uint4* lane_codes = codes + ((size_t)strip * k_blocks * 4 + sub_tile) * 32 + lane;
  const uint32_t* lane_scales = scales + (size_t)strip * groups * SCALE_PAIRS + sub_tile * 8 + row;
  const uint8_t* lane_zeros = zeros + ((size_t)strip * groups * SCALE_PAIRS + sub_tile * 8 + row) * 2;
  const int units_per_group = GROUP == 128 ? group_size / 128 : 1;
  auto fetch = [&](Unit& into, int unit) {
    const int k_block = unit * 2;
    into.codes[0] = load_stream(lane_codes + (size_t)k_block * TILE_VECTORS);
    if (k_block + 1 < k_blocks) {
      into.codes[1] = load_stream(lane_codes + (size_t)(k_block + 1) * TILE_VECTORS);
    } else {  // past the end: inputs are zero there, any code will do
      into.codes[1].x = into.codes[1].y = into.codes[1].z = into.codes[1].w = 0;
    }
    VQ_UNROLL for (int i = 0; i < UNIT_GROUPS; ++i) {
      int group = GROUP == 128 ? (units_per_group == 1 ? unit : unit / units_per_group) : unit * UNIT_GROUPS + i;
      if (group >= groups) group = groups - 1;
      into.scales[i] = lane_scales[(size_t)group * SCALE_PAIRS];
      if (ASYMMETRIC) into.zeros[i] = *(const uint16_t*)(lane_zeros + (size_t)group * ZERO_BYTES);
    }
  };

  // The slice of the inputs: zeros past the end of the columns; 8 elements of padding in each row.
  uint16_t* slice = (uint16_t*)shared;
  const int slice_columns = (end_unit - first_unit) * 128, slice_stride = slice_columns + 8;
  const int columns_left = columns - first_unit * 128;
  const int slice_chunks = (columns_left < slice_columns ? columns_left : slice_columns) / 8;  // of 16 bytes
  VQ_UNROLL for (int i = 0; i < PREFETCH; ++i) {
    const int unit = first_unit + k_slice + i * K_SLICES;
    if (unit < end_unit) fetch(ahead[i], unit);
  }
  for (int i = threadIdx.x; i < tokens * (slice_columns / 8); i += blockDim.x) {
    const int token = i / (slice_columns / 8), chunk = i - token * (slice_columns / 8);
    const bool inside = chunk < slice_chunks;
    cp_async_16(slice + token * slice_stride + chunk * 8,
                inputs + (size_t)token * columns + first_unit * 128 + (inside ? chunk : 0) * 8, inside);
  }
  cp_async_commit();

  float sums[TOKEN_TILES][4] = {};
  // Where this lane's ldmatrix row begins; tokens past the last repeat it, and their sums are never stored.
  int lane_input[TOKEN_TILES];
  VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) {
    const int token = m * 8 + lane % 8;
    lane_input[m] = (token < tokens ? token : tokens - 1) * slice_stride + (lane / 8) * 8;
  }
  cp_async_wait<0>();
  sync_block();

  for (int base = first_unit + k_slice; base < end_unit; base += PREFETCH * K_SLICES) {
    VQ_UNROLL for (int i = 0; i < PREFETCH; ++i) {
      const int unit = base + i * K_SLICES;
      if (unit < end_unit) {
        const Unit now = ahead[i];
        const int next_unit = unit + PREFETCH * K_SLICES;
        if (next_unit < end_unit) fetch(ahead[i], next_unit);
        float group_sums[CHAINS][TOKEN_TILES][4];
        VQ_UNROLL for (int b = 0; b < 2; ++b) VQ_UNROLL for (int half = 0; half < 2; ++half) {  // 32 columns
          const int group = GROUP == 32 ? b * 2 + half : GROUP == 64 ? b : 0;  // of the unit
          const bool first = GROUP == 32 || (GROUP == 64 && half == 0) || (b == 0 && half == 0);
          const bool last = GROUP == 32 || (GROUP == 64 && half == 1) || (b == 1 && half == 1);
          if (first) {
            VQ_UNROLL for (int c = 0; c < CHAINS; ++c) VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m)
              VQ_UNROLL for (int e = 0; e < 4; ++e) group_sums[c][m][e] = 0.f;
          }
          uint32_t zero_top = 8, zero_bottom = 8;
          if (ASYMMETRIC) {
            zero_top = now.zeros[group] & 255;
            zero_bottom = now.zeros[group] >> 8;
          }
          const uint32_t top = zero_constant_top<T>(zero_top), bottom = zero_constant_bottom<T>(zero_bottom);
          const uint32_t word_0 = half == 0 ? now.codes[b].x : now.codes[b].z;
          const uint32_t word_1 = half == 0 ? now.codes[b].y : now.codes[b].w;
          uint32_t a_0[4], a_1[4];  // of two k-steps
          codes_minus_zeros<T>(word_0, top, bottom, a_0);
          codes_minus_zeros<T>(word_1, top, bottom, a_1);
          VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) {
            uint32_t fragment[4];
            ldmatrix_x4(fragment, slice + lane_input[m] + (unit - first_unit) * 128 + b * 64 + half * 32);
            const uint32_t b_0[2] = {fragment[0], fragment[1]}, b_1[2] = {fragment[2], fragment[3]};
            mma_m16n8k16<T>(group_sums[0][m], a_0, b_0);
            mma_m16n8k16<T>(group_sums[CHAINS - 1][m], a_1, b_1);
          }
          if (last) {
            const float scale_top = low_float<T>(now.scales[group]), scale_bottom = high_float<T>(now.scales[group]);
            VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) VQ_UNROLL for (int e = 0; e < 4; ++e) {
              const float sum = CHAINS == 2 ? group_sums[0][m][e] + group_sums[CHAINS - 1][m][e] : group_sums[0][m][e];
              sums[m][e] += sum * (e < 2 ? scale_top : scale_bottom);
            }
          }
        }
      }
    }
  }

  // Sum over the k-slices in their order, through shared memory: [K_SLICES][64 rows][8 * TOKEN_TILES tokens].
  sync_block();
  float* shared_sums = (float*)shared;
  VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) VQ_UNROLL for (int e = 0; e < 4; ++e) {
    const size_t line = (size_t)k_slice * 64 + sub_tile * 16 + row + (e / 2) * 8;
    shared_sums[line * (8 * TOKEN_TILES) + m * 8 + 2 * pair + e % 2] = sums[m][e];
  }
  sync_block();
  const int first_row = strip * TILE_ROWS;
  for (int i = threadIdx.x; i < TILE_ROWS * tokens; i += blockDim.x) {
    const int token = i / TILE_ROWS, r = i % TILE_ROWS;
    float sum = 0;
    VQ_UNROLL for (int k = 0; k < K_SLICES; ++k) sum += shared_sums[((size_t)k * 64 + r) * (8 * TOKEN_TILES) + token];
    if (splits == 1) {
      outputs[(size_t)token * rows + first_row + r] = round_to<T>(sum);
    } else {
      workspace[((size_t)split * tokens + token) * rows + first_row + r] = sum;
    }
  }
  if (splits == 1) return;

  fence_gpu();
  sync_block();
  uint32_t* blocks_before = (uint32_t*)shared;
  if (threadIdx.x == 0) blocks_before[0] = atomic_increment(semaphores + strip);
  sync_block();
  if (blocks_before[0] == (uint32_t)(splits - 1)) {  // every other block of the strip has written its sums
    fence_gpu();
    for (int i = threadIdx.x; i < TILE_ROWS * tokens; i += blockDim.x) {
      const int token = i / TILE_ROWS, r = i % TILE_ROWS;
      float sum = 0;
      for (int s = 0; s < splits; ++s) {
        sum += ((const volatile float*)workspace)[((size_t)s * tokens + token) * rows + first_row + r];
      }
      outputs[(size_t)token * rows + first_row + r] = round_to<T>(sum);
    }
    if (threadIdx.x == 0) semaphores[strip] = 0;
  }
}

// Blocks that an SM must hold; 0: no demand. On 8.6 and 8.9 ptxas forces one entry into the 80 registers that a third
// block leaves, and spills its scales as they arrive, which waits for each load.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
template <class T, int TOKEN_TILES, int GROUP, bool ASYMMETRIC>
constexpr int SKINNY_BLOCKS = T::is_bf16 && TOKEN_TILES == 1 && GROUP == 128 && !ASYMMETRIC ? 2 : 0;
#else
template <class T, int TOKEN_TILES, int GROUP, bool ASYMMETRIC> constexpr int SKINNY_BLOCKS = 0;
#endif

}  // namespace vq

#define VQ_SKINNY(NAME, T, TOKEN_TILES, GROUP, ASYMMETRIC)                                                          \
  VQ_KERNEL_RESIDENT(256, (vq::SKINNY_BLOCKS<T, TOKEN_TILES, GROUP, ASYMMETRIC>))                                   \
  NAME(const uint4* codes, const uint32_t* scales, const uint8_t* zeros, const uint16_t* inputs, uint16_t* outputs, \
       float* workspace, uint32_t* semaphores, int tokens, int rows, int columns, int group_size) {                 \
    vq::skinny<T, TOKEN_TILES, GROUP, ASYMMETRIC>(codes, scales, zeros, inputs, outputs, workspace, semaphores,     \
                                                  tokens, rows, columns, group_size);                               \
  }
