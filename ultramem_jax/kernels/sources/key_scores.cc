// Scores chosen keys under every rank, and the derivatives by queries and keys.
//
// A key's gradient sums over all tokens that chose it. A task owns a range of keys of one side, set and rank, and goes
// through all tokens in order: no two tasks add to the same key, and the order of a sum is always the same.
#include "call.h"
#include "vectors.h"

#include <algorithm>

namespace ultramem {
namespace {

constexpr int kTokens = 16;                 // tokens of a task
constexpr int64_t kRangeBytes = 256 << 10;  // keys' gradients of a task: they stay in the cache

struct Shape {
  int64_t tokens, heads, query_ranks, width, sets, ranks, num_keys, top_m;
  int64_t set_of(int64_t head) const { return sets == 1 ? 0 : head; }
  int64_t query_rank(int64_t rank) const { return query_ranks == 1 ? 0 : rank; }
};

Shape shape_of(const Array& queries, const Array& keys, const Array& chosen) {
  return {queries.dim(0), queries.dim(2), queries.dim(3), queries.dim(4),
          keys.dim(1),    keys.dim(2),    keys.dim(3),    chosen.dim(3)};
}

// The products of a query with four keys, of whole vectors: their sums are four times as fast together.
template <class T>
inline void four_dots(const T* query, const T* keys, const int32_t* key, int64_t width, float* to) {
  const T *a = keys + key[0] * width, *b = keys + key[1] * width;
  const T *c = keys + key[2] * width, *d = keys + key[3] * width;
  Floats of_a = {}, of_b = {}, of_c = {}, of_d = {};
  for (int64_t e = 0; e < width; e += kLanes) {
    const Floats q = load(query + e);
    of_a += q * load(a + e), of_b += q * load(b + e), of_c += q * load(c + e), of_d += q * load(d + e);
  }
  sums(of_a, of_b, of_c, of_d, to);
}

// total[e] += Σ_j weights[j] · rows[index[j]][e], with the sums of two vectors in registers
template <class T>
inline void add_rows(float* total, const float* weights, const T* rows, const int32_t* index, int64_t count,
                     int64_t width) {
  int64_t e = 0;
  for (; e + 2 * kLanes <= width; e += 2 * kLanes) {
    Floats a = load(total + e), b = load(total + e + kLanes);
    for (int64_t j = 0; j < count; j++) {
      const T* row = rows + index[j] * width + e;
      const Floats weight = splat(weights[j]);
      a += weight * load(row), b += weight * load(row + kLanes);
    }
    store(total + e, a), store(total + e + kLanes, b);
  }
  for_vectors(e, width, [&](int64_t from, auto lanes) {
    Floats sums = load(total + from, lanes);
    for (int64_t j = 0; j < count; j++) sums += splat(weights[j]) * load(rows + index[j] * width + from, lanes);
    store(total + from, sums, lanes);
  });
}

template <class T>
void score(const Call& call, const Shape& s) {
  const auto *queries = call.argument(0).as<T>(), *keys = call.argument(1).as<T>();
  const auto* chosen = call.argument(2).as<int32_t>();
  auto* scores = call.result(0).as<float>();
  call.parallel(ceil_div(s.tokens, kTokens), [&](int64_t task) {
    const int64_t sides = 2 * s.heads, end = std::min(s.tokens, (task + 1) * kTokens) * sides;
    for (int64_t at = task * kTokens * sides; at < end; at++) {
      const int64_t side = at / s.heads % 2, set = s.set_of(at % s.heads);
      for (int64_t rank = 0; rank < s.ranks; rank++) {
        const T* of_rank = keys + ((side * s.sets + set) * s.ranks + rank) * s.num_keys * s.width;
        const T* query = queries + (at * s.query_ranks + s.query_rank(rank)) * s.width;
        float* out = scores + (at * s.ranks + rank) * s.top_m;
        const int32_t* key = chosen + at * s.top_m;
        int64_t j = 0;
        if (s.width % kLanes == 0)
          for (; j + 4 <= s.top_m; j += 4) four_dots(query, of_rank, key + j, s.width, out + j);
        for (; j < s.top_m; j++) out[j] = dot(query, of_rank + key[j] * s.width, s.width);
      }
    }
  });
}

template <class T>
void differentiate_queries(const Call& call, const Shape& s) {
  const auto* cotangents = call.argument(0).as<float>();
  const auto* chosen = call.argument(1).as<int32_t>();
  const auto* keys = call.argument(2).as<T>();
  auto* d_queries = call.result(0).as<T>();
  call.parallel(ceil_div(s.tokens, kTokens), [&](int64_t task) {
    const int64_t sides = 2 * s.heads, end = std::min(s.tokens, (task + 1) * kTokens) * sides;
    auto* total = reinterpret_cast<float*>(scratch(sizeof(float) * s.width));
    for (int64_t at = task * kTokens * sides; at < end; at++) {
      const int64_t side = at / s.heads % 2, set = s.set_of(at % s.heads);
      for (int64_t query = 0; query < s.query_ranks; query++) {
        memset(total, 0, sizeof(float) * s.width);
        for (int64_t rank = query; rank < (s.query_ranks == 1 ? s.ranks : query + 1); rank++) {
          const T* of_rank = keys + ((side * s.sets + set) * s.ranks + rank) * s.num_keys * s.width;
          add_rows(total, cotangents + (at * s.ranks + rank) * s.top_m, of_rank, chosen + at * s.top_m, s.top_m,
                   s.width);
        }
        copy_values(d_queries + (at * s.query_ranks + query) * s.width, total, s.width);
      }
    }
  });
}

template <class T>
void differentiate_keys(const Call& call, const Shape& s) {
  const auto* cotangents = call.argument(0).as<float>();
  const auto* chosen = call.argument(1).as<int32_t>();
  const auto* queries = call.argument(2).as<T>();
  auto* d_keys = call.result(0).as<float>();
  const int64_t bytes = s.num_keys * s.width * static_cast<int64_t>(sizeof(float));
  const int64_t ranges = std::max<int64_t>(1, ceil_div(bytes, kRangeBytes)), range = ceil_div(s.num_keys, ranges);
  call.parallel(2 * s.sets * s.ranks * ranges, [&](int64_t task) {
    const int64_t of_range = task % ranges, rank = task / ranges % s.ranks, set = task / ranges / s.ranks % s.sets;
    const int64_t side = task / ranges / s.ranks / s.sets, first = of_range * range;
    const int64_t last = std::min(s.num_keys, first + range);
    if (last <= first) return;
    float* total = d_keys + ((side * s.sets + set) * s.ranks + rank) * s.num_keys * s.width;
    memset(total + first * s.width, 0, sizeof(float) * (last - first) * s.width);
    for (int64_t token = 0; token < s.tokens; token++) {
      for (int64_t head = s.sets == 1 ? 0 : set; head < (s.sets == 1 ? s.heads : set + 1); head++) {
        const int64_t at = (token * 2 + side) * s.heads + head;
        const T* query = queries + (at * s.query_ranks + s.query_rank(rank)) * s.width;
        const float* cotangent = cotangents + (at * s.ranks + rank) * s.top_m;
        for (int64_t j = 0; j < s.top_m; j++) {
          const int64_t key = chosen[at * s.top_m + j];
          if (key >= first && key < last) add_scaled(total + key * s.width, cotangent[j], query, s.width);
        }
      }
    }
  });
}

// queries (T, 2, H, q, d), keys (2, S, r, K, d), chosen (T, 2, H, m) -> scores (T, 2, H, r, m)
const char* key_scores(const Call& call) {
  const Array queries = call.argument(0);
  const Shape s = shape_of(queries, call.argument(1), call.argument(2));
  queries.is_bfloat16() ? score<Bfloat16>(call, s) : score<float>(call, s);
  return nullptr;
}

// cotangents (T, 2, H, r, m), chosen (T, 2, H, m), keys (2, S, r, K, d) -> gradient (T, 2, H, q, d) of the queries
const char* query_gradient(const Call& call) {
  const Array keys = call.argument(2);
  const Shape s = shape_of(call.result(0), keys, call.argument(1));
  keys.is_bfloat16() ? differentiate_queries<Bfloat16>(call, s) : differentiate_queries<float>(call, s);
  return nullptr;
}

// cotangents (T, 2, H, r, m), chosen (T, 2, H, m), queries (T, 2, H, q, d) -> gradient (2, S, r, K, d) of the keys
const char* key_gradient(const Call& call) {
  const Array queries = call.argument(2);
  const Shape s = shape_of(queries, call.result(0), call.argument(1));
  queries.is_bfloat16() ? differentiate_keys<Bfloat16>(call, s) : differentiate_keys<float>(call, s);
  return nullptr;
}

}  // namespace
}  // namespace ultramem

ULTRAMEM_KERNEL(key_scores, ultramem::key_scores)
ULTRAMEM_KERNEL(query_gradient, ultramem::query_gradient)
ULTRAMEM_KERNEL(key_gradient, ultramem::key_gradient)
