// Finds the k largest of many numbers, in the order of jax.lax.top_k.
//
// That order is the total order of IEEE 754: -NaN < -inf < ... < -0 < +0 < ... < +inf < NaN, equal numbers by rising
// index. It is the order of integers that `rank_of` makes of the bits, so everything here compares integers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace ultramem {

// Maps bits of a float to an integer of the same rank, and back.
inline Ints rank_of(Floats x) {
  Ints bits = (Ints)x;
  return bits ^ (bits >> 31 & 0x7fffffff);
}
inline Floats with_rank(Ints rank) { return (Floats)(rank ^ (rank >> 31 & 0x7fffffff)); }
inline int32_t rank_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
inline float with_rank(int32_t rank) {
  int32_t bits = rank ^ (rank >> 31 & 0x7fffffff);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// A number between two, for a search: the mean of two floats, as ranks. Any result is right, this one is near.
inline Ints between(Ints low, Ints high) { return rank_of(0.5f * (with_rank(low) + with_rank(high))); }
inline int32_t between(int32_t low, int32_t high) { return rank_of(0.5f * (with_rank(low) + with_rank(high))); }

constexpr int kMostSurvivors = 256;
constexpr int kMostSelected = 96;  // beyond it, ranking survivors pairwise takes longer than a sort
constexpr int kSearchSteps = 7;

// Holds the numbers of a row that may be among its k largest, in the order of the row.
struct Survivors {
  int32_t* ranks;    // room for kMostSurvivors + kLanes, and so the others
  int32_t* indices;
  int count = 0;
};

// place[i] = how many of the n survivors come before survivor i. There is room for whole vectors in both arrays.
inline void places(int32_t* ranks, int n, int32_t* place) {
  for (int i = n; i < (n + kLanes - 1) / kLanes * kLanes; i++) ranks[i] = INT32_MIN;
  const Ints lane = lane_numbers();
  for (int first = 0; first < n; first += kLanes) {
    const Ints own = load_vector<Ints>(ranks + first);
    Ints before = {};
    int j = 0;
    for (; j < first; j++) before -= splat(ranks[j]) >= own;
    for (; j < first + kLanes && j < n; j++) {
      const Ints other = splat(ranks[j]);
      before -= (other > own) | ((other == own) & (lane > j - first));
    }
    for (; j < n; j++) before -= splat(ranks[j]) > own;
    store_vector(place + first, before);
  }
}

// Keeps the k best survivors, in the order of the row, and returns the rank of the last of them.
inline int32_t keep_best(Survivors& s, int k) {
  int32_t place[kMostSurvivors + kLanes];
  places(s.ranks, s.count, place);
  int32_t last = INT32_MIN;
  int kept = 0;
  for (int i = 0; i < s.count; i++) {
    if (place[i] >= k) continue;
    if (place[i] == k - 1) last = s.ranks[i];
    s.ranks[kept] = s.ranks[i];
    s.indices[kept++] = s.indices[i];
  }
  s.count = kept;
  return last;
}

// Writes the indices of the k best numbers, best first, and, unless `values` is null, their values. If there are fewer
// survivors, every other number of the row has the lowest rank, and the first ones of these follow.
inline void write_best(Survivors& s, int k, int32_t* indices, float* values) {
  int32_t place[kMostSurvivors + kLanes];
  places(s.ranks, s.count, place);
  for (int i = 0; i < s.count; i++) {
    if (place[i] >= k) continue;
    indices[place[i]] = s.indices[i];
    if (values) values[place[i]] = with_rank(s.ranks[i]);
  }
  int written = std::min(s.count, k);
  for (int32_t i = 0; written < k; i++) {
    if (std::find(indices, indices + written, i) != indices + written) continue;
    if (values) values[written] = with_rank(INT32_MIN);
    indices[written++] = i;
  }
}

// Sorts a row, for a large k. `order` has room for n.
inline void sort_best(const int32_t* ranks, int64_t n, int k, int32_t* order, int32_t* indices, float* values) {
  for (int64_t i = 0; i < n; i++) order[i] = static_cast<int32_t>(i);
  std::partial_sort(order, order + k, order + n,
                    [=](int32_t a, int32_t b) { return ranks[a] != ranks[b] ? ranks[a] > ranks[b] : a < b; });
  for (int i = 0; i < k; i++) {
    indices[i] = order[i];
    if (values) values[i] = with_rank(ranks[order[i]]);
  }
}

// Returns a rank that at least k numbers of a row reach: about the k-th largest of the maxima of 2k groups.
template <int kVectors>
inline int32_t lower_bound(const int32_t* ranks, int64_t n, int k) {
  Ints best[kVectors];
  const int64_t step = kVectors * kLanes;
  for (int v = 0; v < kVectors; v++) best[v] = load_vector<Ints>(ranks + v * kLanes);
  int64_t i = step;
  for (; i + step <= n; i += step)
    for (int v = 0; v < kVectors; v++) best[v] = max(best[v], load_vector<Ints>(ranks + i + v * kLanes));
  for (int v = 0; i + kLanes <= n; i += kLanes, v++) best[v] = max(best[v], load_vector<Ints>(ranks + i));
  Ints lows = best[0], highs = best[0];
  for (int v = 1; v < kVectors; v++) lows = min(lows, best[v]), highs = max(highs, best[v]);
  int32_t low = lows[0], high = highs[0];
  for (int lane = 1; lane < kLanes; lane++) low = std::min(low, lows[lane]), high = std::max(high, highs[lane]);
  for (int s = 0; s < kSearchSteps; s++) {
    const int32_t middle = between(low, high);
    Ints count = {};
    for (int v = 0; v < kVectors; v++) count -= best[v] >= splat(middle);
    const int reached = sum(count);
    if (reached < k) {
      high = middle;
      continue;
    }
    low = middle;
    if (reached <= k + k / 16) break;
  }
  return low;
}

// Writes the k best of a contiguous row of n ranks; `order` is for `sort_best`.
inline void best_of_row(const int32_t* ranks, int64_t n, int k, int32_t* order, int32_t* indices, float* values) {
  if (k > kMostSelected) return sort_best(ranks, n, k, order, indices, values);
  int32_t kept_ranks[kMostSurvivors + kLanes], kept_indices[kMostSurvivors + kLanes];
  Survivors kept{kept_ranks, kept_indices};
  int32_t bound = INT32_MIN;  // what is greater survives
  if (2 * k <= 4 * kLanes) {
    if (n >= 8 * kLanes) bound = lower_bound<4>(ranks, n, k);
  } else if (2 * k <= 8 * kLanes) {
    if (n >= 16 * kLanes) bound = lower_bound<8>(ranks, n, k);
  } else if (n >= 48 * kLanes) {
    bound = lower_bound<24>(ranks, n, k);
  }
  if (bound != INT32_MIN) bound--;  // what reaches the bound survives too
  bool full = false;
  const auto take = [&](int64_t i) {
    kept.ranks[kept.count] = ranks[i];
    kept.indices[kept.count++] = static_cast<int32_t>(i);
    if (kept.count == kMostSurvivors) bound = keep_best(kept, k), full = true;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    uint32_t bits = greater_bits(load_vector<Ints>(ranks + i), splat(bound));
    for (; bits; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      if (!full || ranks[at] > bound) take(at);
    }
  }
  for (; i < n; i++)
    if (ranks[i] > bound) take(i);
  write_best(kept, k, indices, values);
}

}  // namespace ultramem
