// Finds the k largest of many numbers, in the order of jax.lax.top_k.
//
// That order is the total order of IEEE 754: -NaN < -inf < ... < -0 < +0 < ... < +inf < NaN, equal numbers by rising
// index. It is the order of integers that `rank_of` makes of the bits, so everything here compares integers.
//
// Functions of whole rows are not inlined. GCC would put them all into each caller, and take twice as long.
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

constexpr int kMostSurvivors = 256 - kLanes;  // with a vector more there is room in 256
constexpr int kMostSelected = 96;  // beyond it, ranking survivors pairwise takes longer than a sort
constexpr int kSearchSteps = 7;

// Holds the numbers of a row that may be among its k largest, in the order of the row.
struct Survivors {
  int32_t *ranks, *indices;  // room for kMostSurvivors + kLanes
  int count = 0;
};

// place[i] = how many of the n survivors come before survivor i. There is room for whole vectors in both arrays.
[[gnu::noinline]]
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
[[gnu::noinline]]
inline int32_t keep_best(Survivors& s, int k) {
  int32_t place[kMostSurvivors + kLanes];
  places(s.ranks, s.count, place);
  int32_t last = INT32_MIN;
  int kept = 0;
  for (int i = 0; i < s.count; i++) {  // without a branch, which could not be predicted
    last = place[i] == k - 1 ? s.ranks[i] : last;
    s.ranks[kept] = s.ranks[i];
    s.indices[kept] = s.indices[i];
    kept += place[i] < k;
  }
  s.count = kept;
  return last;
}

// Drops survivors that are not among the k best, and returns a rank that the k best exceed, or, at INT32_MIN, might
// not. Up to a few more than k are kept: to find about the k-th best by a search is quicker than to rank all.
[[gnu::noinline]]
inline int32_t thin_out(Survivors& s, int k) {
  const int vectors = (s.count + kLanes - 1) / kLanes;
  for (int i = s.count; i < vectors * kLanes; i++) s.ranks[i] = s.ranks[0];
  Ints lows = splat(INT32_MAX), highs = splat(INT32_MIN);
  for (int v = 0; v < vectors; v++) {
    const Ints own = load_vector<Ints>(s.ranks + v * kLanes);
    lows = min(lows, own), highs = max(highs, own);
  }
  int32_t low = lowest(lows), high = highest(highs);
  for (int i = s.count; i < vectors * kLanes; i++) s.ranks[i] = INT32_MIN;
  for (int step = 0; step < kSearchSteps; step++) {
    const int32_t middle = between(low, high);
    Ints count = {};
    for (int v = 0; v < vectors; v++) count -= load_vector<Ints>(s.ranks + v * kLanes) >= splat(middle);
    const int reached = sum(count);
    if (reached < k) {
      high = middle;
      continue;
    }
    low = middle;
    if (reached <= k + k / 8) break;
  }
  if (low == INT32_MIN) return keep_best(s, k);  // no rank is below it
  int kept = 0;
  for (int v = 0; v < vectors; v++) {  // what is written lies before what is read next
    const Ints own = load_vector<Ints>(s.ranks + v * kLanes), index = load_vector<Ints>(s.indices + v * kLanes);
    const uint32_t bits = greater_bits(own, splat(low - 1));
    store_chosen(s.ranks + kept, own, bits);
    store_chosen(s.indices + kept, index, bits);
    kept += __builtin_popcount(bits);
  }
  s.count = kept;
  if (kept > kMostSurvivors / 2 && kept > k) return keep_best(s, k);  // many are equal
  return low - 1;
}

// Writes the indices of the k best numbers, best first, and, unless `values` is null, their values. If there are fewer
// survivors, every other number of the row has the lowest rank, and the first ones of these follow.
[[gnu::noinline]]
inline void write_best(Survivors& s, int k, int32_t* indices, float* values) {
  int32_t place[kMostSurvivors + kLanes], sorted[kMostSurvivors], sorted_ranks[kMostSurvivors];
  places(s.ranks, s.count, place);
  for (int i = 0; i < s.count; i++) sorted[place[i]] = s.indices[i], sorted_ranks[place[i]] = s.ranks[i];
  int written = std::min(s.count, k);
  memcpy(indices, sorted, written * sizeof(int32_t));
  for (int i = 0; i < written && values; i++) values[i] = with_rank(sorted_ranks[i]);
  for (int32_t i = 0; written < k; i++) {
    if (std::find(indices, indices + written, i) != indices + written) continue;
    if (values) values[written] = with_rank(INT32_MIN);
    indices[written++] = i;
  }
}

// Sorts a row, for a large k. `order` has room for n.
[[gnu::noinline]]
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
  int32_t low = lowest(lows), high = highest(highs);
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

// Returns a rank that the k best of a row exceed, or, at INT32_MIN, might not.
[[gnu::noinline]]
inline int32_t bound_of_row(const int32_t* ranks, int64_t n, int k) {
  int32_t low = INT32_MIN;
  if (2 * k <= 4 * kLanes) {
    if (n >= 8 * kLanes) low = lower_bound<4>(ranks, n, k);
  } else if (2 * k <= 8 * kLanes) {
    if (n >= 16 * kLanes) low = lower_bound<8>(ranks, n, k);
  } else if (n >= 48 * kLanes) {
    low = lower_bound<24>(ranks, n, k);
  }
  return low == INT32_MIN ? low : low - 1;
}

// Adds the numbers of a row that exceed the bound, of which the first has the index `first`, and returns the bound: it
// rises if there are too many.
[[gnu::noinline]]
inline int32_t add_survivors(const int32_t* ranks, int64_t n, int32_t first, int32_t bound, int k, Survivors& s) {
  const auto add = [&](int64_t at, uint32_t bits) {
    store_chosen(s.ranks + s.count, load_vector<Ints>(ranks + at), bits);
    store_chosen(s.indices + s.count, lane_numbers() + (first + static_cast<int32_t>(at)), bits);
    s.count += __builtin_popcount(bits);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    uint32_t bits[4];
    for (int v = 0; v < 4; v++) bits[v] = greater_bits(load_vector<Ints>(ranks + i + v * kLanes), splat(bound));
    if (!(bits[0] | bits[1] | bits[2] | bits[3])) continue;
    for (int v = 0; v < 4; v++) add(i + v * kLanes, bits[v]);
    if (s.count > kMostSurvivors - 4 * kLanes) bound = thin_out(s, k);
  }
  for (; i < n; i++) {
    if (ranks[i] <= bound) continue;
    s.ranks[s.count] = ranks[i];
    s.indices[s.count++] = first + static_cast<int32_t>(i);
    if (s.count > kMostSurvivors - 4 * kLanes) bound = thin_out(s, k);
  }
  return bound;
}

// Writes the k best of a contiguous row of n ranks; `order` is for `sort_best`.
[[gnu::noinline]]
inline void best_of_row(const int32_t* ranks, int64_t n, int k, int32_t* order, int32_t* indices, float* values) {
  if (k > kMostSelected) return sort_best(ranks, n, k, order, indices, values);
  int32_t kept_ranks[kMostSurvivors + kLanes], kept_indices[kMostSurvivors + kLanes];
  Survivors kept{kept_ranks, kept_indices};
  add_survivors(ranks, n, 0, bound_of_row(ranks, n, k), k, kept);
  write_best(kept, k, indices, values);
}

}  // namespace ultramem
