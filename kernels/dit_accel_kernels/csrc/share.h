// Work shared by threads: pieces are handed out one by one, so that a slow thread holds nobody up.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace {

// work(worker, i) for i in [0, count), handed out one by one.
template <typename Work>
void share(int64_t threads, int64_t count, const Work& work) {
    std::atomic<int64_t> next{0};
    auto take = [&](int64_t worker) {
        int64_t i;
        while ((i = next++) < count) work(worker, i);
    };
    std::vector<std::thread> helpers;
    try {
        for (int64_t worker = 1; worker < (threads < count ? threads : count); ++worker) helpers.emplace_back(take, worker);
    } catch (const std::exception&) {
        // The system gives no more threads: go on with those that were started.
    }
    take(0);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace
