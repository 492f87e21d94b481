// Hopper primitives (sm_90a): mbarriers, bulk and tensor copies, dependent launch, wgmma. See primitives.cuh for the
// two back ends; that of the emulator is tests/emulator/emulator_hopper.h.
#pragma once
#ifdef VQ_EMULATOR
#include "emulator_hopper.h"
#endif
#include "primitives.cuh"
#ifndef VQ_EMULATOR

// A CUtensorMap, as cuTensorMapEncodeTiled writes it. Kernels take it by value, in constant memory.
struct alignas(64) VqTensorMap {
  unsigned char opaque[128];
};
#define VQ_TENSOR_MAP const __grid_constant__ VqTensorMap
// The first address at or after `pointer` (shared memory) that a swizzled tile may begin at: a multiple of 1024 bytes.
// A launch asks for 1024 bytes more of shared memory than the kernel uses.
#define VQ_ALIGN_1024(pointer) ((pointer) + ((1024 - (vq::shared_address(pointer) & 1023)) & 1023))

namespace vq {

// ---- mbarrier: in shared memory; a phase ends after `arrivals` arrivals and the arrival of all expected bytes ------

VQ_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// The copy engine sees the barriers initialised before it.
VQ_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }
// One arrival, which also raises the number of bytes expected in this phase.
VQ_DEVICE void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
VQ_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(barrier)) : "memory");
}
// Returns once the phase of this parity has ended: 0 for the first phase, 1 for the second, and so on.
VQ_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
#ifdef VQ_TRAP_ON_HANG  // for debugging on a GPU: a lost arrival becomes an error instead of a hang
  uint32_t done = 0;
  for (int tries = 0; !done; ++tries) {
    asm volatile(
        "{\n.reg .pred P;\nmbarrier.try_wait.parity.shared::cta.b64 P, [%1], %2;\nselp.u32 %0, 1, 0, P;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (tries > (1 << 20)) __trap();
  }
#else
  asm volatile(
      "{\n.reg .pred P;\nVQ_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n"
      "@P bra VQ_DONE;\nbra VQ_WAIT;\nVQ_DONE:\n}"
      :
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
}

// ---- Copies from global to shared memory; `barrier` counts their bytes --------------------------------------------

// `bytes` (a multiple of 16, both addresses too) that no other block reads: first to be evicted from L2.
VQ_DEVICE void bulk_copy_stream(void* shared, const void* global, int bytes, uint64_t* barrier) {
  const uint64_t evict_first = 0x12F0000000000000ull;  // an encoded L2 policy, as createpolicy.fractional gives it
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :
      : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(evict_first)
      : "memory");
}
// The box of a two-dimensional tensor whose first element is (column, row); zeros outside of the tensor. Shared memory
// holds it as the map says, here always in rows of 128 bytes, with the 128-byte swizzle: the 16-byte chunk c of row r
// lies at chunk c ^ (r % 8). `shared` is a multiple of 1024 bytes.
VQ_DEVICE void tma_load_2d(void* shared, const VqTensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
VQ_DEVICE void tensor_map_prefetch(const VqTensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

// ---- Between kernels and between blocks ---------------------------------------------------------------------------

// Programmatic dependent launch: wait until the kernel before this one has finished and its writes are seen; allow the
// one after this to start.
VQ_DEVICE void dependency_wait() { asm volatile("griddepcontrol.wait;" : : : "memory"); }
VQ_DEVICE void dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" : : : "memory"); }

// A semaphore in global memory, zero between launches: a block posts when its part is written, and the one that needs
// `count` parts waits for as many posts and sets it back to zero.
VQ_DEVICE void semaphore_post(uint32_t* semaphore) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(semaphore) : "memory");
}
VQ_DEVICE void semaphore_wait(uint32_t* semaphore, uint32_t count) {
  uint32_t value;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(semaphore) : "memory");
  } while (value != count);
  *semaphore = 0;
}
// 16 bytes that another block wrote: from L2, since L1 may hold an older value.
VQ_DEVICE float4 load_from_l2(const float4* global) {
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(global)
               : "memory");
  return value;
}
VQ_DEVICE uint4 load_from_l2(const uint4* global) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global)
               : "memory");
  return value;
}

// ---- Warpgroup (4 warps) matrix product ---------------------------------------------------------------------------

// Registers of each thread of this warpgroup: give up all above N, or take more.
template <int N> VQ_DEVICE void registers_shrink() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(N)); }
template <int N> VQ_DEVICE void registers_grow() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(N)); }

// wgmma is asynchronous: registers written before wgmma_fence are seen by products issued after it; operands and sums
// must not be touched until wgmma_wait<N> says so (all but the N youngest committed groups are done).
VQ_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
VQ_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <int N> VQ_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(N) : "memory");
}

// Descriptor of an operand in shared memory: rows of 128 bytes along k, 128-byte swizzle, first row on a multiple of
// 1024 bytes. Fields, in units of 16 bytes: start address (bits 0-13), leading offset (16-29, not used with this
// swizzle: 1), stride between groups of 8 rows (32-45: 1024 bytes), and the swizzle mode (62-63: 1 = 128 bytes).
// Adding 2 moves on by 32 bytes along k.
VQ_DEVICE uint64_t matrix_descriptor(const void* tile) {
  return (uint64_t)((shared_address(tile) & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// sums (64 x TOKENS float) += a (64 x 16, in registers) * b (TOKENS x 16 in shared memory, by descriptor). Warp w of
// the warpgroup holds rows 16 w to 16 w + 15 of a as for mma_m16n8k16; its sums[4 i .. 4 i + 3] are that instruction's
// sums for columns 8 i to 8 i + 7.
template <class T, int TOKENS> struct Wgmma;
#include "wgmma.inc"

// sums (64 x ROWS int32) += a (64 x 32 of int8) * b (ROWS x 32 of int8), exactly; both in shared memory, by descriptor.
// Sums lie as those of Wgmma.
template <int ROWS> struct WgmmaInt8;
#include "wgmma_int8.inc"

// ---- Clusters: blocks that run together (VQ_KERNEL_PAIRS, VQ_KERNEL_QUADS); rank: blockIdx.x % their number ---------

// Every thread of all blocks arrives before any goes on; what they wrote to shared memory is seen by all. Not "aligned":
// the lanes of a warp may come one by one.
VQ_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" : : : "memory");
}
// One arrival at the mbarrier that lies, in the block of this rank, where `barrier` lies in this one.
VQ_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
      :
      : "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}
// A weight's box as tma_load_2d copies it; of weights it is known that they were complete long before the kernel
// ahead started. MULTICAST: into all blocks of the cluster whose bit is set, at the same place, counted by each one's
// own barrier.
template <bool MULTICAST>
VQ_DEVICE void tma_load_weight(void* shared, const VqTensorMap* map, int column, int row, uint64_t* barrier,
                               uint16_t blocks) {
  if (MULTICAST) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;"
        :
        : "r"(shared_address(shared)), "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
        : "memory");
  } else {
    tma_load_2d(shared, map, column, row, barrier);
  }
}
// The same for inputs, which the kernel ahead may have made: after dependency_wait.
template <bool MULTICAST>
VQ_DEVICE void tma_load_inputs(void* shared, const VqTensorMap* map, int column, int row, uint64_t* barrier,
                               uint16_t blocks) {
  tma_load_weight<MULTICAST>(shared, map, column, row, barrier, blocks);
}

}  // namespace vq
#endif
