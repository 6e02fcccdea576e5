// Greedy suppression of one image's boxes, each group by itself. Needs no torch: onnxruntime's kernel has it too.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace dsg {

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

// keep bool [N]: which of the boxes [N, 4], by falling score, stay; groups int64 [N], valid bool [N].
template <typename scalar_t>
void suppress_image(
    const scalar_t* boxes, const int64_t* groups, const bool* valid, int64_t count, scalar_t threshold, bool* keep) {
  std::unordered_map<int64_t, Group<scalar_t>> members;
  for (int64_t row = 0; row < count; ++row) {
    keep[row] = false;
    if (valid[row]) {
      members[groups[row]].push(boxes + 4 * row, row);
    }
  }
  for (const auto& [name, one] : members) {
    one.suppress(threshold, keep);
  }
}

}  // namespace dsg
