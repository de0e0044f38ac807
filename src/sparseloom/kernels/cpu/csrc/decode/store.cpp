#include "decode/store.hpp"

#include <cmath>
#include <vector>

namespace sparseloom {
namespace {

template <class High>
void split(const int32_t* codes, int64_t dim, int low_bits, char* to_high, char* to_low) {
  auto* high = reinterpret_cast<High*>(to_high);
  for (int64_t d = 0; d < dim; ++d) high[d] = static_cast<High>(codes[d] >> low_bits);
  if (to_low == nullptr) return;
  auto* low = reinterpret_cast<uint8_t*>(to_low);
  const int64_t half = (dim + 1) / 2;
  const int mask = (1 << low_bits) - 1;
  for (int64_t d = 0; d < half; ++d) {
    const int above = d + half < dim ? codes[d + half] & mask : 0;
    low[d] = static_cast<uint8_t>((codes[d] & mask) | above << 4);
  }
}

}  // namespace

bool store(const Store& call) {
  const auto& rows = active_decode_rows();
  const float limit = static_cast<float>((1 << (call.bits - 1)) - 1);
  std::vector<float> x(call.dim);
  std::vector<int32_t> codes(call.dim);
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t h = 0; h < call.heads; ++h) {
      const float scale = call.scale.data[b * call.scale.batch + h * call.scale.head];
      for (int64_t r = 0; r < call.rows; ++r) {
        const auto place = [&](const Cached& t) {
          return t.data == nullptr ? nullptr
                                   : const_cast<char*>(t.data) + b * t.batch + h * t.head + r * t.row;
        };
        rows.widen(call.from.element, place(call.from), call.dim, x.data());
        for (int64_t d = 0; d < call.dim; ++d) {
          if (!(std::fabs(x[d]) / limit <= scale)) return false;  // NaN too
          const float code = std::nearbyint(x[d] / scale);
          codes[d] = static_cast<int32_t>(std::fmin(std::fmax(code, -limit), limit));
        }
        if (call.high.element == Element::i8)
          split<int8_t>(codes.data(), call.dim, call.low_bits, place(call.high), place(call.low));
        else
          split<int16_t>(codes.data(), call.dim, call.low_bits, place(call.high), place(call.low));
      }
    }
  return true;
}

}  // namespace sparseloom
