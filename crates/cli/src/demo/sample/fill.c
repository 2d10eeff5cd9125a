/* fill FILE SIZE SEED: appends to FILE until it has SIZE bytes. The first half of what it appends does not
 * compress, the second is like a log. The same seed gives the same bytes. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t state;

/* splitmix64 */
static uint64_t next(void) {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int main(int argc, char **argv) {
    static const char *words[] = {"accepted", "request", "from",  "cache",  "miss",  "retry", "region",
                                  "piece",    "wrote",   "bytes", "closed", "after", "peer",  "stream"};
    if (argc != 4) return 2;
    FILE *file = fopen(argv[1], "ab");
    long long size = atoll(argv[2]);
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) return 1;
    long long left = size - ftell(file);
    if (left < 0) {
        fprintf(stderr, "the program alone is longer than %lld bytes\n", size);
        return 1;
    }
    for (const char *c = argv[3]; *c; c++) state = (state ^ (unsigned char)*c) * 0x100000001b3u;
    long long noise = left / 2;
    left -= noise;
    while (noise > 0) {
        uint64_t word = next();
        size_t len = noise < 8 ? (size_t)noise : 8;
        if (fwrite(&word, 1, len, file) != len) return 1;
        noise -= (long long)len;
    }
    for (uint64_t number = 0; left > 0; number++) {
        char line[160];
        uint64_t dice = next();
        int len = snprintf(line, sizeof line, "%010" PRIu64 " level=info %s %s %s id=%06" PRIx64 " took=%dms\n",
                           number, words[dice % 14], words[(dice >> 8) % 14], words[(dice >> 16) % 14],
                           (dice >> 24) & 0xffffff, (int)((dice >> 48) % 900));
        size_t want = left < len ? (size_t)left : (size_t)len;
        if (fwrite(line, 1, want, file) != want) return 1;
        left -= (long long)want;
    }
    return fclose(file) == 0 ? 0 : 1;
}
