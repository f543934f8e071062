// The native kernels on buffers of just the size they may touch, for the sanitizers: a run over random small models and batches.
#include "native.cpp"

#include <cstdio>
#include <random>

static std::mt19937 draw(7);
static int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(draw); }
static float real() { return std::normal_distribution<float>()(draw); }

template <class T>
struct Exact {  // new[] of just so many elements: what lies around them is poisoned
    T* at;
    explicit Exact(int64_t n) : at(new T[n]) {}
    ~Exact() { delete[] at; }
    Exact(const Exact&) = delete;
};

template <class W>
static W weight(float x) {
    if constexpr (sizeof(W) == 2) return narrow(x);
    else return x;
}

template <class W>
static Packed* random_floats(const float* bias, int64_t outputs, int64_t inputs, bool paired, Threads& threads) {
    Exact<W> weights(outputs * inputs);
    for (int64_t i = 0; i < outputs * inputs; i++) weights.at[i] = weight<W>(real() * 0.2f);
    return pack(weights.at, bias, outputs, inputs, paired, threads);
}

// Weights of any kind: a model's linears may differ.
static Packed* random_linear(int64_t outputs, int64_t inputs, bool paired, Threads& threads) {
    Exact<float> some_bias(outputs);
    for (int64_t i = 0; i < outputs; i++) some_bias.at[i] = real();
    const float* bias = between(0, 1) ? some_bias.at : nullptr;
    const Kind kind = Kind(between(0, 4));
    if (kind == Kind::fp32) return random_floats<float>(bias, outputs, inputs, paired, threads);
    if (kind == Kind::bf16) return random_floats<bf16>(bias, outputs, inputs, paired, threads);
    const int64_t groups = inputs % 8 || between(0, 1) ? 1 : inputs / 8;
    Exact<uint8_t> values(outputs * inputs);
    Exact<float> scale(outputs * groups);
    Exact<int8_t> zero(outputs * groups);
    const int range = kind == Kind::int4 ? 8 : kind == Kind::int8 ? 128 : 0x7e;  // 0x7f of fp8 is no number
    for (int64_t i = 0; i < outputs * inputs; i++) values.at[i] = kind == Kind::fp8 ? between(0, range) | between(0, 1) << 7 : between(-range, range - 1);
    for (int64_t i = 0; i < outputs * groups; i++) {
        scale.at[i] = 0.3f / (kind == Kind::fp8 ? 448 : range);
        zero.at[i] = kind == Kind::fp8 ? 0 : between(-range, range - 1);
    }
    const int8_t* some_zero = kind != Kind::fp8 && between(0, 1) ? zero.at : nullptr;
    return pack(kind, Quantized{values.at, scale.at, some_zero, groups}, between(0, 1), bias, outputs, inputs, paired, threads);
}

// Each query and key/value head in one task, and neighbours together where they see a tile in the same blocks and all fit.
static void check_tasks(const Paged& paged, int threads) {
    const Tasks tasks(paged, threads);
    std::vector<int> times(paged.first_row[paged.num_spans] * paged.num_kv_heads);
    for (const Task& task : tasks.tasks) {
        if (task.end <= task.begin || task.end - task.begin > TOGETHER) abort();
        for (int64_t i = task.begin; i < task.end; i++) {
            const Piece& piece = tasks.pieces[i];
            if (i + 1 < task.end && tasks.shared[i] == 0) abort();
            for (int64_t q = 0; q < piece.count; q++)
                for (int64_t h = 0; h < task.heads; h++) times[(paged.first_row[piece.span] + piece.first + q) * paged.num_kv_heads + task.head + h]++;
        }
    }
    for (int count : times)
        if (count != 1) abort();
    for (size_t i = 0; i + 1 < tasks.pieces.size(); i++) {
        const Piece &one = tasks.pieces[i], &other = tasks.pieces[i + 1];
        int64_t both = std::min(paged.start[one.span] + one.first, paged.start[other.span] + other.first) + 1;
        for (int64_t p = 0; p < both; p++)
            if (paged.tables[paged.first_block[one.span] + p / paged.block_size] != paged.tables[paged.first_block[other.span] + p / paged.block_size]) both = p;
        const bool alike = (paged.end[one.span] - paged.start[one.span] == 1) == (paged.end[other.span] - paged.start[other.span] == 1);
        if (alike && tasks.shared[i] != both / TILE * TILE) abort();
    }
}

template <class W>
static void run(int threads_count) {
    Threads threads(threads_count);
    const int64_t kv_heads = between(1, 3), heads = kv_heads * between(1, 4), size = 2 * between(1, 20), inner = between(0, 1) ? between(1, 60) : 8 * between(1, 7);
    const int64_t hidden = between(0, 1) ? between(1, 70) : 8 * between(1, 8), block = between(1, 20), blocks = 60;
    const Dimensions dimensions{hidden, heads, kv_heads, size, inner, 1e-5f};
    std::unique_ptr<Packed> qkv(random_linear((heads + 2 * kv_heads) * size, hidden, false, threads));
    std::unique_ptr<Packed> output(random_linear(hidden, heads * size, false, threads));
    std::unique_ptr<Packed> gate_up(random_linear(2 * inner, hidden, true, threads));
    std::unique_ptr<Packed> down(random_linear(hidden, inner, false, threads));
    Exact<float> norm(hidden), head_norm(size);
    for (int64_t i = 0; i < hidden; i++) norm.at[i] = 1.0f;
    for (int64_t i = 0; i < size; i++) head_norm.at[i] = 1.0f;
    const int64_t slots = blocks * block;
    const int64_t form = between(FLOAT32, FP8);
    int64_t bytes = 0;
    with_form(form, [&](auto kept) { bytes = slots * row_size<decltype(kept)>(kv_heads, size) * sizeof kept; });
    Exact<char> keys(bytes), values(bytes);
    std::fill_n(keys.at, bytes, 0);
    std::fill_n(values.at, bytes, 0);
    const float* qk = between(0, 1) ? head_norm.at : nullptr;
    const Layer layer{norm.at, norm.at, qk, qk, qkv.get(), output.get(), gate_up.get(), down.get(), keys.at, values.at, form, between(0, 1) * between(1, 40)};

    std::vector<int64_t> start, end, first_row{0}, tables, first_block{0}, positions, where;
    for (int64_t left = between(1, 4), next = 1; left > 0 && next + 8 < blocks; left--) {
        const int64_t length = between(1, std::min<int64_t>(7 * block, 90)), begin = between(0, 2) ? length - 1 : between(0, length - 1);
        // Whole blocks before the first position that is written, which the span before does not write either.
        const int64_t possible = start.empty() || between(0, 1) ? 0 : std::min(begin, start.back()) / block;
        const int64_t parent = first_block.size() > 1 ? first_block[first_block.size() - 2] : 0;
        start.push_back(begin), end.push_back(length), first_row.push_back(first_row.back() + length - begin);
        for (int64_t i = 0; i < (length + block - 1) / block; i++) tables.push_back(i < possible ? tables[parent + i] : next++);
        for (int64_t p = begin; p < length; p++) positions.push_back(p), where.push_back(tables[first_block.back() + p / block] * block + p % block);
        first_block.push_back(tables.size());
    }
    const int64_t rows = first_row.back(), longest = *std::max_element(end.begin(), end.end());
    Exact<float> state(rows * hidden), part(rows * hidden), cos(longest * (size / 2)), sin(longest * (size / 2));
    for (int64_t i = 0; i < rows * hidden; i++) state.at[i] = real();
    for (int64_t i = 0; i < longest * (size / 2); i++) cos.at[i] = std::cos(i), sin.at[i] = std::sin(i);
    const Paged paged{(int64_t)start.size(), block, heads, kv_heads, size, start.data(), end.data(), first_row.data(), tables.data(), first_block.data()};
    check_tasks(paged, threads_count);
    const Batch batch{rows, state.at, positions.data(), where.data(), cos.at, sin.at, paged};
    std::unique_ptr<Model> model(new Decoder<W>(dimensions, threads));
    const Layer both[2] = {layer, layer};
    model->layers(batch, both, 0, 2);
    model->attention_part(batch, layer, part.at);
    model->mlp_part(batch, layer, part.at);
    Exact<float> x(rows * hidden), y(rows * gate_up->outputs);
    memcpy(x.at, state.at, rows * hidden * sizeof(float));
    if (rayline_linear(gate_up.get(), x.at, rows, y.at, &threads)) abort();
    for (int64_t i = 0; i < rows * gate_up->outputs; i++)
        if (!std::isfinite(y.at[i])) abort();
}

static void draw_tokens(int threads_count) {
    Threads threads(threads_count);
    const int64_t vocab = between(1, 400), rows = between(1, 5), count = between(1, 9);
    Exact<float> logits(rows * vocab);
    Exact<Drawing> drawings(count);
    Exact<int64_t> tokens(count);
    for (int64_t i = 0; i < rows * vocab; i++) logits.at[i] = between(0, 9) ? real() * 3.0f : (float)between(-2, 2);
    if (!between(0, 5)) logits.at[between(0, rows * vocab - 1)] = between(0, 1) ? NAN : -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        const double top_p = between(0, 1) ? 1.0 : between(0, 100) / 100.0;
        const float lowest = between(0, 1) ? -INFINITY : -0.1f * between(0, 30);
        const int64_t top_k = between(0, 1) ? 0 : between(1, 2 * vocab);
        drawings.at[i] = {between(0, rows - 1), top_p, 0.1f * between(1, 20), lowest, top_k, {(uint32_t)draw(), (uint32_t)draw()}};
    }
    Draws draws(vocab, threads_count);
    Threads::Step step(threads);
    draws.draw(logits.at, drawings.at, count, tokens.at, threads);
    for (int64_t i = 0; i < count; i++)
        if (tokens.at[i] < 0 || tokens.at[i] >= vocab) abort();
}

int main(int, char** arguments) {
    const int times = atoi(arguments[1]);
    for (int i = 0; i < times; i++) run<float>(1 + i % 3), run<bf16>(1 + i % 3), draw_tokens(1 + i % 3);
    puts(rayline_instructions());
}
