// Gives a kernel what it needs of a call from XLA: arrays, numbers and threads.
//
// Only the C interface of XLA's foreign functions is used: its C++ headers take 13 s to compile, this one 0.05 s.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/c_api.h"

namespace ultramem {

// An argument or a result: contiguous, in row-major order.
struct Array {
  void* data;
  const int64_t* shape;
  int rank;
  XLA_FFI_DataType dtype;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  // Length of an axis; negative numbers count from the last axis.
  int64_t dim(int axis) const { return shape[axis < 0 ? rank + axis : axis]; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; i++) n *= shape[i];
    return n;
  }
  int64_t bytes_per_value() const {
    switch (dtype) {
      case XLA_FFI_DataType_PRED:
      case XLA_FFI_DataType_U8:
        return 1;
      case XLA_FFI_DataType_U16:
      case XLA_FFI_DataType_BF16:
        return 2;
      default:
        return 4;
    }
  }
  // Whether a value is a bfloat16, of the computation or of a table that stores its bits as uint16.
  bool is_bfloat16() const { return dtype == XLA_FFI_DataType_BF16 || dtype == XLA_FFI_DataType_U16; }
};

class Call {
 public:
  explicit Call(XLA_FFI_CallFrame* frame) : frame_(frame) {}

  Array argument(int i) const { return array(frame_->args.args[i]); }
  Array result(int i) const { return array(frame_->rets.rets[i]); }
  int num_arguments() const { return static_cast<int>(frame_->args.size); }
  int num_results() const { return static_cast<int>(frame_->rets.size); }

  // Attributes of the call, by name; 0 for one that was not given.
  int64_t integer(const char* name) const { return attribute<int64_t>(name); }
  float number(const char* name) const { return attribute<float>(name); }

  // Runs task(0) ... task(count - 1), each once, on XLA's threads and on this one. A result must not depend on
  // which thread runs a task, nor on their order.
  //
  // This thread works too, and then waits only for tasks that another thread has begun. So a pool without a free
  // thread delays nothing, and a kernel within another one's task cannot deadlock.
  template <class Task>
  void parallel(int64_t count, const Task& task) const {
    run(count, [](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); }, &task);
  }

 private:
  using Run = void (*)(const void* task, int64_t number);

  static Array array(void* buffer) {
    auto* b = static_cast<XLA_FFI_Buffer*>(buffer);
    return {b->data, b->dims, static_cast<int>(b->rank), b->dtype};
  }
  template <class T>
  T attribute(const char* name) const {
    const XLA_FFI_Attrs& attrs = frame_->attrs;
    for (int64_t i = 0; i < attrs.size; i++) {
      const XLA_FFI_ByteSpan* n = attrs.names[i];
      if (n->len == strlen(name) && !memcmp(n->ptr, name, n->len))
        return *static_cast<T*>(static_cast<XLA_FFI_Scalar*>(attrs.attrs[i])->value);
    }
    return T{};
  }
  void run(int64_t count, Run run, const void* task) const;

  XLA_FFI_CallFrame* frame_;
};

// A kernel does its work and returns null, or says in a line why it cannot.
using Kernel = const char* (*)(const Call&);

// Answers a call from XLA: it asks for the version of the interface first, and then runs the kernel.
XLA_FFI_Error* answer(XLA_FFI_CallFrame* frame, Kernel kernel);

// Returns memory of at least `bytes`, on a boundary of 64. Each thread has its own, which the next call on the same
// thread overwrites, and which is kept: memory that is returned to the system would be paged in again.
char* scratch(int64_t bytes);

// Hands out parts of a scratch, each on a boundary of 64 bytes.
class Parts {
 public:
  explicit Parts(char* memory) : next_(memory) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return part;
  }
  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* next_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Adds up sums that tasks have made, `count` each, in the order of the tasks: it does not depend on threads.
template <class T>
void add_up(const T* of_tasks, int64_t tasks, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) {
    double total = 0;
    for (int64_t task = 0; task < tasks; task++) total += of_tasks[task * count + i];
    to[i] = static_cast<float>(total);
  }
}

}  // namespace ultramem

// Defines the function that XLA calls by this name.
#define ULTRAMEM_KERNEL(name, kernel) \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* ultramem_##name(XLA_FFI_CallFrame* frame) { \
    return ultramem::answer(frame, kernel); \
  }
