#pragma once

#include <cstdint>
#include <functional>

namespace tokencache::c_api {

// Calls f(begin, end) for parts of [0, count) that each are worth a thread. An item stands for as
// much work as copying so many bytes.
void parallel_for(int64_t count, int64_t bytes_per_item,
                  const std::function<void(int64_t begin, int64_t end)>& f);

}  // namespace tokencache::c_api
