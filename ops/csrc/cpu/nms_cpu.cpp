// Greedy suppression on the CPU: the boxes of each group by themselves, images side by side.

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "../nms_arguments.h"

namespace dsg {
namespace {

// The boxes of one group that are still in the running, side by side in memory so that the inner loop is vectorised.
template <typename scalar_t>
struct Group {
  std::vector<scalar_t> x1, y1, x2, y2, area;
  std::vector<int64_t> row;

  void push(const scalar_t* box, int64_t index) {
    x1.push_back(box[0]);
    y1.push_back(box[1]);
    x2.push_back(box[2]);
    y2.push_back(box[3]);
    area.push_back((box[2] - box[0]) * (box[3] - box[1]));
    row.push_back(index);
  }

  void suppress(scalar_t threshold, bool* keep) const {
    const int64_t count = static_cast<int64_t>(row.size());
    std::vector<uint8_t> gone(count, 0);
    for (int64_t i = 0; i < count; ++i) {
      if (gone[i]) {
        continue;
      }
      keep[row[i]] = true;
      for (int64_t j = i + 1; j < count; ++j) {
        const scalar_t left = x1[i] > x1[j] ? x1[i] : x1[j], right = x2[i] < x2[j] ? x2[i] : x2[j];
        const scalar_t top = y1[i] > y1[j] ? y1[i] : y1[j], bottom = y2[i] < y2[j] ? y2[i] : y2[j];
        const scalar_t width = right > left ? right - left : scalar_t(0);
        const scalar_t height = bottom > top ? bottom - top : scalar_t(0);
        const scalar_t shared = width * height;
        gone[j] |= shared / (area[i] + area[j] - shared) > threshold;  // 0 / 0 is above nothing
      }
    }
  }
};

template <typename scalar_t>
void run(const Tensor& boxes, const Tensor& groups, const Tensor& valid, double threshold, const Tensor& keep) {
  const int64_t batch = boxes.size(0), count = boxes.size(1);
  const auto* box = static_cast<const scalar_t*>(boxes.const_data_ptr());
  const auto* group = static_cast<const int64_t*>(groups.const_data_ptr());
  const auto* usable = static_cast<const bool*>(valid.const_data_ptr());
  auto* kept = static_cast<bool*>(keep.mutable_data_ptr());
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      std::unordered_map<int64_t, Group<scalar_t>> members;
      for (int64_t row = 0; row < count; ++row) {
        const int64_t place = image * count + row;
        kept[place] = false;
        if (usable[place]) {
          members[group[place]].push(box + 4 * place, row);
        }
      }
      for (const auto& [name, one] : members) {
        one.suppress(static_cast<scalar_t>(threshold), kept + image * count);
      }
    }
  });
}

Tensor batched_nms(const Tensor& boxes, const Tensor& groups, const Tensor& valid, double threshold) {
  check_nms_arguments(boxes, groups, valid);
  const Tensor keep = torch::stable::empty_like(valid);
  if (boxes.scalar_type() == torch::headeronly::ScalarType::Double) {
    run<double>(boxes, groups, valid, threshold, keep);
  } else {
    run<float>(boxes, groups, valid, threshold, keep);
  }
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsg, CPU, library) {
  library.impl("batched_nms", TORCH_BOX(&batched_nms));
}

}  // namespace dsg
