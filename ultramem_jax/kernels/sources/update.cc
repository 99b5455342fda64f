// Updates the rows that were read, each in one pass: its gradient is summed over its reads, the rule of the optimizer
// is applied, and what changed is rounded and written in place. No array holds the gradients of all rows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "call.h"
#include "vectors.h"

namespace ultramem {
namespace {

constexpr int64_t kTasks = 64;  // a task's sum of squares is its own, so their number must not depend on the threads
constexpr int64_t kAhead = 8;   // rows whose values and state are on their way into the cache
constexpr int kMostArrays = 4;  // a table and what its rule keeps

// The rules of `training.row_rules`, in the order of `kernels.rules`.
enum class Rule { adamw, adamw_catch_up, adagrad, adagrad_row, sgd, sgd_momentum };

// ---- rounding: as `ops.rounding.stochastic_round`, for the same hash

template <class T>  // uint32_t or Words
inline T mix(T x, T key) {
  x = (x + key) * 0x9E3779B1u;
  x = (x ^ (x >> 16) ^ key) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

struct Rounding {
  bool stochastic;
  uint32_t seed, row;  // of the array; the hash of the row's number and the seed, plus the first column
};

inline Words round_bits(Words bits, Words noise) {
  const Words finite = (Words)((bits & 0x7f800000u) != 0x7f800000u);
  return (bits + (noise & 0xffffu & finite)) >> 16;
}

void store_rounded(Bfloat16* to, const float* x, int64_t width, const Rounding& r) {
  const Words numbers = (Words)lane_numbers();
  for_vectors(0, width, [&](int64_t e, auto lanes) {
    const Floats values = load(x + e, lanes);
    Words rounded = nearest_bfloat16(values);
    if (r.stochastic) {
      // An infinity or a NaN keeps its upper bits. A NaN that has none of its bits there would become infinite.
      const Words noise = mix(numbers + (r.row + static_cast<uint32_t>(e)), splat(r.seed));
      rounded = values == values ? round_bits((Words)values, noise) : rounded;
    }
    store(to + e, rounded, lanes);
  });
}

// ---- arrays of a table, of which a row is worked on in float32

struct Rows {
  char* data;
  int64_t width, bytes;  // values of a row; bytes of one
  bool words, integers;
  char* before;  // rows as they were, one for each row that is written; null unless they are recorded
  uint32_t seed;

  char* at(int64_t row) const { return data + row * width * bytes; }
  void fetch(int64_t row) const {
    for (int64_t i = 0; i < width * bytes; i += 64) prefetch_to_write(at(row) + i);
  }
};

// Returns a row's values: in place if they are float32, else decoded into `buffer`.
inline float* decoded(const Rows& rows, int64_t row, float* buffer) {
  if (!rows.words) return reinterpret_cast<float*>(rows.at(row));
  copy_values(buffer, reinterpret_cast<const Bfloat16*>(rows.at(row)), rows.width);
  return buffer;
}

// ---- the rules

struct Settings {
  Rule rule;
  bool one_per_row;  // one second moment, or one sum of squares, for all values of a row
  float b1, b2, eps, eps_squared, momentum, decay;
  float rate, correction_1, correction_2;
  int32_t step;
};

inline float mean_square(const float* g, int64_t width) { return dot(g, g, width) / static_cast<float>(width); }

// x - rate · (direction + decay · x), and the sum of the squares of it.
struct Step {
  float rate, decay;
  Floats squares = {};

  template <class Lanes>
  void operator()(float* x, Floats direction, Lanes lanes) {
    const Floats old = load(x, lanes), value = old - splat(rate) * (direction + splat(decay) * old);
    store(x, value, lanes);
    squares += only(value, lanes) * only(value, lanes);
  }
};

// Changes a row x and its state by its gradient g. `mean` is that of the squares of g, over columns of other devices
// too; it is used where a row has one moment. Returns the sum of the squares of the row.
double apply(const Settings& s, int64_t width, float* x, float* const* state, int32_t* last, const float* g,
             float mean) {
  Step step{s.rate, s.decay};
  switch (s.rule) {
    case Rule::adamw:
    case Rule::adamw_catch_up: {
      float decay_1 = s.b1, decay_2 = s.b2;
      float *first = state[0], *second = state[1];
      if (s.rule == Rule::adamw_catch_up) {
        const auto missed = static_cast<float>(s.step - *last);
        decay_1 *= std::pow(s.b1, missed);
        decay_2 *= std::pow(s.b2, missed);
        *last = s.step + 1;
      }
      const float new_1 = 1 - s.b1, new_2 = 1 - s.b2;
      float root = 0;
      if (s.one_per_row) {
        *second = decay_2 * *second + new_2 * mean;
        root = std::sqrt(*second / s.correction_2) + s.eps;
      }
      const float over_1 = 1 / s.correction_1, over_2 = 1 / s.correction_2;
      for_vectors(0, width, [&](int64_t e, auto lanes) {
        const Floats gradient = load(g + e, lanes);
        const Floats m = splat(decay_1) * load(first + e, lanes) + splat(new_1) * gradient;
        store(first + e, m, lanes);
        Floats divisor = splat(root);
        if (!s.one_per_row) {
          const Floats v = splat(decay_2) * load(second + e, lanes) + splat(new_2) * (gradient * gradient);
          store(second + e, v, lanes);
          divisor = square_root(v * splat(over_2)) + splat(s.eps);
        }
        step(x + e, m * splat(over_1) / divisor, lanes);
      });
      break;
    }
    case Rule::adagrad: {
      float* squares = state[0];
      for_vectors(0, width, [&](int64_t e, auto lanes) {
        const Floats gradient = load(g + e, lanes), total = load(squares + e, lanes) + gradient * gradient;
        store(squares + e, total, lanes);
        // The gradient is multiplied by 0 where nothing has been summed, so that a NaN stays one.
        const Floats scale = total > 0 ? splat(1.0f) / square_root(total + splat(s.eps_squared)) : Floats{};
        step(x + e, gradient * scale, lanes);
      });
      break;
    }
    case Rule::adagrad_row: {
      const float total = *state[0] += mean;
      const Floats scale = splat(total > 0 ? 1 / std::sqrt(total + s.eps_squared) : 0);
      for_vectors(0, width, [&](int64_t e, auto lanes) { step(x + e, load(g + e, lanes) * scale, lanes); });
      break;
    }
    case Rule::sgd:
      for_vectors(0, width, [&](int64_t e, auto lanes) { step(x + e, load(g + e, lanes), lanes); });
      break;
    case Rule::sgd_momentum: {
      float* trace = state[0];
      for_vectors(0, width, [&](int64_t e, auto lanes) {
        const Floats t = load(g + e, lanes) + splat(s.momentum) * load(trace + e, lanes);
        store(trace + e, t, lanes);
        step(x + e, t, lanes);
      });
      break;
    }
  }
  return sum(step.squares);
}

// ---- reads, in the order of their rows

struct Reads {
  const int32_t *slots, *order, *row_of_read;
  int64_t count, per_token, slices, blocks, width;
  const int32_t* block_of;
  const void *weights, *vectors;
  bool half;

  // Leaves out the reads of padding, which come last: rows of slots from num_slots on.
  void leave_out_padding(int64_t num_slots) {
    int64_t low = 0;
    while (low < count) {
      const int64_t middle = low + (count - low) / 2;
      if (slots[row_of_read[middle]] < num_slots)
        low = middle + 1;
      else
        count = middle;
    }
  }

  // Tasks share the reads evenly; a row belongs to the task in which it begins.
  int64_t begin(int64_t task, int64_t tasks) const {
    int64_t i = count * task / tasks;
    while (i > 0 && i < count && row_of_read[i] == row_of_read[i - 1]) i++;
    return i;
  }

  // Sums the gradient of the row of read i into g, and returns the first read of the next row.
  int64_t sum_gradient(int64_t i, float* g) const {
    return half ? sum_as<Bfloat16>(i, g) : sum_as<float>(i, g);
  }

 private:
  template <class T>
  int64_t sum_as(int64_t i, float* g) const {
    const int32_t row = row_of_read[i];
    memset(g, 0, sizeof(float) * width);
    do {
      const int64_t read = order[i];
      const int64_t block = blocks == 1 ? 0 : block_of[read];
      const T* vector = static_cast<const T*>(vectors) + (read / per_token * blocks + block) * width;
      add_slices(g, static_cast<const T*>(weights) + read * slices, slices, vector, width);
      i++;
    } while (i < count && row_of_read[i] == row);
    return i;
  }
};

// Arguments 0 to 5: rows read (U,), order (n,), rows of the reads (n,), blocks (T, R), weights (T, R, h), vectors
// (T, E, d).
Reads reads_of(const Call& call) {
  const Array order = call.argument(1), weights = call.argument(4), vectors = call.argument(5);
  Reads r;
  r.slots = call.argument(0).as<int32_t>(), r.order = order.as<int32_t>();
  r.row_of_read = call.argument(2).as<int32_t>(), r.count = order.size();
  r.block_of = call.argument(3).as<int32_t>();
  r.per_token = weights.dim(1), r.slices = weights.dim(2), r.blocks = vectors.dim(1), r.width = vectors.dim(2);
  r.weights = weights.data, r.vectors = vectors.data, r.half = vectors.is_bfloat16();
  return r;
}

// The reads, rate (), step (), seeds (arrays,), first slot and first column (2,), means of squares (U,) or (0,), and
// the table and its state -> these, in place, the sum of the squares of the rows (), and, if there are more results,
// the rows as they were (U, ...).
const char* update_rows(const Call& call) {
  constexpr int kFirstArray = 11;
  Reads reads = reads_of(call);
  const int num_arrays = call.num_arguments() - kFirstArray;
  const bool record = call.num_results() > num_arrays + 1;
  const auto* seeds = call.argument(8).as<uint32_t>();
  const auto* first = call.argument(9).as<int32_t>();
  const Array means_in = call.argument(10);
  const float* means = means_in.size() ? means_in.as<float>() : nullptr;
  if (num_arrays < 1 || num_arrays > kMostArrays) return "update_rows: too many arrays";
  Rows rows[kMostArrays];
  for (int i = 0; i < num_arrays; i++) {
    const Array in = call.argument(kFirstArray + i), out = call.result(i);
    if (in.data != out.data) return "update_rows: a table or its state is not updated in place";
    const bool are_steps = out.dtype == XLA_FFI_DataType_S32;
    rows[i] = {out.as<char>(), out.dim(1), out.bytes_per_value(), out.is_bfloat16(), are_steps, nullptr, seeds[i]};
    if (record) rows[i].before = call.result(num_arrays + 1 + i).as<char>();
  }
  Settings s;
  s.rule = static_cast<Rule>(call.integer("rule"));
  s.b1 = call.number("b1"), s.b2 = call.number("b2"), s.eps = call.number("eps"), s.decay = call.number("weight_decay");
  s.eps_squared = call.number("eps_squared"), s.momentum = call.number("momentum");
  s.rate = *call.argument(6).as<float>(), s.step = *call.argument(7).as<int32_t>();
  const float count = static_cast<float>(s.step) + 1;
  s.correction_1 = 1 - std::pow(s.b1, count), s.correction_2 = 1 - std::pow(s.b2, count);
  s.one_per_row = call.integer("one_per_row");
  const bool stochastic = call.integer("stochastic");
  const int64_t num_slots = call.argument(kFirstArray).dim(0), width = reads.width;
  reads.leave_out_padding(num_slots);
  const int64_t tasks = std::max<int64_t>(1, std::min(kTasks, reads.count / 64));
  std::vector<double> squares(tasks);
  call.parallel(tasks, [&](int64_t task) {
    Parts parts(scratch((1 + kMostArrays) * Parts::bytes<float>(width)));
    auto* g = parts.take<float>(width);
    float* buffers[kMostArrays];
    for (auto& buffer : buffers) buffer = parts.take<float>(width);
    const int64_t end = reads.begin(task + 1, tasks);
    int64_t fetched = reads.begin(task, tasks);
    int64_t ahead = 0;  // rows fetched and not yet updated
    double total = 0;
    for (int64_t i = fetched; i < end;) {
      for (; ahead < kAhead && fetched < end; fetched++) {
        if (fetched > i && reads.row_of_read[fetched] == reads.row_of_read[fetched - 1]) continue;
        for (int a = 0; a < num_arrays; a++) rows[a].fetch(reads.slots[reads.row_of_read[fetched]]);
        ahead++;
      }
      const int64_t row = reads.row_of_read[i], slot = reads.slots[row];
      ahead--;
      i = reads.sum_gradient(i, g);
      for (int a = 0; a < num_arrays && record; a++)
        memcpy(rows[a].before + row * rows[a].width * rows[a].bytes, rows[a].at(slot), rows[a].width * rows[a].bytes);
      float* values[kMostArrays] = {};
      int32_t* last = nullptr;
      for (int a = 0; a < num_arrays; a++) {
        if (rows[a].integers)
          last = reinterpret_cast<int32_t*>(rows[a].at(slot));
        else
          values[a] = decoded(rows[a], slot, buffers[a]);
      }
      const float mean = !s.one_per_row ? 0 : means ? means[row] : mean_square(g, width);
      total += apply(s, width, values[0], values + 1, last, g, mean);
      for (int a = 0; a < num_arrays; a++) {
        if (!rows[a].words) continue;
        const uint32_t seed = mix(static_cast<uint32_t>(a), rows[a].seed);
        const uint32_t of_row = mix(static_cast<uint32_t>(slot + first[0]), seed) + static_cast<uint32_t>(first[1]);
        store_rounded(reinterpret_cast<Bfloat16*>(rows[a].at(slot)), values[a], rows[a].width,
                      {stochastic, seed, of_row});
      }
    }
    squares[task] = total;
  });
  double total = 0;
  for (double of_task : squares) total += of_task;
  *call.result(num_arrays).as<float>() = static_cast<float>(total);
  return nullptr;
}

// The reads -> means (U,) of the squares of every row's gradient, zero for padding. Slots from num_slots on are
// padding, or the one row that stands for the rows of all other devices.
const char* row_mean_squares(const Call& call) {
  Reads reads = reads_of(call);
  const Array means_out = call.result(0);
  auto* means = means_out.as<float>();
  reads.leave_out_padding(call.integer("num_slots"));
  const int64_t tasks = std::max<int64_t>(1, std::min(kTasks, reads.count / 64));
  memset(means, 0, sizeof(float) * means_out.size());
  call.parallel(tasks, [&](int64_t task) {
    auto* g = reinterpret_cast<float*>(scratch(sizeof(float) * reads.width));
    const int64_t end = reads.begin(task + 1, tasks);
    for (int64_t i = reads.begin(task, tasks); i < end;) {
      const int64_t row = reads.row_of_read[i];
      i = reads.sum_gradient(i, g);
      means[row] = mean_square(g, reads.width);
    }
  });
  return nullptr;
}

}  // namespace
}  // namespace ultramem

ULTRAMEM_KERNEL(update_rows, ultramem::update_rows)
ULTRAMEM_KERNEL(row_mean_squares, ultramem::row_mean_squares)
