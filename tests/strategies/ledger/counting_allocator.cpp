// The allocator of all of torch's CPU tensors, with a counter: whoever allocates, Python, autograd, an operator's inner
// workings or a thread of gloo's, is counted. Built and loaded by tests/strategies/ledger/allocator.py.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <mutex>
#include <unordered_map>

namespace {

std::mutex mutex;
std::unordered_map<void*, long long> blocks;
long long live = 0;
long long peak = 0;
c10::Allocator* torchs = nullptr;

void release(void* data) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    live -= blocks.at(data);
    blocks.erase(data);
  }
  torchs->raw_deallocate(data);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = torchs->raw_allocate(bytes);
    if (data) {
      const std::lock_guard<std::mutex> lock(mutex);
      blocks[data] = static_cast<long long>(bytes);
      live += static_cast<long long>(bytes);
      peak = live > peak ? live : peak;
    }
    return {data, data, data ? &release : nullptr, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

extern "C" {

void install() {
  static CountingAllocator counting;
  torchs = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&counting, 100);
}

long long live_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  return live;
}

long long peak_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  return peak;
}

void reset_peak() {
  const std::lock_guard<std::mutex> lock(mutex);
  peak = live;
}
}
