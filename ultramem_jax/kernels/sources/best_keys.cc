// Chooses the m best keys of every token, side and head. Scores of all keys exist only in the cache.
//
// A task has up to kGroup tokens of one side and head. It goes through the keys in blocks. It lays a block's keys out
// in vectors, scores them for a few tokens at a time, and keeps of each token the keys that may be among its best: in
// the first block those above a bound, and then those above the m-th best so far, or nearly.
#include "call.h"
#include "select.h"

namespace ultramem {
namespace {

constexpr int kTileKeys = 16;                       // keys that are scored together
constexpr int kVectors = kTileKeys / kLanes;        // vectors of them
constexpr int kTileTokens = kLanes == 16 ? 12 : 6;  // tokens that are scored together: their sums fill the registers
constexpr int kBlock = 512;                         // keys of a block: with 12 tokens, 24 kB of scores
constexpr int kGroup = 132;                         // tokens of a task
constexpr double kCrowded = 1.6;  // survivors, in units of m, from which on a block ends with a search for a new bound

struct Shape {
  int64_t tokens, heads, query_ranks, width, sets, ranks, num_keys;
  int top_m;
  bool combine;  // one query for all ranks: the keys of all ranks are summed, not the scores
  int64_t depth() const { return combine ? width : ranks * width; }
};

// queries[e][t]: those of a tile's tokens, and zeros for tokens past the end.
template <class T>
void pack_queries(const Shape& s, const T* queries, const float* direction, int64_t side, int64_t head, int64_t first,
                  float* packed) {
  memset(packed, 0, sizeof(float) * kTileTokens * s.depth());
  for (int64_t t = 0; t < kTileTokens && first + t < s.tokens; t++) {
    const T* query = queries + (((first + t) * 2 + side) * s.heads + head) * s.query_ranks * s.width;
    for (int64_t rank = 0; rank < s.query_ranks; rank++) {
      const float weight = s.combine ? 1.0f : direction[rank];
      for (int64_t e = 0; e < s.width; e++)
        packed[(rank * s.width + e) * kTileTokens + t] = weight * load_one(query + rank * s.width + e);
    }
  }
}

// Writes the keys of a whole tile under one rank, [e][key].
inline void transpose_tile(const float* keys, int64_t width, float* packed) {
  for (int64_t e = 0; e < width; e += 4)
    for (int i = 0; i < kTileKeys; i += 4)
      transpose(keys + i * width + e, width, packed + e * kTileKeys + i, kTileKeys);
}
inline void transpose_tile(const Bfloat16* keys, int64_t width, float* packed) {
  for (int i = 0; i < kTileKeys; i++)
    for (int64_t e = 0; e < width; e++) packed[e * kTileKeys + i] = load_one(keys + i * width + e);
}

// keys[tile][e][key]: a block of keys, tile by tile, and zeros for keys past the end.
template <class T>
void pack_keys(const Shape& s, const T* keys, const float* direction, int64_t first, int count, float* packed) {
  const int64_t depth = s.depth();
  for (int tile = 0; tile < ceil_div(count, kTileKeys); tile++, packed += kTileKeys * depth) {
    if (!s.combine && s.width % 4 == 0 && (tile + 1) * kTileKeys <= count) {
      for (int64_t rank = 0; rank < s.ranks; rank++)
        transpose_tile(keys + (rank * s.num_keys + first + tile * kTileKeys) * s.width, s.width,
                       packed + rank * s.width * kTileKeys);
      continue;
    }
    for (int i = 0; i < kTileKeys; i++) {
      const int64_t key = first + tile * kTileKeys + i;
      float* column = packed + i;
      if (tile * kTileKeys + i >= count) {
        for (int64_t e = 0; e < depth; e++) column[e * kTileKeys] = 0;
      } else if (!s.combine) {
        for (int64_t rank = 0; rank < s.ranks; rank++, column += s.width * kTileKeys) {
          const T* of_rank = keys + (rank * s.num_keys + key) * s.width;
          for (int64_t e = 0; e < s.width; e++) column[e * kTileKeys] = load_one(of_rank + e);
        }
      } else {
        for (int64_t e = 0; e < s.width; e++) {
          float sum = 0;
          for (int64_t rank = 0; rank < s.ranks; rank++)
            sum += direction[rank] * load_one(keys + (rank * s.num_keys + key) * s.width + e);
          column[e * kTileKeys] = sum;
        }
      }
    }
  }
}

// ranks[t][key] of the scores of a tile; rows are kBlock apart.
inline void score_tile(const float* keys, const float* queries, int64_t depth, int32_t* ranks) {
  Floats sums[kTileTokens][kVectors] = {};
  for (int64_t e = 0; e < depth; e++, keys += kTileKeys, queries += kTileTokens) {
    Floats key[kVectors];
    for (int v = 0; v < kVectors; v++) key[v] = load(keys + v * kLanes);
#pragma GCC unroll 12
    for (int t = 0; t < kTileTokens; t++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sums[t][v] += splat(queries[t]) * key[v];
  }
  for (int t = 0; t < kTileTokens; t++)
    for (int v = 0; v < kVectors; v++) store_vector(ranks + t * kBlock + v * kLanes, rank_of(sums[t][v]));
}

template <class T>
void choose(const Shape& s, const T* queries, const T* keys, const float* directions, int32_t* chosen, int64_t task) {
  const int64_t groups = ceil_div(s.tokens, kGroup);
  const int64_t side = task / groups / s.heads, head = task / groups % s.heads, first = task % groups * kGroup;
  const int tokens = static_cast<int>(std::min<int64_t>(kGroup, s.tokens - first));
  const int tiles = static_cast<int>(ceil_div(tokens, kTileTokens)), m = s.top_m;
  const int64_t depth = s.depth(), of_tile = kTileTokens * depth, of_list = kMostSurvivors + kLanes;
  const int64_t block = std::min<int64_t>(ceil_div(s.num_keys, kTileKeys) * kTileKeys, kBlock);
  Parts parts(scratch(Parts::bytes<float>(block * depth) + Parts::bytes<float>(tiles * of_tile) +
                      Parts::bytes<int32_t>(kTileTokens * kBlock) + 2 * Parts::bytes<int32_t>(tokens * of_list)));
  auto* packed_keys = parts.take<float>(block * depth);
  auto* packed_queries = parts.take<float>(tiles * of_tile);
  auto* ranks = parts.take<int32_t>(kTileTokens * kBlock);
  auto* lists_ranks = parts.take<int32_t>(tokens * of_list);
  auto* lists_indices = parts.take<int32_t>(tokens * of_list);
  Survivors survivors[kGroup];
  int32_t bounds[kGroup];
  for (int t = 0; t < tokens; t++) survivors[t] = {lists_ranks + t * of_list, lists_indices + t * of_list};
  const float* direction = directions + (side * s.heads + head) * s.ranks;
  const T* of_set = keys + (side * s.sets + (s.sets == 1 ? 0 : head)) * s.ranks * s.num_keys * s.width;
  for (int tile = 0; tile < tiles; tile++)
    pack_queries(s, queries, direction, side, head, first + tile * kTileTokens, packed_queries + tile * of_tile);
  for (int64_t first_key = 0; first_key < s.num_keys; first_key += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, s.num_keys - first_key));
    pack_keys(s, of_set, direction, first_key, count, packed_keys);
    for (int tile = 0; tile < tiles; tile++) {
      for (int key = 0; key < count; key += kTileKeys)
        score_tile(packed_keys + key * depth, packed_queries + tile * of_tile, depth, ranks + key);
      const int last = std::min(tokens, (tile + 1) * kTileTokens);
      for (int t = tile * kTileTokens; t < last; t++) {
        const int32_t* row = ranks + (t - tile * kTileTokens) * kBlock;
        if (first_key == 0) bounds[t] = bound_of_row(row, count, m);
        bounds[t] = add_survivors(row, count, static_cast<int32_t>(first_key), bounds[t], m, survivors[t]);
        if (survivors[t].count > kCrowded * m && first_key + kBlock < s.num_keys) bounds[t] = thin_out(survivors[t], m);
      }
    }
  }
  for (int t = 0; t < tokens; t++)
    write_best(survivors[t], m, chosen + (((first + t) * 2 + side) * s.heads + head) * m, nullptr);
}

template <class T>
void run(const Call& call, const Shape& s) {
  const auto* queries = call.argument(0).as<T>();
  const auto* keys = call.argument(1).as<T>();
  const auto* directions = call.argument(2).as<float>();
  auto* chosen = call.result(0).as<int32_t>();
  call.parallel(2 * s.heads * ceil_div(s.tokens, kGroup),
                [&](int64_t task) { choose(s, queries, keys, directions, chosen, task); });
}

// queries (T, 2, H, q, d), keys (2, S, r, K, d), directions (2, H, r) -> keys chosen (T, 2, H, m), best first.
const char* best_keys(const Call& call) {
  const Array queries = call.argument(0), keys = call.argument(1), chosen = call.result(0);
  Shape s;
  s.tokens = queries.dim(0), s.heads = queries.dim(2), s.query_ranks = queries.dim(3), s.width = queries.dim(4);
  s.sets = keys.dim(1), s.ranks = keys.dim(2), s.num_keys = keys.dim(3);
  s.top_m = static_cast<int>(chosen.dim(3));
  s.combine = s.query_ranks != s.ranks;
  if (s.top_m > kMostSelected || s.top_m > s.num_keys) return "best_keys: top_m is too large";
  queries.is_bfloat16() ? run<Bfloat16>(call, s) : run<float>(call, s);
  return nullptr;
}

}  // namespace
}  // namespace ultramem

ULTRAMEM_KERNEL(best_keys, ultramem::best_keys)
