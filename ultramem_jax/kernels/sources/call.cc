#include "call.h"

#include <sched.h>
#include <stdlib.h>

#include "vectors.h"

#ifdef ULTRAMEM_OWN_THREADS
#include <thread>
#include <vector>
#endif

namespace ultramem {
namespace {

// Tasks that several threads share. It lives until the last thread has looked at it, which may be after the call.
struct Shared {
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<int64_t> holders;
  int64_t count;
  void (*run)(const void*, int64_t);
  const void* task;
};

void work(Shared* shared) {
  for (;;) {
    int64_t i = shared->next.fetch_add(1, std::memory_order_relaxed);
    if (i >= shared->count) return;
    shared->run(shared->task, i);
    shared->done.fetch_add(1, std::memory_order_release);
  }
}

void leave(Shared* shared) {
  if (shared->holders.fetch_sub(1, std::memory_order_acq_rel) == 1) delete shared;
}

void work_and_leave(void* shared) {
  work(static_cast<Shared*>(shared));
  leave(static_cast<Shared*>(shared));
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void discard(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&args);
}

constexpr int kSpins = 2000;  // some microseconds, about what it takes to wake a thread

}  // namespace

void Call::run(int64_t count, Run run, const void* task) const {
  int64_t threads = 1;
#ifdef ULTRAMEM_OWN_THREADS  // for a sanitizer, which sees no thread of XLA start
  threads = count < 4 ? count : 4;
#else
  XLA_FFI_ThreadPool_NumThreads_Args pool = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, frame_->ctx,
                                             &threads};
  if (count > 1)
    if (XLA_FFI_Error* error = frame_->api->XLA_FFI_ThreadPool_NumThreads(&pool)) {
      discard(frame_->api, error);
      threads = 1;
    }
#endif
  if (threads > count) threads = count;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) run(task, i);
    return;
  }
  auto* shared = new Shared;
  shared->holders = threads;
  shared->count = count;
  shared->run = run;
  shared->task = task;
#ifdef ULTRAMEM_OWN_THREADS
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; t++) others.emplace_back(work_and_leave, shared);
#else
  for (int64_t t = 1; t < threads; t++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, frame_->ctx,
                                             work_and_leave, shared};
    if (XLA_FFI_Error* error = frame_->api->XLA_FFI_ThreadPool_Schedule(&args)) {
      discard(frame_->api, error);
      leave(shared);
    }
  }
#endif
  work(shared);
  for (int spin = 0; shared->done.load(std::memory_order_acquire) < count; spin++) {
    if (spin < kSpins)
      pause();
    else
      sched_yield();  // the thread that has the last task may have lost its CPU core
  }
#ifdef ULTRAMEM_OWN_THREADS
  for (auto& other : others) other.join();
#endif
  leave(shared);
}

XLA_FFI_Error* answer(XLA_FFI_CallFrame* frame, Kernel kernel) {
  for (auto* e = frame->extension_start; e; e = e->next) {  // its type has another name since jaxlib 0.11
    if (e->type != XLA_FFI_Extension_Metadata) continue;
    auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(e)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
    return nullptr;
  }
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return nullptr;
  const char* message = kernel(Call(frame));
  if (!message) return nullptr;
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message,
                                    XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

char* scratch(int64_t bytes) {
  struct Memory {
    char* start = nullptr;
    int64_t size = 0;
    ~Memory() { free(start); }
  };
  static thread_local Memory memory;
  if (memory.size < bytes) {
    free(memory.start);
    memory.size = (bytes + (bytes >> 2) + 4095) / 4096 * 4096;
    memory.start = static_cast<char*>(aligned_alloc(64, memory.size));
    if (!memory.start) abort();
  }
  return memory.start;
}

}  // namespace ultramem

// Names the vector instructions that the library is compiled for.
extern "C" __attribute__((visibility("default"))) const char* ultramem_instruction_set() {
  return ultramem::kInstructions;
}
