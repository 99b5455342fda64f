// Normalises keys by their root mean square, and the derivative.
//
// A key of keys (2, S, r, K, d) lies in r parts. They are normalised together if the gain is (r, d), and each by itself
// if it is (1, d).
#include "call.h"
#include "vectors.h"

#include <algorithm>
#include <vector>

namespace ultramem {
namespace {

constexpr int64_t kKeys = 256;  // keys of a task

struct Keys {
  int64_t outer, ranks, count, width;  // keys are (outer, ranks, count, width), with the ranks of the gain
  float eps;
  int64_t tasks() const { return outer * ceil_div(count, kKeys); }
  int64_t of_gain() const { return ranks * width; }
};

Keys keys_of(const Call& call, const Array& keys, const Array& gain) {
  const int64_t ranks = gain.dim(0);
  return {keys.dim(0) * keys.dim(1) * keys.dim(2) / ranks, ranks, keys.dim(3), keys.dim(4), call.number("eps")};
}

// Calls body(at) for every key of a task, with the offset of its first part.
template <class Body>
void for_keys(const Keys& s, int64_t task, const Body& body) {
  const int64_t of_outer = ceil_div(s.count, kKeys), first = task % of_outer * kKeys;
  const int64_t start = task / of_outer * s.ranks * s.count;
  for (int64_t key = first; key < std::min(s.count, first + kKeys); key++) body((start + key) * s.width);
}

// Calls body(value, gain, lanes) for the vectors of a key, with offsets among the keys and in the gain.
template <class Body>
inline void for_values(const Keys& s, int64_t at, const Body& body) {
  for (int64_t r = 0; r < s.ranks; r++)
    for_vectors(0, s.width, [&](int64_t e, auto lanes) {
      body(at + r * s.count * s.width + e, r * s.width + e, lanes);
    });
}

inline float inverse_rms(const Keys& s, const float* key) {
  float total = 0;
  for (int64_t r = 0; r < s.ranks; r++) {
    const float* part = key + r * s.count * s.width;
    total += dot(part, part, s.width);
  }
  return 1 / std::sqrt(total / static_cast<float>(s.of_gain()) + s.eps);
}

// keys, gain -> keys · gain / sqrt(mean square + eps)
const char* rms_norm(const Call& call) {
  const Keys s = keys_of(call, call.argument(0), call.argument(1));
  const auto *keys = call.argument(0).as<float>(), *gain = call.argument(1).as<float>();
  auto* normed = call.result(0).as<float>();
  call.parallel(s.tasks(), [&](int64_t task) {
    for_keys(s, task, [&](int64_t at) {
      const Floats scale = splat(inverse_rms(s, keys + at));
      for_values(s, at, [&](int64_t i, int64_t e, auto lanes) {
        store(normed + i, load(keys + i, lanes) * scale * load(gain + e, lanes), lanes);
      });
    });
  });
  return nullptr;
}

// cotangent, keys, gain -> gradients by keys and by gain
const char* rms_norm_gradient(const Call& call) {
  const Keys s = keys_of(call, call.argument(1), call.argument(2));
  const auto *cotangent = call.argument(0).as<float>(), *keys = call.argument(1).as<float>();
  const auto* gain = call.argument(2).as<float>();
  auto *d_keys = call.result(0).as<float>(), *d_gain = call.result(1).as<float>();
  std::vector<float> partial(s.tasks() * s.of_gain());
  call.parallel(s.tasks(), [&](int64_t task) {
    float* of_task = partial.data() + task * s.of_gain();
    for_keys(s, task, [&](int64_t at) {
      const float scale = inverse_rms(s, keys + at);
      Floats sums = {};
      for_values(s, at, [&](int64_t i, int64_t e, auto lanes) {
        const Floats products = load(cotangent + i, lanes) * load(keys + i, lanes);
        store(of_task + e, load(of_task + e, lanes) + splat(scale) * products, lanes);
        sums += products * load(gain + e, lanes);
      });
      const Floats back = splat(sum(sums) * scale * scale / static_cast<float>(s.of_gain()));
      for_values(s, at, [&](int64_t i, int64_t e, auto lanes) {
        const Floats own = load(cotangent + i, lanes) * load(gain + e, lanes);
        store(d_keys + i, splat(scale) * (own - back * load(keys + i, lanes)), lanes);
      });
    });
  });
  add_up(partial.data(), s.tasks(), s.of_gain(), d_gain);
  return nullptr;
}

}  // namespace
}  // namespace ultramem

ULTRAMEM_KERNEL(rms_norm, ultramem::rms_norm)
ULTRAMEM_KERNEL(rms_norm_gradient, ultramem::rms_norm_gradient)
