// 17 to 48 tokens times a packed weight on Hopper (sm_90a): skinny_hopper without its producer warp.
//
// Grid, order of the work, dependent launch, stages of the ring and a warp's part of them: as in skinny_hopper.cu.
// Block: 8 warps, all of them consumers, so that two blocks on an SM leave a thread 128 registers instead of 96.
//   * The ring is refilled between units. After its part of unit u a warp requests unit u - 1 + stages into the stage
//     that unit u - 1 had, as soon as all warps have left it; most have, since they had all of unit u to do so. Warps
//     take turns, one for each unit. A refill waits only for units before u, and those for earlier refills, so two
//     stages are enough to go on.
//   * Inputs are loaded one step (32 columns) ahead of their products.
//   * SUM_GROUPS: a group's scale multiplies its float32 sums, which takes fewer instructions and rounds no weight.
//     Above 32 tokens there are too few registers for that, and groups below 128 have too many sums: then it multiplies
//     the weights.
#include "persistent.cuh"
#include "vq4.cuh"
namespace vq {

// Arguments and shared memory as those of skinny_hopper; tokens up to 8 * TOKEN_TILES.
template <class T, int TOKEN_TILES, int GROUP, bool ASYMMETRIC>
VQ_DEVICE void skinny_wide_hopper(const VqTensorMap* input_map, const uint4* __restrict__ codes,
                                  const uint32_t* __restrict__ scales, const uint8_t* __restrict__ zeros,
                                  uint16_t* __restrict__ outputs, float* __restrict__ workspace,
                                  uint32_t* __restrict__ semaphores, int tokens, int rows, int columns,
                                  int group_size, int stages) {
  constexpr int K_BLOCKS = 2, STRIPS = 4, WARPS = 8;  // of a unit, of a tile, and of a block
  constexpr int INPUT_BYTES = TOKEN_TILES * 1024;     // inputs of a k-block: 8 tokens x 128 bytes for each tile
  constexpr int UNIT_GROUPS = 128 / GROUP;            // groups of a unit (at least a part of one)
  constexpr int FRAGMENTS = 2 * TOKEN_TILES;          // of 4 sums, in a lane
  constexpr bool SUM_GROUPS = GROUP == 128 && TOKEN_TILES <= 4;
  constexpr bool TIGHT = TOKEN_TILES == 6 && ASYMMETRIC;  // ptxas would spill if it began a step early
  VQ_SHARED_MEMORY(shared_start);
  unsigned char* shared = VQ_ALIGN_1024(shared_start);
  uint64_t* full = (uint64_t*)shared;                 // [32]: the stage's copies have landed
  uint64_t* empty = full + 32;                        // [32]: all warps are done with the stage
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int k_blocks = columns / TILE_K, strips = rows / TILE_ROWS;
  const int units = (k_blocks + K_BLOCKS - 1) / K_BLOCKS, tiles = (strips + STRIPS - 1) / STRIPS;
  const int groups = columns / group_size;
  // Offsets inside of a stage.
  constexpr int CODES_AT = K_BLOCKS * INPUT_BYTES, SCALES_AT = CODES_AT + STRIPS * K_BLOCKS * TILE_BYTES;
  constexpr int ZEROS_AT = SCALES_AT + STRIPS * UNIT_GROUPS * SCALE_BYTES;
  constexpr int END = ZEROS_AT + (ASYMMETRIC ? STRIPS * UNIT_GROUPS * ZERO_BYTES : 0), STAGE = (END + 1023) & ~1023;
  unsigned char* ring = shared + 1024;

  Shares shares;
  shares.units = tiles * units;
  shares.per_block = shares.units / (int)gridDim.x;
  shares.remainder = shares.units - shares.per_block * (int)gridDim.x;
  const int me = (int)gridDim.x - 1 - (int)blockIdx.x;
  const int first_unit = shares.begin(me), end_unit = shares.begin(me + 1);
  if (threadIdx.x == 0) {
    tensor_map_prefetch(input_map);
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, WARPS);
    }
    mbarrier_init_fence();
  }
  sync_block();
  dependency_launch();

  // Requests weights, scales and zeros of unit u: lane i copies for strip i. The bytes of its inputs are expected too.
  auto request_weights = [&](int u, int stage) {
    const int tile = u / units, k_block = (u - tile * units) * K_BLOCKS, strip = tile * STRIPS;
    const int unit_blocks = k_blocks - k_block < K_BLOCKS ? k_blocks - k_block : K_BLOCKS;
    const int tile_strips = strips - strip < STRIPS ? strips - strip : STRIPS;
    const int group = GROUP == 128 ? k_block * TILE_K / group_size : k_block * TILE_K / GROUP;
    const int unit_groups = GROUP == 128 ? 1 : groups - group < UNIT_GROUPS ? groups - group : UNIT_GROUPS;
    unsigned char* to = ring + stage * STAGE;
    if (lane == 0) {
      const int group_bytes = ASYMMETRIC ? SCALE_BYTES + ZERO_BYTES : SCALE_BYTES;
      const int strip_bytes = unit_blocks * TILE_BYTES + unit_groups * group_bytes;
      mbarrier_expect(full + stage, tile_strips * strip_bytes + K_BLOCKS * INPUT_BYTES);
    }
    sync_warp();
    if (lane < tile_strips) {
      const size_t first_group = (size_t)(strip + lane) * groups + group;
      bulk_copy_stream(to + CODES_AT + lane * K_BLOCKS * TILE_BYTES,
                       codes + ((size_t)(strip + lane) * k_blocks + k_block) * TILE_VECTORS, unit_blocks * TILE_BYTES,
                       full + stage);
      bulk_copy_stream(to + SCALES_AT + lane * UNIT_GROUPS * SCALE_BYTES, scales + first_group * SCALE_PAIRS,
                       unit_groups * SCALE_BYTES, full + stage);
      if (ASYMMETRIC) {
        bulk_copy_stream(to + ZEROS_AT + lane * UNIT_GROUPS * ZERO_BYTES, zeros + first_group * ZERO_BYTES,
                         unit_groups * ZERO_BYTES, full + stage);
      }
    }
  };
  // And its inputs: lane i copies those of k-block i, zeros past the last column.
  auto request_inputs = [&](int u, int stage) {
    if (lane < K_BLOCKS) {
      tma_load_2d(ring + stage * STAGE + lane * INPUT_BYTES, input_map, (u % units * K_BLOCKS + lane) * TILE_K, 0,
                  full + stage);
    }
  };

  // The ring is filled with weights; then the kernel ahead must end, and inputs follow.
  const int at_start = end_unit - first_unit < stages ? end_unit - first_unit : stages;
  for (int i = warp; i < at_start; i += WARPS) request_weights(first_unit + i, i);
  dependency_wait();
  for (int i = warp; i < at_start; i += WARPS) request_inputs(first_unit + i, i);

  const int row = lane / 4, pair = lane % 4;
  const int strip_of_tile = warp / 2, sub_tile = warp % 2 * 2;  // the first of this warp's two sub-tiles
  // This lane's codes, scales and zeros in a stage, and its row for ldmatrix: token lane % 8, chunk lane / 8, swizzled.
  const int lane_codes = CODES_AT + strip_of_tile * K_BLOCKS * TILE_BYTES + (sub_tile * 32 + lane) * 16;
  const int lane_scales = SCALES_AT + strip_of_tile * UNIT_GROUPS * SCALE_BYTES + (sub_tile * 8 + row) * 4;
  const int lane_zeros = ZEROS_AT + strip_of_tile * UNIT_GROUPS * ZERO_BYTES + (sub_tile * 8 + row) * 2;
  const int lane_input = lane % 8 * 128 + ((lane / 8) ^ (lane % 8)) * 16;
  int tile = first_unit / units, unit = first_unit - tile * units, stage = 0, phase = 0;
  float sums[2][TOKEN_TILES][4] = {};  // of the two sub-tiles, over all units so far
  for (int u = first_unit; u < end_unit; ++u) {
    mbarrier_wait(full + stage, phase);
    const unsigned char* from = ring + stage * STAGE;
    // The last unit may lack its second k-block: inputs are zero there, and any finite scale will do.
    const bool half_unit = (k_blocks & 1) && unit == units - 1;
    float group_sums[2][TOKEN_TILES][4];
    uint4 block_codes[2];  // of a k-block: [sub-tile]
    uint32_t fragments[2][TOKEN_TILES][4];
    auto load_inputs = [&](int quarter) {
      VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) {
        ldmatrix_x4(fragments[quarter % 2][m],
                    from + quarter / 2 * INPUT_BYTES + m * 1024 + (lane_input ^ (quarter % 2 * 64)));
      }
    };
    load_inputs(0);
    VQ_UNROLL for (int quarter = 0; quarter < 4; ++quarter) {  // 32 columns: two k-steps
      const int b = quarter / 2, half = quarter % 2;
      const int group = GROUP == 128  ? 0
                        : GROUP == 64 ? (half_unit ? 0 : b)
                                      : (half_unit ? 0 : b * 2) + half;
      const bool first = GROUP == 32 || (GROUP == 64 && half == 0) || quarter == 0;
      const bool last = GROUP == 32 || (GROUP == 64 && half == 1) || quarter == 3;
      if (SUM_GROUPS && first) {
        VQ_UNROLL for (int p = 0; p < 2; ++p) VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m)
          VQ_UNROLL for (int e = 0; e < 4; ++e) group_sums[p][m][e] = 0.f;
      }
      if (TIGHT && quarter > 0) sync_warp();
      if (half == 0) VQ_UNROLL for (int p = 0; p < 2; ++p) {
        block_codes[p] = *(const uint4*)(from + lane_codes + b * TILE_BYTES + p * 512);
      }
      if (quarter < 3) load_inputs(quarter + 1);
      uint32_t a[2][2][4];  // [k-step][sub-tile]
      VQ_UNROLL for (int p = 0; p < 2; ++p) {
        uint32_t zero_top = 8, zero_bottom = 8;
        if (ASYMMETRIC) {
          const uint32_t zero_pair = *(const uint16_t*)(from + lane_zeros + p * 16 + group * ZERO_BYTES);
          zero_top = zero_pair & 255;
          zero_bottom = zero_pair >> 8;
        }
        const uint32_t top = zero_constant_top<T>(zero_top), bottom = zero_constant_bottom<T>(zero_bottom);
        codes_minus_zeros<T>(half ? block_codes[p].z : block_codes[p].x, top, bottom, a[0][p]);
        codes_minus_zeros<T>(half ? block_codes[p].w : block_codes[p].y, top, bottom, a[1][p]);
        if (!SUM_GROUPS) {
          const uint32_t scale_pair = *(const uint32_t*)(from + lane_scales + p * 32 + group * SCALE_BYTES);
          const uint32_t scale_top = scale_twice_top(scale_pair), scale_bottom = scale_twice_bottom(scale_pair);
          VQ_UNROLL for (int k = 0; k < 2; ++k) apply_scales<T>(a[k][p], scale_top, scale_bottom);
        }
      }
      VQ_UNROLL for (int k = 0; k < 2; ++k) VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) {
        const uint32_t(&held)[4] = fragments[quarter % 2][m];
        const uint32_t b_step[2] = {held[2 * k], held[2 * k + 1]};
        VQ_UNROLL for (int p = 0; p < 2; ++p) {
          mma_m16n8k16<T>(SUM_GROUPS ? group_sums[p][m] : sums[p][m], a[k][p], b_step);
        }
      }
      if (SUM_GROUPS && last) {
        VQ_UNROLL for (int p = 0; p < 2; ++p) {
          const uint32_t scale_pair = *(const uint32_t*)(from + lane_scales + p * 32 + group * SCALE_BYTES);
          const float scale_top = low_float<T>(scale_pair), scale_bottom = high_float<T>(scale_pair);
          VQ_UNROLL for (int m = 0; m < TOKEN_TILES; ++m) VQ_UNROLL for (int e = 0; e < 4; ++e) {
            sums[p][m][e] += group_sums[p][m][e] * (e < 2 ? scale_top : scale_bottom);
          }
        }
      }
    }
    sync_warp();
    if (lane == 0) mbarrier_arrive(empty + stage);
    const int next = u - 1 + stages;  // what may follow the unit before this one in its stage
    if (u > first_unit && next < end_unit && u % WARPS == warp) {
      const int before = stage == 0 ? stages - 1 : stage - 1;
      mbarrier_wait(empty + before, stage == 0 ? phase ^ 1 : phase);
      request_weights(next, before);
      request_inputs(next, before);
    }
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
        // Fragment i of block c lies at parts[(c * WARPS * FRAGMENTS + i) * 32].
        float4* parts = (float4*)workspace + warp * (FRAGMENTS * 32) + lane;
        if (me != owner) {
          mine = false;
          VQ_UNROLL for (int i = 0; i < FRAGMENTS; ++i) {
            const float* f = sums[i / TOKEN_TILES][i % TOKEN_TILES];
            float4 part;
            part.x = f[0];
            part.y = f[1];
            part.z = f[2];
            part.w = f[3];
            parts[((size_t)me * WARPS * FRAGMENTS + i) * 32] = part;
          }
          sync_warp();
          if (lane == 0) semaphore_post(semaphores + tile * WARPS + warp);
        } else {
          if (lane == 0) semaphore_wait(semaphores + tile * WARPS + warp, (uint32_t)(last_sharer - owner));
          sync_warp();
          VQ_UNROLL_NOT for (int c = owner + 1; c <= last_sharer; ++c) {
            float4 part[FRAGMENTS];
            VQ_UNROLL for (int i = 0; i < FRAGMENTS; ++i) {
              part[i] = load_from_l2(parts + ((size_t)c * WARPS * FRAGMENTS + i) * 32);
            }
            VQ_UNROLL for (int i = 0; i < FRAGMENTS; ++i) add(sums[i / TOKEN_TILES][i % TOKEN_TILES], part[i]);
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

#define VQ_SKINNY_WIDE_HOPPER(NAME, T, TOKEN_TILES, GROUP, ASYMMETRIC)                                              \
  VQ_KERNEL_RESIDENT(256, 2)                                                                                        \
  NAME(VQ_TENSOR_MAP inputs, const uint4* codes, const uint32_t* scales, const uint8_t* zeros, uint16_t* outputs,   \
       float* workspace, uint32_t* semaphores, int tokens, int rows, int columns, int group_size, int stages) {     \
    vq::skinny_wide_hopper<T, TOKEN_TILES, GROUP, ASYMMETRIC>(&inputs, codes, scales, zeros, outputs, workspace,    \
                                                              semaphores, tokens, rows, columns, group_size,        \
                                                              stages);                                              \
  }
