// Hashes n-grams as Engram does: products of ids and multipliers, joined by XOR, modulo the size of each head's table.
#include "call.h"

namespace ultramem {
namespace {

constexpr int64_t kPositions = 256;  // positions of a task

// ids (B, span - 1 + S), multipliers (span, 2) as low and high halves, sizes (R,), orders (O,) -> slots (B, S, R)
const char* ngram_slots(const Call& call) {
  const Array ids_in = call.argument(0), slots_out = call.result(0);
  const auto* ids = ids_in.as<int32_t>();
  const auto* halves = call.argument(1).as<uint32_t>();
  const auto *sizes = call.argument(2).as<int32_t>(), *orders = call.argument(3).as<int32_t>();
  auto* slots = slots_out.as<int32_t>();
  const int64_t span = call.argument(1).dim(0), num_orders = call.argument(3).size();
  const int64_t batch = slots_out.dim(0), length = slots_out.dim(1), heads = slots_out.dim(2);
  const int64_t per_order = heads / num_orders;
  call.parallel(ceil_div(batch * length, kPositions), [&](int64_t task) {
    auto* hashes = reinterpret_cast<uint64_t*>(scratch(span * static_cast<int64_t>(sizeof(uint64_t))));
    const int64_t end = (task + 1) * kPositions < batch * length ? (task + 1) * kPositions : batch * length;
    for (int64_t at = task * kPositions; at < end; at++) {
      const int32_t* last = ids + at / length * (span - 1 + length) + at % length + span - 1;
      uint64_t hash = 0;
      for (int64_t i = 0; i < span; i++) {
        const uint64_t multiplier = static_cast<uint64_t>(halves[2 * i + 1]) << 32 | halves[2 * i];
        hash ^= static_cast<uint64_t>(static_cast<uint32_t>(last[-i])) * multiplier;
        hashes[i] = hash;
      }
      for (int64_t head = 0; head < heads; head++) {
        const int64_t remainder = static_cast<int64_t>(hashes[orders[head / per_order] - 1]) % sizes[head];
        slots[at * heads + head] = static_cast<int32_t>(remainder < 0 ? remainder + sizes[head] : remainder);
      }
    }
  });
  return nullptr;
}

}  // namespace
}  // namespace ultramem

ULTRAMEM_KERNEL(ngram_slots, ultramem::ngram_slots)
