#include "cpu/limits.h"

#include <string.h>
#include <time.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace hsv::HSV_ISA {
namespace {

constexpr int kChains = 12;  // independent sums: more than the latency of a multiply-add times the units that run it
constexpr int kTurns = 4096;
constexpr int kMostThreads = 1024;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Keeps the vectors in registers and their values unknown to the compiler.
template <class V>
HSV_INLINE void opaque(V& v) {
#if defined(__x86_64__)
  asm volatile("" : "+x"(v));
#else
  asm volatile("" : "+w"(v));
#endif
}

// The work of all threads per second; chunk(thread, team) returns how much it did and is repeated for `seconds`.
template <class F>
double rate(double seconds, int threads, const F& chunk) {
  double rates[kMostThreads] = {};
  parallel(threads < kMostThreads ? threads : kMostThreads, [&](int thread, int team) {
    const double begin = now();
    double work = 0, elapsed = 0;
    while (elapsed < seconds) {
      work += chunk(thread, team);
      elapsed = now() - begin;
    }
    rates[thread] = work / elapsed;
  });
  double total = 0;
  for (double r : rates) total += r;
  return total;
}

double fma(double seconds, int threads) {
  return rate(seconds, threads, [](int, int) {
    Vec sum[kChains] = {}, a = splat(0.999f), b = splat(1e-3f);
    opaque(a), opaque(b);
    HSV_UNROLL
    for (int i = 0; i < kChains; i++) opaque(sum[i]);  // or equal chains become one
    for (int turn = 0; turn < kTurns; turn++) {
      HSV_UNROLL
      for (int i = 0; i < kChains; i++) sum[i] = sum[i] * a + b;
    }
    HSV_UNROLL
    for (int i = 0; i < kChains; i++) opaque(sum[i]);
    return 2.0 * kWidth * kChains * kTurns;
  });
}

double dot_bf16([[maybe_unused]] double seconds, [[maybe_unused]] int threads) {
#ifdef __AVX512BF16__
  return rate(seconds, threads, [](int, int) {
    __m512 sum[kChains] = {};
    __m512i a = {}, b = {};
    opaque(a), opaque(b);
    HSV_UNROLL
    for (int i = 0; i < kChains; i++) opaque(sum[i]);
    for (int turn = 0; turn < kTurns; turn++) {
      HSV_UNROLL
      for (int i = 0; i < kChains; i++) sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)a, (__m512bh)b);
    }
    HSV_UNROLL
    for (int i = 0; i < kChains; i++) opaque(sum[i]);
    return 4.0 * kWidth * kChains * kTurns;
  });
#else
  return 0;
#endif
}

double exponentials(double seconds, int threads) {
  return rate(seconds, threads, [](int, int) {
    Vec x = splat(-0.3f), sum[4] = {};
    for (int turn = 0; turn < kTurns; turn++) {
      HSV_UNROLL
      for (int i = 0; i < 4; i++) {
        opaque(x);
        sum[i] += exp2_in_range(x);
      }
    }
    HSV_UNROLL
    for (int i = 0; i < 4; i++) opaque(sum[i]);
    return 4.0 * kWidth * kTurns;
  });
}

double copy(void* to, const void* from, int64_t bytes, double seconds, int threads) {
  return rate(seconds, threads, [=](int thread, int team) {
    const int64_t begin = bytes * thread / team, size = bytes * (thread + 1) / team - begin;
    memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, static_cast<size_t>(size));
    return 2.0 * static_cast<double>(size);
  });
}

}  // namespace

LimitKernels limit_kernels() {
  return {fma, dot_bf16, exponentials, copy};
}

}  // namespace hsv::HSV_ISA
