// The Hopper part of the emulator: the primitives of hopper.cuh. See emulator.h for the rules; here
//   * copies land when their mbarrier has all its arrivals and someone waits for it
//   * a wgmma is computed when wgmma_wait retires it, from its registers and shared memory as they are THEN, so that
//     changing either too early gives a wrong result here as it may on a GPU
//   * a kernel must call dependency_wait before it reads activations or uses the workspace
#pragma once
#include <map>

#include "emulator.h"

// What cuTensorMapEncodeTiled is told, instead of its encoding: a 2-D tensor of 16-bit elements, box of 64 columns.
struct alignas(64) VqTensorMap {
  const void* base;
  uint64_t columns, rows, row_bytes;
  uint32_t box_columns, box_rows;
  unsigned char unused[80];
};
static_assert(sizeof(VqTensorMap) == 128, "as large as a CUtensorMap");
#define VQ_TENSOR_MAP const VqTensorMap
#define VQ_ALIGN_1024(pointer) ((pointer) + ((1024 - ((uintptr_t)(pointer) & 1023)) & 1023))

namespace vq {
namespace emulator {

struct BulkCopy {
  unsigned char* target;
  const void* source;
  int bytes;
  VqTensorMap map;  // base is null for a plain copy
  int column, row;
};
struct Mbarrier {
  int arrivals = 0, pending = 0;
  long bytes = 0;
  uint32_t phase = 0;
  std::vector<BulkCopy> copies;
};
struct Product {  // of one lane
  float* sums;
  const uint32_t* a;
  uint64_t b;
  bool is_bf16;
  int tokens;
  int32_t* integers = nullptr;  // sums of an int8 product, whose operand a is in shared memory too
  uint64_t a_shared = 0;
};
struct WarpgroupLane {
  bool fenced = false;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
};
struct Warpgroup {
  int arrived = 0;
  uint32_t generation = 0;
};
struct HopperState {
  std::map<const void*, Mbarrier> barriers;
  std::vector<WarpgroupLane> lanes;
  std::vector<Warpgroup> warpgroups;
};

inline const char* unfinished_hopper() {
  for (const auto& [address, barrier] : block->hopper->barriers)
    if (!barrier.copies.empty()) return "the block ends with bulk copies under way";
  for (const WarpgroupLane& lane : block->hopper->lanes)
    if (!lane.open.empty() || !lane.groups.empty()) return "the block ends with wgmma under way";
  return nullptr;
}
inline HopperState& hopper() {
  if (!block->hopper) {
    block->hopper = std::make_shared<HopperState>();
    block->hopper->lanes.resize(block->lanes.size());
    block->hopper->warpgroups.resize(block->lanes.size() / 128 + 1);
    block->unfinished = unfinished_hopper;
  }
  return *block->hopper;
}
inline Mbarrier& barrier_at(uint64_t* pointer) {
  auto& barriers = hopper().barriers;
  const auto found = barriers.find(pointer);
  if (found == barriers.end()) fail("mbarrier used before mbarrier_init");
  return found->second;
}

// 128-byte swizzle: bits 4 to 6 of an address are XORed with bits 7 to 9.
inline unsigned char* swizzled(unsigned char* pointer) {
  const uintptr_t address = (uintptr_t)pointer;
  return (unsigned char*)(address ^ ((address >> 7 & 7) << 4));
}
inline void land(const BulkCopy& copy) {
  const VqTensorMap& map = copy.map;
  if (!map.base) {
    memcpy(copy.target, copy.source, copy.bytes);
    return;
  }
  for (uint32_t r = 0; r < map.box_rows; ++r)
    for (uint32_t c = 0; c < map.box_columns; ++c) {
      const uint64_t row = copy.row + r, column = copy.column + c;
      uint16_t element = 0;
      if (row < map.rows && column < map.columns)
        memcpy(&element, (const char*)map.base + row * map.row_bytes + column * 2, 2);
      memcpy(swizzled(copy.target + r * 128 + c * 2), &element, 2);
    }
}
inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending) return;
  for (const BulkCopy& copy : barrier.copies) {
    land(copy);
    barrier.bytes -= copy.bytes;
  }
  barrier.copies.clear();
  if (barrier.bytes) return;  // more bytes expected than copied so far
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  block->progress++;
}
inline void arrive(uint64_t* pointer) {
  Mbarrier& barrier = barrier_at(pointer);
  if (--barrier.pending < 0) fail("more arrivals than the mbarrier was initialised for");
  block->progress++;
}
inline void check_inputs_allowed() {
  if (!block->current->may_touch_inputs) fail("before dependency_wait, the kernel before this one may still run,");
}
}  // namespace emulator

VQ_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals, VQ_SITE) {
  VQ_HERE("mbarrier_init");
  emulator::check_shared(barrier, 8, 8);
  emulator::Mbarrier fresh;
  fresh.arrivals = fresh.pending = arrivals;
  emulator::hopper().barriers[barrier] = fresh;
}
VQ_DEVICE void mbarrier_init_fence() {}
VQ_DEVICE void mbarrier_expect(uint64_t* barrier, int bytes, VQ_SITE) {
  VQ_HERE("mbarrier_expect");
  emulator::barrier_at(barrier).bytes += bytes;
  emulator::arrive(barrier);
}
VQ_DEVICE void mbarrier_arrive(uint64_t* barrier, VQ_SITE) {
  VQ_HERE("mbarrier_arrive");
  emulator::arrive(barrier);
}
inline void mbarrier_wait(uint64_t* pointer, int parity, VQ_SITE) {
  VQ_HERE("mbarrier_wait");
  emulator::Mbarrier& barrier = emulator::barrier_at(pointer);
  emulator::wait_until([&] {
    if ((int)(barrier.phase & 1) == parity) emulator::end_phase_if_complete(barrier);
    return (int)(barrier.phase & 1) != parity;
  }, !emulator::block->cluster.empty());
}

inline void bulk_copy_stream(void* shared, const void* global, int bytes, uint64_t* barrier, VQ_SITE) {
  VQ_HERE("bulk_copy_stream");
  if (bytes <= 0 || bytes % 16 || (uintptr_t)global % 16) emulator::fail("misaligned address or size");
  emulator::check_shared(shared, bytes, 16);
  memset(shared, 0xff, bytes);
  emulator::barrier_at(barrier).copies.push_back({(unsigned char*)shared, global, bytes, {}, 0, 0});
}
inline void tma_load_2d(void* shared, const VqTensorMap* map, int column, int row, uint64_t* barrier, VQ_SITE) {
  VQ_HERE("tma_load_2d");
  emulator::check_inputs_allowed();
  if (map->box_columns != 64 || map->row_bytes % 16) emulator::fail("a tensor map that is not supported");
  const int bytes = map->box_rows * 128;
  emulator::check_shared(shared, bytes, 1024);
  memset(shared, 0xff, bytes);
  emulator::barrier_at(barrier).copies.push_back({(unsigned char*)shared, nullptr, bytes, *map, column, row});
}
VQ_DEVICE void tensor_map_prefetch(const VqTensorMap*) {}

VQ_DEVICE void dependency_wait() { emulator::block->current->may_touch_inputs = true; }
VQ_DEVICE void dependency_launch() {}
VQ_DEVICE void semaphore_post(uint32_t* semaphore, VQ_SITE) {
  VQ_HERE("semaphore_post");
  emulator::check_inputs_allowed();
  ++*semaphore;
}
inline void semaphore_wait(uint32_t* semaphore, uint32_t count, VQ_SITE) {
  VQ_HERE("semaphore_wait");
  emulator::check_inputs_allowed();
  const volatile uint32_t* value = semaphore;
  emulator::wait_until([&] { return *value == count; }, true);
  *semaphore = 0;
}
template <class Vector> VQ_DEVICE Vector load_from_l2(const Vector* global, VQ_SITE) {
  VQ_HERE("load_from_l2");
  emulator::check_inputs_allowed();
  return *global;
}

template <int N> VQ_DEVICE void registers_shrink() {}
template <int N> VQ_DEVICE void registers_grow() {}

// ---- wgmma -------------------------------------------------------------------------------------------------------

namespace emulator {
// All 128 lanes of the warpgroup meet.
inline void meet_warpgroup() {
  Warpgroup& group = hopper().warpgroups[block->current->number / 128];
  if (++group.arrived == 128) {
    group.arrived = 0;
    group.generation++;
    block->progress++;
    return;
  }
  const uint32_t generation = group.generation;
  wait_until([&] { return group.generation != generation; });
}
inline WarpgroupLane& warpgroup_lane() { return hopper().lanes[block->current->number]; }
// Shared addresses in descriptors count from here, a multiple of 1024 bytes.
inline unsigned char* shared_base() { return (unsigned char*)((uintptr_t)block->shared & ~(uintptr_t)1023); }

// Element (token, k) of operand b: rows of 128 bytes along k, swizzled, 8 rows every `stride` bytes.
inline float operand(uint64_t descriptor, int token, int k, bool is_bf16) {
  const uint64_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
  uint16_t element;
  const unsigned char* at = swizzled(shared_base() + start + token / 8 * stride + token % 8 * 128 + k * 2);
  memcpy(&element, at, 2);
  return is_bf16 ? float_of_bf16(element) : float_of_f16(element);
}
// 32 bytes of a line of an int8 operand.
inline void copy_line(int8_t (&line)[32], uint64_t descriptor, int number) {
  const uint64_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
  for (int half = 0; half < 2; ++half) {
    memcpy(line + half * 16, swizzled(shared_base() + start + number / 8 * stride + number % 8 * 128 + half * 16), 16);
  }
}
// One instruction of the warpgroup whose lanes begin at `lanes`: product `index` of each lane's oldest group.
__attribute__((noinline)) inline void multiply_warpgroup_int8(WarpgroupLane* lanes, size_t index) {
  static int8_t a[64][32], b[256][32];
  const Product& first = lanes[0].groups.front()[index];
  for (int line = 0; line < 64; ++line) copy_line(a[line], first.a_shared, line);
  for (int line = 0; line < first.tokens; ++line) copy_line(b[line], first.b, line);
  for (int l = 0; l < 128; ++l) {
    const Product& product = lanes[l].groups.front()[index];
    if (product.b != first.b || product.a_shared != first.a_shared)
      fail("the lanes of a warpgroup give different descriptors");
    const int row = l / 32 * 16 + l % 32 / 4, pair = l % 4;
    for (int i = 0; i < first.tokens / 2; ++i) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[row + i % 4 / 2 * 8][k] * b[i / 4 * 8 + 2 * pair + i % 2][k];
      product.integers[i] += sum;
    }
  }
  counters.products++;
}
__attribute__((noinline)) inline void multiply_warpgroup(WarpgroupLane* lanes, size_t index) {
  if (lanes[0].groups.front()[index].integers) return multiply_warpgroup_int8(lanes, index);
  static float a[64][16], b[16][256];
  const Product& first = lanes[0].groups.front()[index];
  for (int k = 0; k < 16; ++k)
    for (int token = 0; token < first.tokens; ++token) b[k][token] = operand(first.b, token, k, first.is_bf16);
  for (int l = 0; l < 128; ++l) {
    const Product& product = lanes[l].groups.front()[index];
    if (product.b != first.b) fail("the lanes of a warpgroup give different descriptors");
    const int row = l / 32 * 16 + l % 32 / 4, pair = l % 4;
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half) {
        const uint16_t bits = (uint16_t)(product.a[i] >> (16 * half));
        a[row + i % 2 * 8][2 * pair + half + i / 2 * 8] = first.is_bf16 ? float_of_bf16(bits) : float_of_f16(bits);
      }
  }
  for (int l = 0; l < 128; ++l) {
    float* sums = lanes[l].groups.front()[index].sums;
    const int row = l / 32 * 16 + l % 32 / 4, pair = l % 4;
    for (int i = 0; i < first.tokens / 2; ++i) {
      const int token = i / 4 * 8 + 2 * pair + i % 2;
      float sum = sums[i];
      for (int k = 0; k < 16; ++k) sum += a[row + i % 4 / 2 * 8][k] * b[k][token];
      sums[i] = sum;
    }
  }
  counters.products++;
}
}  // namespace emulator

VQ_DEVICE uint64_t matrix_descriptor(const void* tile) {
  if ((uintptr_t)tile % 1024) emulator::fail("a matrix that does not begin at a multiple of 1024 bytes");
  const uint64_t offset = (const unsigned char*)tile - emulator::shared_base();
  return (offset & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
inline void wgmma_fence(VQ_SITE) {
  VQ_HERE("wgmma_fence");
  emulator::warpgroup_lane().fenced = true;
  emulator::meet_warpgroup();
}
VQ_DEVICE void wgmma_commit() {
  auto& lane = emulator::warpgroup_lane();
  lane.groups.push_back(std::move(lane.open));
  lane.open.clear();
  lane.fenced = false;
}
template <class T, int TOKENS> struct Wgmma {
  static VQ_DEVICE void multiply(float (&sums)[TOKENS / 2], const uint32_t (&a)[4], uint64_t b, VQ_SITE) {
    VQ_HERE("wgmma");
    auto& lane = emulator::warpgroup_lane();
    if (!lane.fenced) emulator::fail("no wgmma_fence since the last commit");
    lane.open.push_back({sums, a, b, T::is_bf16, TOKENS});
  }
};
template <int ROWS> struct WgmmaInt8 {
  static VQ_DEVICE void multiply(int32_t (&sums)[ROWS / 2], uint64_t a, uint64_t b, VQ_SITE) {
    VQ_HERE("wgmma");
    auto& lane = emulator::warpgroup_lane();
    if (!lane.fenced) emulator::fail("no wgmma_fence since the last commit");
    lane.open.push_back({nullptr, nullptr, b, false, ROWS, sums, a});
  }
};
template <int N> inline void wgmma_wait(VQ_SITE) {
  VQ_HERE("wgmma_wait");
  emulator::meet_warpgroup();
  if (emulator::block->current->number % 128 == 0) {  // the first lane computes for all of them
    emulator::WarpgroupLane* lanes = &emulator::warpgroup_lane();
    while ((int)lanes[0].groups.size() > N) {
      for (size_t i = 0; i < lanes[0].groups.front().size(); ++i) emulator::multiply_warpgroup(lanes, i);
      for (int l = 0; l < 128; ++l) lanes[l].groups.erase(lanes[l].groups.begin());
    }
  }
  emulator::meet_warpgroup();
}

// ---- Clusters ----------------------------------------------------------------------------------------------------

namespace emulator {
inline Block* in_cluster(int rank) {
  if (block->cluster.empty()) fail("not a kernel of clusters");
  if (!block->cluster[rank]) fail("another block of the cluster has ended");
  return block->cluster[rank];
}
inline int own_rank() { return block->index.x % block->cluster.size(); }
// What lies in another block's shared memory where `pointer` lies in this one's.
template <class Value> inline Value* there(Block* other, Value* pointer) {
  return (Value*)(other->shared + ((unsigned char*)pointer - block->shared));
}
// Does something as if a thread of the other block did it.
template <class Action> inline void act_in(Block* other, Action action) {
  Block* self = block;
  Lane* lane = other->current;
  const Site site = lane->site;
  lane->site = self->current->site;
  block = other;
  action();
  block = self;
  lane->site = site;
  self->progress++;
}
template <bool MULTICAST>
inline void load_box(void* shared, const VqTensorMap* map, int column, int row, uint64_t* barrier, uint16_t blocks) {
  if (map->box_columns != 64 || map->row_bytes % 16) fail("a tensor map that is not supported");
  const int bytes = map->box_rows * 128;
  auto copy = [&](void* to, uint64_t* counter) {
    check_shared(to, bytes, 1024);
    memset(to, 0xff, bytes);
    barrier_at(counter).copies.push_back({(unsigned char*)to, nullptr, bytes, *map, column, row});
  };
  if (!MULTICAST) return copy(shared, barrier);
  for (int rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    Block* other = in_cluster(rank);
    void* to = there(other, shared);
    uint64_t* counter = there(other, barrier);
    if (other == block) {
      copy(to, counter);
    } else {
      act_in(other, [&] { copy(to, counter); });
    }
  }
}
}  // namespace emulator

inline void sync_cluster(VQ_SITE) {
  VQ_HERE("sync_cluster");
  emulator::Block* b = emulator::block;
  const uint32_t generation = b->cluster_generation;
  b->cluster_arrived++;
  bool complete = true;
  for (size_t rank = 0; rank < b->cluster.size(); ++rank) {
    const emulator::Block* one = emulator::in_cluster(rank);
    complete &= one->cluster_arrived == (int)one->lanes.size();
  }
  if (complete) {
    for (emulator::Block* one : b->cluster) {
      one->cluster_arrived = 0;
      one->cluster_generation++;
      one->progress++;
    }
    return;
  }
  emulator::wait_until([&] { return b->cluster_generation != generation; }, true);
}
inline void mbarrier_arrive_cluster(uint64_t* barrier, int rank, VQ_SITE) {
  VQ_HERE("mbarrier_arrive_cluster");
  emulator::Block* other = emulator::in_cluster(rank);
  uint64_t* in_other = emulator::there(other, barrier);
  if (rank == emulator::own_rank()) {
    emulator::arrive(barrier);
  } else {
    emulator::act_in(other, [&] { emulator::arrive(in_other); });
  }
}
template <bool MULTICAST>
inline void tma_load_weight(void* shared, const VqTensorMap* map, int column, int row, uint64_t* barrier,
                            uint16_t blocks, VQ_SITE) {
  VQ_HERE("tma_load_weight");
  emulator::load_box<MULTICAST>(shared, map, column, row, barrier, blocks);
}
template <bool MULTICAST>
inline void tma_load_inputs(void* shared, const VqTensorMap* map, int column, int row, uint64_t* barrier,
                            uint16_t blocks, VQ_SITE) {
  VQ_HERE("tma_load_inputs");
  emulator::check_inputs_allowed();
  emulator::load_box<MULTICAST>(shared, map, column, row, barrier, blocks);
}

}  // namespace vq
