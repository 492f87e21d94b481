// int8 activations times an int8 weight on Hopper (sm_90a), by wgmma with both operands in shared memory.
//
// Grid: persistent blocks, one or two for each SM, in clusters of BLOCKS: 1; 2, with the same rows and 128 tokens each;
// or 4, two by two, so that each has one other with the same rows and one with the same tokens.
// Block: two consumer warpgroups with 64 tokens x ROWS rows each, and one for the producer (of which one thread works).
// A ring of `stages` in shared memory; a stage is 128 columns of a tile, lines of 128 bytes with the 128-byte swizzle:
//   tokens [128][128 bytes], rows [ROWS][128 bytes]; the tensor copies give zeros beyond the tensors
//   * What two blocks need, each copies half of into both. With 256 rows that takes a third of the traffic off L2 in
//     clusters of 2, and half in those of 4: without, a block needs 48 bytes a clock, more than L2 gives. A stage is
//     filled again when the consumers of all blocks that the copies go to are done with it.
//   * Dependent launch: the first stages' weights come before the kernel ahead, which makes input_codes, has ended.
//   * The units (stages) of the first `split_tiles` tiles are cut evenly over the clusters; later tiles stay whole.
//     What several share is finished by the one that begins it: warp by warp it adds the others' sums, which are exact
//     integers, so the outputs have the same bits however the work is cut. The blocks of a cluster go through the same
//     units, each with its part of the tile, and share tiles with the blocks of their rank in other clusters.
//   * Work is given in reverse order of blockIdx: a block waits only for blocks with a LOWER blockIdx, which have been
//     started before it.
// As in gemm_hopper.cu no branch may depend on data around wgmma.
#include "int8.cuh"
#include "persistent.cuh"
namespace vq {

// The work of a cluster: segments of tiles. First come its units of the tiles that are cut, then every
// `clusters`-th of the whole ones.
struct Segments {
  int units, clusters, me, split_tiles;  // units of a tile; tiles that are cut
  int tile, unit, end;                   // this segment: from this unit of the tile to that one
  int later;                             // units of cut tiles after this segment
  Shares shares;                         // of the units of cut tiles

  VQ_DEVICE Segments(int units_, int clusters_, int me_, int split_tiles_) {
    units = units_;
    clusters = clusters_;
    me = me_;
    split_tiles = split_tiles_;
    shares.units = split_tiles * units;
    shares.per_block = shares.units / clusters;
    shares.remainder = shares.units - shares.per_block * clusters;
    const int begin = shares.begin(me), share = shares.begin(me + 1) - begin;
    tile = share ? begin / units : split_tiles + me;
    unit = share ? begin - tile * units : 0;
    end = share && unit + share < units ? unit + share : units;
    later = share ? share - (end - unit) : 0;
  }
  VQ_DEVICE void next() {
    tile = later ? tile + 1 : tile < split_tiles ? split_tiles + me : tile + clusters;
    unit = 0;
    end = later && later < units ? later : units;
    later = later > units ? later - units : 0;
  }
  VQ_DEVICE void next_unit() {
    if (++unit == end) next();
  }
  // The clusters that begin and end the tile.
  VQ_DEVICE int first_sharer() const { return tile < split_tiles ? shares.owner(tile * units) : me; }
  VQ_DEVICE int last_sharer() const { return tile < split_tiles ? shares.owner(tile * units + units - 1) : me; }
};

// input_map     of the codes [tokens][columns], as pairs of bytes; box 64 pairs x 128 tokens, or half of them if BLOCKS
//               is 4; 128-byte swizzle
// weight_map    of the codes [rows, rounded up to a multiple of 32][columns], in the order of pack_w8, likewise;
//               box 64 pairs x ROWS rows, or half of them if BLOCKS is 2 or 4
// input_scales, scales, bias, outputs   as in w8_gemm.cu
// workspace     [blocks][8 consumer warps][ROWS / 8][32 lanes] of four int32: sums for a tile that another begins
// semaphores    [cut tiles][BLOCKS][8]: how many such sums are written; zero before and after
// columns       a multiple of 16
// stages        of the ring, 2 to 32
// sweep_tiles   token tiles of a cluster that share one sweep over the rows, so that they stay in L2
// split_tiles   tiles that are cut, the first ones; 0 for 64 rows
// Dynamic shared memory: 2048 + stages * (128 + ROWS) * 128 bytes.
template <class T, int ROWS, int BLOCKS, int ACTIVATION>
VQ_DEVICE void w8_gemm_hopper(const VqTensorMap* input_map, const VqTensorMap* weight_map,
                              const float* __restrict__ input_scales, const float* __restrict__ scales,
                              const uint16_t* __restrict__ bias, uint16_t* __restrict__ outputs,
                              uint4* __restrict__ workspace, uint32_t* __restrict__ semaphores, int tokens, int rows,
                              int columns, int stages, int sweep_tiles, int split_tiles) {
  constexpr int WARPS = 8, TOKENS = 128;  // consumer warps, tokens of a block
  constexpr int TOKEN_BLOCKS = BLOCKS > 1 ? 2 : 1, ROW_BLOCKS = BLOCKS > 2 ? 2 : 1;  // of a cluster
  constexpr int PARTNERS = TOKEN_BLOCKS + ROW_BLOCKS - 1;  // blocks that a block copies to, and gets copies from
  // Of a thread: together at most the 80 (64 rows) or 168 that each of the 384 begins with. What spills least.
  constexpr int PRODUCER_REGISTERS = BLOCKS > 2 ? 40 : 24;
  constexpr int CONSUMER_REGISTERS = ROWS == 64 ? 104 : BLOCKS > 2 ? 232 : 240;
  constexpr bool CUT = ROWS > 64;  // whether tiles may be cut: two blocks on an SM have no registers left for it
  constexpr int INPUT_BYTES = TOKENS * 128, STAGE_BYTES = INPUT_BYTES + ROWS * 128;
  VQ_SHARED_MEMORY(shared_start);
  unsigned char* shared = VQ_ALIGN_1024(shared_start);
  uint64_t* full = (uint64_t*)shared;  // [32]: the stage's copies have landed
  uint64_t* empty = full + 32;         // [32]: all consumer warps of the partners are done with the stage
  unsigned char* ring = shared + 1024;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int clusters = gridDim.x / BLOCKS, me = clusters - 1 - (int)blockIdx.x / BLOCKS, rank = blockIdx.x % BLOCKS;
  const int token_rank = rank % TOKEN_BLOCKS, row_rank = rank / TOKEN_BLOCKS;
  const int units = (columns + 127) / 128, row_tiles = (rows + ROWS * ROW_BLOCKS - 1) / (ROWS * ROW_BLOCKS);
  const int token_tiles = (tokens + TOKENS * TOKEN_BLOCKS - 1) / (TOKENS * TOKEN_BLOCKS);
  const int tiles = row_tiles * token_tiles;
  // Tiles are numbered sweep by sweep, and within one with the token tile as the fast index.
  auto place = [&](int tile, int& first_row, int& first_token) {
    const int per_sweep = row_tiles * sweep_tiles, sweep = tile / per_sweep, in_sweep = tile - sweep * per_sweep;
    const int left = token_tiles - sweep * sweep_tiles, width = left < sweep_tiles ? left : sweep_tiles;
    const int row_tile = in_sweep / width;
    first_row = (row_tile * ROW_BLOCKS + row_rank) * ROWS;
    first_token = ((sweep * sweep_tiles + in_sweep - row_tile * width) * TOKEN_BLOCKS + token_rank) * TOKENS;
  };
  Segments work(units, clusters, me, CUT ? split_tiles : 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, WARPS * PARTNERS);
    }
    mbarrier_init_fence();
  }
  if (BLOCKS > 1) {
    sync_cluster();
  } else {
    sync_block();
  }
  dependency_launch();

  if (warp >= WARPS) {  // ---- the producer
    registers_shrink<PRODUCER_REGISTERS>();
    if (threadIdx.x == WARPS * 32) {
      auto load_weight = [&](const Segments& at, int stage) {
        int first_row, first_token;
        place(at.tile, first_row, first_token);
        constexpr int SHARE = ROWS / TOKEN_BLOCKS;
        const uint16_t same_rows = (uint16_t)(3 << 2 * row_rank);  // a bit for each rank
        mbarrier_expect(full + stage, STAGE_BYTES);
        tma_load_weight<(TOKEN_BLOCKS > 1)>(
            ring + (size_t)stage * STAGE_BYTES + INPUT_BYTES + token_rank * SHARE * 128, weight_map, at.unit * 64,
            first_row + token_rank * SHARE, full + stage, same_rows);
      };
      auto load_inputs = [&](const Segments& at, int stage) {
        int first_row, first_token;
        place(at.tile, first_row, first_token);
        constexpr int SHARE = TOKENS / ROW_BLOCKS;
        const uint16_t same_tokens = (uint16_t)(5 << token_rank);
        tma_load_inputs<(ROW_BLOCKS > 1)>(ring + (size_t)stage * STAGE_BYTES + row_rank * SHARE * 128, input_map,
                                          at.unit * 64, first_token + row_rank * SHARE, full + stage, same_tokens);
      };
      Segments weights_at = work, inputs_at = work;
      for (int s = 0; s < stages && weights_at.tile < tiles; ++s, weights_at.next_unit()) load_weight(weights_at, s);
      dependency_wait();
      for (int s = 0; s < stages && inputs_at.tile < tiles; ++s, inputs_at.next_unit()) load_inputs(inputs_at, s);
      for (int stage = 0, phase = 0; inputs_at.tile < tiles; inputs_at.next_unit()) {
        mbarrier_wait(empty + stage, phase);
        load_weight(inputs_at, stage);
        load_inputs(inputs_at, stage);
        if (++stage == stages) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
  } else {  // ---- the consumers
    registers_grow<CONSUMER_REGISTERS>();
    dependency_wait();
    const int warpgroup = warp / 4;
    const Finish to = {input_scales, scales, bias, outputs, tokens, rows};
    auto release = [&](int stage) {
      if (BLOCKS > 1) {  // ranks of partners differ in one bit
        if (lane < PARTNERS) mbarrier_arrive_cluster(empty + stage, rank ^ lane);
      } else {
        if (lane == 0) mbarrier_arrive(empty + stage);
      }
    };
    int stage = 0, phase = 0, previous = 0;  // previous: the stage before, which wgmma may still be reading
    int32_t sums[ROWS / 2];
    for (; work.tile < tiles; work.next()) {
      VQ_UNROLL for (int i = 0; i < ROWS / 2; ++i) sums[i] = 0;
      for (int unit = work.unit; unit < work.end; ++unit) {
        mbarrier_wait(full + stage, phase);
        unsigned char* from = ring + (size_t)stage * STAGE_BYTES;
        const uint64_t a = matrix_descriptor(from + warpgroup * 64 * 128), b = matrix_descriptor(from + INPUT_BYTES);
        wgmma_fence();
        VQ_UNROLL for (int step = 0; step < 4; ++step) {  // 32 bytes each
          WgmmaInt8<ROWS>::multiply(sums, a + step * 2, b + step * 2);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (unit > work.unit) release(previous);
        previous = stage;
        if (++stage == stages) {
          stage = 0;
          phase ^= 1;
        }
      }
      wgmma_wait<0>();
      release(previous);
      const int owner = CUT ? work.first_sharer() : me, last_sharer = CUT ? work.last_sharer() : me;
      // Fragment i of cluster c's block of this rank lies at parts[c * BLOCKS * WARPS * FRAGMENTS * 32 + i * 32].
      constexpr int FRAGMENTS = ROWS / 8;
      uint4* parts = workspace + (rank * WARPS + warp) * FRAGMENTS * 32 + lane;
      uint32_t* semaphore = semaphores + (work.tile * BLOCKS + rank) * WARPS + warp;
      if (me != owner) {
        VQ_UNROLL for (int i = 0; i < FRAGMENTS; ++i) {
          uint4 part;
          part.x = sums[4 * i];
          part.y = sums[4 * i + 1];
          part.z = sums[4 * i + 2];
          part.w = sums[4 * i + 3];
          parts[((size_t)me * BLOCKS * WARPS * FRAGMENTS + i) * 32] = part;
        }
        sync_warp();
        if (lane == 0) semaphore_post(semaphore);
      } else {
        if (owner != last_sharer) {
          if (lane == 0) semaphore_wait(semaphore, (uint32_t)(last_sharer - owner));
          sync_warp();
          for (int c = owner + 1; c <= last_sharer; ++c) VQ_UNROLL for (int i = 0; i < FRAGMENTS; ++i) {
            const uint4 part = load_from_l2(parts + ((size_t)c * BLOCKS * WARPS * FRAGMENTS + i) * 32);
            sums[4 * i] += part.x;
            sums[4 * i + 1] += part.y;
            sums[4 * i + 2] += part.z;
            sums[4 * i + 3] += part.w;
          }
        }
        int first_row, first_token;
        place(work.tile, first_row, first_token);
        const TokenScales token_scales(to, first_token + warp * 16, lane);
        RowTerms<T> row_terms(to, first_row, lane);
        VQ_UNROLL for (int group = 0; group < ROWS / 32; ++group) {
          const RowTerms<T> now = row_terms;  // the next ones are loaded before this group's outputs are made
          if (group + 1 < ROWS / 32) row_terms = RowTerms<T>(to, first_row + (group + 1) * 32, lane);
          store_outputs<T, ACTIVATION>(to, token_scales, now,
                                       [&](int j, int e) { return sums[group * 16 + j * 4 + e]; });
        }
      }
    }
  }
  if (BLOCKS > 1) sync_cluster();  // the others may still arrive at this block's barriers
}

}  // namespace vq

// 64 rows leave room for two blocks on an SM. HEAD is VQ_KERNEL_RESIDENT, VQ_KERNEL_PAIRS or VQ_KERNEL_QUADS, for 1, 2
// or 4 BLOCKS.
#define VQ_W8_GEMM_HOPPER(NAME, T, HEAD, ROWS, BLOCKS, ACTIVATION)                                                    \
  HEAD(384, (ROWS == 64 ? 2 : 1))                                                                                  \
  NAME(VQ_TENSOR_MAP input_codes, VQ_TENSOR_MAP codes, const float* input_scales, const float* scales,              \
       const uint16_t* bias, uint16_t* outputs, uint4* workspace, uint32_t* semaphores, int tokens, int rows,       \
       int columns, int stages, int sweep_tiles, int split_tiles) {                                                 \
    vq::w8_gemm_hopper<T, ROWS, BLOCKS, ACTIVATION>(&input_codes, &codes, input_scales, scales, bias, outputs,        \
                                                  workspace, semaphores, tokens, rows, columns, stages,             \
                                                  sweep_tiles, split_tiles);                                        \
  }
