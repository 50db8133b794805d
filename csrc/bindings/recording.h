// Calls of kernels, kept with their arguments and made again without Python.
#pragma once

#include <functional>
#include <vector>

namespace llmos {

class Recording {
 public:
  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  void replay() const {
    for (const auto& call : calls_) call();
  }
  size_t size() const { return calls_.size(); }

 private:
  std::vector<std::function<void()>> calls_;
};

// Where this thread's calls are recorded; null where they are not.
inline Recording*& current_recording() {
  static thread_local Recording* recording = nullptr;
  return recording;
}

// How every kernel is called from Python.
template <typename Call>
void run(void (*kernel)(const Call&), const Call& call) {
  kernel(call);
  if (Recording* recording = current_recording()) recording->add([kernel, call] { kernel(call); });
}

}  // namespace llmos
