// Runs an exported TorchScript file in C++: segment MODEL.ts PICTURE.ppm LIBRARY...
// The libraries hold the ops of the network: _C_schemas.so, _C_cpu.so and, for a GPU, _C_cuda.so.
#include <dlfcn.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>

int main(int count, char** arguments) {
  if (count < 5) {
    return std::cerr << "segment MODEL.ts PICTURE.ppm _C_schemas.so _C_cpu.so [_C_cuda.so, to run on the GPU]\n", 2;
  }
  for (int number = 3; number < count; ++number) {
    if (dlopen(arguments[number], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      return std::cerr << dlerror() << "\n", 2;
    }
  }
  std::string kind;
  int64_t width = 0, height = 0, top = 0;
  std::ifstream file(arguments[2], std::ios::binary);
  file >> kind >> width >> height >> top;  // P6, 8 bits
  file.get();
  torch::Tensor pixels = torch::empty({height, width, 3}, torch::kUInt8);
  file.read(static_cast<char*>(pixels.data_ptr()), height * width * 3);
  const torch::Device device(count > 5 ? torch::kCUDA : torch::kCPU);
  torch::InferenceMode guard;
  torch::jit::Module model = torch::jit::load(arguments[1], device);
  const torch::Tensor images = (pixels.permute({2, 0, 1}).unsqueeze(0).to(torch::kFloat) / 255).to(device);
  const torch::Tensor sizes = torch::tensor({{height, width}}, torch::kLong).to(device);
  std::cout.precision(9);
  const auto found = model.forward({images, sizes}).toTuple();  // valid, boxes, scores, labels, mask_probs
  const auto at = [&](size_t part) { return found->elements()[part].toTensor()[0].cpu(); };
  const torch::Tensor valid = at(0), boxes = at(1), scores = at(2), labels = at(3);
  for (int64_t row = 0; row < valid.size(0) && valid[row].item<bool>(); ++row) {
    std::cout << labels[row].item<int64_t>() << " " << scores[row].item<float>();
    for (int64_t side = 0; side < 4; ++side) {
      std::cout << " " << boxes[row][side].item<float>() << (side == 3 ? "\n" : "");
    }
  }
}
