// Runs methods of .pte files one after another and prints the memory of the process: see executorch_memory.py.
//
// executorch_memory cache|no-cache CHANNELS SIZE FILE:METHOD ...

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <vector>

using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::BackendOptions;

int main(int count, char** given) {
  BackendOptions<1> options;
  options.set_option("weight_cache_enabled", std::string(given[1]) == "cache");
  if (executorch::runtime::set_option("XnnpackBackend", options.view()) != executorch::runtime::Error::Ok) {
    std::cerr << "XNNPACK does not take the option\n";
    return 1;
  }
  const int channels = std::atoi(given[2]), size = std::atoi(given[3]);
  std::vector<float> image(channels * size * size, 1.0f);
  std::map<std::string, std::unique_ptr<Module>> files;
  for (int i = 4; i < count; ++i) {
    const std::string call = given[i];
    const auto colon = call.rfind(':');
    auto& file = files[call.substr(0, colon)];
    if (!file) {
      file = std::make_unique<Module>(call.substr(0, colon), Module::LoadMode::Mmap);
    }
    const auto outputs = file->execute(call.substr(colon + 1), from_blob(image.data(), {1, channels, size, size}));
    if (!outputs.ok()) {
      std::cerr << call << " failed\n";
      return 1;
    }
  }
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM", 0) == 0 || line.rfind("VmRSS", 0) == 0) {
      std::cout << line << "\n";
    }
  }
}
