// Calls of the ops as onnxruntime hands them over: contiguous tensors, and the attributes of the node.
//
// N images, C channels, R RoIs, H x W the output, Hp x Wp a probability map.
#pragma once

#include <cstdint>
#include <vector>

#include "../sampling.h"

namespace dsg {

struct Attributes {
  int64_t out_height = 0, out_width = 0, sampling_ratio = 0;
  bool aligned = true;
  std::vector<float> spatial_scales;
  double canonical_scale = 1.0, canonical_level = 0.0;
};

struct Request {
  ScalarType type = ScalarType::Float;  // of features, map and output: float or half
  std::vector<const void*> features;  // [N, C, Hf, Wf] each
  std::vector<int64_t> heights, widths;
  int64_t images = 0, channels = 0;
  const float* rois = nullptr;  // [R, 5]
  int64_t count = 0;
  const void* prob = nullptr;  // [R, Hp, Wp]
  int64_t prob_height = 0, prob_width = 0;
  void* output = nullptr;  // [R, C, H, W]
};

inline Call<float> call_of(const Request& request, const Attributes& attributes) {
  Call<float> call{};
  call.images = request.images;
  call.channels = request.channels;
  call.rois = request.count;
  call.out_height = attributes.out_height;
  call.out_width = attributes.out_width;
  call.sampling_ratio = attributes.sampling_ratio;
  call.aligned = attributes.aligned;
  call.levels = static_cast<int>(request.features.size());
  call.roi = {request.rois, ScalarType::Float, {5, 1, 0}};
  if (request.prob != nullptr) {
    call.prob_height = request.prob_height;
    call.prob_width = request.prob_width;
    call.prob = {request.prob, request.type, {request.prob_height * request.prob_width, request.prob_width, 1}};
  }
  for (int level = 0; level < call.levels; ++level) {
    call.height[level] = request.heights[level];
    call.width[level] = request.widths[level];
    call.scale[level] = attributes.spatial_scales[level];
    call.area_threshold[level] = static_cast<float>(level_area(
        level, attributes.spatial_scales[0], attributes.canonical_scale, attributes.canonical_level));
  }
  return call;
}

// Runs `task(index)` for 0 .. count - 1, perhaps side by side.
struct Parallel {
  void (*run)(void* context, void (*task)(void*, size_t), size_t count, void* data);
  void* context;
};

template <typename task_t>
void for_each(const Parallel& parallel, int64_t count, const task_t& task) {
  parallel.run(
      parallel.context,
      [](void* data, size_t index) { (*static_cast<const task_t*>(data))(static_cast<int64_t>(index)); },
      static_cast<size_t>(count), const_cast<task_t*>(&task));
}

void run_on_cpu(const Request& request, const Attributes& attributes, const Parallel& parallel);

// `stream`: a cudaStream_t. Returns an error's text, or null.
const char* run_on_cuda(const Request& request, const Attributes& attributes, void* stream);

// One call of suppression: B images, N boxes of an image, by falling score.
struct BoxesOfImages {
  const float* boxes;  // [B, N, 4]
  const int64_t* groups;  // [B, N]
  const bool* valid;  // [B, N]
  int64_t images, count;
  float threshold;
  bool* keep;  // [B, N]
};

// Bytes that `suppress_on_cuda` needs beside.
int64_t suppression_scratch(const BoxesOfImages& call);

// `scratch`: so many bytes on the device; `stream`: a cudaStream_t. Returns an error's text, or null.
const char* suppress_on_cuda(const BoxesOfImages& call, void* scratch, void* stream);

// CUDA's number of the device in use.
int current_device();

}  // namespace dsg
