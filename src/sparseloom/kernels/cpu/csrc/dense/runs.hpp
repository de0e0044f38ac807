// A SparseMask with blocks of MASK_QUERIES x MASK_KEYS as runs.
#pragma once

#include <vector>

#include "dense/dense.hpp"

namespace sparseloom {

struct RunList {
  std::vector<Run> runs;
  std::vector<int64_t> offsets;  // (rows, blocks + 1)

  // `rows` of `blocks` query blocks each; `from` as in a SparseMask.
  RunList(const int32_t* indices, const int64_t* from, int64_t rows, int64_t blocks) {
    offsets.reserve(static_cast<size_t>(rows * (blocks + 1)));
    for (int64_t row = 0; row < rows; ++row, from += blocks + 1)
      for (int64_t block = 0; block <= blocks; ++block) {
        offsets.push_back(static_cast<int64_t>(runs.size()));
        if (block == blocks) break;
        for (int64_t i = from[block]; i < from[block + 1]; ++i)
          if (i > from[block] && runs.back().end == indices[i])
            ++runs.back().end;
          else
            runs.push_back({indices[i], indices[i] + 1, 0});
      }
  }
};

}  // namespace sparseloom
