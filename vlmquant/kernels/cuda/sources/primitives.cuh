// Device primitives of every kernel, named after the PTX instructions they stand for. Two back ends, one source:
//   * CUDA (nvcc or NVRTC): inline PTX. No CUDA header is included, which makes NVRTC several times faster.
//   * VQ_EMULATOR (a C++17 host compiler): tests/emulator/emulator.h gives the same names the same meaning.
// A 16-bit element is carried as uint16_t, two of them as the halves of a uint32_t; `f16` and `bf16` name the type.
#pragma once
#ifdef VQ_EMULATOR
#include "emulator.h"
#else
#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#define VQ_DEVICE __device__ __forceinline__
#define VQ_UNROLL _Pragma("unroll")
#define VQ_UNROLL_NOT _Pragma("unroll 1")
// Dynamic shared memory of the block, as bytes. To NVRTC we promise 1024, the most a kernel needs: VQ_ALIGN_1024 then
// costs nothing. Without that, NVRTC (unlike nvcc) keeps its 64-bit sums in registers, and hot Hopper kernels spill.
#ifdef __CUDACC_RTC__
#define VQ_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]
#else
#define VQ_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif
// Head of an entry point: the most threads of a block, and for VQ_KERNEL_RESIDENT how many blocks an SM must hold
// (which caps the registers of a thread).
#define VQ_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define VQ_KERNEL_RESIDENT(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// As VQ_KERNEL_RESIDENT; 2 or 4 neighbouring blocks run together and reach each other's shared memory (from sm_90 on).
#define VQ_KERNEL_PAIRS(threads, blocks) \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(threads, blocks)
#define VQ_KERNEL_QUADS(threads, blocks) \
  extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(threads, blocks)

namespace vq {

struct f16 {
  static constexpr bool is_bf16 = false;
};
struct bf16 {
  static constexpr bool is_bf16 = true;
};

// ---- Arithmetic --------------------------------------------------------------------------------------------------

// Bitwise function of three words; bit 4a + 2b + c of TABLE is its value for the bits a, b, c. 0xea is (a & b) | c.
template <int TABLE> VQ_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return result;
}

// a - b on both halves. bf16 has no subtraction before sm_90: b * -1 + a is the same, rounded once.
template <class T> VQ_DEVICE uint32_t subtract2(uint32_t a, uint32_t b);
template <> VQ_DEVICE uint32_t subtract2<f16>(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
template <> VQ_DEVICE uint32_t subtract2<bf16>(uint32_t a, uint32_t b) {
  const uint32_t minus_ones = 0xbf80bf80u;
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(b), "r"(minus_ones), "r"(a));
  return result;
}

// a * b on both halves. bf16 has no multiplication before sm_90: a * b + -0 is the same, rounded once.
template <class T> VQ_DEVICE uint32_t multiply2(uint32_t a, uint32_t b);
template <> VQ_DEVICE uint32_t multiply2<f16>(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
template <> VQ_DEVICE uint32_t multiply2<bf16>(uint32_t a, uint32_t b) {
  const uint32_t minus_zeros = 0x80008000u;
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(minus_zeros));
  return result;
}

// a * b + c on both halves, rounded once.
VQ_DEVICE uint32_t multiply_add2_f16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// Float of the low or the high half.
template <class T> VQ_DEVICE float low_float(uint32_t pair);
template <class T> VQ_DEVICE float high_float(uint32_t pair);
VQ_DEVICE float float_of_f16(uint16_t half) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
  return result;
}
template <> VQ_DEVICE float low_float<f16>(uint32_t pair) { return float_of_f16((uint16_t)(pair & 0xffffu)); }
template <> VQ_DEVICE float high_float<f16>(uint32_t pair) { return float_of_f16((uint16_t)(pair >> 16)); }
template <> VQ_DEVICE float low_float<bf16>(uint32_t pair) { return __uint_as_float(pair << 16); }
template <> VQ_DEVICE float high_float<bf16>(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// A float rounded to nearest even.
template <class T> VQ_DEVICE uint16_t round_to(float value);
template <> VQ_DEVICE uint16_t round_to<f16>(float value) {
  uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}
template <> VQ_DEVICE uint16_t round_to<bf16>(float value) {
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}

// Two floats rounded to nearest even, the first as the low half.
template <class T> VQ_DEVICE uint32_t round_pair(float low, float high);
template <> VQ_DEVICE uint32_t round_pair<f16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <> VQ_DEVICE uint32_t round_pair<bf16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// a * b + c, rounded once.
VQ_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// a * b, rounded before anything is added to it.
VQ_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
// The nearest integer, ties to the even one.
VQ_DEVICE float round_even(float value) {
  float result;
  asm("cvt.rni.f32.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
// 2**value and 1 / value, to about 2 units in the last place.
VQ_DEVICE float exp2_approx(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
VQ_DEVICE float reciprocal_approx(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
VQ_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
VQ_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
// The lowest bytes of four words, the first as the lowest.
VQ_DEVICE uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// ---- Tensor core: a warp multiplies fragments ---------------------------------------------------------------------

// sums (16 x 8 float) += a (16 x 16) * b (16 x 8). With row = lane / 4 and pair = lane % 4, a lane holds of
//   a[i]     row + 8 (i % 2), k = 2 pair + 8 (i / 2) in the low half and the next k in the high half
//   b[i]     k = 2 pair + 8 i in the low half and the next k in the high half, column lane / 4
//   sums[i]  row + 8 (i / 2), column 2 pair + i % 2
template <class T>
VQ_DEVICE void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
VQ_DEVICE void mma_m16n8k16<f16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
VQ_DEVICE void mma_m16n8k16<bf16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sums (16 x 8) += a (16 x 32 of int8) * b (32 x 8 of int8), exactly. With row = lane / 4 and quad = lane % 4, a lane
// holds of
//   a[i]     row + 8 (i % 2), k = 4 quad + 16 (i / 2) to k + 3, the first in the lowest byte
//   b[i]     k = 4 quad + 16 i to k + 3, column lane / 4
//   sums[i]  as mma_m16n8k16
VQ_DEVICE void mma_m16n8k32_int8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Memory ------------------------------------------------------------------------------------------------------

VQ_DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the 16-byte row l % 8 of matrix l / 8, and
// gets in fragment[i] the elements 2 (lane % 4) and + 1 of row lane / 4 of matrix i.
VQ_DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, past the registers and L1; zeros instead where `inside` is false. They are
// there when cp_async_wait<N> returns, N being how many of this thread's youngest groups may still be on their way.
VQ_DEVICE void cp_async_16(void* shared, const void* global, bool inside) {
  int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
VQ_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int N> VQ_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }

// 16 bytes that are read once by one thread: not kept in L1; L2 fetches 128 bytes.
VQ_DEVICE uint4 load_stream(const uint4* global) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global));
  return value;
}

// ---- Threads -----------------------------------------------------------------------------------------------------

VQ_DEVICE void sync_warp() { __syncwarp(); }
VQ_DEVICE void sync_block() { __syncthreads(); }
// The value of the lane whose number differs in the bits of `mask`.
VQ_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
VQ_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Earlier writes of this thread are seen by every thread of the GPU before its later ones.
VQ_DEVICE void fence_gpu() { __threadfence(); }
// Adds 1 and returns the value before; orders this thread's accesses before and after it (acquire and release).
VQ_DEVICE uint32_t atomic_increment(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

}  // namespace vq
#endif
