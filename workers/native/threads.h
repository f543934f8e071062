// Threads that share the tasks of one step after the other, without the operating system in between.
//
// Between begin() and end() they wait actively: a layer has eight hand-overs, and waking a sleeping thread takes longer than some of
// them compute. Outside they sleep, so that the cores belong to others. A hand-over needs no thread to have arrived: whoever is
// there takes the tasks, so a thread that the machine has taken off its core costs no more than the task it was at.
#pragma once
#include <atomic>
#include <condition_variable>
#include <new>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

class Threads {
  public:
    // A step: begun and, however it ends, ended.
    class Step {
      public:
        explicit Step(Threads& threads) : threads_(threads) { threads_.begin(); }
        ~Step() { threads_.end(); }
        Step(const Step&) = delete;

      private:
        Threads& threads_;
    };

    // One caller at a time, always.
    explicit Threads(int count) : count_(count) {
        try {
            for (int i = 1; i < count; i++) workers_.emplace_back([this, i] { work(i); });
        } catch (...) {
            finish();
            throw;
        }
    }

    ~Threads() { finish(); }

    int count() const { return count_; }

    // Begins and ends nest.
    void begin() {
        if (begun_++ > 0 || workers_.empty()) return;
        {
            std::lock_guard<std::mutex> hold(mutex_);
            active_.store(true, std::memory_order_release);
        }
        wake_.notify_all();
    }

    void end() {
        if (--begun_ == 0) active_.store(false, std::memory_order_release);
    }

    // f(task, thread) for each task in [0, tasks), in any order; returns when all are done. Throws bad_alloc where one threw.
    template <class F>
    void run(int64_t tasks, const F& f) {
        if (tasks <= 0) return;
        if (tasks == 1 || workers_.empty()) {
            for (int64_t i = 0; i < tasks; i++) f(i, 0);
            return;
        }
        context_ = &f;
        call_ = [](const void* context, int64_t task, int thread) { (*static_cast<const F*>(context))(task, thread); };
        left_.store(tasks, std::memory_order_relaxed);
        ticket_.store((uint64_t)tasks << 32, std::memory_order_release);
        while (take(0)) {
        }
        for (int spins = 0; left_.load(std::memory_order_acquire) > 0;) pause(spins);
        if (failed_.exchange(false)) throw std::bad_alloc();
    }

  private:
    void finish() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            over_ = true;
            active_.store(false, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    // A ticket: the number of tasks, and how many of them are handed out. One that was drawn below the number belongs to the run that
    // goes on, since that can't end without its task.
    bool take(int thread) {
        uint64_t seen = ticket_.load(std::memory_order_acquire);
        if ((seen & MASK) >= seen >> 32) return false;
        uint64_t mine = ticket_.fetch_add(1, std::memory_order_acq_rel);
        uint64_t task = mine & MASK;
        if (task >= mine >> 32) return false;
        try {
            call_(context_, (int64_t)task, thread);
        } catch (...) {
            failed_.store(true);
        }
        left_.fetch_sub(1, std::memory_order_acq_rel);
        return true;
    }

    void work(int thread) {
        for (;;) {
            {
                std::unique_lock<std::mutex> hold(mutex_);
                wake_.wait(hold, [this] { return over_ || active_.load(std::memory_order_acquire); });
                if (over_) return;
            }
            for (int spins = 0; active_.load(std::memory_order_acquire);) {
                if (take(thread)) spins = 0;
                pause(spins);
            }
        }
    }

    static void pause(int& spins) {
        if (++spins > PATIENCE) {
            spins = PATIENCE - 64;
            std::this_thread::yield();  // others want the core, or this would not take so long
            return;
        }
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    static constexpr uint64_t MASK = 0xffffffff;
    static constexpr int PATIENCE = 4096;
    int count_, begun_ = 0;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool over_ = false;
    std::atomic<bool> active_{false}, failed_{false};
    const void* context_ = nullptr;
    void (*call_)(const void*, int64_t, int) = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> left_{0};
};
