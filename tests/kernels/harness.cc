// Calls kernels without XLA, for builds that a Python process cannot load: those of sanitizers, and of other CPUs.
//
// harness IN OUT reads calls from one file and writes their results to another. All numbers are int64, little-endian:
//   calls; per call: length and name of the kernel, numbers of arguments, results, attributes
//   per argument: dtype, rank, dimensions, bytes, data · per result: the same, without data, and then the argument
//   that it replaces, or -1 · per attribute: length of the name, name, whether it is a float32, value in 8 bytes
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

#define KERNELS(X)                                                                                                    \
  X(best_keys) X(key_scores) X(query_gradient) X(key_gradient) X(rms_norm) X(rms_norm_gradient) \
  X(best_cells) X(best_cells_gradient) X(top_k) X(pool) \
  X(products) X(rows_read) X(record_reads) X(update_rows) X(row_mean_squares) X(ngram_slots)
#define DECLARE(name) extern "C" XLA_FFI_Error* ultramem_##name(XLA_FFI_CallFrame*);
KERNELS(DECLARE)
#define ENTRY(name) {#name, ultramem_##name},
const struct {
  const char* name;
  XLA_FFI_Handler* handler;
} kKernels[] = {KERNELS(ENTRY)};

namespace {

FILE *in, *out;

int64_t number() {
  int64_t n = 0;
  if (fread(&n, sizeof n, 1, in) != 1) abort();
  return n;
}
std::string text() {
  std::string s(number(), ' ');
  if (!s.empty() && fread(&s[0], 1, s.size(), in) != s.size()) abort();
  return s;
}

struct Tensor {
  XLA_FFI_Buffer buffer = {};
  std::vector<int64_t> shape;
  void* memory = nullptr;

  // Reads dtype and shape, and takes exactly as many bytes as the array has: a sanitizer sees what is beyond.
  void read_shape() {
    buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    buffer.dtype = static_cast<XLA_FFI_DataType>(number());
    shape.resize(number());
    for (auto& n : shape) n = number();
    buffer.rank = static_cast<int64_t>(shape.size());
    buffer.dims = shape.data();
  }
  void allocate(int64_t bytes) {
    memory = malloc(bytes ? bytes : 1);
    memset(memory, 0xab, bytes);
    buffer.data = memory;
  }
};

XLA_FFI_Error* make_error(XLA_FFI_Error_Create_Args* args) {
  fprintf(stderr, "%s\n", args->message);
  exit(3);
}
XLA_FFI_Error* one_thread(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = 1;
  return nullptr;
}

void call() {
  const std::string name = text();
  const int64_t num_arguments = number(), num_results = number(), num_attributes = number();
  std::vector<Tensor> arguments(num_arguments), results(num_results);
  std::vector<int64_t> sizes(num_results);
  std::vector<void*> in_buffers, out_buffers;
  for (auto& a : arguments) {
    a.read_shape();
    const int64_t bytes = number();
    a.allocate(bytes);
    if (bytes && fread(a.memory, 1, bytes, in) != static_cast<size_t>(bytes)) abort();
    in_buffers.push_back(&a.buffer);
  }
  for (int64_t i = 0; i < num_results; i++) {
    results[i].read_shape();
    sizes[i] = number();
    const int64_t replaced = number();
    if (replaced < 0)
      results[i].allocate(sizes[i]);
    else
      results[i].buffer.data = arguments[replaced].memory;
    out_buffers.push_back(&results[i].buffer);
  }
  std::vector<std::string> names(num_attributes);
  std::vector<int64_t> values(num_attributes);
  std::vector<XLA_FFI_ByteSpan> spans(num_attributes);
  std::vector<XLA_FFI_ByteSpan*> span_pointers;
  std::vector<XLA_FFI_Scalar> scalars(num_attributes);
  std::vector<void*> scalar_pointers;
  std::vector<XLA_FFI_AttrType> types(num_attributes, XLA_FFI_AttrType_SCALAR);
  for (int64_t i = 0; i < num_attributes; i++) {
    names[i] = text();
    const bool is_float = number();
    values[i] = number();
    spans[i] = {names[i].data(), names[i].size()};
    scalars[i] = {is_float ? XLA_FFI_DataType_F32 : XLA_FFI_DataType_S64, &values[i]};
    span_pointers.push_back(&spans[i]);
    scalar_pointers.push_back(&scalars[i]);
  }
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.XLA_FFI_Error_Create = make_error;
  api.XLA_FFI_ThreadPool_NumThreads = one_thread;
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args.size = num_arguments;
  frame.args.args = in_buffers.data();
  frame.rets.size = num_results;
  frame.rets.rets = out_buffers.data();
  frame.attrs.size = num_attributes;
  frame.attrs.types = types.data();
  frame.attrs.names = span_pointers.data();
  frame.attrs.attrs = scalar_pointers.data();
  XLA_FFI_Handler* handler = nullptr;
  for (const auto& kernel : kKernels)
    if (name == kernel.name) handler = kernel.handler;
  if (!handler) {
    fprintf(stderr, "no kernel %s\n", name.c_str());
    exit(2);
  }
  handler(&frame);
  for (int64_t i = 0; i < num_results; i++)
    if (sizes[i] && fwrite(results[i].buffer.data, 1, sizes[i], out) != static_cast<size_t>(sizes[i])) abort();
  for (auto& a : arguments) free(a.memory);
  for (auto& r : results) free(r.memory);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 || !(in = fopen(arguments[1], "rb")) || !(out = fopen(arguments[2], "wb"))) return 1;
  for (int64_t calls = number(); calls > 0; calls--) call();
  return fclose(out);
}
