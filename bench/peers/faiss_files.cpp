/* faiss_files.cpp - the same retrieval by plain means: FAISS over landmark keys, keys and values in an ordinary file
 * read by pread, attention in plain loops; and dense attention over all keys and values in RAM. No part of Cairn.
 * bench/peers/retrieval.py compiles and runs it beside `cairn bench decode`.
 *
 *   g++ -O3 -march=native -ffast-math -fopenmp -o faiss_files faiss_files.cpp -lfaiss -lopenblas -lgomp
 *   faiss_files FILE TOKENS LAYERS HEADS HEAD_DIM K FACTORY STEPS COLD THREADS      prints one JSON object
 *
 * Tiles are (63 keys, 63 values) of half floats, one layer and head after the other, blocks in order. A step is one
 * query for each layer and head: the K best landmarks by FAISS, their tiles by one pread each, softmax within each
 * block and over the blocks. A cold step begins with the file's pages dropped from the page cache. */
#include <faiss/IndexFlat.h>
#include <faiss/index_factory.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <immintrin.h>
#include <memory>
#include <random>
#include <string>
#include <unistd.h>
#include <vector>

typedef _Float16 half;
static const int C = 63;

static double now()
{
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

[[noreturn]] static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double quantile(std::vector<double> x, double p)
{
    std::sort(x.begin(), x.end());
    return x.empty() ? 0 : x[(size_t)(p * (double)(x.size() - 1) + 0.5)];
}

/* n half floats as floats, n a multiple of 8: compilers do not find this instruction by themselves. */
static inline void widen(float *to, const half *from, int n)
{
#ifdef __F16C__
    for (int i = 0; i < n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#else
    for (int i = 0; i < n; i++) to[i] = (float)from[i];
#endif
}

/* out (D) += exp(gate - m) * softmax(q K) V over one tile; m only keeps exp() in range. */
static void attend(const half *tile, const float *q, int D, float gate, float *out)
{
    float s[C], most = -1e30f, sum = 0;
    for (int j = 0; j < C; j++) {
        float x = 0, row[256];
        widen(row, tile + j * D, D);
        for (int d = 0; d < D; d++) x += q[d] * row[d];
        s[j] = x;
        most = std::max(most, x);
    }
    for (int j = 0; j < C; j++) sum += s[j] = std::exp(s[j] - most);
    for (int j = 0; j < C; j++) {
        float w = gate * s[j] / sum, row[256];
        widen(row, tile + (C + j) * D, D);
        for (int d = 0; d < D; d++) out[d] += w * row[d];
    }
}

/* Ordinary attention of one query over all tiles of a head, in one pass: running maximum, denominator, output. */
static void attend_all(const half *tiles, size_t n, const float *q, int D, float *out)
{
    float most = -1e30f, sum = 0;
    std::fill(out, out + D, 0.f);
    for (size_t b = 0; b < n; b++) {
        const half *tile = tiles + b * 2 * C * (size_t)D;
        float s[C], top = most;
        for (int j = 0; j < C; j++) {
            float x = 0, row[256];
            widen(row, tile + j * D, D);
            for (int d = 0; d < D; d++) x += q[d] * row[d];
            s[j] = x;
            top = std::max(top, x);
        }
        float keep = std::exp(most - top);
        sum *= keep;
        for (int d = 0; d < D; d++) out[d] *= keep;
        most = top;
        for (int j = 0; j < C; j++) {
            float w = std::exp(s[j] - most), row[256];
            sum += w;
            widen(row, tile + (C + j) * D, D);
            for (int d = 0; d < D; d++) out[d] += w * row[d];
        }
    }
    for (int d = 0; d < D; d++) out[d] /= sum;
}

int main(int argc, char **argv)
{
    if (argc != 11) return fprintf(stderr, "faiss_files: ten arguments, see the source\n"), 2;
    const char *path = argv[1];
    const size_t tokens = strtoull(argv[2], nullptr, 10), n = tokens / C;
    const int layers = atoi(argv[3]), heads = atoi(argv[4]), D = atoi(argv[5]), K = atoi(argv[6]);
    const int steps = atoi(argv[8]), cold = atoi(argv[9]), threads = atoi(argv[10]);
    if (D % 8 != 0 || D > 256) return fprintf(stderr, "faiss_files: HEAD_DIM %d\n", D), 2;
    const size_t tile = 2 * (size_t)C * D, all = (size_t)layers * heads;
    omp_set_num_threads(threads);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;

    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0) die(path);
    std::vector<half> stock(tile * 64);
    for (half &x : stock) x = (half)normal(random);
    std::vector<std::unique_ptr<faiss::Index>> index;
    std::vector<half> ram; /* of one layer: dense attention is measured on one and counted for all */
    std::vector<float> landmarks(n * D), centre(D), common(D);
    double built = now();
    for (size_t i = 0; i < all; i++) {
        std::vector<half> head(n * tile);
        for (size_t b = 0; b < n; b++)
            std::copy_n(stock.begin() + (long)(random() % 64 * tile), tile, head.begin() + (long)(b * tile));
        if (pwrite(fd, head.data(), head.size() * sizeof(half), (off_t)(i * n * tile * sizeof(half))) !=
            (ssize_t)(head.size() * sizeof(half)))
            die(path);
        if (i < (size_t)heads) ram.insert(ram.end(), head.begin(), head.end());
        for (float &x : common) x = 1.5f * normal(random);
        for (size_t b = 0; b < n; b++) {
            if (b % 24 == 0)
                for (float &x : centre) x = normal(random);
            for (int d = 0; d < D; d++) landmarks[b * D + d] = common[d] + centre[d] + 0.5f * normal(random);
        }
        index.emplace_back(faiss::index_factory(D, argv[7], faiss::METRIC_INNER_PRODUCT));
        index.back()->train((faiss::Index::idx_t)n, landmarks.data());
        index.back()->add((faiss::Index::idx_t)n, landmarks.data());
    }
    if (fdatasync(fd) != 0) die(path);
    built = now() - built;

    std::vector<double> seconds[2], search[2], dense;
    std::vector<float> q(all * D), out(all * D);
    for (int i = -8; i < steps + cold; i++) {
        bool is_cold = i >= steps;
        for (float &x : q) x = normal(random) / std::sqrt((float)D);
        if (is_cold && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0) die(path);
        double start = now(), searching = 0;
        std::fill(out.begin(), out.end(), 0.f);
        for (int l = 0; l < layers; l++) { /* the next layer's queries come of this one's outputs */
            double before = now();
            std::vector<faiss::Index::idx_t> id((size_t)heads * K);
            std::vector<float> score((size_t)heads * K);
#pragma omp parallel for schedule(static)
            for (int h = 0; h < heads; h++)
                index[(size_t)l * heads + h]->search(1, &q[((size_t)l * heads + h) * D], K, &score[(size_t)h * K],
                                                     &id[(size_t)h * K]);
            searching += now() - before;
#pragma omp parallel for schedule(static)
            for (int h = 0; h < heads; h++) {
                std::vector<half> got(tile);
                float sum = 0;
                for (int k = 0; k < K; k++) sum += std::exp(score[(size_t)h * K + k] - score[(size_t)h * K]);
                for (int k = 0; k < K; k++) {
                    if (id[(size_t)h * K + k] < 0) continue;
                    size_t at = ((size_t)l * heads + h) * n + (size_t)id[(size_t)h * K + k];
                    if (pread(fd, got.data(), tile * sizeof(half), (off_t)(at * tile * sizeof(half))) !=
                        (ssize_t)(tile * sizeof(half)))
                        die(path);
                    attend(got.data(), &q[((size_t)l * heads + h) * D], D,
                           std::exp(score[(size_t)h * K + k] - score[(size_t)h * K]) / sum,
                           &out[((size_t)l * heads + h) * D]);
                }
            }
        }
        if (i < 0) continue;
        seconds[is_cold].push_back(now() - start);
        search[is_cold].push_back(searching);
    }
    for (int i = -1; i < 5; i++) {
        for (float &x : q) x = normal(random) / std::sqrt((float)D);
        double start = now();
#pragma omp parallel for schedule(static)
        for (int h = 0; h < heads; h++)
            attend_all(&ram[(size_t)h * n * tile], n, &q[(size_t)h * D], D, &out[(size_t)h * D]);
        if (i >= 0) dense.push_back((now() - start) * layers);
    }
    float sum = 0;
    for (float x : out) sum += x; /* so that it is needed */
    printf(
        "{\"tokens\": %zu, \"threads\": %d, \"index\": \"%s\", \"build_seconds\": %.3f, \"warm_seconds\": %.9f, "
        "\"warm_p99_seconds\": %.9f, \"warm_search_seconds\": %.9f, \"cold_seconds\": %.9f, \"dense_seconds\": %.9f, "
        "\"dense_bytes\": %zu, \"sum\": %g}\n",
        n * C, threads, argv[7], built, quantile(seconds[0], 0.5), quantile(seconds[0], 0.99), quantile(search[0], 0.5),
        quantile(seconds[1], 0.5), quantile(dense, 0.5), all * n * tile * sizeof(half), (double)sum);
    close(fd);
    unlink(path);
    return 0;
}
