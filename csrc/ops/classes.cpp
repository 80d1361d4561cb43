// For softmax over very many classes, on the CPU: the nearest rows of a matrix, and the choice of the rows that a step scores.
//
// merge_nearest reads a tile of products while it is in cache. A product that cannot reach the last place of its row's list
// costs one comparison in a vector; the few that can are scored again in fp64 and put into place. The choice of active rows
// counts keys instead of sorting rows: three passes over the rows, whatever their number is.
#include "common.h"

namespace opencoder {
namespace {

constexpr int64_t kNobody = std::numeric_limits<int64_t>::min();  // an empty place
constexpr int32_t kFar = std::numeric_limits<int32_t>::max();     // nobody's neighbour
constexpr int64_t kLast = std::numeric_limits<int32_t>::max();
constexpr int64_t kStrip = 256;  // products looked at together,
constexpr int64_t kPart = 32;    // and where one of them may count

// ---- nearest rows ----

// Keys fall with the score, then rise with the id: the greatest is the best.
INLINE int64_t key_of(float score, int64_t id) {
    const int32_t bits = std::bit_cast<int32_t>(score + 0.0f);  // −0 is 0
    const int32_t ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
    return static_cast<int64_t>(ordered) * (int64_t{1} << 32) + (kLast - id);
}
INLINE float score_of(int64_t key) {
    if (key == kNobody) return -std::numeric_limits<float>::infinity();
    const int32_t ordered = static_cast<int32_t>(key >> 32);
    return std::bit_cast<float>(ordered ^ ((ordered >> 31) & 0x7FFFFFFF));
}

template <typename T>
struct Merge {
    int64_t* best;
    const T* products;
    const float* queries;
    const float* rows;
    const int64_t* query_ids;
    int64_t places, columns, width, first_id;
    RealOf<T> slack;
};

INLINE float dot(const float* a, const float* b, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return static_cast<float>(sum);
}

template <typename Real>
INLINE Real greatest(const Real* values, int64_t n) {
    Real found = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : found)
    for (int64_t i = 0; i < n; ++i) found = found < values[i] ? values[i] : found;
    return found;
}

// Into a falling list, whose last key falls out.
INLINE void insert(int64_t* best, int64_t* last, int64_t key) {
    int64_t* place = last;
    for (; place > best && place[-1] < key; --place) *place = place[-1];
    *place = key;
}

template <typename T>
INLINE void merge_rows(const Merge<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    Real scratch[kStrip];
    for (int64_t q = begin; q < end; ++q) {
        int64_t* best = a.best + q * a.places;
        int64_t* last = best + a.places - 1;
        const float* query = a.queries + q * a.width;
        const int64_t self = a.query_ids[q] - a.first_id;
        Real least = static_cast<Real>(score_of(*last)) - a.slack;
        for (int64_t at = 0; at < a.columns; at += kStrip) {
            const int64_t n = std::min(kStrip, a.columns - at);
            const Real* products = load<Real>(a.products + q * a.columns + at, scratch, n);
            if (greatest(products, n) < least) continue;
            for (int64_t part = 0; part < n; part += kPart) {
                const int64_t end_of_part = std::min(part + kPart, n);
                if (greatest(products + part, end_of_part - part) < least) continue;
                for (int64_t i = part; i < end_of_part; ++i) {
                    const int64_t column = at + i;
                    if (products[i] < least || column == self) continue;
                    const int64_t key = key_of(dot(query, a.rows + column * a.width, a.width), a.first_id + column);
                    if (key <= *last) continue;
                    insert(best, last, key);
                    least = static_cast<Real>(score_of(*last)) - a.slack;
                }
            }
        }
    }
}
CLONED_RANGE(merge_rows, Merge)

void merge_nearest(Tensor best, const Tensor& products_in, const Tensor& queries_in, const Tensor& rows_in,
                   const Tensor& query_ids_in, int64_t first_id, double slack) {
    const Tensor products = torch::stable::contiguous(products_in), queries = torch::stable::contiguous(queries_in);
    const Tensor rows = torch::stable::contiguous(rows_in), query_ids = torch::stable::contiguous(query_ids_in);
    STD_TORCH_CHECK(best.is_contiguous() && best.scalar_type() == ScalarType::Long && best.dim() == 2 && best.size(1) > 0 &&
                        query_ids.scalar_type() == ScalarType::Long,
                    "merge_nearest: best must be contiguous int64 (Q, K), query_ids int64");
    STD_TORCH_CHECK(queries.scalar_type() == ScalarType::Float && rows.scalar_type() == ScalarType::Float,
                    "merge_nearest: queries and rows must be fp32");
    STD_TORCH_CHECK(queries.dim() == 2 && rows.dim() == 2 && products.dim() == 2 && rows.size(1) == queries.size(1) &&
                        products.size(0) == queries.size(0) && products.size(1) == rows.size(0) &&
                        best.size(0) == queries.size(0) && query_ids.numel() == queries.size(0),
                    "merge_nearest: queries (Q, D), rows (C, D), products (Q, C), best (Q, K), query_ids (Q,) do not fit");
    DISPATCH("merge_nearest", products, {
        const Merge<T> a{mutable_data<int64_t>(best), data<T>(products), data<float>(queries), data<float>(rows),
                         data<int64_t>(query_ids), best.size(1), rows.size(0), rows.size(1), first_id,
                         static_cast<RealOf<T>>(slack)};
        PARALLEL(merge_rows, a, queries.size(0), rows.size(0) * sizeof(T));
    })
}

// ---- which rows a step scores ----

template <typename Offset, typename Position>
void scatter(const Tensor& labels, const Tensor& offsets, const Tensor& ids, const Tensor& positions, Tensor& priority,
             Tensor& count) {
    const int64_t* label = data<int64_t>(labels);
    const Offset* offset = data<Offset>(offsets);
    const int32_t* id = data<int32_t>(ids);
    const Position* position = data<Position>(positions);
    int32_t* least = mutable_data<int32_t>(priority);
    int32_t* edges = mutable_data<int32_t>(count);
    const int64_t lists = offsets.numel() - 1, rows = priority.numel();
    for (int64_t u = 0; u < labels.numel(); ++u) {
        STD_TORCH_CHECK(label[u] >= 0 && label[u] < lists, "neighbour_priority: label ", label[u], " of ", lists, " lists");
        const int64_t begin = offset[label[u]], end = offset[label[u] + 1];
        STD_TORCH_CHECK(begin >= 0 && end <= ids.numel(), "neighbour_priority: list ", label[u], " lies in [", begin, ", ", end,
                        ") of ", ids.numel(), " ids");
        for (int64_t e = begin; e < end; ++e) {
            const int32_t row = id[e];
            STD_TORCH_CHECK(row >= 0 && row < rows, "neighbour_priority: id ", row, " of ", rows, " rows");
            least[row] = std::min(least[row], static_cast<int32_t>(position[e]));
            ++edges[row];
        }
    }
}

std::tuple<Tensor, Tensor> neighbour_priority(const Tensor& labels_in, const Tensor& offsets_in, const Tensor& ids_in,
                                              const Tensor& positions_in, int64_t rows) {
    const Tensor labels = torch::stable::contiguous(labels_in), offsets = torch::stable::contiguous(offsets_in);
    const Tensor ids = torch::stable::contiguous(ids_in), positions = torch::stable::contiguous(positions_in);
    STD_TORCH_CHECK(ids.numel() == positions.numel() && labels.scalar_type() == ScalarType::Long &&
                        ids.scalar_type() == ScalarType::Int && offsets.numel() > 0 && rows >= 0,
                    "neighbour_priority: labels must be int64, ids int32, positions of their length, offsets at least one");
    Tensor priority = torch::stable::new_empty(ids, {rows}), count = torch::stable::new_empty(ids, {rows});
    std::fill_n(mutable_data<int32_t>(priority), rows, kFar);
    std::fill_n(mutable_data<int32_t>(count), rows, 0);
    const bool wide = offsets.scalar_type() == ScalarType::Long, short_positions = positions.scalar_type() == ScalarType::Short;
    STD_TORCH_CHECK((wide || offsets.scalar_type() == ScalarType::Int) &&
                        (short_positions || positions.scalar_type() == ScalarType::Int),
                    "neighbour_priority: offsets must be int32 or int64, positions int16 or int32");
    const auto run = wide ? (short_positions ? scatter<int64_t, int16_t> : scatter<int64_t, int32_t>)
                          : (short_positions ? scatter<int32_t, int16_t> : scatter<int32_t, int32_t>);
    run(labels, offsets, ids, positions, priority, count);
    return {priority, count};
}

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of row + 1 steps after `seed`; the upper half.
INLINE uint32_t random_key(uint64_t seed, int64_t row) {
    uint64_t z = seed + (static_cast<uint64_t>(row) + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}

constexpr int32_t kLongest = 1 << 26;  // of a list of neighbours: its places are counted

// Rows of a priority below `cut` are taken, and the first `ties` of that priority.
struct Cut {
    int64_t cut, ties, taken;
};

// Where the `wanted` smallest priorities end. They are at most the longest list, so they can be counted.
Cut cut_of(const int32_t* priority, int64_t rows, int64_t wanted) {
    int32_t least = -1, longest = -1;
    for (int64_t i = 0; i < rows; ++i) {
        least = std::min(least, priority[i]);
        longest = std::max(longest, priority[i] == kFar ? -1 : priority[i]);
    }
    STD_TORCH_CHECK(least >= -1 && longest < kLongest, "smallest_keys: priorities lie in [", least, ", ", longest,
                    "]; allowed: from -1 to ", kLongest - 1, ", and ", kFar, " for nobody's neighbour");
    std::vector<int64_t> count(static_cast<size_t>(longest) + 2);
    for (int64_t i = 0; i < rows; ++i)
        if (priority[i] != kFar) ++count[static_cast<size_t>(priority[i] + 1)];
    int64_t taken = 0;
    for (int64_t p = -1; p <= longest; ++p) {
        const int64_t here = count[static_cast<size_t>(p + 1)];
        if (taken + here >= wanted) return {p, wanted - taken, wanted};
        taken += here;
    }
    return {int64_t{longest} + 1, 0, taken};
}

constexpr int kBucketBits = 16;

// The greatest (random key, row) that is among the `wanted` smallest of the rows with no mark.
std::pair<uint32_t, int64_t> last_random(const std::vector<uint8_t>& marked, uint64_t seed, int64_t wanted) {
    const int64_t rows = static_cast<int64_t>(marked.size());
    std::vector<int64_t> count(1 << kBucketBits);
    for (int64_t i = 0; i < rows; ++i) count[random_key(seed, i) >> (32 - kBucketBits)] += !marked[static_cast<size_t>(i)];
    uint32_t bucket = 0;
    for (; count[bucket] < wanted; ++bucket) wanted -= count[bucket];
    std::vector<std::pair<uint32_t, int64_t>> inside;
    for (int64_t i = 0; i < rows; ++i)
        if (const uint32_t key = random_key(seed, i); key >> (32 - kBucketBits) == bucket && !marked[static_cast<size_t>(i)])
            inside.emplace_back(key, i);
    std::nth_element(inside.begin(), inside.begin() + (wanted - 1), inside.end());
    return inside[static_cast<size_t>(wanted - 1)];
}

std::tuple<Tensor, Tensor> smallest_keys(const Tensor& priority_in, int64_t count, int64_t hard, int64_t seed) {
    const Tensor keys = torch::stable::contiguous(priority_in);
    const int64_t rows = keys.numel();
    STD_TORCH_CHECK(keys.scalar_type() == ScalarType::Int && 0 <= hard && hard <= count && count <= rows,
                    "smallest_keys: priority must be int32 and 0 ≤ hard ≤ count ≤ rows");
    const int32_t* priority = data<int32_t>(keys);
    const Cut cut = cut_of(priority, rows, hard);
    std::vector<uint8_t> marked(static_cast<size_t>(rows));
    for (int64_t i = 0, ties = cut.ties; i < rows; ++i)
        marked[static_cast<size_t>(i)] = priority[i] < cut.cut || (priority[i] == cut.cut && ties-- > 0);
    const int64_t fill = count - cut.taken;
    const auto last = fill ? last_random(marked, static_cast<uint64_t>(seed), fill) : std::pair<uint32_t, int64_t>{0, -1};
    Tensor chosen = torch::stable::new_empty(keys, {count}, ScalarType::Long);
    Tensor by_priority = torch::stable::new_empty(keys, {count}, ScalarType::Bool);
    int64_t* out = mutable_data<int64_t>(chosen);
    bool* flag = mutable_data<bool>(by_priority);
    int64_t at = 0;
    for (int64_t i = 0; i < rows && at < count; ++i) {
        const bool first = marked[static_cast<size_t>(i)];
        if (!first && (!fill || std::pair{random_key(static_cast<uint64_t>(seed), i), i} > last)) continue;
        out[at] = i;
        flag[at++] = first;
    }
    STD_TORCH_CHECK(at == count, "smallest_keys: ", at, " rows found instead of ", count);
    return {chosen, by_priority};
}

}  // namespace
}  // namespace opencoder

STABLE_TORCH_LIBRARY_IMPL(opencoder, CPU, m) {
    m.impl("merge_nearest_", TORCH_BOX(&opencoder::merge_nearest));
    m.impl("neighbour_priority", TORCH_BOX(&opencoder::neighbour_priority));
    m.impl("smallest_keys", TORCH_BOX(&opencoder::smallest_keys));
}
