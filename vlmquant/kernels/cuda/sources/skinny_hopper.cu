// Few tokens (up to 32) times a packed weight on Hopper (sm_90a): bound by reading the weight once.
//
// Grid: any number of blocks, one or two for each SM. Block: 8 consumer warps and a producer warp, for tiles of 256
// rows (four strips). A ring of `stages` in shared memory is filled by the producer; a stage is a unit of 128 columns:
//   inputs [2 k-blocks][8 * TOKEN_TILES tokens][64], by tensor copies with the 128-byte swizzle (see tma_load_2d)
//   codes  [4 strips][2 k-blocks][2048 bytes], scales [4 strips][UNIT_GROUPS][128 bytes], zeros likewise, 64 bytes
//   * A consumer warp takes 32 rows (two sub-tiles) x all columns of a stage, so no sums are shared inside the block,
//     and each fragment of inputs serves two products. Weights are operand a, tokens the columns of mma_m16n8k16.
//   * Up to 16 tokens a group's scale multiplies its float32 sum; above, it multiplies the weights (rounding them), for
//     want of registers.
//   * BIASED (symmetric, few tokens, large groups): the tensor core multiplies codes as biased numbers (biased_codes),
//     and a constant matrix of minus the bias of zero 8 by the same inputs; the sum of both has no bias left. That
//     saves the subtraction for each weight, and costs an addition for each sum of a group.
//   * The units of all row tiles, one tile after the other, are cut evenly over the blocks. A tile that several blocks
//     share is finished by the one that begins it: warp by warp it adds the others' sums in block order, so the bits
//     are the same every time. Shares are given in reverse order of blockIdx: a block waits only for blocks with a
//     LOWER blockIdx, which have been started before it.
//   * Dependent launch: the ring is filled with weights before the kernel ahead has ended, inputs are requested after.
//     So the weights must be complete before the kernel AHEAD starts.
// The 96 registers that two blocks of 288 threads leave to a thread are all in use: after any change look for spills
// with -Xptxas -v. There must be none (4 to 20 bytes cost 3 to 5 %). TIGHT kernels have none because they start a
// quarter of a unit after the one before, and load the codes of the second half when their turn comes.
#include "persistent.cuh"
#include "vq4.cuh"
namespace vq {

// input_map   of the inputs [tokens][columns] of T; box 64 columns x 8 * TOKEN_TILES tokens, 128-byte swizzle
// codes       VQ4 tiles [rows / 64][columns / 64][128] of uint4
// scales      [rows / 64][groups][32], a pair of T each (rows r and r + 8 of a sub-tile); groups = columns / group_size
// zeros       [rows / 64][groups][64] bytes, two for each pair; not read if symmetric (zero 8)
// outputs     [tokens][rows] of T
// workspace   [blocks][8 warps][2 * TOKEN_TILES][32 lanes] of float4: sums of a block for a tile that it did not begin
// semaphores  [row tiles][8 warps]: how many such sums are written; zero before and after
// tokens      1 to 8 * TOKEN_TILES
// group_size  GROUP; or, if that is 128, a multiple of 128, or `columns` (one group)
// stages      of the ring, 2 to 32
// Dynamic shared memory: 2048 + stages * stage_bytes.
template <class T, int TOKEN_TILES, int GROUP, bool ASYMMETRIC>
VQ_DEVICE void skinny_hopper(const VqTensorMap* input_map, const uint4* __restrict__ codes,
                             const uint32_t* __restrict__ scales, const uint8_t* __restrict__ zeros,
                             uint16_t* __restrict__ outputs, float* __restrict__ workspace,
                             uint32_t* __restrict__ semaphores, int tokens, int rows, int columns, int group_size,
                             int stages) {
  constexpr int K_BLOCKS = 2, STRIPS = 4, WARPS = 8;         // of a unit, of a tile, and consumers
  constexpr int INPUT_BYTES = TOKEN_TILES * 1024;            // inputs of a k-block: 8 tokens x 128 bytes for each tile
  constexpr int UNIT_GROUPS = 128 / GROUP;                   // groups of a unit (at least a part of one)
  constexpr bool BIASED = !ASYMMETRIC && TOKEN_TILES * UNIT_GROUPS <= 2;
  constexpr bool SCALE_WEIGHTS = TOKEN_TILES > 2;
  constexpr bool TIGHT = (TOKEN_TILES == 2 && (ASYMMETRIC ? GROUP == 32 && T::is_bf16 : GROUP == 64)) ||
                         (TOKEN_TILES == 4 && GROUP == (ASYMMETRIC ? 128 : 64));
  VQ_SHARED_MEMORY(shared_start);
  unsigned char* shared = VQ_ALIGN_1024(shared_start);
  uint64_t* full = (uint64_t*)shared;                        // [32]: the stage's copies have landed
  uint64_t* empty = full + 32;                               // [32]: all consumer warps are done with the stage
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int k_blocks = columns / TILE_K, strips = rows / TILE_ROWS;
  const int units = (k_blocks + K_BLOCKS - 1) / K_BLOCKS, tiles = (strips + STRIPS - 1) / STRIPS;
  const int groups = columns / group_size;
  // Offsets inside of a stage.
  const int scale_bytes = STRIPS * UNIT_GROUPS * SCALE_BYTES, zero_bytes = ASYMMETRIC ? scale_bytes / 2 : 0;
  const int codes_at = K_BLOCKS * INPUT_BYTES, scales_at = codes_at + STRIPS * K_BLOCKS * TILE_BYTES;
  const int zeros_at = scales_at + scale_bytes, stage_bytes = (zeros_at + zero_bytes + 1023) & ~1023;
  unsigned char* ring = shared + 1024;

  Shares shares;
  shares.units = tiles * units;
  shares.per_block = shares.units / (int)gridDim.x;
  shares.remainder = shares.units - shares.per_block * (int)gridDim.x;
  const int me = (int)gridDim.x - 1 - (int)blockIdx.x;
  const int first_unit = shares.begin(me), end_unit = shares.begin(me + 1);
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, WARPS);
    }
    mbarrier_init_fence();
  }
  sync_block();
  dependency_launch();

  if (warp == WARPS) {  // ---- the producer: lane i copies for strip i, and for k-block i of the inputs
    if (lane == 0) tensor_map_prefetch(input_map);
    int tile = first_unit / units, unit = first_unit - tile * units, stage = 0, phase = 0, input_unit = unit;
    const int at_start = end_unit - first_unit < stages ? end_unit - first_unit : stages;  // stages not used yet
    for (int i = 0; i < end_unit - first_unit; ++i) {
      if (i >= stages) mbarrier_wait(empty + stage, phase ^ 1);
      unsigned char* to = ring + (size_t)stage * stage_bytes;
      const int k_block = unit * K_BLOCKS;
      const int unit_blocks = k_blocks - k_block < K_BLOCKS ? k_blocks - k_block : K_BLOCKS;
      const int strip = tile * STRIPS, tile_strips = strips - strip < STRIPS ? strips - strip : STRIPS;
      const int group = GROUP == 128 ? k_block * TILE_K / group_size : k_block * TILE_K / GROUP;
      const int unit_groups = GROUP == 128 ? 1 : groups - group < UNIT_GROUPS ? groups - group : UNIT_GROUPS;
      if (lane == 0) {
        const int group_bytes = ASYMMETRIC ? SCALE_BYTES + ZERO_BYTES : SCALE_BYTES;
        const int strip_bytes = unit_blocks * TILE_BYTES + unit_groups * group_bytes;
        mbarrier_expect(full + stage, tile_strips * strip_bytes + K_BLOCKS * INPUT_BYTES);
      }
      sync_warp();
      if (lane < tile_strips) {
        bulk_copy_stream(to + codes_at + lane * K_BLOCKS * TILE_BYTES,
                         codes + ((size_t)(strip + lane) * k_blocks + k_block) * TILE_VECTORS,
                         unit_blocks * TILE_BYTES, full + stage);
        bulk_copy_stream(to + scales_at + lane * UNIT_GROUPS * SCALE_BYTES,
                         scales + ((size_t)(strip + lane) * groups + group) * SCALE_PAIRS, unit_groups * SCALE_BYTES,
                         full + stage);
        if (ASYMMETRIC) {
          bulk_copy_stream(to + zeros_at + lane * UNIT_GROUPS * ZERO_BYTES,
                           zeros + ((size_t)(strip + lane) * groups + group) * ZERO_BYTES, unit_groups * ZERO_BYTES,
                           full + stage);
        }
      }
      if (i >= at_start && lane < K_BLOCKS) {  // past the last column the copy gives zeros
        tma_load_2d(to + lane * INPUT_BYTES, input_map, (k_block + lane) * TILE_K, 0, full + stage);
      }
      if (++unit == units) {
        unit = 0;
        ++tile;
      }
      if (++stage == stages) {
        stage = 0;
        phase ^= 1;
      }
      if (i == at_start - 1) {  // the ring is full of weights: now the kernel ahead must end, then the inputs follow
        dependency_wait();
        for (int s = 0; s < at_start; ++s) {
          if (lane < K_BLOCKS) {
            tma_load_2d(ring + (size_t)s * stage_bytes + lane * INPUT_BYTES, input_map,
                        (input_unit * K_BLOCKS + lane) * TILE_K, 0, full + s);
          }
          if (++input_unit == units) input_unit = 0;
        }
      }
    }
    return;
  }

  // ---- the consumers
  dependency_wait();
  const int row = lane / 4, pair = lane % 4;
  const int strip_of_tile = warp / 2, sub_tile = warp % 2 * 2;  // the first of this warp's two sub-tiles
  // Minus the bias of zero 8, as an A fragment: -(128 + 8) in bf16; in fp16 -(1024 + 8), and -(1024 + 16 * 8) at the
  // bottom, where sums come out 16 times too large.
  const uint32_t bias_top = T::is_bf16 ? 0xc308c308u : 0xe408e408u;
  const uint32_t bias_bottom = T::is_bf16 ? 0xc308c308u : 0xe480e480u;
  const uint32_t bias[4] = {bias_top, bias_bottom, bias_top, bias_bottom};
  // This lane's codes, scales and zeros in a stage, and its row for ldmatrix: token lane % 8, chunk lane / 8, swizzled.
  const int lane_codes = codes_at + strip_of_tile * K_BLOCKS * TILE_BYTES + (sub_tile * 32 + lane) * 16;
  const int lane_scales = scales_at + strip_of_tile * UNIT_GROUPS * SCALE_BYTES + (sub_tile * 8 + row) * 4;
  const int lane_zeros = zeros_at + strip_of_tile * UNIT_GROUPS * ZERO_BYTES + (sub_tile * 8 + row) * 2;
  const int lane_input = lane % 8 * 128 + ((lane / 8) ^ (lane % 8)) * 16;
  int tile = first_unit / units, unit = first_unit - tile * units, stage = 0, phase = 0;
  float sums[2][TOKEN_TILES][4] = {};  // of the two sub-tiles, over all units so far
  for (int u = first_unit; u < end_unit; ++u) {
    mbarrier_wait(full + stage, phase);
    const unsigned char* from = ring + (size_t)stage * stage_bytes;
    // The last unit may lack its second k-block: inputs are zero there, and any finite scale will do.
    const bool half_unit = (k_blocks & 1) && unit == units - 1;
    constexpr int CHAINS = TOKEN_TILES == 1 ? 2 : 1;     // independent sums (even and odd k-steps) where tiles are few
    constexpr int AHEAD = TOKEN_TILES == 1 ? 1 : 0;      // inputs are loaded one step ahead where registers allow it
    float group_sums[CHAINS][2][TOKEN_TILES][4], bias_sums[CHAINS][TOKEN_TILES][4];
    uint4 unit_codes[2][2];                              // [k-block][sub-tile]
    uint32_t fragments[1 + AHEAD][TOKEN_TILES][4];
    VQ_UNROLL for (int b = 0; b < (TIGHT ? 1 : 2); ++b) VQ_UNROLL for (int p = 0; p < 2; ++p) {
      unit_codes[b][p] = *(const uint4*)(from + lane_codes + b * TILE_BYTES + p * 512);
    }
    if (AHEAD) {
      VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) ldmatrix_x4(fragments[0][m], from + m * 1024 + lane_input);
    }
    VQ_UNROLL for (int quarter = 0; quarter < 4; ++quarter) {  // 32 columns: two k-steps
      const int b = quarter / 2, half = quarter % 2;
      const int group = GROUP == 128  ? 0
                        : GROUP == 64 ? (half_unit ? 0 : b)
                                      : (half_unit ? 0 : b * 2) + half;
      const bool first = GROUP == 32 || (GROUP == 64 && half == 0) || quarter == 0;
      const bool last = GROUP == 32 || (GROUP == 64 && half == 1) || quarter == 3;
      if (first && !SCALE_WEIGHTS) {
        VQ_UNROLL for (int c = 0; c < CHAINS; ++c) VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m)
          VQ_UNROLL for (int e = 0; e < 4; ++e) {
            bias_sums[c][m][e] = 0.f;
            group_sums[c][0][m][e] = 0.f;
            group_sums[c][1][m][e] = 0.f;
          }
      }
      if (TIGHT && quarter > 0) sync_warp();
      if (TIGHT && quarter == 2) VQ_UNROLL for (int p = 0; p < 2; ++p) {
        unit_codes[1][p] = *(const uint4*)(from + lane_codes + TILE_BYTES + p * 512);
      }
      const int wanted = AHEAD ? quarter + 1 : quarter, held = AHEAD ? quarter & 1 : 0;
      if (wanted < 4) {
        VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) {
          ldmatrix_x4(fragments[AHEAD ? wanted & 1 : 0][m],
                      from + wanted / 2 * INPUT_BYTES + m * 1024 + (lane_input ^ (wanted % 2 * 64)));
        }
      }
      uint32_t a[2][2][4];  // [k-step][sub-tile]
      VQ_UNROLL for (int p = 0; p < 2; ++p) {
        const uint32_t word_0 = half ? unit_codes[b][p].z : unit_codes[b][p].x;
        const uint32_t word_1 = half ? unit_codes[b][p].w : unit_codes[b][p].y;
        if (BIASED) {
          biased_codes<T>(word_0, a[0][p]);
          biased_codes<T>(word_1, a[1][p]);
        } else {
          uint32_t zero_top = 8, zero_bottom = 8;
          if (ASYMMETRIC) {
            const uint32_t zero_pair = *(const uint16_t*)(from + lane_zeros + p * 16 + group * ZERO_BYTES);
            zero_top = zero_pair & 255;
            zero_bottom = zero_pair >> 8;
          }
          const uint32_t top = zero_constant_top<T>(zero_top), bottom = zero_constant_bottom<T>(zero_bottom);
          codes_minus_zeros<T>(word_0, top, bottom, a[0][p]);
          codes_minus_zeros<T>(word_1, top, bottom, a[1][p]);
          if (SCALE_WEIGHTS) {
            const uint32_t scale_pair = *(const uint32_t*)(from + lane_scales + p * 32 + group * SCALE_BYTES);
            const uint32_t scale_top = scale_twice_top(scale_pair), scale_bottom = scale_twice_bottom(scale_pair);
            VQ_UNROLL for (int i = 0; i < 4; ++i) {
              a[0][p][i] = multiply2<T>(a[0][p][i], i & 1 ? scale_bottom : scale_top);
              a[1][p][i] = multiply2<T>(a[1][p][i], i & 1 ? scale_bottom : scale_top);
            }
          }
        }
      }
      VQ_UNROLL for (int k = 0; k < 2; ++k) {  // the products of one k-step do not depend on each other
        const int c = CHAINS == 2 ? k : 0;
        VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) {
          const uint32_t b_step[2] = {fragments[held][m][2 * k], fragments[held][m][2 * k + 1]};
          VQ_UNROLL for (int p = 0; p < 2; ++p) {
            if (SCALE_WEIGHTS) {
              mma_m16n8k16<T>(sums[p][m], a[k][p], b_step);
            } else {
              mma_m16n8k16<T>(group_sums[c][p][m], a[k][p], b_step);
            }
          }
          if (BIASED) mma_m16n8k16<T>(bias_sums[c][m], bias, b_step);
        }
      }
      if (last && !SCALE_WEIGHTS) {
        VQ_UNROLL for (int p = 0; p < 2; ++p) {
          const uint32_t scale_pair = *(const uint32_t*)(from + lane_scales + p * 32 + group * SCALE_BYTES);
          float scale_top = low_float<T>(scale_pair), scale_bottom = high_float<T>(scale_pair);
          if (BIASED && !T::is_bf16) scale_bottom *= 0.0625f;
          VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) VQ_UNROLL for (int e = 0; e < 4; ++e) {
            float sum = group_sums[0][p][m][e];
            if (CHAINS == 2) sum += group_sums[CHAINS - 1][p][m][e];
            if (BIASED) {
              float bias_sum = bias_sums[0][m][e];
              if (CHAINS == 2) bias_sum += bias_sums[CHAINS - 1][m][e];
              sum += bias_sum;
            }
            sums[p][m][e] += sum * (e < 2 ? scale_top : scale_bottom);
          }
        }
      }
    }
    sync_warp();
    if (lane == 0) mbarrier_arrive(empty + stage);
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
    ++unit;

    if (unit == units || u == end_unit - 1) {  // the end of this block's share of the tile
      const int owner = shares.owner(tile * units), last_sharer = shares.owner(tile * units + units - 1);
      const int strip = tile * STRIPS + strip_of_tile;
      bool mine = strip < strips;  // this warp stores outputs
      if (owner != last_sharer && mine) {
        // Fragment i of block c lies at parts[(c * WARPS * 2 * TOKEN_TILES + i) * 32].
        float4* parts = (float4*)workspace + warp * (2 * TOKEN_TILES * 32) + lane;
        if (me != owner) {
          mine = false;
          VQ_UNROLL for (int i = 0; i < 2 * TOKEN_TILES; ++i) {
            const float* f = sums[i / TOKEN_TILES][i % TOKEN_TILES];
            float4 part;
            part.x = f[0];
            part.y = f[1];
            part.z = f[2];
            part.w = f[3];
            parts[((size_t)me * WARPS * 2 * TOKEN_TILES + i) * 32] = part;
          }
          sync_warp();
          if (lane == 0) semaphore_post(semaphores + tile * WARPS + warp);
        } else {
          if (lane == 0) semaphore_wait(semaphores + tile * WARPS + warp, (uint32_t)(last_sharer - owner));
          sync_warp();
          if (TOKEN_TILES == 1) {
            int c = owner + 1;
            for (; c + 3 <= last_sharer; c += 4) {  // the parts of four blocks are requested together
              float4 part[4][2];
              VQ_UNROLL for (int r = 0; r < 4; ++r) VQ_UNROLL for (int i = 0; i < 2; ++i) {
                part[r][i] = load_from_l2(parts + ((size_t)(c + r) * WARPS * 2 + i) * 32);
              }
              VQ_UNROLL for (int r = 0; r < 4; ++r) VQ_UNROLL for (int i = 0; i < 2; ++i) {
                add(sums[i][0], part[r][i]);
              }
            }
            for (; c <= last_sharer; ++c) VQ_UNROLL for (int i = 0; i < 2; ++i) {
              add(sums[i][0], load_from_l2(parts + ((size_t)c * WARPS * 2 + i) * 32));
            }
          } else {
            constexpr int TOGETHER = 1;  // a loop of one: written so because ptxas then spills nothing for 32 tokens
            for (int c = owner + 1; c <= last_sharer; c += TOGETHER) {
              float4 part[TOGETHER][2 * TOKEN_TILES];
              VQ_UNROLL for (int r = 0; r < TOGETHER; ++r) if (c + r <= last_sharer) {
                VQ_UNROLL for (int i = 0; i < 2 * TOKEN_TILES; ++i) {
                  part[r][i] = load_from_l2(parts + ((size_t)(c + r) * WARPS * 2 * TOKEN_TILES + i) * 32);
                }
              }
              VQ_UNROLL for (int r = 0; r < TOGETHER; ++r) if (c + r <= last_sharer) {
                VQ_UNROLL for (int i = 0; i < 2 * TOKEN_TILES; ++i) {
                  add(sums[i / TOKEN_TILES][i % TOKEN_TILES], part[r][i]);
                }
              }
            }
          }
        }
      }
      VQ_UNROLL for (int p = 0; p < 2; ++p) VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) {
        const RowPairs pairs = row_pairs<T>(sums[p][m], row);
        const int token = m * 8 + 2 * pair + pairs.odd;
        const int r = strip * TILE_ROWS + (sub_tile + p) * 16 + (row & ~1);
        if (mine && token < tokens) {
          uint32_t* to = (uint32_t*)(outputs + (size_t)token * rows + r);
          to[0] = pairs.top;
          to[4] = pairs.bottom;
        }
        VQ_UNROLL for (int e = 0; e < 4; ++e) sums[p][m][e] = 0.f;
      }
      if (unit == units) {
        unit = 0;
        ++tile;
      }
    }
  }
}

}  // namespace vq

#define VQ_SKINNY_HOPPER(NAME, T, TOKEN_TILES, GROUP, ASYMMETRIC)                                                   \
  VQ_KERNEL_RESIDENT(288, 2)                                                                                        \
  NAME(VQ_TENSOR_MAP inputs, const uint4* codes, const uint32_t* scales, const uint8_t* zeros, uint16_t* outputs,   \
       float* workspace, uint32_t* semaphores, int tokens, int rows, int columns, int group_size, int stages) {     \
    vq::skinny_hopper<T, TOKEN_TILES, GROUP, ASYMMETRIC>(&inputs, codes, scales, zeros, outputs, workspace,         \
                                                         semaphores, tokens, rows, columns, group_size, stages);    \
  }
