// dsg::BatchedNms for onnxruntime, on the CPU and on CUDA: its own NonMaxSuppression takes a fifth of a network there.
#include "../cpu/suppression.h"
#include "kernel.h"

namespace dsg {
namespace {

constexpr size_t kBoxes = 0, kGroups = 1, kValid = 2;  // inputs

class NmsKernel {
 public:
  NmsKernel(const OrtKernelInfo* info, bool cuda)
      : threshold(Ort::ConstKernelInfo{info}.GetAttribute<float>("threshold")), on_cuda(cuda) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(Ort::KernelContext{raw}); });
  }

 private:
  void compute(Ort::KernelContext context) const {
    const auto boxes = context.GetInput(kBoxes), groups = context.GetInput(kGroups), valid = context.GetInput(kValid);
    const auto shape = boxes.GetTensorTypeAndShapeInfo().GetShape();
    check(shape.size() == 3 && shape[2] == 4, "boxes must be [B, N, 4]");
    const std::vector<int64_t> rows = {shape[0], shape[1]};
    for (const auto& input : {groups, valid}) {
      check(input.GetTensorTypeAndShapeInfo().GetShape() == rows, "groups and valid must be [B, N], as the boxes are");
    }
    auto output = context.GetOutput(0, rows.data(), rows.size());
    if (rows[0] * rows[1] == 0) {
      return;
    }
    const BoxesOfImages call{
        boxes.GetTensorData<float>(), groups.GetTensorData<int64_t>(), valid.GetTensorData<bool>(), rows[0], rows[1],
        threshold, output.GetTensorMutableData<bool>()};
    if (on_cuda) {
      suppress_on(context, call);
      return;
    }
    for_each(parallel_of(context), call.images, [&](int64_t image) {
      const int64_t first = image * call.count;
      suppress_image(
          call.boxes + 4 * first, call.groups + first, call.valid + first, call.count, threshold, call.keep + first);
    });
  }

  static void suppress_on(const Ort::KernelContext& context, const BoxesOfImages& call) {
#if defined(DSG_WITH_CUDA)
    const Ort::MemoryInfo place("Cuda", OrtDeviceAllocator, current_device(), OrtMemTypeDefault);
    OrtAllocator* allocator = context.GetAllocator(*place);
    void* scratch = allocator->Alloc(allocator, static_cast<size_t>(suppression_scratch(call)));
    const char* error =
        scratch == nullptr ? "no memory for suppression" : suppress_on_cuda(call, scratch, context.GetGPUComputeStream());
    // Whoever gets it next writes to it on the same stream, after these kernels.
    allocator->Free(allocator, scratch);
    Ort::GetApi().ReleaseAllocator(allocator);
    check(error == nullptr, error);
#else
    (void)context;
    (void)call;
    check(false, "built without CUDA");
#endif
  }

  float threshold;
  bool on_cuda;
};

template <bool cuda>
struct NmsOp : Ort::CustomOpBase<NmsOp<cuda>, NmsKernel, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new NmsKernel(info, cuda); });
  }
  const char* GetName() const { return "BatchedNms"; }
  const char* GetExecutionProviderType() const { return cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return 3; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    constexpr ONNXTensorElementDataType types[] = {
        ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL};
    return types[index];
  }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL; }
};

}  // namespace

void add_nms(Ort::CustomOpDomain& domain) {
  static const NmsOp<false> on_cpu;
  domain.Add(&on_cpu);
#if defined(DSG_WITH_CUDA)
  static const NmsOp<true> on_cuda;
  domain.Add(&on_cuda);
#endif
}

}  // namespace dsg
