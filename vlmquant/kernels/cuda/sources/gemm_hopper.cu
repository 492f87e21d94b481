// Any number of tokens times a packed weight on Hopper (sm_90a), by wgmma.
//
// Grid: any number of blocks, one or two for each SM. Block: WARPGROUPS consumer warpgroups and one for the producer (a
// single warp of it works; a whole one makes ptxas count registers right). A tile is 64 * WARPGROUPS rows (a strip for
// each warpgroup) x TOKENS tokens. A ring of `stages` in shared memory; a stage is a unit of 128 columns of a tile:
//   inputs [2 k-blocks][TOKENS][64], by tensor copies with the 128-byte swizzle (see tma_load_2d)
//   codes  [strips][2 k-blocks][2048 bytes], scales [strips][groups of the unit][128 bytes], zeros likewise, 64 bytes
//   * Codes become weights in registers, rounded once with their scale, and are operand a of wgmma; tokens are its
//     columns. While wgmma multiplies one k-block, the next is made in other registers.
//   * Schedule: tiles are finished in whole waves of all blocks as far as they go; those of the last, incomplete wave
//     and of the one before it are cut evenly by columns ("stream-K"). A cut tile is finished by the block that begins
//     it, warp by warp, adding the others' sums in block order: the same bits every time. Blocks take part in reverse
//     order of blockIdx: a block waits only for blocks with a LOWER blockIdx.
//   * Dependent launch as in skinny_hopper.cu: the weights must be complete before the kernel AHEAD starts.
// A data-dependent branch around wgmma, or too few registers, makes ptxas serialise every wgmma without a word but for
// the lines C75xx of -Xptxas -v: there must be none. Hence the loop over segments, whose waits stand outside of `if`s.
#include "persistent.cuh"
#include "vq4.cuh"
namespace vq {

// The work of one block: a sequence of units (tile, unit of its columns).
struct Schedule {
  int units, blocks, me;         // units of a tile
  int split_tiles;               // tiles 0 to split_tiles - 1 are cut; then come whole ones
  int tiles, split_units, count; // all tiles; this block's units of cut tiles, and of all
  int done, tile, unit;          // where it stands
  Shares shares;                 // of the units of cut tiles

  VQ_DEVICE Schedule(int tiles_, int units_, int blocks_, int me_) {
    tiles = tiles_;
    units = units_;
    blocks = blocks_;
    me = me_;
    const int waves = tiles / blocks;
    split_tiles = tiles % blocks == 0 ? 0 : waves == 0 ? tiles : tiles - (waves - 1) * blocks;
    shares.per_block = split_tiles * units / blocks;
    shares.remainder = split_tiles * units - shares.per_block * blocks;
    const int begin = shares.begin(me);
    split_units = shares.begin(me + 1) - begin;
    count = split_units + (tiles - split_tiles) / blocks * units;
    done = 0;
    if (split_units) {
      tile = begin / units;
      unit = begin - tile * units;
    } else {
      tile = split_tiles + me;
      unit = 0;
    }
  }
  // Units of the current tile that are this block's.
  VQ_DEVICE int segment() const {
    const int left = units - unit;
    return done < split_units && split_units - done < left ? split_units - done : left;
  }
  VQ_DEVICE void advance(int by) {
    done += by;
    unit += by;
    if (done == split_units) {
      tile = split_tiles + me;
      unit = 0;
    } else if (unit == units) {
      unit = 0;
      tile += done > split_units ? blocks : 1;
    }
  }
};

// input_map    of the inputs [tokens][columns] of T; box 64 columns x TOKENS tokens, 128-byte swizzle
// codes        VQ4 tiles [rows / 64][columns / 64][128] of uint4
// scales       [rows / 64][groups][32], each a pair of T (rows r and r + 8 of a sub-tile); groups: columns / group_size
// zeros        [rows / 64][groups][64] bytes, two for each pair; not read if symmetric (zero 8)
// outputs      [tokens][rows] of T
// workspace    [blocks][consumer warps][TOKENS / 8][32 lanes] of float4: sums of a block for a tile it did not begin
// semaphores   [tiles][consumer warps]: how many such sums are written; zero before and after
// group_size   32 if GROUPS_OF_32; else 64, a multiple of 128, or `columns` (one group)
// stages       of the ring, 2 to 32
// sweep_tiles  token tiles that share one sweep over the weight: so many that their inputs stay in L2
// Dynamic shared memory: 2048 + stages * stage_bytes.
template <class T, int TOKENS, int WARPGROUPS, bool GROUPS_OF_32, bool ASYMMETRIC>
VQ_DEVICE void gemm_hopper(const VqTensorMap* input_map, const uint4* __restrict__ codes,
                           const uint32_t* __restrict__ scales, const uint8_t* __restrict__ zeros,
                           uint16_t* __restrict__ outputs, float* __restrict__ workspace,
                           uint32_t* __restrict__ semaphores, int tokens, int rows, int columns, int group_size,
                           int stages, int sweep_tiles) {
  constexpr int K_BLOCKS = 2, WARPS = WARPGROUPS * 4;  // k-blocks of a unit; consumer warps
  constexpr int INPUT_BYTES = TOKENS * 128;            // inputs of a k-block
  VQ_SHARED_MEMORY(shared_start);
  unsigned char* shared = VQ_ALIGN_1024(shared_start);
  uint64_t* full = (uint64_t*)shared;                  // [32]: the stage's copies have landed
  uint64_t* empty = full + 32;                         // [32]: all consumer warps are done with the stage
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int k_blocks = columns / TILE_K, strips = rows / TILE_ROWS;
  const int row_tiles = (strips + WARPGROUPS - 1) / WARPGROUPS, token_tiles = (tokens + TOKENS - 1) / TOKENS;
  const int unit_columns = K_BLOCKS * TILE_K;
  const int groups_per_unit = group_size >= unit_columns ? 1 : unit_columns / group_size;
  const int groups = columns / group_size;
  // Offsets inside of a stage.
  const int scale_bytes = WARPGROUPS * groups_per_unit * SCALE_BYTES, zero_bytes = ASYMMETRIC ? scale_bytes / 2 : 0;
  const int codes_at = K_BLOCKS * INPUT_BYTES, scales_at = codes_at + WARPGROUPS * K_BLOCKS * TILE_BYTES;
  const int zeros_at = scales_at + scale_bytes, stage_bytes = (zeros_at + zero_bytes + 1023) & ~1023;
  unsigned char* ring = shared + 1024;
  Schedule work(row_tiles * token_tiles, (k_blocks + K_BLOCKS - 1) / K_BLOCKS, (int)gridDim.x,
                (int)gridDim.x - 1 - (int)blockIdx.x);
  // Tiles are numbered sweep by sweep, and within one with the token tile as the fast index.
  auto place = [&](int tile, int& row_tile, int& token_tile) {
    const int per_sweep = row_tiles * sweep_tiles, sweep = tile / per_sweep, in_sweep = tile - sweep * per_sweep;
    const int left = token_tiles - sweep * sweep_tiles, width = left < sweep_tiles ? left : sweep_tiles;
    row_tile = in_sweep / width;
    token_tile = sweep * sweep_tiles + in_sweep - row_tile * width;
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, WARPS);
    }
    mbarrier_init_fence();
  }
  sync_block();
  dependency_launch();

  if (warp >= WARPS) {  // ---- the producer: lane i copies for strip i, and for k-block i of the inputs
    // 640 threads start with 96 registers each: 112 for each consumer leave 32 for the others, whom zeros cost a few.
    registers_shrink<ASYMMETRIC && WARPGROUPS == 4 ? 32 : 24>();
    if (warp == WARPS) {
      const int at_start = work.count < stages ? work.count : stages;  // stages not used yet
      Schedule inputs_work = work;
      int stage = 0, phase = 0;
      auto load_inputs = [&](const Schedule& at, int to_stage) {  // past the last column the copy gives zeros
        int row_tile, token_tile;
        place(at.tile, row_tile, token_tile);
        if (lane < K_BLOCKS) {
          tma_load_2d(ring + (size_t)to_stage * stage_bytes + lane * INPUT_BYTES, input_map,
                      (at.unit * K_BLOCKS + lane) * TILE_K, token_tile * TOKENS, full + to_stage);
        }
      };
      for (; work.done < work.count; work.advance(1)) {
        if (work.done >= stages) mbarrier_wait(empty + stage, phase ^ 1);
        unsigned char* to = ring + (size_t)stage * stage_bytes;
        int row_tile, token_tile;
        place(work.tile, row_tile, token_tile);
        const int k_block = work.unit * K_BLOCKS;
        const int unit_blocks = k_blocks - k_block < K_BLOCKS ? k_blocks - k_block : K_BLOCKS;
        const int strip = row_tile * WARPGROUPS;
        const int tile_strips = strips - strip < WARPGROUPS ? strips - strip : WARPGROUPS;
        const int group = k_block * TILE_K / group_size;
        const int unit_groups = groups - group < groups_per_unit ? groups - group : groups_per_unit;
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
          bulk_copy_stream(to + scales_at + lane * groups_per_unit * SCALE_BYTES,
                           scales + ((size_t)(strip + lane) * groups + group) * SCALE_PAIRS,
                           unit_groups * SCALE_BYTES, full + stage);
          if (ASYMMETRIC) {
            bulk_copy_stream(to + zeros_at + lane * groups_per_unit * ZERO_BYTES,
                             zeros + ((size_t)(strip + lane) * groups + group) * ZERO_BYTES,
                             unit_groups * ZERO_BYTES, full + stage);
          }
        }
        if (work.done >= at_start) load_inputs(work, stage);
        if (++stage == stages) {
          stage = 0;
          phase ^= 1;
        }
        if (work.done == at_start - 1) {  // the ring is full of weights: the kernel ahead must end, then inputs follow
          dependency_wait();
          for (int s = 0; s < at_start; ++s, inputs_work.advance(1)) load_inputs(inputs_work, s);
        }
      }
    }
  } else {  // ---- the consumers
    registers_grow<WARPGROUPS == 4 ? 112 : TOKENS <= 64 ? 104 : 240>();
    dependency_wait();
    const int warpgroup = warp / 4, sub_tile = warp % 4, row = lane / 4, pair = lane % 4;
    int stage = 0, phase = 0, previous = -1;  // previous: the stage before, which wgmma may still be reading
    // Register buffers for operand a: one where registers are short, and other warpgroups fill the gap.
    constexpr int BUFFERS = WARPGROUPS == 4 && TOKENS > 64 ? 1 : 2;
    float sums[TOKENS / 2];
    uint32_t weights[BUFFERS][4][4];  // [k-step][register]
    // This lane's codes, scales and zeros in a stage.
    const int lane_codes = codes_at + warpgroup * K_BLOCKS * TILE_BYTES + (sub_tile * 32 + lane) * 16;
    const int lane_scales = scales_at + warpgroup * groups_per_unit * SCALE_BYTES + (sub_tile * 8 + row) * 4;
    const int lane_zeros = zeros_at + warpgroup * groups_per_unit * ZERO_BYTES + (sub_tile * 8 + row) * 2;
    while (work.done < work.count) {
      VQ_UNROLL for (int i = 0; i < TOKENS / 2; ++i) sums[i] = 0.f;
      const int segment = work.segment();
      // The last unit may lack its second k-block: inputs are zero there, and any finite scale will do.
      const bool ends_half = (k_blocks & 1) && work.unit + segment == work.units;
      for (int u = 0; u < segment; ++u) {
        mbarrier_wait(full + stage, phase);
        unsigned char* from = ring + (size_t)stage * stage_bytes;
        const int second_group = group_size == TILE_K ? (ends_half && u == segment - 1 ? 0 : 1) : 0;
        VQ_UNROLL for (int b = 0; b < K_BLOCKS; ++b) {
          uint32_t(&a)[4][4] = weights[b % BUFFERS];
          const uint4 vector = *(const uint4*)(from + lane_codes + b * TILE_BYTES);
          const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
          if (BUFFERS == 1) {
            wgmma_wait<0>();
            if (b == 0 && u > 0 && lane == 0) mbarrier_arrive(empty + previous);
          }
          uint32_t scale_pair = 0, zero_top = zero_constant_top<T>(8), zero_bottom = zero_constant_bottom<T>(8);
          VQ_UNROLL for (int step = 0; step < 4; ++step) {
            if (step == 0 || (GROUPS_OF_32 && step == 2)) {
              const int group =  // of the unit
                  GROUPS_OF_32 ? (ends_half && u == segment - 1 ? 0 : b * 2) + step / 2 : b * second_group;
              scale_pair = *(const uint32_t*)(from + lane_scales + group * SCALE_BYTES);
              if (ASYMMETRIC) {
                const uint32_t zero_pair = *(const uint16_t*)(from + lane_zeros + group * ZERO_BYTES);
                zero_top = zero_constant_top<T>(zero_pair & 255);
                zero_bottom = zero_constant_bottom<T>(zero_pair >> 8);
              }
            }
            const uint32_t scale_top = scale_twice_top(scale_pair), scale_bottom = scale_twice_bottom(scale_pair);
            codes_minus_zeros<T>(words[step], zero_top, zero_bottom, a[step]);
            apply_scales<T>(a[step], scale_top, scale_bottom);
          }
          const uint64_t inputs = matrix_descriptor(from + b * INPUT_BYTES);
          wgmma_fence();
          VQ_UNROLL for (int step = 0; step < 4; ++step) {
            Wgmma<T, TOKENS>::multiply(sums, a[step], inputs + step * 2);  // 32 bytes on for each k-step
          }
          wgmma_commit();
          if (BUFFERS == 2) wgmma_wait<1>();
          // Every wgmma of the stage before has retired.
          if (BUFFERS == 2 && b == 0 && u > 0 && lane == 0) mbarrier_arrive(empty + previous);
        }
        previous = stage;
        if (++stage == stages) {
          stage = 0;
          phase ^= 1;
        }
      }
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(empty + previous);

      int row_tile, token_tile;
      place(work.tile, row_tile, token_tile);
      const int strip = row_tile * WARPGROUPS + warpgroup, first_token = token_tile * TOKENS;
      bool mine = true;  // this warp stores outputs
      if (work.tile < work.split_tiles) {
        const int owner = work.shares.owner(work.tile * work.units);
        const int last_sharer = work.shares.owner(work.tile * work.units + work.units - 1);
        float4* parts = (float4*)workspace;
        if (work.me != owner) {
          float4* to = parts + ((size_t)work.me * WARPS + warp) * (TOKENS / 8 * 32) + lane;
          mine = false;
          VQ_UNROLL for (int m = 0; m < TOKENS / 8; ++m) {
            float4 part;
            part.x = sums[4 * m];
            part.y = sums[4 * m + 1];
            part.z = sums[4 * m + 2];
            part.w = sums[4 * m + 3];
            to[m * 32] = part;
          }
          sync_warp();
          if (lane == 0) semaphore_post(semaphores + work.tile * WARPS + warp);
        } else if (last_sharer != owner) {
          if (lane == 0) semaphore_wait(semaphores + work.tile * WARPS + warp, (uint32_t)(last_sharer - owner));
          sync_warp();
          auto add_part = [&](int c) {
            const float4* from = parts + ((size_t)c * WARPS + warp) * (TOKENS / 8 * 32) + lane;
            VQ_UNROLL for (int m = 0; m < TOKENS / 8; ++m) {
              const float4 part = load_from_l2(from + m * 32);
              sums[4 * m] += part.x;
              sums[4 * m + 1] += part.y;
              sums[4 * m + 2] += part.z;
              sums[4 * m + 3] += part.w;
            }
          };
          if (ASYMMETRIC && TOKENS == 64) {  // parts of several blocks at once would need registers that are not there
            VQ_UNROLL_NOT for (int c = owner + 1; c <= last_sharer; ++c) add_part(c);
          } else {
            for (int c = owner + 1; c <= last_sharer; ++c) add_part(c);
          }
        }
      }
      if (mine) {
        VQ_UNROLL for (int m = 0; m < TOKENS / 8; ++m) {
          const float tile_sums[4] = {sums[4 * m], sums[4 * m + 1], sums[4 * m + 2], sums[4 * m + 3]};
          const RowPairs pairs = row_pairs<T>(tile_sums, row);
          const int token = first_token + m * 8 + 2 * pair + pairs.odd;
          const int r = strip * TILE_ROWS + sub_tile * 16 + (row & ~1);
          if (token < tokens && strip < strips) {
            uint32_t* to = (uint32_t*)(outputs + (size_t)token * rows + r);
            to[0] = pairs.top;
            to[4] = pairs.bottom;
          }
        }
      }
      work.advance(segment);
    }
  }
}

}  // namespace vq

// Two warpgroups with at most 64 tokens leave room for two blocks on an SM.
#define VQ_GEMM_HOPPER(NAME, T, TOKENS, WARPGROUPS, GROUPS_OF_32, ASYMMETRIC)                                       \
  VQ_KERNEL_RESIDENT(WARPGROUPS * 128 + 128, (WARPGROUPS == 2 && TOKENS <= 64 ? 2 : 1))                             \
  NAME(VQ_TENSOR_MAP inputs, const uint4* codes, const uint32_t* scales, const uint8_t* zeros, uint16_t* outputs,   \
       float* workspace, uint32_t* semaphores, int tokens, int rows, int columns, int group_size, int stages,       \
       int sweep_tiles) {                                                                                           \
    vq::gemm_hopper<T, TOKENS, WARPGROUPS, GROUPS_OF_32, ASYMMETRIC>(&inputs, codes, scales, zeros, outputs,        \
                                                                     workspace, semaphores, tokens, rows, columns,  \
                                                                     group_size, stages, sweep_tiles);              \
  }
