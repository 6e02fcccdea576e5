// Arithmetic over the channels of cells, which lie side by side: what the vector units do.
#pragma once

#include <cstdint>
#include <cstring>

// One binary for every x86 processor: a copy for AVX2 beside the plain one, chosen when the library loads.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define DSG_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else  // no name for the level that has fused multiply-add too
#define DSG_VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define DSG_VECTOR_CLONES
#endif

namespace dsg {

// Vectors of 32 bytes in GCC's and Clang's own terms: left to themselves, compilers vectorise only some of these loops.
template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(32)));
  static constexpr int64_t lanes = 32 / sizeof(T);
};

template <typename T>
[[gnu::always_inline]] inline void load(typename Vector<T>::type& vector, const T* from) {
  std::memcpy(&vector, from, sizeof(vector));
}

template <typename T>
[[gnu::always_inline]] inline void store(const typename Vector<T>::type& vector, T* to) {
  std::memcpy(to, &vector, sizeof(vector));
}

// `width` vectors of channels, whose sums stay in registers while the rows are walked through.
template <int width, typename T>
[[gnu::always_inline]] inline void weighted_sum_of_block(
    const T* const* rows, const T* weights, int64_t count, int64_t channel, T* output) {
  constexpr int64_t lanes = Vector<T>::lanes;
  typename Vector<T>::type sums[width] = {}, values;
  for (int64_t row = 0; row < count; ++row) {
    for (int part = 0; part < width; ++part) {
      load(values, rows[row] + channel + part * lanes);
      sums[part] += weights[row] * values;
    }
  }
  for (int part = 0; part < width; ++part) {
    store(sums[part], output + channel + part * lanes);
  }
}

template <typename T>
[[gnu::always_inline]] inline void weighted_sum_of_rows(
    const T* const* rows, const T* weights, int64_t count, int64_t channels, T* output) {
  constexpr int64_t lanes = Vector<T>::lanes;
  int64_t channel = 0;
  for (; channel + 4 * lanes <= channels; channel += 4 * lanes) {
    weighted_sum_of_block<4>(rows, weights, count, channel, output);
  }
  for (; channel + lanes <= channels; channel += lanes) {
    weighted_sum_of_block<1>(rows, weights, count, channel, output);
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
[[gnu::always_inline]] inline T dot_of_rows(const T* a, const T* b, int64_t channels) {
  constexpr int64_t lanes = Vector<T>::lanes;
  typename Vector<T>::type sums = {}, left, right;
  int64_t channel = 0;
  for (; channel + lanes <= channels; channel += lanes) {
    load(left, a + channel);
    load(right, b + channel);
    sums += left * right;
  }
  T total = 0;
  for (; channel < channels; ++channel) {
    total += a[channel] * b[channel];
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    total += sums[lane];
  }
  return total;
}

template <typename T>
[[gnu::always_inline]] inline void add_to_row(T* row, const T* values, T weight, int64_t channels) {
  constexpr int64_t lanes = Vector<T>::lanes;
  typename Vector<T>::type sums, added;
  int64_t channel = 0;
  for (; channel + lanes <= channels; channel += lanes) {
    load(sums, row + channel);
    load(added, values + channel);
    sums += weight * added;
    store(sums, row + channel);
  }
  for (; channel < channels; ++channel) {
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
