// Greedy suppression on CUDA: all images in two launches, nothing waits for the host.
//
// First every pair of boxes is compared, 64 x 64 in a block, into bits. Then a block an image walks down its boxes, 64
// at a time: who of the 64 stays is settled in one thread's registers, and what those suppress is gathered by all.
//
// Needs no torch: onnxruntime's kernel has it too.
#pragma once

#include "pyramid.cuh"

namespace dsg {
namespace {

constexpr int kBits = 64;
using Word = unsigned long long;

template <typename scalar_t>
__device__ __forceinline__ bool overlaps(const scalar_t* a, const scalar_t* b, scalar_t threshold) {
  const scalar_t width = max(min(a[2], b[2]) - max(a[0], b[0]), scalar_t(0));
  const scalar_t height = max(min(a[3], b[3]) - max(a[1], b[1]), scalar_t(0));
  const scalar_t shared = width * height;
  const scalar_t area_a = (a[2] - a[0]) * (a[3] - a[1]), area_b = (b[2] - b[0]) * (b[3] - b[1]);
  return shared / (area_a + area_b - shared) > threshold;  // 0 / 0 is above nothing
}

// bits [B, N, words]: bit j of word w of row i says that box i, if it stays, suppresses box 64 * w + j, which comes
// after it. Words left of the diagonal are not written, and nobody reads them.
template <typename scalar_t>
__global__ void __launch_bounds__(kBits) compare_kernel(
    const scalar_t* __restrict__ boxes, const int64_t* __restrict__ groups, int64_t count, int64_t words,
    scalar_t threshold, Word* __restrict__ bits) {
  const int64_t image = blockIdx.z, word = blockIdx.x, part = blockIdx.y;
  if (word < part) {
    return;
  }
  __shared__ scalar_t other[kBits][4];
  __shared__ int64_t other_group[kBits];
  const int64_t column = word * kBits + threadIdx.x, row = part * kBits + threadIdx.x;
  boxes += image * count * 4;
  groups += image * count;
  if (column < count) {
    for (int side = 0; side < 4; ++side) {
      other[threadIdx.x][side] = boxes[column * 4 + side];
    }
    other_group[threadIdx.x] = groups[column];
  }
  __syncthreads();
  if (row >= count) {
    return;
  }
  const scalar_t own[4] = {boxes[row * 4], boxes[row * 4 + 1], boxes[row * 4 + 2], boxes[row * 4 + 3]};
  const int64_t own_group = groups[row];
  const int size = static_cast<int>(min(static_cast<int64_t>(kBits), count - word * kBits));
  Word found = 0;
  for (int bit = word == part ? threadIdx.x + 1 : 0; bit < size; ++bit) {
    if (other_group[bit] == own_group && overlaps(own, other[bit], threshold)) {
      found |= Word{1} << bit;
    }
  }
  bits[(image * count + row) * words + word] = found;
}

constexpr int kShares = kThreads / kBits;      // threads that gather one word of what 64 rows suppress ...
constexpr int kRowsOfShare = kBits / kShares;  // ... and the rows that each of them reads

__global__ void __launch_bounds__(kThreads) walk_kernel(
    const Word* __restrict__ bits, const bool* __restrict__ valid, int64_t count, int64_t words,
    bool* __restrict__ keep) {
  extern __shared__ Word gone[];  // [words]: bit j of word w: box 64 * w + j is suppressed, or was never there
  __shared__ Word diagonal[kBits];
  __shared__ Word staying;
  bits += blockIdx.x * count * words;
  valid += blockIdx.x * count;
  keep += blockIdx.x * count;
  const int lane = threadIdx.x % kBits, share = threadIdx.x / kBits;
  for (int64_t row = threadIdx.x; row < words * kBits; row += kThreads) {
    const unsigned present = __ballot_sync(~0u, row < count && valid[row]);
    if (row % warpSize == 0) {
      reinterpret_cast<unsigned*>(gone)[row / warpSize] = ~present;
    }
  }
  Word next_diagonal = share == 0 && lane < count ? bits[lane * words] : 0;
  for (int64_t part = 0; part < words; ++part) {
    const int64_t first = part * kBits;
    if (share == 0) {
      diagonal[lane] = next_diagonal;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Word left_out = gone[part];
#pragma unroll
      for (int bit = 0; bit < kBits; ++bit) {
        left_out |= (left_out >> bit & 1) ? Word{0} : diagonal[bit];
      }
      staying = ~left_out;
    }
    // Read while that one thread is busy.
    const int64_t next_row = first + kBits + lane;
    next_diagonal = share == 0 && next_row < count ? bits[next_row * words + part + 1] : 0;
    __syncthreads();
    const Word stays = staying;
    if (share == 0 && first + lane < count) {
      keep[first + lane] = stays >> lane & 1;
    }
    const Word own = stays >> (share * kRowsOfShare);  // rows past the last box never stay
    const int64_t first_row = first + share * kRowsOfShare, last_row = count - 1;
    for (int64_t word = part + 1 + lane; word < words; word += kBits) {
      Word read[kRowsOfShare];  // whoever stays or not, so that all are asked for at once
#pragma unroll
      for (int row = 0; row < kRowsOfShare; ++row) {
        read[row] = bits[min(first_row + row, last_row) * words + word];
      }
      Word suppressed = 0;
#pragma unroll
      for (int row = 0; row < kRowsOfShare; ++row) {
        suppressed |= read[row] & (Word{0} - (own >> row & 1));
      }
      if (suppressed != 0) {
        atomicOr(&gone[word], suppressed);
      }
    }
    __syncthreads();
  }
}

constexpr int64_t kMostWords = 4096;  // 32 KiB of shared memory
constexpr int64_t kMostImages = 65535;

inline int64_t words_of(int64_t count) { return (count + kBits - 1) / kBits; }

// keep bool [B, N]: which of the boxes [B, N, 4], by falling score, stay; groups int64 [B, N], valid bool [B, N].
//
// bits: room for B * N * words_of(N) words, of which there may be kMostWords, and of images kMostImages.
template <typename scalar_t>
void suppress(
    const scalar_t* boxes, const int64_t* groups, const bool* valid, int64_t batch, int64_t count, scalar_t threshold,
    Word* bits, bool* keep, cudaStream_t stream) {
  const int64_t words = words_of(count);
  const dim3 grid(static_cast<unsigned>(words), static_cast<unsigned>(words), static_cast<unsigned>(batch));
  compare_kernel<scalar_t><<<grid, kBits, 0, stream>>>(boxes, groups, count, words, threshold, bits);
  walk_kernel<<<static_cast<unsigned>(batch), kThreads, words * sizeof(Word), stream>>>(
      bits, valid, count, words, keep);
}

}  // namespace
}  // namespace dsg
