// dsg::SgRoIAlign and dsg::MultiScaleSgRoIAlign for onnxruntime, on the CPU and on CUDA, in float and half; and what
// onnxruntime calls when the library is registered.
//
// Both execution providers get a kernel for every type: where a library registers an op, onnxruntime forgets the body
// that the model holds for it, and a provider without a kernel of its own would have nothing to run.
#include "kernel.h"

namespace dsg {
namespace {

constexpr size_t kRois = 0, kProb = 1, kFeatures = 2;  // inputs

template <typename type_t>
class Kernel {
 public:
  Kernel(const OrtKernelInfo* raw, bool many, bool cuda) : on_cuda(cuda) {
    const Ort::ConstKernelInfo info{raw};
    attributes.out_height = info.GetAttribute<int64_t>("output_height");
    attributes.out_width = info.GetAttribute<int64_t>("output_width");
    attributes.sampling_ratio = info.GetAttribute<int64_t>("sampling_ratio");
    attributes.aligned = info.GetAttribute<int64_t>("aligned") != 0;
    if (many) {
      attributes.spatial_scales = info.GetAttributes<float>("spatial_scales");
      attributes.canonical_scale = info.GetAttribute<float>("canonical_scale");
      attributes.canonical_level = static_cast<double>(info.GetAttribute<int64_t>("canonical_level"));
    } else {
      attributes.spatial_scales = {info.GetAttribute<float>("spatial_scale")};
    }
    check(attributes.out_height > 0 && attributes.out_width > 0, "output sizes must be positive");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(Ort::KernelContext{raw}); });
  }

 private:
  void compute(Ort::KernelContext context) {
    Request request;
    request.type = std::is_same_v<type_t, float> ? ScalarType::Float : ScalarType::Half;
    for (size_t input = kFeatures; input < context.GetInputCount(); ++input) {
      const auto level = context.GetInput(input);
      if (!level) {
        break;
      }
      const auto shape = level.GetTensorTypeAndShapeInfo().GetShape();
      check(shape.size() == 4, "features must be [N, C, Hf, Wf]");
      if (request.features.empty()) {
        request.images = shape[0];
        request.channels = shape[1];
      }
      check(shape[0] == request.images && shape[1] == request.channels, "levels differ in images or channels");
      request.features.push_back(level.GetTensorRawData());
      request.heights.push_back(shape[2]);
      request.widths.push_back(shape[3]);
    }
    check(
        request.features.size() <= static_cast<size_t>(kMaxLevels) &&
            request.features.size() == attributes.spatial_scales.size(),
        "one spatial scale per level, and at most 8 levels");
    const auto rois = context.GetInput(kRois);
    const auto roi_shape = rois.GetTensorTypeAndShapeInfo().GetShape();
    check(roi_shape.size() == 2 && roi_shape[1] == 5, "rois must be [R, 5]");
    request.rois = rois.GetTensorData<float>();
    request.count = roi_shape[0];
    if (const auto prob = context.GetInput(kProb)) {
      const auto shape = prob.GetTensorTypeAndShapeInfo().GetShape();
      check(shape.size() == 3 && shape[0] == request.count && shape[1] > 0 && shape[2] > 0, "prob must be [R, Hp, Wp]");
      request.prob = prob.GetTensorRawData();
      request.prob_height = shape[1];
      request.prob_width = shape[2];
    }
    const int64_t shape[] = {request.count, request.channels, attributes.out_height, attributes.out_width};
    auto output = context.GetOutput(0, shape, 4);
    if (request.count == 0 || request.channels == 0) {
      return;
    }
    request.output = output.GetTensorMutableRawData();
    if (on_cuda) {
      run_cuda(context, request);
      return;
    }
    run_on_cpu(request, attributes, parallel_of(context));
  }

  Attributes attributes;
  bool on_cuda;

  void run_cuda(const Ort::KernelContext& context, const Request& request) const {
#if defined(DSG_WITH_CUDA)
    const char* error = run_on_cuda(request, attributes, context.GetGPUComputeStream());
    check(error == nullptr, error);
#else
    (void)context;
    (void)request;
    check(false, "built without CUDA");
#endif
  }
};

template <typename type_t, bool many, bool cuda>
struct Op : Ort::CustomOpBase<Op<type_t, many, cuda>, Kernel<type_t>, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new Kernel<type_t>(info, many, cuda); });
  }
  const char* GetName() const { return many ? "MultiScaleSgRoIAlign" : "SgRoIAlign"; }
  const char* GetExecutionProviderType() const { return cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return kFeatures + (many ? kMaxLevels : 1); }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == kRois ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : Ort::TypeToTensorType<type_t>::type;
  }
  ONNXTensorElementDataType GetOutputType(size_t) const { return Ort::TypeToTensorType<type_t>::type; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == kProb || index > kFeatures ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
};

template <bool cuda>
void add(Ort::CustomOpDomain& domain) {
  static const Op<float, false, cuda> one;
  static const Op<float, true, cuda> many;
  static const Op<Ort::Float16_t, false, cuda> half_one;
  static const Op<Ort::Float16_t, true, cuda> half_many;
  domain.Add(&one);
  domain.Add(&many);
  domain.Add(&half_one);
  domain.Add(&half_many);
}

}  // namespace
}  // namespace dsg

// What onnxruntime calls when the library is registered with a session.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "dsg: this onnxruntime is older than the one the kernels were built for");
  }
  Ort::InitApi(api);
  try {
    // Lives as long as the process: sessions hold on to it.
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made{"dsg"};
      dsg::add_nms(made);
      dsg::add<false>(made);
#if defined(DSG_WITH_CUDA)
      dsg::add<true>(made);
#endif
      return made;
    }();
    return api->AddCustomOpDomain(options, domain);
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}
