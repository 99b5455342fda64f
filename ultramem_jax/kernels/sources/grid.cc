// Chooses the m best cells among the pairs of a token's candidates, scores them, and the derivatives of their scores.
//
// A cell's score under a core is Σ_qs row_q · C_qs · column_s; without cores it is row + column.
#include <algorithm>
#include <vector>

#include "call.h"
#include "select.h"

namespace ultramem {
namespace {

constexpr int kTokens = 8;  // tokens of a task

struct Shape {
  int64_t tokens, heads, ranks, candidates, cores, top_m;
  bool plain;  // product keys: the sum of two scores
};

// The ranks of all cells of one token and head, in a grid of m·m.
void rank_cells(const Shape& s, const float* row, const float* column, const float* core, float* mixed,
                int32_t* ranks) {
  const int64_t m = s.candidates;
  if (s.plain) {
    for (int64_t i = 0; i < m; i++)
      for_vectors(0, m, [&](int64_t j, auto lanes) {
        store(ranks + i * m + j, rank_of(splat(row[i]) + load(column + j, lanes)), lanes);
      });
    return;
  }
  for (int64_t c = 0; c < s.ranks; c++)
    for (int64_t i = 0; i < m; i++) {
      float sum = 0;
      for (int64_t q = 0; q < s.ranks; q++) sum += core[q * s.ranks + c] * row[q * m + i];
      mixed[c * m + i] = sum;
    }
  for (int64_t i = 0; i < m; i++)
    for_vectors(0, m, [&](int64_t j, auto lanes) {
      Floats cell = {};
      for (int64_t c = 0; c < s.ranks; c++) cell += splat(mixed[c * m + i]) * load(column + c * m + j, lanes);
      store(ranks + i * m + j, rank_of(cell), lanes);
    });
}

// scores[...][core] of one cell
inline void score_cell(const Shape& s, const float* row, const float* column, const float* cores, float* scores) {
  const int64_t m = s.candidates;
  if (s.plain) {
    *scores = *row + *column;
    return;
  }
  for (int64_t core = 0; core < s.cores; core++, cores += s.ranks * s.ranks) {
    float total = 0;
    for (int64_t c = 0; c < s.ranks; c++) {
      float mixed = 0;
      for (int64_t q = 0; q < s.ranks; q++) mixed += cores[q * s.ranks + c] * row[q * m];
      total += mixed * column[c * m];
    }
    scores[core] = total;
  }
}

Shape shape_of(const Array& scores, const Array& cores, const Array& cells) {
  return {scores.dim(0), scores.dim(2), scores.dim(3), scores.dim(4), std::max<int64_t>(cores.dim(1), 1), cells.dim(2),
          cores.dim(1) == 0};
}

// scores (T, 2, H, r, m) of candidates, cores (H, h, r, r), or (H, 0, 1, 1) for sums
// -> cells (T, H, m), i·m + j of row i and column j of the candidates, best first; scores (T, H, m, h)
const char* best_cells(const Call& call) {
  const Array scores_in = call.argument(0), cores_in = call.argument(1), cells_out = call.result(0);
  const Shape s = shape_of(scores_in, cores_in, cells_out);
  const auto *scores = scores_in.as<float>(), *cores = cores_in.as<float>();
  auto* cells = cells_out.as<int32_t>();
  auto* of_cells = call.result(1).as<float>();
  const int64_t m = s.candidates, of_core = s.ranks * s.ranks, of_side = s.heads * s.ranks * m;
  // Selection is by the sum of the cores.
  std::vector<float> summed(s.heads * of_core);
  for (int64_t head = 0; head < s.heads && !s.plain; head++)
    for (int64_t core = 0; core < s.cores; core++)
      for (int64_t i = 0; i < of_core; i++) summed[head * of_core + i] += cores[(head * s.cores + core) * of_core + i];
  call.parallel(ceil_div(s.tokens, kTokens), [&](int64_t task) {
    Parts parts(scratch(2 * Parts::bytes<int32_t>(m * m) + Parts::bytes<float>(s.ranks * m)));
    auto *ranks = parts.take<int32_t>(m * m), *order = parts.take<int32_t>(m * m);
    auto* mixed = parts.take<float>(s.ranks * m);
    const int64_t end = std::min(s.tokens, (task + 1) * kTokens);
    for (int64_t token = task * kTokens; token < end; token++) {
      for (int64_t head = 0; head < s.heads; head++) {
        const float* row = scores + token * 2 * of_side + head * s.ranks * m;
        const float* column = row + of_side;
        const int64_t at = token * s.heads + head;
        rank_cells(s, row, column, summed.data() + head * of_core, mixed, ranks);
        int32_t* chosen = cells + at * s.top_m;
        best_of_row(ranks, m * m, static_cast<int>(s.top_m), order, chosen, nullptr);
        for (int64_t j = 0; j < s.top_m; j++)
          score_cell(s, row + chosen[j] / m, column + chosen[j] % m, cores + head * s.cores * of_core,
                     of_cells + (at * s.top_m + j) * s.cores);
      }
    }
  });
  return nullptr;
}

template <int64_t n>
struct Ranks {
  constexpr operator int64_t() const { return n; }
};

// Adds the derivatives of one cell's scores, by its row, its column and the cores; values of ranks are m apart.
template <class Count>
inline void add_cell(Count ranks, int64_t num_cores, int64_t m, const float* cotangent, const float* cores,
                     const float* row, const float* column, float* d_row, float* d_column, float* d_cores) {
  for (int64_t core = 0; core < num_cores; core++, cores += ranks * ranks, d_cores += ranks * ranks) {
    const float weight = cotangent[core];
    for (int64_t q = 0; q < ranks; q++)
      for (int64_t k = 0; k < ranks; k++) {
        const float of_core = weight * cores[q * ranks + k], x = row[q * m], y = column[k * m];
        d_row[q * m] += of_core * y;
        d_column[k * m] += of_core * x;
        d_cores[q * ranks + k] += weight * x * y;
      }
  }
}

// cotangents (T, H, m, h) of the scores, cells, scores of the candidates, cores
// -> gradients of the candidates' scores (T, 2, H, r, m) and of the cores
const char* best_cells_gradient(const Call& call) {
  const Array scores_in = call.argument(2), cores_in = call.argument(3);
  const Shape s = shape_of(scores_in, cores_in, call.argument(1));
  const auto* cotangents = call.argument(0).as<float>();
  const auto* cells = call.argument(1).as<int32_t>();
  const auto *scores = scores_in.as<float>(), *cores = cores_in.as<float>();
  auto *d_scores = call.result(0).as<float>(), *d_cores = call.result(1).as<float>();
  const int64_t m = s.candidates, of_core = s.ranks * s.ranks, of_side = s.heads * s.ranks * m;
  const int64_t tasks = ceil_div(s.tokens, kTokens), all_cores = s.plain ? 0 : s.heads * s.cores * of_core;
  std::vector<double> partial(tasks * all_cores);
  call.parallel(tasks, [&](int64_t task) {
    double* of_task = partial.data() + task * all_cores;
    std::vector<float> of_head_cores(s.cores * of_core);
    const int64_t end = std::min(s.tokens, (task + 1) * kTokens);
    for (int64_t token = task * kTokens; token < end; token++) {
      float* d_token = d_scores + token * 2 * of_side;
      memset(d_token, 0, sizeof(float) * 2 * of_side);
      for (int64_t head = 0; head < s.heads; head++) {
        const int64_t at = token * s.heads + head, of_head = head * s.ranks * m;
        const float *row = scores + token * 2 * of_side + of_head, *column = row + of_side;
        float *d_row = d_token + of_head, *d_column = d_row + of_side;
        std::fill(of_head_cores.begin(), of_head_cores.end(), 0.0f);
        for (int64_t cell = 0; cell < s.top_m; cell++) {
          const int64_t i = cells[at * s.top_m + cell] / m, j = cells[at * s.top_m + cell] % m;
          const float* cotangent = cotangents + (at * s.top_m + cell) * s.cores;
          if (s.plain) {
            d_row[i] += *cotangent;
            d_column[j] += *cotangent;
            continue;
          }
          const float* of_cores = cores + head * s.cores * of_core;
          float* d_of_cores = of_head_cores.data();
          const auto add = [&](auto ranks) {
            add_cell(ranks, s.cores, m, cotangent, of_cores, row + i, column + j, d_row + i, d_column + j, d_of_cores);
          };
          switch (s.ranks) {  // the loops over ranks are as short as a branch, unless their length is known
            case 1: add(Ranks<1>{}); break;
            case 2: add(Ranks<2>{}); break;
            case 3: add(Ranks<3>{}); break;
            case 4: add(Ranks<4>{}); break;
            default: add(s.ranks);
          }
        }
        for (int64_t c = 0; c < s.cores * of_core && !s.plain; c++)
          of_task[head * s.cores * of_core + c] += of_head_cores[c];
      }
    }
  });
  add_up(partial.data(), tasks, all_cores, d_cores);
  return nullptr;
}

// x (..., K) -> values and indices (..., k) of the k largest of every row, best first
const char* top_k(const Call& call) {
  const Array x_in = call.argument(0), values_out = call.result(0);
  const int64_t length = x_in.dim(-1), rows = length ? x_in.size() / length : 0;
  const int k = static_cast<int>(values_out.dim(-1));
  const auto* x = x_in.as<float>();
  auto* values = values_out.as<float>();
  auto* indices = call.result(1).as<int32_t>();
  if (k > length) return "top_k: k is larger than a row";
  const int64_t of_task = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(length, 1));
  call.parallel(ceil_div(rows, of_task), [&](int64_t task) {
    Parts parts(scratch(2 * Parts::bytes<int32_t>(length)));
    auto *ranks = parts.take<int32_t>(length), *order = parts.take<int32_t>(length);
    const int64_t end = std::min(rows, (task + 1) * of_task);
    for (int64_t row = task * of_task; row < end; row++) {
      for_vectors(0, length, [&](int64_t i, auto lanes) {
        store(ranks + i, rank_of(load(x + row * length + i, lanes)), lanes);
      });
      best_of_row(ranks, length, k, order, indices + row * k, values + row * k);
    }
  });
  return nullptr;
}

}  // namespace
}  // namespace ultramem

ULTRAMEM_KERNEL(best_cells, ultramem::best_cells)
ULTRAMEM_KERNEL(best_cells_gradient, ultramem::best_cells_gradient)
ULTRAMEM_KERNEL(top_k, ultramem::top_k)
