// Sorts reads by slot, lists the rows that they touch, and records which slots have been read.
#include <cmath>
#include <vector>

#include "call.h"

namespace ultramem {
namespace {

constexpr int kDigitBits = 11;

// A read's slot in the upper half, its number in the lower.
using Entry = uint64_t;

// Sorts by slot, equal slots by number: least significant digit first, each pass stable. Returns `a` or `b`.
Entry* sort_by_slot(Entry* a, Entry* b, int64_t count, int64_t num_slots) {
  int bits = 1;
  while (bits < 32 && num_slots > int64_t{1} << bits) bits++;
  const int passes = static_cast<int>(ceil_div(bits, kDigitBits)), digit = static_cast<int>(ceil_div(bits, passes));
  const uint32_t mask = (1u << digit) - 1;
  std::vector<uint32_t> places(static_cast<size_t>(passes) << digit);
  for (int64_t i = 0; i < count; i++)
    for (int pass = 0; pass < passes; pass++) places[(pass << digit) + (a[i] >> (32 + pass * digit) & mask)]++;
  for (int pass = 0; pass < passes; pass++) {
    uint32_t* place = places.data() + (pass << digit);
    uint32_t next = 0;
    for (uint32_t i = 0; i <= mask; i++) {
      const uint32_t of_digit = place[i];
      place[i] = next;
      next += of_digit;
    }
    const int shift = 32 + pass * digit;
    for (int64_t i = 0; i < count; i++) b[place[a[i] >> shift & mask]++] = a[i];
    std::swap(a, b);
  }
  return a;
}

// slots (n,) in [0, num_slots) -> rows read (U,) and reads of each (U,), order of the reads (n,), their rows (n,)
const char* rows_read(const Call& call) {
  const Array slots_in = call.argument(0), slots_out = call.result(0);
  const int64_t count = slots_in.size(), num_rows = slots_out.size(), num_slots = call.integer("num_slots");
  const auto* slots = slots_in.as<int32_t>();
  auto *rows = slots_out.as<int32_t>(), *reads = call.result(1).as<int32_t>();
  auto *order = call.result(2).as<int32_t>(), *row_of_read = call.result(3).as<int32_t>();
  auto* entries = reinterpret_cast<Entry*>(scratch(2 * count * static_cast<int64_t>(sizeof(Entry))));
  bool in_range = true;
  for (int64_t i = 0; i < count; i++) {
    in_range &= slots[i] >= 0 && slots[i] < num_slots;
    entries[i] = static_cast<uint64_t>(static_cast<uint32_t>(slots[i])) << 32 | i;
  }
  // There would be more rows than the results have room for.
  if (!in_range) return "rows_read: a slot is not in [0, num_slots)";
  const Entry* sorted = sort_by_slot(entries, entries + count, count, num_slots);
  int64_t row = -1;
  for (int64_t i = 0; i < count; i++) {
    const auto slot = static_cast<int32_t>(sorted[i] >> 32);
    if (i == 0 || slot != rows[row]) {
      rows[++row] = slot;
      reads[row] = 0;
    }
    reads[row]++;
    order[i] = static_cast<int32_t>(sorted[i]);
    row_of_read[i] = static_cast<int32_t>(row);
  }
  for (row++; row < num_rows; row++) {
    rows[row] = static_cast<int32_t>(num_slots + row);
    reads[row] = 0;
  }
  return nullptr;
}

// seen (N,), rows read (U,), reads of each (U,) -> seen, in place, number of new rows (), entropy () of the reads
const char* record_reads(const Call& call) {
  const Array seen_in = call.argument(0), rows_in = call.argument(1);
  auto* seen = call.result(0).as<uint8_t>();
  if (seen != seen_in.as<uint8_t>()) return "record_reads: the record is not updated in place";
  const auto *rows = rows_in.as<int32_t>(), *reads = call.argument(2).as<int32_t>();
  const int64_t num_slots = seen_in.size(), num_rows = rows_in.size();
  const double share = 1.0 / static_cast<double>(call.integer("num_reads"));
  constexpr int kKnown = 256;  // terms of small counts, which are most, are computed once
  double terms[kKnown] = {};
  for (int n = 1; n < kKnown; n++) terms[n] = -n * share * std::log(n * share);
  int32_t fresh = 0;
  double entropy = 0;
  for (int64_t row = 0; row < num_rows && rows[row] < num_slots; row++) {
    if (row + 16 < num_rows && rows[row + 16] < num_slots) __builtin_prefetch(seen + rows[row + 16], 1, 3);
    fresh += !seen[rows[row]];
    seen[rows[row]] = 1;
    const int32_t n = reads[row];
    entropy += n < kKnown ? terms[n] : -n * share * std::log(n * share);
  }
  *call.result(1).as<int32_t>() = fresh;
  *call.result(2).as<float>() = static_cast<float>(entropy);
  return nullptr;
}

}  // namespace
}  // namespace ultramem

ULTRAMEM_KERNEL(rows_read, ultramem::rows_read)
ULTRAMEM_KERNEL(record_reads, ultramem::record_reads)
