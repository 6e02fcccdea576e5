// Suppression for onnxruntime on CUDA.
#include "../cuda/suppression.cuh"
#include "request.h"

namespace dsg {

int64_t suppression_scratch(const BoxesOfImages& call) {
  return call.images * call.count * words_of(call.count) * static_cast<int64_t>(sizeof(Word));
}

const char* suppress_on_cuda(const BoxesOfImages& call, void* scratch, void* stream) {
  if (words_of(call.count) > kMostWords || call.images > kMostImages) {
    return "too many boxes for one suppression";
  }
  suppress(
      call.boxes, call.groups, call.valid, call.images, call.count, call.threshold, static_cast<Word*>(scratch),
      call.keep, static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

}  // namespace dsg
