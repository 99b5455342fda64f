// Chooses the m best keys of every token, side and head. Scores of all keys exist only in the cache.
//
// A task has up to kGroup tokens of one side and head. It goes through the keys in blocks. It lays a block's keys out
// so that each can be broadcast, and then, for 16 tokens at a time, scores the block and drops every key that cannot be
// among a token's best. From the second block on, that is what the m-th best so far decides.
#include "call.h"
#include "select.h"

namespace ultramem {
namespace {

constexpr int kPanel = 16;                     // tokens that are scored together
constexpr int kVectors = kPanel / kLanes;      // vectors of a panel
constexpr int kTile = kLanes == 16 ? 12 : 6;   // keys that are scored together: their sums fill the registers
constexpr int kBlock = 42 * 12;                // keys of a block: with 16 tokens, 32 kB of scores
constexpr int kGroup = 128;                    // tokens of a task

struct Shape {
  int64_t tokens, heads, query_ranks, width, sets, ranks, num_keys;
  int top_m;
  bool combine;  // one query for all ranks: the keys of all ranks are summed, not the scores
  int64_t depth() const { return combine ? width : ranks * width; }
};

// queries[e][t]: those of a panel's tokens, transposed, and zeros for tokens past the end.
template <class T>
void pack_queries(const Shape& s, const T* queries, const float* direction, int64_t side, int64_t head, int64_t first,
                  float* packed) {
  memset(packed, 0, sizeof(float) * kPanel * s.depth());
  for (int64_t t = 0; t < kPanel && first + t < s.tokens; t++) {
    const T* query = queries + (((first + t) * 2 + side) * s.heads + head) * s.query_ranks * s.width;
    for (int64_t rank = 0; rank < s.query_ranks; rank++) {
      const float weight = s.combine ? 1.0f : direction[rank];
      for (int64_t e = 0; e < s.width; e++)
        packed[(rank * s.width + e) * kPanel + t] = weight * load_one(query + rank * s.width + e);
    }
  }
}

// keys[tile][e][key]: a block of keys, tile by tile, and zeros for keys past the end.
template <class T>
void pack_keys(const Shape& s, const T* keys, const float* direction, int64_t first, int count, float* packed) {
  const int64_t depth = s.depth();
  for (int tile = 0; tile < ceil_div(count, kTile); tile++, packed += kTile * depth) {
    for (int i = 0; i < kTile; i++) {
      const int64_t key = first + tile * kTile + i;
      float* column = packed + i;
      if (tile * kTile + i >= count) {
        for (int64_t e = 0; e < depth; e++) column[e * kTile] = 0;
      } else if (!s.combine) {
        for (int64_t rank = 0; rank < s.ranks; rank++, column += s.width * kTile) {
          const T* of_rank = keys + (rank * s.num_keys + key) * s.width;
          for (int64_t e = 0; e < s.width; e++) column[e * kTile] = load_one(of_rank + e);
        }
      } else {
        for (int64_t e = 0; e < s.width; e++) {
          float sum = 0;
          for (int64_t rank = 0; rank < s.ranks; rank++)
            sum += direction[rank] * load_one(keys + (rank * s.num_keys + key) * s.width + e);
          column[e * kTile] = sum;
        }
      }
    }
  }
}

// ranks[key][t] of the scores of a tile.
inline void score_tile(const float* keys, const float* queries, int64_t depth, int32_t* ranks) {
  Floats sums[kTile][kVectors] = {};
  for (int64_t e = 0; e < depth; e++, keys += kTile, queries += kPanel) {
    Floats query[kVectors];
    for (int v = 0; v < kVectors; v++) query[v] = load(queries + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kTile; i++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sums[i][v] += splat(keys[i]) * query[v];
  }
  for (int i = 0; i < kTile; i++)
    for (int v = 0; v < kVectors; v++) store_vector(ranks + i * kPanel + v * kLanes, rank_of(sums[i][v]));
}

// For each token of a panel, bounds[t] that at least m of the keys exceed or, at INT32_MIN, might not.
void lower_bounds(const int32_t* ranks, int count, int m, int32_t* maxima, int32_t* bounds) {
  const int size = count / (2 * m) > 1 ? count / (2 * m) : 1;
  const int groups = static_cast<int>(ceil_div(count, size));
  for (int v = 0; v < kVectors; v++) {
    Ints low = splat(INT32_MAX), high = splat(INT32_MIN);
    for (int g = 0; g < groups; g++) {
      const int end = std::min(count, (g + 1) * size);
      Ints best = load_vector<Ints>(ranks + g * size * kPanel + v * kLanes);
      for (int i = g * size + 1; i < end; i++) best = max(best, load_vector<Ints>(ranks + i * kPanel + v * kLanes));
      store_vector(maxima + g * kLanes, best);
      low = min(low, best), high = max(high, best);
    }
    for (int step = 0; step < kSearchSteps; step++) {
      const Ints middle = between(low, high);
      Ints reached = {};
      for (int g = 0; g < groups; g++) reached -= load_vector<Ints>(maxima + g * kLanes) >= middle;
      const Ints enough = reached >= m;
      low = enough ? middle : low;
      high = enough ? high : middle;
    }
    // A rank is exceeded by those that reach the next one. Nothing is below the lowest.
    store_vector(bounds + v * kLanes, low == INT32_MIN ? low : low - 1);
  }
}

struct Lists {
  int32_t *ranks, *indices;  // [token][kMostSurvivors + kLanes]
  int32_t counts[kGroup], bounds[kGroup];
  Survivors of(int token) const {
    const int64_t at = static_cast<int64_t>(token) * (kMostSurvivors + kLanes);
    return {ranks + at, indices + at, counts[token]};
  }
};

// Adds the keys of a block that exceed the bounds of their tokens; the panel's first token is `first` in the lists.
void add_survivors(const int32_t* ranks, int count, int64_t first_key, int m, int first, Lists& lists) {
  Ints bounds[kVectors];
  for (int v = 0; v < kVectors; v++) bounds[v] = load_vector<Ints>(lists.bounds + first + v * kLanes);
  for (int i = 0; i < count; i++, ranks += kPanel) {
    uint32_t bits = 0;
    for (int v = 0; v < kVectors; v++)
      bits |= greater_bits(load_vector<Ints>(ranks + v * kLanes), bounds[v]) << v * kLanes;
    for (; bits; bits &= bits - 1) {
      const int t = __builtin_ctz(bits), token = first + t;
      Survivors s = lists.of(token);
      s.ranks[s.count] = ranks[t];
      s.indices[s.count++] = static_cast<int32_t>(first_key + i);
      if (s.count == kMostSurvivors) {
        lists.bounds[token] = keep_best(s, m);
        bounds[t / kLanes] = load_vector<Ints>(lists.bounds + first + t / kLanes * kLanes);
      }
      lists.counts[token] = s.count;
    }
  }
}

template <class T>
void choose(const Shape& s, const T* queries, const T* keys, const float* directions, int32_t* chosen, int64_t task) {
  const int64_t groups = ceil_div(s.tokens, kGroup);
  const int64_t side = task / groups / s.heads, head = task / groups % s.heads, first = task % groups * kGroup;
  const int tokens = static_cast<int>(std::min<int64_t>(kGroup, s.tokens - first));
  const int panels = static_cast<int>(ceil_div(tokens, kPanel));
  const int64_t depth = s.depth(), of_list = kMostSurvivors + kLanes;
  const int64_t block = std::min<int64_t>(ceil_div(s.num_keys, kTile) * kTile, kBlock);
  Parts parts(scratch(Parts::bytes<float>(block * depth) + Parts::bytes<float>(panels * kPanel * depth) +
                      Parts::bytes<int32_t>(block * kPanel) + Parts::bytes<int32_t>((block + 1) * kLanes) +
                      2 * Parts::bytes<int32_t>(panels * kPanel * of_list)));
  auto* packed_keys = parts.take<float>(block * depth);
  auto* packed_queries = parts.take<float>(panels * kPanel * depth);
  auto* ranks = parts.take<int32_t>(block * kPanel);
  auto* maxima = parts.take<int32_t>((block + 1) * kLanes);
  Lists lists;
  lists.ranks = parts.take<int32_t>(panels * kPanel * of_list);
  lists.indices = parts.take<int32_t>(panels * kPanel * of_list);
  const float* direction = directions + (side * s.heads + head) * s.ranks;
  const T* of_set = keys + (side * s.sets + (s.sets == 1 ? 0 : head)) * s.ranks * s.num_keys * s.width;
  for (int panel = 0; panel < panels; panel++)
    pack_queries(s, queries, direction, side, head, first + panel * kPanel, packed_queries + panel * kPanel * depth);
  memset(lists.counts, 0, sizeof(lists.counts));
  for (int64_t first_key = 0; first_key < s.num_keys; first_key += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, s.num_keys - first_key));
    pack_keys(s, of_set, direction, first_key, count, packed_keys);
    for (int panel = 0; panel < panels; panel++) {
      for (int tile = 0; tile < ceil_div(count, kTile); tile++)
        score_tile(packed_keys + tile * kTile * depth, packed_queries + panel * kPanel * depth, depth,
                   ranks + tile * kTile * kPanel);
      if (first_key == 0) lower_bounds(ranks, count, s.top_m, maxima, lists.bounds + panel * kPanel);
      for (int t = tokens; t < (panel + 1) * kPanel; t++) lists.bounds[t] = INT32_MAX;  // no token: nothing survives
      add_survivors(ranks, count, first_key, s.top_m, panel * kPanel, lists);
    }
    if (first_key + kBlock >= s.num_keys) break;
    for (int t = 0; t < tokens; t++) {
      Survivors of_token = lists.of(t);
      if (of_token.count < s.top_m) continue;
      lists.bounds[t] = keep_best(of_token, s.top_m);
      lists.counts[t] = of_token.count;
    }
  }
  for (int t = 0; t < tokens; t++) {
    Survivors of_token = lists.of(t);
    write_best(of_token, s.top_m, chosen + (((first + t) * 2 + side) * s.heads + head) * s.top_m, nullptr);
  }
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
