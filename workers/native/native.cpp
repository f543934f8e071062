// A rank's layers on a CPU: an iteration's flat batch from one collective to the next without leaving C++.
//
// Hidden states are fp32 [num_tokens, hidden]. Between them, per layer (see workers/decoder.py for the formulas):
//
//     norm -> qkv -> norms of heads, rotary embedding, store to the pool -> attention -> output (+ hidden)
//     norm -> gate and up, silu, product -> down (+ hidden)
//
// Structs and functions at the end are called through ctypes (workers/native/library.py) and must agree with what stands there.
#include <chrono>
#include <memory>

#include "attention.h"
#include "linear.h"
#include "rows.h"
#include "sample.h"

namespace {

struct Layer {
    const float *input_norm, *mlp_norm;  // [hidden]
    const float *query_norm, *key_norm;  // [head_dim] or none
    const Packed *qkv, *output, *gate_up, *down;
    void *keys, *values;  // this layer's pool
    int64_t form;         // what it keeps them in
    int64_t window;       // 0: none
};

struct Dimensions {
    int64_t hidden, num_heads, num_kv_heads, head_dim, inner;
    float eps;
};

struct Batch {
    int64_t num_tokens;
    float* hidden;            // [num_tokens, hidden]
    const int64_t* positions; // [num_tokens]
    const int64_t* slots;     // [num_tokens]
    const float *cos, *sin;   // [positions there are, head_dim / 2]
    Paged paged;
};

// Seconds that the calling thread has spent in each kind of work, waiting for the others included.
struct Spent {
    double linears, attention, rows;
};

// Adds the time of its own life.
class Clock {
  public:
    explicit Clock(double& to) : to_(to) {}
    ~Clock() { to_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count(); }

  private:
    double& to_;
    const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
};

void attend_task(const Paged& paged, const Tasks& tasks, const Task& task, const float* queries, int64_t padded, const void* keys,
                 const void* values, int64_t form, int64_t window, AttentionScratch& scratch) {
    with_form(form, [&](auto kept) {
        typedef decltype(kept) KV;
        Attending<KV>(paged, tasks, task, queries, padded, static_cast<const KV*>(keys), static_cast<const KV*>(values), window, scratch);
    });
}

class Model {
  public:
    virtual ~Model() = default;
    Spent spent{};
    // Layers [first, end), added to batch.hidden.
    virtual void layers(const Batch& batch, const Layer* all, int64_t first, int64_t end) = 0;
    // Half a layer, not added: this rank's part of a sum, into `to` [num_tokens, hidden].
    virtual void attention_part(const Batch& batch, const Layer& layer, float* to) = 0;
    virtual void mlp_part(const Batch& batch, const Layer& layer, float* to) = 0;
};

template <class W>  // of weights
class Decoder final : public Model {
    using X = typename Activation<W>::type;

  public:
    Decoder(const Dimensions& dimensions, Threads& threads)
        : d_(dimensions), threads_(threads), scratch_(threads.count()), padded_(round_up(d_.head_dim, LANES)) {}

    void layers(const Batch& batch, const Layer* all, int64_t first, int64_t end) override {
        Threads::Step step(threads_);
        const Tasks tasks(batch.paged, threads_.count());
        for (int64_t i = first; i < end; i++) {
            const X* attended = attention(batch, all[i], tasks);
            add(*all[i].output, attended, attended_stride(), batch);
            const X* inner = mlp(batch, all[i]);
            add(*all[i].down, inner, inner_stride(), batch);
        }
    }

    void attention_part(const Batch& batch, const Layer& layer, float* to) override {
        Threads::Step step(threads_);
        const X* attended = attention(batch, layer, Tasks(batch.paged, threads_.count()));
        put(*layer.output, attended, attended_stride(), batch.num_tokens, to);
    }

    void mlp_part(const Batch& batch, const Layer& layer, float* to) override {
        Threads::Step step(threads_);
        const X* inner = mlp(batch, layer);
        put(*layer.down, inner, inner_stride(), batch.num_tokens, to);
    }

  private:
    int64_t hidden_stride() const { return round_up(d_.hidden, LANES); }
    int64_t attended_stride() const { return round_up(d_.num_heads * d_.head_dim, LANES); }
    int64_t inner_stride() const { return round_up(round_up(d_.inner, WIDTH / 2), LANES); }

    // f(row) for each row; a few rows are not worth sharing.
    template <class F>
    void each_row(int64_t rows, const F& f) {
        const int64_t share = 4;
        threads_.run((rows + share - 1) / share, [&](int64_t task, int) {
            for (int64_t row = task * share; row < std::min(rows, (task + 1) * share); row++) f(row);
        });
    }

    const X* normed(const Batch& batch, const float* weight) {
        X* to = normed_.fit(batch.num_tokens * hidden_stride());
        Clock clock(spent.rows);
        each_row(batch.num_tokens, [&](int64_t row) {
            norm_row<W>(to + row * hidden_stride(), batch.hidden + row * d_.hidden, weight, d_.hidden, d_.eps);
        });
        return to;
    }

    const X* attention(const Batch& batch, const Layer& layer, const Tasks& tasks) {
        const int64_t n = batch.num_tokens, width = (d_.num_heads + 2 * d_.num_kv_heads) * d_.head_dim;
        const X* x = normed(batch, layer.input_norm);
        float* qkv = qkv_.fit(n * width);
        put(*layer.qkv, x, hidden_stride(), n, qkv);

        float* queries = queries_.fit(n * d_.num_heads * padded_);
        turn(batch, layer, qkv, width, queries);
        X* attended = attended_.fit(n * attended_stride());
        attend_all(batch, layer, tasks, queries, attended);
        return attended;
    }

    void turn(const Batch& batch, const Layer& layer, float* qkv, int64_t width, float* queries) {
        with_form(layer.form, [&](auto kept) { turn_into<decltype(kept)>(batch, layer, qkv, width, queries); });
    }

    // Norms of heads and rotary embedding; keys and values go to the pool.
    template <class KV>
    void turn_into(const Batch& batch, const Layer& layer, float* qkv, int64_t width, float* queries) {
        Clock clock(spent.rows);
        each_row(batch.num_tokens, [&](int64_t row) {
            const int64_t size = d_.head_dim, kv = d_.num_kv_heads, place = batch.slots[row] * row_size<KV>(kv, size);
            KV *keys = static_cast<KV*>(layer.keys) + place, *values = static_cast<KV*>(layer.values) + place;
            const float *cos = batch.cos + batch.positions[row] * (size / 2), *sin = batch.sin + batch.positions[row] * (size / 2);
            float* head = qkv + row * width;
            for (int64_t i = 0; i < d_.num_heads; i++, head += size) {
                turn_head(head, size, layer.query_norm, d_.eps, cos, sin);
                float* to = queries + (row * d_.num_heads + i) * padded_;
                memcpy(to, head, size * sizeof(float));
                for (int64_t j = size; j < padded_; j++) to[j] = 0.0f;
            }
            for (int64_t i = 0; i < kv; i++, head += size) {
                turn_head(head, size, layer.key_norm, d_.eps, cos, sin);
                put_vector(keys, kv, size, i, head);
            }
            for (int64_t i = 0; i < kv; i++, head += size) put_vector(values, kv, size, i, head);
        });
    }

    void attend_all(const Batch& batch, const Layer& layer, const Tasks& tasks, const float* queries, X* attended) {
        Clock clock(spent.attention);
        threads_.run(tasks.tasks.size(), [&](int64_t i, int thread) {
            const Task& task = tasks.tasks[i];
            attend_task(batch.paged, tasks, task, queries, padded_, layer.keys, layer.values, layer.form, layer.window, scratch_[thread]);
            put_attended(batch.paged, tasks, task, padded_, scratch_[thread], [&](int64_t row, int64_t head, int64_t d, Floats v) {
                X* to = attended + row * attended_stride() + head * d_.head_dim + d;
                if (d + LANES <= d_.head_dim) {
                    Activation<W>::put(to, v);
                } else {
                    X some[LANES];
                    Activation<W>::put(some, v);
                    memcpy(to, some, (d_.head_dim - d) * sizeof(X));
                }
            });
        });
        clear_behind(attended, batch.num_tokens, d_.num_heads * d_.head_dim, attended_stride());
    }

    const X* mlp(const Batch& batch, const Layer& layer) {
        const X* x = normed(batch, layer.mlp_norm);
        X* inner = inner_.fit(batch.num_tokens * inner_stride());
        const int64_t stride = inner_stride();
        Clock clock(spent.linears);
        linear(*layer.gate_up, x, hidden_stride(), batch.num_tokens, threads_, [=](int64_t row, int64_t panel, const Floats* y) {
            X* to = inner + row * stride + panel * (WIDTH / 2);
            for (int v = 0; v < VECTORS / 2; v++) Activation<W>::put(to + v * LANES, silu(y[v]) * y[VECTORS / 2 + v]);
        });
        clear_behind(inner, batch.num_tokens, layer.gate_up->panels * (WIDTH / 2), stride);
        return inner;
    }

    // What a linear reads behind a row's end is multiplied by zeros, and must be a number.
    static void clear_behind(X* rows, int64_t count, int64_t used, int64_t stride) {
        if (used == stride) return;
        for (int64_t row = 0; row < count; row++) memset(rows + row * stride + used, 0, (stride - used) * sizeof(X));
    }

    void add(const Packed& packed, const X* x, int64_t stride, const Batch& batch) {
        Clock clock(spent.linears);
        linear_to(packed, x, stride, batch.num_tokens, threads_, batch.hidden, [](float* to, Floats y) { store(to, load(to) + y); });
    }

    void put(const Packed& packed, const X* x, int64_t stride, int64_t rows, float* to) {
        Clock clock(spent.linears);
        linear_to(packed, x, stride, rows, threads_, to, [](float* to, Floats y) { store(to, y); });
    }

    const Dimensions d_;
    Threads& threads_;
    std::vector<AttentionScratch> scratch_;
    const int64_t padded_;
    Buffer<X> normed_, attended_, inner_;
    Buffer<float> qkv_, queries_;
};

template <class W>
void multiply_alone(const Packed& packed, const float* x, int64_t rows, float* y, Threads& threads) {
    using X = typename Activation<W>::type;
    const int64_t stride = round_up(packed.inputs, LANES), outputs = packed.outputs;
    Buffer<X> buffer;
    X* taken = buffer.fit(rows * stride);
    Threads::Step step(threads);
    threads.run(rows, [&](int64_t row, int) { put_row<W>(taken + row * stride, x + row * packed.inputs, packed.inputs); });
    if (packed.paired) {
        linear(packed, taken, stride, rows, threads, [&](int64_t row, int64_t panel, const Floats* v) {
            for (int i = 0; i < WIDTH; i++) {
                const int64_t output = packed.output(panel, i);
                if (output < outputs) y[row * outputs + output] = v[i / LANES][i % LANES];
            }
        });
    } else {
        linear_to(packed, taken, stride, rows, threads, y, [](float* to, Floats v) { store(to, v); });
    }
}

void attend_alone(const Paged& paged, const float* queries, int64_t num_tokens, const void* keys, const void* values, int64_t form,
                  int64_t window, float* to, Threads& threads) {
    const int64_t size = paged.head_dim, padded = round_up(size, LANES);
    std::vector<float> wide(num_tokens * paged.num_heads * padded);
    for (int64_t i = 0; i < num_tokens * paged.num_heads; i++) memcpy(wide.data() + i * padded, queries + i * size, size * sizeof(float));
    std::vector<AttentionScratch> scratch(threads.count());
    const Tasks tasks(paged, threads.count());
    Threads::Step step(threads);
    threads.run(tasks.tasks.size(), [&](int64_t i, int thread) {
        attend_task(paged, tasks, tasks.tasks[i], wide.data(), padded, keys, values, form, window, scratch[thread]);
        put_attended(paged, tasks, tasks.tasks[i], padded, scratch[thread], [&](int64_t row, int64_t head, int64_t d, Floats v) {
            float* at = to + (row * paged.num_heads + head) * size + d;
            for (int j = 0; j < LANES && d + j < size; j++) at[j] = v[j];
        });
    });
}

}  // namespace

// Memory is all that can fail below; a function then returns what its caller takes for that.
extern "C" {

const char* rayline_instructions() { return INSTRUCTIONS; }

void* rayline_threads(int count) {
    try {
        return new Threads(count);
    } catch (...) {
        return nullptr;
    }
}

void rayline_begin(void* threads) { static_cast<Threads*>(threads)->begin(); }

void rayline_end(void* threads) { static_cast<Threads*>(threads)->end(); }

void rayline_threads_free(void* threads) { delete static_cast<Threads*>(threads); }

// weights [outputs, inputs] of a kind, bias [outputs] fp32 or none -> a Packed. paired: gate over up. Of quantized weights: scale
// [outputs, groups] fp32, zero [outputs, groups] int8 or none; dynamic: activations are quantized too.
void* rayline_pack(const void* weights, int kind, const float* scale, const int8_t* zero, int64_t groups, int dynamic, const float* bias,
                   int64_t outputs, int64_t inputs, int paired, void* threads) {
    try {
        Threads& some = *static_cast<Threads*>(threads);
        if (kind == (int)Kind::bf16) return pack(static_cast<const bf16*>(weights), bias, outputs, inputs, paired, some);
        if (kind == (int)Kind::fp32) return pack(static_cast<const float*>(weights), bias, outputs, inputs, paired, some);
        return pack(Kind(kind), Quantized{static_cast<const uint8_t*>(weights), scale, zero, groups}, dynamic, bias, outputs, inputs, paired, some);
    } catch (...) {
        return nullptr;
    }
}

// Of a packed of dynamic activations: what its rank has is part of the inputs (see Packed).
void rayline_pack_exchange(void* packed, Exchange exchange) { static_cast<Packed*>(packed)->exchange = exchange; }

void rayline_pack_free(void* packed) { delete static_cast<Packed*>(packed); }

// x [rows, inputs] -> y [rows, outputs], fp32 both; with bf16 weights x is rounded, with quantized ones it is not, but where activations are quantized.
int rayline_linear(const void* packed, const float* x, int64_t rows, float* y, void* threads) {
    try {
        const Packed& weights = *static_cast<const Packed*>(packed);
        Threads& some = *static_cast<Threads*>(threads);
        weights.kind == Kind::bf16 ? multiply_alone<bf16>(weights, x, rows, y, some) : multiply_alone<float>(weights, x, rows, y, some);
        return 0;
    } catch (...) {
        return 1;
    }
}

// RMSNorm of x [rows, n] fp32 with weight [n] -> y, alike.
void rayline_norm(const float* x, int64_t rows, int64_t n, const float* weight, float eps, float* y) {
    for (int64_t row = 0; row < rows; row++, x += n, y += n) {
        const float scale = inverse_rms(x, n, eps);
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
    }
}

void* rayline_draws(int64_t vocab, void* threads) {
    try {
        return new Draws(vocab, static_cast<Threads*>(threads)->count());
    } catch (...) {
        return nullptr;
    }
}

void rayline_draws_free(void* draws) { delete static_cast<Draws*>(draws); }

// logits [rows, vocab] fp32, drawings [count] -> tokens [count].
int rayline_draw(void* draws, const float* logits, const Drawing* drawings, int64_t count, int64_t* tokens, void* threads) {
    try {
        Threads& some = *static_cast<Threads*>(threads);
        Threads::Step step(some);
        static_cast<Draws*>(draws)->draw(logits, drawings, count, tokens, some);
        return 0;
    } catch (...) {
        return 1;
    }
}

// queries [num_tokens, heads, head_dim] -> to, alike.
int rayline_attend(const Paged* paged, const float* queries, int64_t num_tokens, const void* keys, const void* values, int form, int64_t window,
                   float* to, void* threads) {
    try {
        attend_alone(*paged, queries, num_tokens, keys, values, form, window, to, *static_cast<Threads*>(threads));
        return 0;
    } catch (...) {
        return 1;
    }
}

void* rayline_model(const Dimensions* dimensions, int half, void* threads) {
    try {
        Threads& some = *static_cast<Threads*>(threads);
        return half ? static_cast<Model*>(new Decoder<bf16>(*dimensions, some)) : new Decoder<float>(*dimensions, some);
    } catch (...) {
        return nullptr;
    }
}

void rayline_model_spent(const void* model, double* to) { memcpy(to, &static_cast<const Model*>(model)->spent, sizeof(Spent)); }

void rayline_model_free(void* model) { delete static_cast<Model*>(model); }

int rayline_layers(void* model, const Batch* batch, const Layer* layers, int64_t first, int64_t end) {
    try {
        static_cast<Model*>(model)->layers(*batch, layers, first, end);
        return 0;
    } catch (...) {
        return 1;
    }
}

int rayline_attention_part(void* model, const Batch* batch, const Layer* layer, float* to) {
    try {
        static_cast<Model*>(model)->attention_part(*batch, *layer, to);
        return 0;
    } catch (...) {
        return 1;
    }
}

int rayline_mlp_part(void* model, const Batch* batch, const Layer* layer, float* to) {
    try {
        static_cast<Model*>(model)->mlp_part(*batch, *layer, to);
        return 0;
    } catch (...) {
        return 1;
    }
}
}
