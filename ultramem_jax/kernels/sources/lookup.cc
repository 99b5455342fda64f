// Looks up rows of a table: weighed sums of them, and products with vectors.
//
// A device may own only some of the rows. It then skips the reads of others: their products are zero.
#include <algorithm>

#include "call.h"
#include "vectors.h"

namespace ultramem {
namespace {

constexpr int64_t kTokens = 8;  // tokens of a task
constexpr int64_t kAhead = 16;  // reads whose rows are on their way into the cache

// Where the rows of a task's reads are.
template <class Row>
struct Table {
  const Row* rows;
  int64_t num_rows, width;
  const int32_t* slots;
  int32_t first;  // slot of the first row

  // Returns the row of a read, or null if it belongs to another device.
  const Row* of(int64_t read) const {
    const int64_t row = static_cast<int64_t>(slots[read]) - first;
    return row >= 0 && row < num_rows ? rows + row * width : nullptr;
  }
  void fetch(int64_t read, int64_t end) const {
    if (read >= end) return;
    if (const Row* row = of(read)) prefetch_row(row, width);
  }
};

template <class Row>
Table<Row> table_of(const Call& call) {
  const Array table = call.argument(0);
  return {table.as<Row>(), table.dim(0), table.dim(1), call.argument(1).as<int32_t>(), *call.argument(4).as<int32_t>()};
}

template <class Row, class T>
void pool_as(const Call& call) {
  const auto table = table_of<Row>(call);
  const Array scores = call.argument(3), pooled = call.result(0);
  const int64_t tokens = scores.dim(0), reads = scores.dim(1), slices = scores.dim(2), blocks = pooled.dim(1);
  const auto* block_of = call.argument(2).as<int32_t>();
  const auto* weights = scores.as<T>();
  auto* out = pooled.as<T>();
  const bool apart = call.integer("apart");
  const int64_t width = table.width, of_token = blocks * width;
  call.parallel(ceil_div(tokens, kTokens), [&](int64_t task) {
    auto* totals = reinterpret_cast<float*>(scratch(sizeof(float) * of_token));
    const int64_t first = task * kTokens, last = std::min(tokens, first + kTokens), end = last * reads;
    for (int64_t read = first * reads; read < first * reads + kAhead; read++) table.fetch(read, end);
    for (int64_t token = first; token < last; token++) {
      memset(totals, 0, sizeof(float) * of_token);
      for (int64_t j = 0; j < reads; j++) {
        const int64_t read = token * reads + j;
        table.fetch(read + kAhead, end);
        const int64_t block = blocks == 1 ? 0 : apart ? j : block_of[read];
        if (const Row* row = table.of(read))
          add_slices(totals + block * width, weights + read * slices, slices, row, width);
      }
      copy_values(out + token * of_token, totals, of_token);
    }
  });
}

template <class Row, class T>
void multiply_as(const Call& call) {
  const auto table = table_of<Row>(call);
  const Array vectors_in = call.argument(3), products_out = call.result(0);
  const int64_t tokens = products_out.dim(0), reads = products_out.dim(1), slices = products_out.dim(2);
  const int64_t blocks = vectors_in.dim(1), width = table.width, slice = width / slices;
  const auto* block_of = call.argument(2).as<int32_t>();
  const auto* vectors = vectors_in.as<T>();
  auto* out = products_out.as<T>();
  const bool apart = call.integer("apart");
  call.parallel(ceil_div(tokens, kTokens), [&](int64_t task) {
    const int64_t first = task * kTokens * reads, end = std::min(tokens, (task + 1) * kTokens) * reads;
    for (int64_t read = first; read < first + kAhead; read++) table.fetch(read, end);
    for (int64_t read = first; read < end; read++) {
      table.fetch(read + kAhead, end);
      const Row* row = table.of(read);
      if (!row) {
        for (int64_t c = 0; c < slices; c++) store_one(out + read * slices + c, 0);
        continue;
      }
      const int64_t block = blocks == 1 ? 0 : apart ? read % reads : block_of[read];
      const T* vector = vectors + (read / reads * blocks + block) * width;
      for (int64_t c = 0; c < slices; c++)
        store_one(out + read * slices + c, dot(vector + c * slice, row + c * slice, slice));
    }
  });
}

// table (N, d), slots (T, R), blocks (T, R), scores (T, R, h), first slot () -> sums (T, E, d)
const char* pool(const Call& call) {
  const bool words = call.argument(0).is_bfloat16(), half = call.argument(3).is_bfloat16();
  if (words)
    half ? pool_as<Bfloat16, Bfloat16>(call) : pool_as<Bfloat16, float>(call);
  else
    half ? pool_as<float, Bfloat16>(call) : pool_as<float, float>(call);
  return nullptr;
}

// table (N, d), slots (T, R), blocks (T, R), vectors (T, E, d), first slot () -> products (T, R, h)
const char* products(const Call& call) {
  const bool words = call.argument(0).is_bfloat16(), half = call.argument(3).is_bfloat16();
  if (words)
    half ? multiply_as<Bfloat16, Bfloat16>(call) : multiply_as<Bfloat16, float>(call);
  else
    half ? multiply_as<float, Bfloat16>(call) : multiply_as<float, float>(call);
  return nullptr;
}

}  // namespace
}  // namespace ultramem

ULTRAMEM_KERNEL(pool, ultramem::pool)
ULTRAMEM_KERNEL(products, ultramem::products)
