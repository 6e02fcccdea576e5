// Arithmetic over the channels of cells, which lie side by side: what the vector units do.
#pragma once

#include <cstdint>

// One binary for every x86 processor: a copy for AVX2 beside the plain one, chosen when the library loads.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define DSG_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define DSG_VECTOR_CLONES
#endif

namespace dsg {

// Channels whose sums stay in registers while the rows are walked through.
constexpr int64_t kChannelBlock = 32;

template <typename T>
[[gnu::always_inline]] inline void weighted_sum_of_rows(
    const T* const* rows, const T* weights, int64_t count, int64_t channels, T* __restrict output) {
  int64_t channel = 0;
  for (; channel + kChannelBlock <= channels; channel += kChannelBlock) {
    T sums[kChannelBlock] = {};
    for (int64_t row = 0; row < count; ++row) {
      const T* __restrict values = rows[row] + channel;
      const T weight = weights[row];
      for (int64_t lane = 0; lane < kChannelBlock; ++lane) {
        sums[lane] += weight * values[lane];
      }
    }
    for (int64_t lane = 0; lane < kChannelBlock; ++lane) {
      output[channel + lane] = sums[lane];
    }
  }
  for (; channel < channels; ++channel) {
    T sum = 0;
    for (int64_t row = 0; row < count; ++row) {
      sum += weights[row] * rows[row][channel];
    }
    output[channel] = sum;
  }
}

template <typename T>
[[gnu::always_inline]] inline T dot_of_rows(const T* __restrict a, const T* __restrict b, int64_t channels) {
  T sums[kChannelBlock] = {};
  int64_t channel = 0;
  for (; channel + kChannelBlock <= channels; channel += kChannelBlock) {
    for (int64_t lane = 0; lane < kChannelBlock; ++lane) {
      sums[lane] += a[channel + lane] * b[channel + lane];
    }
  }
  T total = 0;
  for (; channel < channels; ++channel) {
    total += a[channel] * b[channel];
  }
  for (int64_t lane = 0; lane < kChannelBlock; ++lane) {
    total += sums[lane];
  }
  return total;
}

template <typename T>
[[gnu::always_inline]] inline void add_to_row(T* __restrict row, const T* __restrict values, T weight, int64_t channels) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    row[channel] += weight * values[channel];
  }
}

// The compiler makes no clones of templates, so each is spelled for both types.

// output[c] = sum over rows of weights[row] * rows[row][c]
DSG_VECTOR_CLONES static void weighted_sum(
    const float* const* rows, const float* weights, int64_t count, int64_t channels, float* output) {
  weighted_sum_of_rows(rows, weights, count, channels, output);
}
DSG_VECTOR_CLONES static void weighted_sum(
    const double* const* rows, const double* weights, int64_t count, int64_t channels, double* output) {
  weighted_sum_of_rows(rows, weights, count, channels, output);
}

DSG_VECTOR_CLONES static float dot(const float* a, const float* b, int64_t channels) {
  return dot_of_rows(a, b, channels);
}
DSG_VECTOR_CLONES static double dot(const double* a, const double* b, int64_t channels) {
  return dot_of_rows(a, b, channels);
}

// rows[row][c] += weights[row] * values[c]
DSG_VECTOR_CLONES static void add_to_rows(
    float* const* rows, const float* weights, int64_t count, const float* values, int64_t channels) {
  for (int64_t row = 0; row < count; ++row) {
    add_to_row(rows[row], values, weights[row], channels);
  }
}
DSG_VECTOR_CLONES static void add_to_rows(
    double* const* rows, const double* weights, int64_t count, const double* values, int64_t channels) {
  for (int64_t row = 0; row < count; ++row) {
    add_to_row(rows[row], values, weights[row], channels);
  }
}

}  // namespace dsg
