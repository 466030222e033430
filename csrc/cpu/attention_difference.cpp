#include "attention.h"

namespace dz {
namespace {

// A tensor [P, N, H, rows, columns] with strides p, n, h, row; columns are contiguous.
template <typename T>
struct Operand {
  const T* data;
  int64_t p, n, h, row;
  const T* at(int64_t perturbation, int64_t sample, int64_t head) const {
    return data + perturbation * p + sample * n + head * h;
  }
};

template <typename T>
Operand<T> operand(const void* data, const int64_t* strides) {
  return {static_cast<const T*>(data), strides[0], strides[1], strides[2], strides[3]};
}

template <typename In, typename Out>
void attend(Operand<In> dq, Operand<In> dk, Operand<In> dv, Operand<float> q, Operand<float> k, Operand<float> v,
            const float* p, Out* out, float scale, int64_t P, int64_t N, int64_t H, int64_t T, int64_t S, int64_t D,
            int64_t E) {
  const Head head = {dq.data != nullptr, dk.data != nullptr, dv.data != nullptr, T, S, D, E};
  const int64_t keys_size = head.keys_size(), packed_size = keys_size + head.values_size();
  const int64_t thread_size = packed_size + head.rows_size();
  Scratch<float> scratch(omp_get_max_threads() * thread_size);

#pragma omp parallel
  {
    float* keys = scratch.data + omp_get_thread_num() * thread_size;
    float* values = keys + keys_size;
    int64_t packed = -1;  // the (sample, head) whose k and v are packed

#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < N * H * P; ++piece) {
      const int64_t b = piece / P, at = piece % P, n = b / H, h = b % H;
      if (packed != b) {
        packed = b;
        head.pack_base(k.at(0, n, h), k.row, v.at(0, n, h), v.row, keys, values);
      }
      head.pack_perturbed(dk.at(at, n, h), dk.row, dv.at(at, n, h), dv.row, keys, values);
      head.attend(dq.at(at, n, h), dq.row, q.at(0, n, h), q.row, p + b * T * S, keys, values, scale, keys + packed_size,
                  out + ((at * N + n) * T * H + h) * E, H * E);
    }
  }
}

}  // namespace

DZ_KERNEL(attention_difference, (const void* dq,  // [P, N, H, T, D] float32, or bfloat16 with half; may be null
                                 const void* dk,  // [P, N, H, S, D]  of the same type; may be null
                                 const void* dv,  // [P, N, H, S, E]  of the same type; may be null
                                 const float* q,  // [N, H, T, D]
                                 const float* k, const float* v,  // [N, H, S, D], [N, H, S, E]
                                 const float* p,                  // [N, H, T, S]
                                 void* out,                       // [P, N, T, H, E] float32, or bfloat16 with out_half
                                 const int64_t* strides,  // [6, 4] of dq, dk, dv, q, k, v along P, N, H and rows
                                 double scale, int64_t P, int64_t N, int64_t H, int64_t T, int64_t S, int64_t D,
                                 int64_t E, bool half, bool out_half)) {
  const auto run = [&](auto in, auto* to) {
    using In = decltype(in);
    attend(operand<In>(dq, strides), operand<In>(dk, strides + 4), operand<In>(dv, strides + 8),
           operand<float>(q, strides + 12), operand<float>(k, strides + 16), operand<float>(v, strides + 20), p, to,
           static_cast<float>(scale), P, N, H, T, S, D, E);
  };
  const auto from = [&](auto in) {
    if (out_half) {
      run(in, static_cast<Bf16*>(out));
    } else {
      run(in, static_cast<float*>(out));
    }
  };
  if (half) {
    from(Bf16{});
  } else {
    from(float{});
  }
}

}  // namespace dz
