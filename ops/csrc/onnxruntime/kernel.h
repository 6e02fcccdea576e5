// What the kernels for onnxruntime have in common.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <string>

#include "request.h"

namespace dsg {

inline void check(bool holds, const char* what) {
  if (!holds) {
    throw Ort::Exception(std::string("dsg: ") + what, ORT_INVALID_ARGUMENT);
  }
}

// Exceptions do not cross into onnxruntime.
template <typename task_t>
OrtStatusPtr guarded(const task_t& task) {
  try {
    task();
    return nullptr;
  } catch (const std::exception& error) {
    return Ort::Status(error.what(), ORT_INVALID_ARGUMENT).release();
  }
}

// onnxruntime's own threads; `context` must outlive it.
inline Parallel parallel_of(Ort::KernelContext& context) {
  return {
      [](void* own, void (*task)(void*, size_t), size_t count, void* data) {
        static_cast<Ort::KernelContext*>(own)->ParallelFor(task, count, 0, data);
      },
      &context};
}

// dsg::BatchedNms, on the CPU and where there is CUDA.
void add_nms(Ort::CustomOpDomain& domain);

}  // namespace dsg
