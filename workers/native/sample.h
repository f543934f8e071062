// Tokens drawn from rows of logits: filters as thresholds and Gumbel noise, as workers/filters.py and workers/noise.py define them.
//
// A row is gone through a few times, each time in pieces of GROUP scores whose largest is kept: most pieces hold nothing that could
// be among the k largest, or that noise could lift above the rest, and are passed over from then on.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "threads.h"

// How one row is to be drawn from.
struct Drawing {
    int64_t row;        // of the logits
    double top_p;       // 1: all
    float temperature;  // above 0
    float lowest;       // scores (logits over temperature, the largest 0) below it are dropped: log(min_p)
    int64_t top_k;      // 0: all
    uint32_t keys[2];   // of the noise
};

constexpr int64_t GROUP = 64;
static_assert(GROUP % LANES == 0);

struct DrawScratch {
    std::vector<float> scores, bounds, peaks, some;
    std::vector<uint16_t> buckets;
    std::vector<double> mass;
};

// The noise: 32-bit integers, modulo 2**32.
template <class T>  // uint32_t or Words
inline T hash_finished(T x) {
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

template <class T>
inline T hash_mixed(T x, uint32_t key) {
    return hash_finished((x ^ (x >> 16)) * 0x7feb352du + key);
}

inline uint32_t token_hash(uint32_t id) {
    const uint32_t x = id * 0x7feb352du + 0x846ca68bu;
    return hash_finished((x ^ (x >> 16)) * 0x7feb352du);
}

inline float gumbel(uint32_t hash) {
    const float u = std::min(((float)(hash & 0x7fffffff) + 0.5f) * 0x1p-31f, 1.0f - 0x1p-24f);
    return -std::log(-std::log1p(-u));
}

// At least the noise of these hashes: see _bound in workers/noise.py.
inline Floats gumbel_bound(Words hashes) {
    const Floats u = (__builtin_convertvector((Ints)(hashes & 0x7fffffff), Floats) + 0.5f) * 0x1p-31f;
    return __builtin_convertvector((Ints)u, Floats) * (float)(-0.6931471805599453 / (1 << 23)) + (float)(127 * 0.6931471805599453 + 1e-3);
}

class Draws {  // over one vocabulary, by one caller at a time
  public:
    Draws(int64_t vocab, int threads) : vocab_(vocab), padded_(round_up(vocab, GROUP)), hashes_(padded_), scratch_(threads) {
        for (int64_t i = 0; i < vocab; i++) hashes_[i] = token_hash(i);
    }

    // One token for each drawing, from logits [rows, vocab].
    void draw(const float* logits, const Drawing* drawings, int64_t count, int64_t* tokens, Threads& threads) {
        threads.run(count, [&](int64_t i, int thread) {
            tokens[i] = draw(logits + drawings[i].row * vocab_, drawings[i], scratch_[thread]);
        });
    }

  private:
    int64_t draw(const float* logits, const Drawing& d, DrawScratch& s) const {
        s.scores.resize(padded_), s.bounds.resize(padded_), s.peaks.resize(padded_ / GROUP);
        if (!score(logits, d.temperature, s)) return vocab_ - 1;  // no number to go by
        float lowest = std::min(d.lowest, 0.0f);
        if (d.top_k > 0 && d.top_k < vocab_) {
            lowest = std::max(lowest, top_k_edge(d.top_k, d.top_p, s));
        } else if (d.top_p < 1.0) {
            lowest = std::max(lowest, nucleus_edge(d.top_p, s));
        }
        return winner(d.keys, lowest, s);
    }

    // Scores, -inf behind the last one, and the largest of each group. False where some logit, or the largest, is no number.
    bool score(const float* logits, float temperature, DrawScratch& s) const {
        Floats most = all(-INFINITY);
        Ints bad = {};
        int64_t i = 0;
        for (; i + LANES <= vocab_; i += LANES) {
            const Floats x = load(logits + i);
            bad |= x != x;
            most = max(most, x);
        }
        float largest_one = largest(most);
        for (int j = 0; j < LANES; j++)
            if (bad[j]) return false;
        for (; i < vocab_; i++) {
            if (logits[i] != logits[i]) return false;
            largest_one = std::max(largest_one, logits[i]);
        }
        if (!std::isfinite(largest_one)) return false;
        const Floats above = all(largest_one), divisor = all(temperature);
        for (i = 0; i + LANES <= vocab_; i += LANES) store(&s.scores[i], (load(logits + i) - above) / divisor);
        for (; i < vocab_; i++) s.scores[i] = (logits[i] - largest_one) / temperature;
        for (; i < padded_; i++) s.scores[i] = -INFINITY;
        for (int64_t group = 0; group < padded_ / GROUP; group++) s.peaks[group] = peak(&s.scores[group * GROUP]);
        return true;
    }

    static float peak(const float* of) {
        Floats most = load(of);
        for (int j = LANES; j < GROUP; j += LANES) most = max(most, load(of + j));
        return largest(most);
    }

    // f(place) for each of `values` that is at least `least`, by their groups' peaks.
    template <class F>
    static void each_above(const std::vector<float>& values, const std::vector<float>& peaks, float least, const F& f) {
        for (size_t group = 0; group < peaks.size(); group++) {
            if (!(peaks[group] >= least)) continue;
            for (int64_t i = group * GROUP; i < (int64_t)(group + 1) * GROUP; i++)
                if (values[i] >= least) f(i);
        }
    }

    // The smallest score that top_k, and top_p over what that leaves, let stay. Two stages: the k-th largest of the groups' peaks is
    // no more than the k-th largest score, and few scores reach it.
    float top_k_edge(int64_t k, double top_p, DrawScratch& s) const {
        float least = -INFINITY;
        if (k <= (int64_t)s.peaks.size()) {
            s.some = s.peaks;
            std::nth_element(s.some.begin(), s.some.begin() + (k - 1), s.some.end(), std::greater<float>());
            least = s.some[k - 1];
        }
        s.some.clear();
        each_above(s.scores, s.peaks, least, [&](int64_t i) { s.some.push_back(s.scores[i]); });
        std::nth_element(s.some.begin(), s.some.begin() + (k - 1), s.some.end(), std::greater<float>());
        const float last = s.some[k - 1];
        if (top_p >= 1.0) return last;
        s.some.erase(std::remove_if(s.some.begin(), s.some.end(), [=](float x) { return x < last; }), s.some.end());
        std::sort(s.some.begin(), s.some.end(), std::greater<float>());
        double total = 0.0;
        for (float x : s.some) total += std::exp(x);
        return edge(s.some, 0.0, top_p * total);
    }

    // Of scores in descending order, the last before which, with what is above them all, less than `wanted` has summed up.
    static float edge(const std::vector<float>& sorted, double above, double wanted) {
        size_t i = 0;
        for (; i + 1 < sorted.size(); i++) {
            above += std::exp(sorted[i]);
            if (!(above < wanted)) break;
        }
        return sorted[i];
    }

    // The smallest score inside the nucleus: scores are put in buckets by size, and the bucket of the edge alone is sorted.
    float nucleus_edge(double top_p, DrawScratch& s) const {
        s.buckets.resize(padded_);
        s.mass.assign(BUCKETS, 0.0);
        for (int64_t i = 0; i < padded_; i += LANES) {
            const Floats x = load(&s.scores[i]), weights = exp(x), place = x * -(float)BUCKETS_PER_UNIT, end = all(BUCKETS - 1);
            const Ints bucket = __builtin_convertvector(place < end ? place : end, Ints);
            for (int j = 0; j < LANES; j++) {
                s.buckets[i + j] = bucket[j];
                s.mass[bucket[j]] += weights[j];
            }
        }
        double total = 0.0;
        for (double one : s.mass) total += one;
        double above = 0.0;
        int at = 0;
        for (; at + 1 < BUCKETS && above + s.mass[at] < top_p * total; at++) above += s.mass[at];
        s.some.clear();
        for (int64_t i = 0; i < vocab_; i++)
            if (s.buckets[i] == at) s.some.push_back(s.scores[i]);
        std::sort(s.some.begin(), s.some.end(), std::greater<float>());
        return s.some.empty() ? -INFINITY : edge(s.some, above, top_p * total);
    }

    // The token of the largest sum of score and noise among scores that are at least `lowest`; of equal ones the first. The noise has
    // a bound that takes no logarithm: who can't come above some other's sum by it is passed over.
    int64_t winner(const uint32_t* keys, float lowest, DrawScratch& s) const {
        float most = -INFINITY;
        int64_t rival = vocab_ - 1;
        for (size_t group = 0; group < s.peaks.size(); group++) {
            if (!(s.peaks[group] >= lowest)) {
                s.peaks[group] = -INFINITY;
                continue;
            }
            Floats highest = all(-INFINITY);
            for (int64_t i = group * GROUP; i < (int64_t)(group + 1) * GROUP; i += LANES) {
                const Floats x = load(&s.scores[i]);
                Words own;
                memcpy(&own, &hashes_[i], sizeof own);
                const Floats bound = x >= all(lowest) ? x + gumbel_bound(hash_mixed(own ^ keys[0], keys[1])) : all(-INFINITY);
                store(&s.bounds[i], bound);
                highest = max(highest, bound);
            }
            s.peaks[group] = largest(highest);
            if (s.peaks[group] > most) {
                most = s.peaks[group];
                rival = group;
            }
        }
        if (most == -INFINITY) return vocab_ - 1;
        rival = std::find(s.bounds.begin() + rival * GROUP, s.bounds.begin() + (rival + 1) * GROUP, most) - s.bounds.begin();
        const auto noisy = [&](int64_t i) { return s.scores[i] + gumbel(hash_mixed(hashes_[i] ^ keys[0], keys[1])); };
        float best = -INFINITY;
        int64_t token = vocab_ - 1;
        each_above(s.bounds, s.peaks, noisy(rival), [&](int64_t i) {
            const float sum = noisy(i);
            if (sum > best) best = sum, token = i;
        });
        return token;
    }

    static constexpr int BUCKETS = 1024, BUCKETS_PER_UNIT = 64;
    const int64_t vocab_, padded_;
    std::vector<uint32_t> hashes_;
    std::vector<DrawScratch> scratch_;
};
