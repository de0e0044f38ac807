#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include "predict.hpp"

namespace nb = nanobind;

namespace sparseloom {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::pair<bool, long> encode_from_python(
    uintptr_t hidden, int dtype, long batch, long length, long hidden_size, long batch_stride,
    long row_stride, float input_scale, float most, uintptr_t weights, uintptr_t sums,
    uintptr_t scale, long depth, long columns, uintptr_t cos, uintptr_t sin,
    long rotary_batch_stride, long rotary_row_stride, uintptr_t chosen, long pairs,
    uintptr_t key_scale, long heads, long width, int bits, float unit, uintptr_t q, uintptr_t k,
    uintptr_t q_scale, int threads) {
  const EncodeArgs args{at<const void>(hidden), dtype, batch, length, hidden_size, batch_stride,
                        row_stride, input_scale, most, at<const int8_t>(weights),
                        at<const int32_t>(sums), at<const float>(scale), depth, columns,
                        at<const float>(cos), at<const float>(sin), rotary_batch_stride,
                        rotary_row_stride, at<const int64_t>(chosen), pairs,
                        at<const float>(key_scale), heads, width, bits, unit, at<int8_t>(q),
                        at<int8_t>(k), at<float>(q_scale)};
  nb::gil_scoped_release release;
  bool finite = true;
  const long bytes = encode(args, threads, &finite);
  return {finite, bytes};
}

long select_from_python(uintptr_t q, uintptr_t k, uintptr_t q_scale, uintptr_t k_scale, long batch,
                        long heads, long q_len, long kv_len, long width, long bq, long bk,
                        bool causal, int pooling, uintptr_t key_padding, long key_padding_stride,
                        uintptr_t voters, long voters_stride, uintptr_t visible,
                        long visible_stride, uintptr_t budget, long budget_stride,
                        uintptr_t diagonal, uintptr_t offsets, uintptr_t thresholds,
                        uintptr_t counts, uintptr_t out, uintptr_t pooled, int threads) {
  const SelectArgs args{at<const int8_t>(q), at<const int8_t>(k), at<const float>(q_scale),
                        at<const float>(k_scale), batch, heads, q_len, kv_len, width, bq, bk,
                        causal, static_cast<Pooling>(pooling), at<const uint8_t>(key_padding),
                        key_padding_stride, at<const uint8_t>(voters), voters_stride,
                        at<const int64_t>(visible), at<const int64_t>(budget), visible_stride,
                        budget_stride, at<const int64_t>(diagonal), at<const int64_t>(offsets),
                        at<const float>(thresholds), at<int64_t>(counts), at<int32_t>(out),
                        at<float>(pooled)};
  nb::gil_scoped_release release;
  return select(args, threads);
}

}  // namespace

void bind_predict(nb::module_& m) {
  m.def("predict_depth", &padded_depth);
  m.def("predict_encode", &encode_from_python);
  m.def("predict_select", &select_from_python);
}

}  // namespace sparseloom
