// Runs a CUDA kernel on the CPU, from the same source. Each CUDA thread is a fiber; what a warp or a block does
// together is a meeting point of its fibers. The rules are stricter than a GPU's, so that a bug shows and does not pass
// by luck:
//   * shared memory is filled with 0xff (NaN) before a block starts, and a copy poisons its target when it is issued
//     and lands only when someone has waited for it
//   * the lanes of a warp must meet at the same instruction of the source; a deadlock, a misaligned or out-of-range
//     access, or a thread that ends with copies under way stops the launch with a message that says where
//   * seed 0 runs the blocks (or clusters of blocks) one after the other in order, so a block that waits for a later one is
//     a deadlock; another seed shuffles the warps of a block and starts the blocks in shuffled order, where a wait lets
//     the others run
// It counts products, ldmatrix bank conflicts and more. It proves logic; it knows nothing of time, caches or encodings.
#pragma once
#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define VQ_DEVICE inline __attribute__((always_inline))
#define VQ_UNROLL
#define VQ_UNROLL_NOT
#define VQ_KERNEL(threads) extern "C" void
#define VQ_KERNEL_RESIDENT(threads, blocks) extern "C" void
#define VQ_KERNEL_PAIRS(threads, blocks) extern "C" void
#define VQ_KERNEL_QUADS(threads, blocks) extern "C" void
#define VQ_SHARED_MEMORY(name) unsigned char* name = vq::emulator::block->shared

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Pushes the callee-saved registers, stores the stack pointer in *save, and goes on where `to` was saved.
extern "C" void vq_switch_stack(void** save, void* to);
#if defined(__x86_64__)
__asm__(R"(
.text
.globl vq_switch_stack
.hidden vq_switch_stack
.type vq_switch_stack,@function
vq_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size vq_switch_stack,.-vq_switch_stack
)");
#elif defined(__aarch64__)
__asm__(R"(
.text
.globl vq_switch_stack
.hidden vq_switch_stack
vq_switch_stack:
  sub sp,sp,#160
  stp x19,x20,[sp,#0]
  stp x21,x22,[sp,#16]
  stp x23,x24,[sp,#32]
  stp x25,x26,[sp,#48]
  stp x27,x28,[sp,#64]
  stp x29,x30,[sp,#80]
  stp d8,d9,[sp,#96]
  stp d10,d11,[sp,#112]
  stp d12,d13,[sp,#128]
  stp d14,d15,[sp,#144]
  mov x9,sp
  str x9,[x0]
  mov sp,x1
  ldp x19,x20,[sp,#0]
  ldp x21,x22,[sp,#16]
  ldp x23,x24,[sp,#32]
  ldp x25,x26,[sp,#48]
  ldp x27,x28,[sp,#64]
  ldp x29,x30,[sp,#80]
  ldp d8,d9,[sp,#96]
  ldp d10,d11,[sp,#112]
  ldp d12,d13,[sp,#128]
  ldp d14,d15,[sp,#144]
  add sp,sp,#160
  ret
)");
#else
#error "the emulator needs a stack switch for this CPU"
#endif

namespace vq {

struct f16 {
  static constexpr bool is_bf16 = false;
};
struct bf16 {
  static constexpr bool is_bf16 = true;
};

namespace emulator {

// Where in the source a primitive was called: primitives take VQ_SITE as their last parameter.
struct Site {
  const char* what;
  const char* file;
  int line;
};
#define VQ_SITE const char *site_file = __builtin_FILE(), int site_line = __builtin_LINE()
#define VQ_HERE(what) vq::emulator::at(what, site_file, site_line)

struct Copy {  // cp.async of 16 bytes; a null source stands for zeros
  void* target;
  const void* source;
};

struct Lane {
  void* stack = nullptr;
  dim3 index;
  int number = 0;
  bool done = false;
  bool may_touch_inputs = false;  // has waited for the kernel before (dependent launch)
  Site site = {"start", "", 0};
  const void* input = nullptr;  // of the collective that this lane has reached
  void* output = nullptr;
  std::vector<Copy> open;  // copies issued since the last commit
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  int arrived = 0;
  uint32_t generation = 0;
};

struct Counters {
  uint64_t products = 0;            // mma and wgmma instructions of a warp or warpgroup
  uint64_t matrix_loads = 0;        // ldmatrix instructions
  uint64_t bank_conflicts = 0;      // extra passes that ldmatrix needs because rows share banks
  uint64_t stream_loads = 0;        // load_stream by a thread
  uint64_t switches = 0;            // of fibers
};

struct HopperState;  // emulator_hopper.h

struct Block {
  dim3 index, count, size;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<int> order, place;  // order of the lanes in their ring, and each lane's place in it
  Lane* current = nullptr;
  void* main_stack = nullptr;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  unsigned char *region = nullptr, *stacks = nullptr;
  size_t region_bytes = 0, stacks_bytes = 0;
  int barrier_arrived = 0, alive = 0, waiting_for_blocks = 0;
  uint32_t barrier_generation = 0;
  uint64_t progress = 0;  // counts meetings that took place
  uint64_t visits = 0;    // how often the block has been given the CPU
  std::vector<Block*> cluster;  // its blocks by rank, this one too, while they run; empty if there is none
  int cluster_arrived = 0;      // threads of this block at sync_cluster
  uint32_t cluster_generation = 0;
  std::shared_ptr<HopperState> hopper;
  std::function<const char*()> unfinished;  // what is still under way, or null
};

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr int PATIENCE = 3;  // full rounds of a block's fibers without any meeting, after which it is stuck

inline Block* block = nullptr;                         // the block whose fibers run, or another of its cluster while it acts for that
inline Block* running = nullptr;                       // the block whose fibers run
inline const std::function<void()>* kernel = nullptr;  // what each fiber runs
inline std::string failure;                            // of this launch; empty: none
inline Counters counters;

inline void at(const char* what, const char* file, int line) { block->current->site = {what, file, line}; }

inline bool same(const Site& a, const Site& b) {
  return a.line == b.line && !strcmp(a.what, b.what) && !strcmp(a.file, b.file);
}
inline std::string place(const Site& site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(site.what) + " (" + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

// Ends the launch: control returns to `launch`, which frees the block.
[[noreturn]] inline void fail(const std::string& message) {
  const Lane* lane = block->current;
  failure = message + " at " + place(lane->site) + ", block (" + std::to_string(block->index.x) + "," +
            std::to_string(block->index.y) + "), warp " + std::to_string(lane->number / 32) + ", lane " +
            std::to_string(lane->number % 32);
  void* lost;
  vq_switch_stack(&lost, running->main_stack);
  abort();
}

// Where every warp of a stuck block is.
inline std::string whereabouts() {
  std::string text;
  for (size_t warp = 0; warp < block->warps.size(); ++warp) {
    std::vector<std::pair<std::string, int>> places;
    for (int i = 0; i < 32; ++i) {
      const Lane& lane = block->lanes[warp * 32 + i];
      const std::string where = lane.done ? "the end" : place(lane.site);
      if (places.empty() || places.back().first != where) places.push_back({where, 0});
      places.back().second++;
    }
    text += "; warp " + std::to_string(warp) + ":";
    for (const auto& [where, lanes] : places) text += " " + std::to_string(lanes) + " lanes at " + where;
  }
  return text;
}

// Goes on with the next unfinished fiber of the ring.
__attribute__((noinline)) inline void yield() {
  Lane* from = block->current;
  const int count = (int)block->order.size(), start = block->place[from->number];
  for (int i = 1; i < count; ++i) {
    Lane* to = &block->lanes[block->order[(start + i) % count]];
    if (to->done) continue;
    block->current = to;
    counters.switches++;
    vq_switch_stack(&from->stack, to->stack);
    return;
  }
}

// Returns when `ready` is true, letting the other fibers run. `for_blocks`: another block will make it true.
template <class Ready> inline void wait_until(Ready ready, bool for_blocks = false) {
  uint64_t seen = block->progress + block->visits;
  for (int rounds = 0; !ready();) {
    block->waiting_for_blocks += for_blocks;
    yield();
    if (block->progress + block->visits != seen) {
      seen = block->progress + block->visits;
      rounds = 0;
    } else if (++rounds > PATIENCE) {
      if (!block->waiting_for_blocks) fail("deadlock" + whereabouts());
      Lane* from = block->current;  // leave the block until others have run
      vq_switch_stack(&from->stack, block->main_stack);
    }
    block->waiting_for_blocks -= for_blocks;
  }
}

// All 32 lanes of a warp meet here; the last one calls compute(first lane of the warp).
template <class Compute> inline void meet(const void* input, void* output, Compute compute) {
  Lane* lane = block->current;
  Warp& warp = block->warps[lane->number / 32];
  lane->input = input;
  lane->output = output;
  if (++warp.arrived < 32) {
    const uint32_t generation = warp.generation;
    wait_until([&] { return warp.generation != generation; });
    return;
  }
  Lane* first = &block->lanes[lane->number / 32 * 32];
  for (int i = 0; i < 32; ++i) {
    if (!same(lane->site, first[i].site))
      fail("the lanes of a warp are divided, some at " + place(first[i].site) + " and some");
  }
  compute(first);
  warp.arrived = 0;
  warp.generation++;
  block->progress++;
}

inline void release_barrier_if_complete() {
  if (block->barrier_arrived == 0 || block->barrier_arrived != block->alive) return;
  block->barrier_arrived = 0;
  block->barrier_generation++;
  block->progress++;
}

inline void run_fiber() {
  (*kernel)();
  Lane* lane = block->current;
  lane->site.what = "the end of the thread after";
  if (!lane->open.empty()) fail("copies without cp_async_commit");
  for (const auto& group : lane->groups)
    if (!group.empty()) fail("copies under way");
  lane->done = true;
  block->alive--;
  block->progress++;
  release_barrier_if_complete();
  if (block->alive == 0) {
    if (const char* what = block->unfinished ? block->unfinished() : nullptr) fail(what);
    vq_switch_stack(&lane->stack, block->main_stack);
  }
  yield();
  abort();
}

// ---- Launch ------------------------------------------------------------------------------------------------------

// An access to an unmapped page (buffers and shared memory end at one) becomes a failure of the fiber.
inline const void* fault_address = nullptr;
inline void after_fault() {
  char text[96];
  snprintf(text, sizeof text, "access outside of memory (address %p), last seen", fault_address);
  fail(text);
}
inline void on_fault(int signal, siginfo_t* info, void* context) {
  if (!block || !block->current) {
    std::signal(signal, SIG_DFL);
    return;
  }
  fault_address = info->si_addr;
  auto& machine = ((ucontext_t*)context)->uc_mcontext;
#if defined(__x86_64__)
  machine.gregs[REG_RSP] = ((machine.gregs[REG_RSP] - 256) & ~15ll) - 8;
  machine.gregs[REG_RIP] = (greg_t)after_fault;
#else
  machine.sp = (machine.sp - 256) & ~15ull;
  machine.pc = (uint64_t)after_fault;
#endif
}

inline uint32_t random_below(uint32_t& state, uint32_t bound) {
  state = state * 1664525u + 1013904223u;
  return (state >> 8) % bound;
}
inline std::vector<int> shuffled(int count, uint32_t state, bool shuffle) {
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = i;
  if (shuffle)
    for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random_below(state, i + 1)]);
  return order;
}

struct Launch {  // as ctypes sees it
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes;
  uint32_t seed;
  uint32_t cluster;  // blocks that run together: 1, or as the kernel's head says
};

inline void start_block(Block& b, const Launch& launch, uint32_t number) {
  const size_t page = sysconf(_SC_PAGESIZE);
  const int threads = launch.threads;
  b.count = {launch.grid[0], launch.grid[1], launch.grid[2]};
  b.index = {number % b.count.x, number / b.count.x % b.count.y, number / b.count.x / b.count.y};
  b.size = {launch.threads, 1, 1};
  b.stacks_bytes = STACK_BYTES * threads;
  b.stacks = (unsigned char*)mmap(nullptr, b.stacks_bytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // Shared memory ends where a page without access begins. It begins at a multiple of 128 bytes, and of no more where
  // the seed is odd.
  b.shared_bytes = launch.shared_bytes;
  const size_t used = (b.shared_bytes + 127) / 128 * 128 + (launch.seed % 2 ? 128 : 0);
  const size_t pages = (used + page - 1) / page * page;
  b.region_bytes = pages + page;
  b.region = (unsigned char*)mmap(nullptr, b.region_bytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(b.region + pages, page, PROT_NONE);
  memset(b.region, 0xff, pages);
  b.shared = b.region + pages - used;

  const uint32_t state = launch.seed * 2654435761u + number * 40503u + 1;
  const std::vector<int> warp_order = shuffled(threads / 32, state, launch.seed != 0);
  b.lanes.resize(threads);
  b.warps.resize(threads / 32);
  b.order.resize(threads);
  b.place.resize(threads);
  for (int i = 0; i < threads; ++i) {
    b.order[i] = warp_order[i / 32] * 32 + i % 32;
    b.place[b.order[i]] = i;
    Lane& lane = b.lanes[i];
    lane.number = i;
    lane.index = {(unsigned)i, 0, 0};
    void** stack = (void**)(b.stacks + STACK_BYTES * (i + 1));
#if defined(__x86_64__)
    stack -= 2;
    *stack = (void*)run_fiber;  // vq_switch_stack returns to it, and pops six registers before
    stack -= 6;
    memset(stack, 0, 48);
#else
    stack -= 20;
    memset(stack, 0, 160);
    stack[11] = (void*)run_fiber;  // x30, the return address
#endif
    lane.stack = stack;
  }
  b.alive = threads;
  b.current = &b.lanes[b.order[0]];
}

inline void end_block(Block& b) {
  for (Block* other : b.cluster)
    if (other && other != &b) std::replace(other->cluster.begin(), other->cluster.end(), &b, (Block*)nullptr);
  munmap(b.stacks, b.stacks_bytes);
  munmap(b.region, b.region_bytes);
}

// Runs the kernel; the message of a failure, or an empty string.
inline std::string launch(const Launch& launch, const std::function<void()>& body) {
  if (launch.threads % 32 || launch.threads > 1024) return "threads must be a multiple of 32, at most 1024";
  struct sigaction action = {}, old_segv, old_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  kernel = &body;
  failure.clear();
  counters = {};

  const uint32_t total = launch.grid[0] * launch.grid[1] * launch.grid[2], together = launch.cluster;
  if (launch.grid[0] % together) return "a grid of clusters needs a multiple of their blocks";
  const std::vector<int> order = shuffled(total / together, launch.seed + 77, launch.seed != 0);
  std::vector<std::unique_ptr<Block>> waiting;
  uint32_t started = 0;
  auto run = [&](Block* b) {  // true: it has ended
    block = running = b;
    b->visits++;
    vq_switch_stack(&b->main_stack, b->current->stack);
    block = nullptr;
    return b->alive == 0 || !failure.empty();
  };
  while (failure.empty() && (started < total || !waiting.empty())) {
    // First every block that waits, then new ones; a round in which nothing can go on is a deadlock.
    bool moved = false;
    for (size_t i = 0; i < waiting.size() && failure.empty();) {
      const uint64_t before = waiting[i]->progress;
      const bool ended = run(waiting[i].get());
      moved |= ended || waiting[i]->progress != before;
      if (ended) {
        end_block(*waiting[i]);
        waiting.erase(waiting.begin() + i);
      } else {
        ++i;
      }
    }
    if (!failure.empty()) break;
    if (started < total && (launch.seed != 0 || waiting.empty())) {
      const size_t first = waiting.size();
      for (uint32_t i = 0; i < together; ++i, ++started) {
        waiting.push_back(std::make_unique<Block>());
        start_block(*waiting.back(), launch, order[started / together] * together + i);
      }
      if (together > 1) {  // they run in the next round
        std::vector<Block*> cluster;
        for (uint32_t i = 0; i < together; ++i) cluster.push_back(waiting[first + i].get());
        for (Block* one : cluster) one->cluster = cluster;
      } else if (run(waiting.back().get())) {
        end_block(*waiting.back());
        waiting.pop_back();
      }
      moved = true;
    }
    const bool in_order = launch.seed == 0;
    const bool stuck = !waiting.empty() && ((in_order && together == 1) || (!moved && (in_order || started == total)));
    if (stuck && failure.empty()) {
      block = waiting.front().get();
      failure = "deadlock: block " + std::to_string(block->index.x) + " waits for a block that never signals, or " +
                "that starts after it" + whereabouts();
      block = nullptr;
    }
  }
  for (auto& left : waiting) end_block(*left);
  block = nullptr;
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  return failure;
}

// Calls kernel(*params[0], *params[1], ...), as cuLaunchKernel does; parameters may lie at any address.
template <class Parameter> inline Parameter parameter_at(const void* address) {
  Parameter value;
  memcpy((void*)&value, address, sizeof value);
  return value;
}
template <class... Parameters, size_t... I>
inline std::string launch_with(void (*function)(Parameters...), const Launch& how, void** params,
                               std::index_sequence<I...>) {
  return launch(how, [=] { function(parameter_at<std::decay_t<Parameters>>(params[I])...); });
}
template <class... Parameters>
inline int launch_kernel(void (*function)(Parameters...), const Launch* how, void** params, Counters* counted,
                         char* message, size_t message_bytes) {
  const std::string text = launch_with(function, *how, params, std::index_sequence_for<Parameters...>());
  *counted = counters;
  snprintf(message, message_bytes, "%s", text.c_str());
  return text.empty() ? 0 : 1;
}
// Makes a kernel callable from outside: emulate_NAME(how, parameters, counted, message, its bytes) -> 0 if all is well.
#define VQ_EMULATED(NAME)                                                                                            \
  extern "C" int emulate_##NAME(const vq::emulator::Launch* how, void** params, vq::emulator::Counters* counted,     \
                                char* message, size_t message_bytes) {                                               \
    return vq::emulator::launch_kernel(NAME, how, params, counted, message, message_bytes);                          \
  }

// ---- Numbers -----------------------------------------------------------------------------------------------------

VQ_DEVICE float float_of_f16(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
}
template <class Value> VQ_DEVICE uint16_t f16_of(Value value) {  // from float or double, rounded once
  const _Float16 rounded = (_Float16)value;
  uint16_t bits;
  memcpy(&bits, &rounded, 2);
  return bits;
}
VQ_DEVICE float float_of_bf16(uint16_t bits) {
  const uint32_t word = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}
VQ_DEVICE uint16_t bf16_of(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if ((word & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
template <class T> VQ_DEVICE float float_of(uint16_t bits) {
  return T::is_bf16 ? float_of_bf16(bits) : float_of_f16(bits);
}
template <class T> VQ_DEVICE uint16_t bits_of(float value) { return T::is_bf16 ? bf16_of(value) : f16_of(value); }

inline void check_shared(const void* pointer, size_t bytes, size_t alignment) {
  const unsigned char* first = (const unsigned char*)pointer;
  if ((uintptr_t)first % alignment) fail("misaligned address");
  if (first < block->shared || first + bytes > block->shared + block->shared_bytes) fail("outside of shared memory");
}

}  // namespace emulator

// ---- The primitives of primitives.cuh ----------------------------------------------------------------------------

#define threadIdx (vq::emulator::block->current->index)
#define blockIdx (vq::emulator::block->index)
#define gridDim (vq::emulator::block->count)
#define blockDim (vq::emulator::block->size)

template <int TABLE> VQ_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  if (TABLE == 0xea) return (a & b) | c;
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) {
    const int row = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
    result |= (uint32_t)(TABLE >> row & 1) << i;
  }
  return result;
}
template <class T> VQ_DEVICE float low_float(uint32_t pair) { return emulator::float_of<T>((uint16_t)pair); }
template <class T> VQ_DEVICE float high_float(uint32_t pair) { return emulator::float_of<T>((uint16_t)(pair >> 16)); }
template <class T> VQ_DEVICE uint16_t round_to(float value) { return emulator::bits_of<T>(value); }
template <class T> VQ_DEVICE uint32_t round_pair(float low, float high) {
  return round_to<T>(low) | (uint32_t)round_to<T>(high) << 16;
}
// Sums and products of two 16-bit floats are exact in float or rounded to it harmlessly, so they are rounded once.
template <class T> VQ_DEVICE uint32_t subtract2(uint32_t a, uint32_t b) {
  return round_pair<T>(low_float<T>(a) - low_float<T>(b), high_float<T>(a) - high_float<T>(b));
}
template <class T> VQ_DEVICE uint32_t multiply2(uint32_t a, uint32_t b) {
  return round_pair<T>(low_float<T>(a) * low_float<T>(b), high_float<T>(a) * high_float<T>(b));
}
VQ_DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
VQ_DEVICE float multiply(float a, float b) {
  const volatile float product = a * b;  // a compiler would make it part of a multiply_add
  return product;
}
VQ_DEVICE float round_even(float value) { return nearbyintf(value); }
VQ_DEVICE float exp2_approx(float value) { return exp2f(value); }
VQ_DEVICE float reciprocal_approx(float value) { return 1 / value; }
VQ_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
VQ_DEVICE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
VQ_DEVICE uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
}
VQ_DEVICE uint32_t multiply_add2_f16(uint32_t a, uint32_t b, uint32_t c) {
  const double low = (double)low_float<f16>(a) * low_float<f16>(b) + low_float<f16>(c);
  const double high = (double)high_float<f16>(a) * high_float<f16>(b) + high_float<f16>(c);
  return emulator::f16_of(low) | (uint32_t)emulator::f16_of(high) << 16;
}

namespace emulator {
struct MmaInput {
  const uint32_t *a, *b;
  float* sums;
};
template <class T> __attribute__((noinline)) inline void multiply_fragments(Lane* lanes) {
  alignas(64) float a[16][16], b[16][8], sums[16][8];
  for (int l = 0; l < 32; ++l) {
    const MmaInput& in = *(const MmaInput*)lanes[l].input;
    const int row = l / 4, pair = l % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[row + i % 2 * 8][2 * pair + half + i / 2 * 8] = float_of<T>((uint16_t)(in.a[i] >> (16 * half)));
      for (int i = 0; i < 2; ++i) b[2 * pair + half + i * 8][row] = float_of<T>((uint16_t)(in.b[i] >> (16 * half)));
    }
    for (int i = 0; i < 4; ++i) sums[row + i / 2 * 8][2 * pair + i % 2] = in.sums[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) sums[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < 32; ++l) {
    float* out = ((const MmaInput*)lanes[l].input)->sums;
    for (int i = 0; i < 4; ++i) out[i] = sums[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
  }
  counters.products++;
}
}  // namespace emulator

template <class T>
VQ_DEVICE void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], VQ_SITE) {
  VQ_HERE("mma_m16n8k16");
  const emulator::MmaInput input = {a, b, sums};
  emulator::meet(&input, nullptr, emulator::multiply_fragments<T>);
}

namespace emulator {
struct MmaInt8Input {
  const uint32_t *a, *b;
  int32_t* sums;
};
__attribute__((noinline)) inline void multiply_int8_fragments(Lane* lanes) {
  int8_t a[16][32], b[8][32];  // b by column
  for (int l = 0; l < 32; ++l) {
    const MmaInt8Input& in = *(const MmaInt8Input*)lanes[l].input;
    for (int i = 0; i < 4; ++i) memcpy(&a[l / 4 + i % 2 * 8][l % 4 * 4 + i / 2 * 16], &in.a[i], 4);
    for (int i = 0; i < 2; ++i) memcpy(&b[l / 4][l % 4 * 4 + i * 16], &in.b[i], 4);
  }
  for (int l = 0; l < 32; ++l) {
    int32_t* sums = ((const MmaInt8Input*)lanes[l].input)->sums;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 32; ++k) sums[i] += a[l / 4 + i / 2 * 8][k] * b[2 * (l % 4) + i % 2][k];
  }
  counters.products++;
}
}  // namespace emulator

VQ_DEVICE void mma_m16n8k32_int8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], VQ_SITE) {
  VQ_HERE("mma_m16n8k32_int8");
  const emulator::MmaInt8Input input = {a, b, sums};
  emulator::meet(&input, nullptr, emulator::multiply_int8_fragments);
}

VQ_DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], const void* row, VQ_SITE) {
  VQ_HERE("ldmatrix_x4");
  emulator::check_shared(row, 16, 16);
  emulator::meet(row, fragment, [](emulator::Lane* lanes) {
    emulator::counters.matrix_loads++;
    for (int matrix = 0; matrix < 4; ++matrix) {
      // Rows at the same 16 bytes modulo 128 share banks, and need one pass each (unless they are the same row).
      std::vector<uintptr_t> in_bank[8];
      size_t passes = 1;
      for (int i = 0; i < 8; ++i) {
        const uintptr_t address = (uintptr_t)lanes[matrix * 8 + i].input;
        auto& bank = in_bank[address / 16 % 8];
        if (std::find(bank.begin(), bank.end(), address) == bank.end()) bank.push_back(address);
        passes = std::max(passes, bank.size());
      }
      emulator::counters.bank_conflicts += passes - 1;
      for (int l = 0; l < 32; ++l)
        memcpy((uint32_t*)lanes[l].output + matrix, (const char*)lanes[matrix * 8 + l / 4].input + l % 4 * 4, 4);
    }
  });
}

VQ_DEVICE void cp_async_16(void* shared, const void* global, bool inside, VQ_SITE) {
  VQ_HERE("cp_async_16");
  emulator::check_shared(shared, 16, 16);
  if ((uintptr_t)global % 16) emulator::fail("misaligned address");
  memset(shared, 0xff, 16);
  emulator::block->current->open.push_back({shared, inside ? global : nullptr});
}
VQ_DEVICE void cp_async_commit() {
  emulator::Lane* lane = emulator::block->current;
  lane->groups.push_back(std::move(lane->open));
  lane->open.clear();
}
template <int N> inline void cp_async_wait(VQ_SITE) {
  VQ_HERE("cp_async_wait");
  auto& groups = emulator::block->current->groups;
  while ((int)groups.size() > N) {
    for (const emulator::Copy& copy : groups.front()) {
      if (copy.source)
        memcpy(copy.target, copy.source, 16);
      else
        memset(copy.target, 0, 16);
    }
    groups.erase(groups.begin());
  }
}
VQ_DEVICE uint4 load_stream(const uint4* global, VQ_SITE) {
  VQ_HERE("load_stream");
  if ((uintptr_t)global % 16) emulator::fail("misaligned address");
  emulator::counters.stream_loads++;
  return *global;
}

VQ_DEVICE void sync_warp(VQ_SITE) {
  VQ_HERE("sync_warp");
  emulator::meet(nullptr, nullptr, [](emulator::Lane*) {});
}
inline void sync_block(VQ_SITE) {
  VQ_HERE("sync_block");
  emulator::Block* b = emulator::block;
  const uint32_t generation = b->barrier_generation;
  b->barrier_arrived++;
  emulator::release_barrier_if_complete();
  emulator::wait_until([&] { return b->barrier_generation != generation; });
}
namespace emulator {
template <class Value> struct ShuffleInput {
  Value value;
  int mask;
};
template <class Value> VQ_DEVICE Value shuffle(Value value, int mask) {
  const ShuffleInput<Value> input = {value, mask};
  Value result;
  meet(&input, &result, [](Lane* lanes) {
    for (int l = 0; l < 32; ++l) {
      const int from = l ^ ((const ShuffleInput<Value>*)lanes[l].input)->mask;
      *(Value*)lanes[l].output = ((const ShuffleInput<Value>*)lanes[from].input)->value;
    }
  });
  return result;
}
}  // namespace emulator
VQ_DEVICE float shuffle_xor(float value, int mask, VQ_SITE) {
  VQ_HERE("shuffle_xor");
  return emulator::shuffle(value, mask);
}
VQ_DEVICE uint32_t shuffle_xor(uint32_t value, int mask, VQ_SITE) {
  VQ_HERE("shuffle_xor");
  return emulator::shuffle(value, mask);
}

VQ_DEVICE void fence_gpu() {}
VQ_DEVICE uint32_t atomic_increment(uint32_t* counter) { return (*counter)++; }

}  // namespace vq
