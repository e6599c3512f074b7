// What the kernels are written in: 16-byte vectors, sums over a row's threads, copies into shared memory. Nothing but this
// file and emulated.h knows whether a GPU runs them: with RED_EMULATED they are plain C++, for tests without a GPU.
#pragma once

#include "arguments.h"
#include "arithmetic.h"

#if defined(RED_EMULATED)
#include "emulated.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define RED_DEVICE __device__ __forceinline__
// A kernel for blocks of so many threads, and so many blocks on a multiprocessor.
#define RED_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define RED_ARGUMENT const __grid_constant__
#define RED_UNROLL _Pragma("unroll")
#define RED_CLUSTERS (__CUDA_ARCH__ >= 900)
#endif

namespace red {
namespace cuda {

constexpr int kWarp = 32;

// Elements of 16 bytes.
template <class T>
constexpr int kVector = static_cast<int>(16 / sizeof(T));

#if !defined(RED_EMULATED)

RED_DEVICE float widen(float v) { return v; }
RED_DEVICE float widen(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
RED_DEVICE float widen(Float16 v) { return __half2float(__ushort_as_half(v.bits)); }
// Two values in the type of the last argument, the first in the low half.
RED_DEVICE uint32_t narrow_two(float low, float high, BFloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
RED_DEVICE uint32_t narrow_two(float low, float high, Float16) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

RED_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
RED_DEVICE float not_a_number() { return __uint_as_float(0x7fffffffu); }

RED_DEVICE Raw load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
RED_DEVICE void store16(void* p, const Raw& v) { *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]); }

// The same pointer, of which the compiler does not know what it was made from: what is a constant beyond it is added to it,
// and not kept in registers as an address of its own.
template <class T>
RED_DEVICE T* as_base(T* p) {
  asm("" : "+l"(p));
  return p;
}

// Of what no thread of the kernel reads: loads may go before it, and it stays one store where registers are few.
RED_DEVICE void put16(void* p, const Raw& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]));
}

RED_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// An address in shared memory as copies take it.
using SharedAddress = uint32_t;
RED_DEVICE SharedAddress shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
// Starts to copy 16 bytes to shared memory. The thread that waits for it may read them, others after a barrier.
RED_DEVICE void copy_async(SharedAddress shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// Ends a group of copies; wait_copies<K>() waits for all but the last K groups.
RED_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int K>
RED_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(K) : "memory");
}

RED_DEVICE void block_barrier() { __syncthreads(); }
// A barrier of the `threads` threads of a group of a block, which has GROUPS of them at most.
template <int NUMBER>
RED_DEVICE void numbered_barrier(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "r"(threads) : "memory");
}
template <int GROUPS>
RED_DEVICE void group_barrier(int group, int threads) {
  __syncwarp();  // a warp comes to it as one
  if constexpr (GROUPS == 1) {
    numbered_barrier<1>(threads);
  } else if constexpr (GROUPS == 2) {
    if (group == 0)
      numbered_barrier<1>(threads);
    else
      numbered_barrier<2>(threads);
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(threads) : "memory");
  }
}

// The sums of K values over a warp, in all of its threads.
template <int K>
RED_DEVICE void warp_sum(float (&v)[K]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] += __shfl_xor_sync(0xffffffffu, v[k], offset);
}

// The same over each `lanes` neighbouring threads, a power of 2 that is the same for the whole warp.
template <int K>
RED_DEVICE void part_sum(float (&v)[K], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] += __shfl_xor_sync(0xffffffffu, v[k], offset);
}

// For kernels in a row on a stream: from the first on, the next may be started, where it allows that (Launch::early), when all
// blocks have said so or ended. It waits with the second until all of the kernels before it is done, and can be seen.
#if defined(__CUDA_ARCH__) && RED_CLUSTERS
RED_DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
RED_DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
RED_DEVICE void let_next_start() {}
RED_DEVICE void wait_for_previous() {}
#endif

// Counts the bytes that the blocks of a cluster send to this one, phase by phase.
using Arrivals = uint64_t;

#if !defined(__CUDA_ARCH__) || RED_CLUSTERS
RED_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All that was stored before is seen behind it, in all blocks of the cluster.
RED_DEVICE void cluster_barrier() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
RED_DEVICE void init_arrivals(Arrivals* arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(
                   shared_address(arrivals))
               : "memory");
}
// By one thread, once in each phase: so many bytes make it complete, whether they come before or after.
RED_DEVICE void expect_arrivals(Arrivals* arrivals, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes)
               : "memory");
}
// Stores to the same place in the shared memory of another block of the cluster, and counts it there.
RED_DEVICE void send(float* shared, Arrivals* arrivals, int rank, float v) {
  uint32_t remote, counter;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(shared_address(arrivals)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote), "f"(v),
               "r"(counter)
               : "memory");
}
// Waits for the end of a phase, whose number is even (0) or odd (1).
RED_DEVICE void await_arrivals(Arrivals* arrivals, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(arrivals)), "r"(parity)
        : "memory");
  } while (!done);
}
#else
RED_DEVICE int cluster_rank() { return 0; }
RED_DEVICE void cluster_barrier() {}
RED_DEVICE void init_arrivals(Arrivals*) {}
RED_DEVICE void expect_arrivals(Arrivals*, int) {}
RED_DEVICE void send(float*, Arrivals*, int, float) {}
RED_DEVICE void await_arrivals(Arrivals*, int) {}
#endif

#endif  // !RED_EMULATED

// 16 bytes to fp32 and back, rounded to nearest.
template <class T>
RED_DEVICE void unpack(const Raw& raw, float (&v)[kVector<T>]) {
  if constexpr (sizeof(T) == 4) {
    RED_UNROLL for (int i = 0; i < 4; ++i) {
      T bits;
      __builtin_memcpy(&bits, &raw.w[i], 4);
      v[i] = bits;
    }
  } else {
    RED_UNROLL for (int i = 0; i < 4; ++i) {
      v[2 * i] = widen(T{static_cast<uint16_t>(raw.w[i] & 0xffffu)});
      v[2 * i + 1] = widen(T{static_cast<uint16_t>(raw.w[i] >> 16)});
    }
  }
}

template <class T>
RED_DEVICE Raw pack(const float (&v)[kVector<T>]) {
  Raw raw;
  if constexpr (sizeof(T) == 4) {
    RED_UNROLL for (int i = 0; i < 4; ++i) raw.w[i] = bits_of(v[i]);
  } else {
    RED_UNROLL for (int i = 0; i < 4; ++i) raw.w[i] = narrow_two(v[2 * i], v[2 * i + 1], T{});
  }
  return raw;
}

// A row of an activation.
template <class T>
RED_DEVICE const T* row_of(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

// One vector of a row from column `column` on, of `count` columns that exist: in one piece if `whole`, and otherwise one by
// one, the missing ones 0.
template <class T>
RED_DEVICE Raw load_raw(const T* row, int64_t column, int64_t count, bool whole) {
  if (whole) return load16(row + column);
  T some[kVector<T>];
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) {
    some[i] = T{};
    if (i < count) some[i] = row[column + i];
  }
  Raw raw;
  __builtin_memcpy(&raw, some, 16);
  return raw;
}

template <class T>
RED_DEVICE void store_raw(void* data, int64_t row, int64_t d, int64_t column, int64_t count, bool whole, const Raw& raw) {
  T* to = static_cast<T*>(data) + row * d + column;
  if (whole) return store16(to, raw);
  T some[kVector<T>];
  __builtin_memcpy(some, &raw, 16);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i)
    if (i < count) to[i] = some[i];
}

// What is known of a parameter when a kernel is compiled: that it is there, in fp32 (kWide) or the activations' type
// (kNarrow). With kAny it is asked each time.
enum Known { kAny, kWide, kNarrow };

template <class T>
RED_DEVICE void fill(float (&v)[kVector<T>], float value) {
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = value;
}

// kVector<T> elements of a parameter from `offset` on.
template <class T, Known KNOWN = kAny>
RED_DEVICE void load_vector(const Vectors& vectors, int64_t offset, int64_t count, bool whole, float (&v)[kVector<T>]) {
  constexpr int kSize = kVector<T>;
  if (KNOWN == kWide || (KNOWN == kAny && vectors.wide)) {
    const float* from = static_cast<const float*>(vectors.data) + offset;
    if (whole) {
      RED_UNROLL for (int i = 0; i < kSize; i += 4) {
        float part[4];
        unpack<float>(load16(from + i), part);
        RED_UNROLL for (int j = 0; j < 4; ++j) v[i + j] = part[j];
      }
    } else {
      RED_UNROLL for (int i = 0; i < kSize; ++i) v[i] = i < count ? from[i] : 0.0f;
    }
  } else {
    unpack<T>(load_raw<T>(static_cast<const T*>(vectors.data), offset, count, whole), v);
  }
}

// weight + weight_offset, or 1.
template <class T, Known KNOWN = kAny>
RED_DEVICE void load_weight(const Vectors& weight, float offset, int64_t column, int64_t count, bool whole,
                            float (&v)[kVector<T>]) {
  if (KNOWN == kAny && weight.data == nullptr) return fill<T>(v, 1.0f);
  load_vector<T, KNOWN>(weight, column, count, whole, v);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] += offset;
}

// norm_bias, or nothing to add: +0 would lose the sign of a zero.
template <class T>
RED_DEVICE void load_norm_bias(const Vectors& norm_bias, int64_t column, int64_t count, bool whole,
                               float (&v)[kVector<T>]) {
  if (norm_bias.data == nullptr) return fill<T>(v, -0.0f);
  load_vector<T>(norm_bias, column, count, whole, v);
}

// A row's own edit: where its vectors begin, and whether it exists.
struct RowEdit {
  RED_DEVICE RowEdit(const Edit& edit, int64_t id)
      : known(id >= 0 && id < edit.edits), offset(known ? id * edit.stride : 0) {}
  bool known;
  int64_t offset;
};

// Multiplies by the scale of a row's edit, NaN if there is no such edit.
template <class T>
RED_DEVICE void apply_scale(const Edit& edit, const RowEdit& own, int64_t column, int64_t count, bool whole,
                            float (&v)[kVector<T>]) {
  if (edit.scale.data == nullptr) return;
  float u[kVector<T>];
  load_vector<T>(edit.scale, own.offset + column, count, whole, u);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = own.known ? product(v[i], u[i]) : not_a_number();
}

// Multiplies by the dropout factors of a row's columns.
template <class T>
RED_DEVICE void drop(const Dropout& dropout, int64_t seed, int64_t row, int64_t column, float (&v)[kVector<T>]) {
  RED_UNROLL for (int i = 0; i < kVector<T>; i += 4) {
    const Words words = philox(seed, row, static_cast<uint32_t>((column + i) / 4));
    RED_UNROLL for (int j = 0; j < 4; ++j)
      v[i + j] = product(v[i + j], dropped(words.w[j], dropout.threshold, dropout.factor));
  }
}

// dropout(scale * x + bias) (RED eq. 1); `v` is x. Roundings are written out, so that every kernel makes the same bits.
template <class T>
RED_DEVICE void apply_edit(const Edit& edit, const RowEdit& own, int64_t seed, int64_t row, int64_t column, int64_t count,
                           bool whole, float (&v)[kVector<T>]) {
  float s[kVector<T>], b[kVector<T>];
  const bool scaled = edit.scale.data != nullptr, biased = edit.bias.data != nullptr;
  if (scaled) load_vector<T>(edit.scale, own.offset + column, count, whole, s);
  if (biased) load_vector<T>(edit.bias, own.offset + column, count, whole, b);
  if (scaled && biased) {
    RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = multiply_add(v[i], s[i], b[i]);
  } else if (scaled) {
    RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = product(v[i], s[i]);
  } else if (biased) {
    RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] += b[i];
  }
  if (!own.known) fill<T>(v, not_a_number());
  if (edit.dropout.seed != nullptr) drop<T>(edit.dropout, seed, row, column, v);
}

// Adds the residual, as it lies in memory.
template <class T>
RED_DEVICE void add_raw(const Raw& residual, float (&v)[kVector<T>]) {
  float r[kVector<T>];
  unpack<T>(residual, r);
  RED_UNROLL for (int i = 0; i < kVector<T>; ++i) v[i] = r[i] + v[i];
}

// What the edit made of a row, with the residual: z as it lies in memory where it is kept, and as a norm sees it in any
// case. `x` and `residual` too are as they lie in memory.
template <class T>
RED_DEVICE Raw edited(const Edit& edit, const RowEdit& own, int64_t seed, int64_t row, int64_t column, int64_t count,
                      bool whole, const Raw& x, const Raw& residual, bool added) {
  float v[kVector<T>];
  unpack<T>(x, v);
  apply_edit<T>(edit, own, seed, row, column, count, whole, v);
  if (added) add_raw<T>(residual, v);
  return pack<T>(v);
}

RED_DEVICE int64_t edit_id(const Edit& edit, int64_t row) { return edit.ids == nullptr ? 0 : edit.ids[row]; }
RED_DEVICE int64_t dropout_seed(const Edit& edit) { return edit.dropout.seed == nullptr ? 0 : *edit.dropout.seed; }

}  // namespace cuda
}  // namespace red
