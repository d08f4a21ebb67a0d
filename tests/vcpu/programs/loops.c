/* Loops to measure the engine by: entry(which, rounds). Integer only; the results check the run. */
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

static const u32 K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static u32 ror(u32 x, int n) { return x >> n | x << (32 - n); }

static long sha256(long rounds)
{
    u32 s[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    u8 block[64];
    for (int i = 0; i < 64; i++) {
        block[i] = (u8)i;
    }
    for (long round = 0; round < rounds; round++) {
        u32 w[64];
        for (int i = 0; i < 16; i++) {
            w[i] = (u32)block[4 * i] << 24 | (u32)block[4 * i + 1] << 16 | (u32)block[4 * i + 2] << 8 | block[4 * i + 3];
        }
        for (int i = 16; i < 64; i++) {
            u32 a = ror(w[i - 15], 7) ^ ror(w[i - 15], 18) ^ w[i - 15] >> 3, b = ror(w[i - 2], 17) ^ ror(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + a + w[i - 7] + b;
        }
        u32 a = s[0], b = s[1], c = s[2], d = s[3], e = s[4], f = s[5], g = s[6], h = s[7];
        for (int i = 0; i < 64; i++) {
            u32 t1 = h + (ror(e, 6) ^ ror(e, 11) ^ ror(e, 25)) + ((e & f) ^ (~e & g)) + K[i] + w[i];
            u32 t2 = (ror(a, 2) ^ ror(a, 13) ^ ror(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g; g = f; f = e; e = d + t1; d = c; c = b; b = a; a = t1 + t2;
        }
        s[0] += a; s[1] += b; s[2] += c; s[3] += d; s[4] += e; s[5] += f; s[6] += g; s[7] += h;
        block[round & 63] ^= (u8)s[0];
    }
    return s[0];
}

static u8 flags[1 << 20];

static long sieve(long rounds)
{
    long count = 0;
    for (long round = 0; round < rounds; round++) {
        for (long i = 0; i < (long)sizeof flags; i++) {
            flags[i] = 1;
        }
        count = 0;
        for (long i = 2; i < (long)sizeof flags; i++) {
            if (flags[i]) {
                count++;
                for (long j = i + i; j < (long)sizeof flags; j += i) {
                    flags[j] = 0;
                }
            }
        }
    }
    return count;
}

typedef u64 (*function)(u64);
__attribute__((noinline)) static u64 f0(u64 x) { return x * 3 + 1; }
__attribute__((noinline)) static u64 f1(u64 x) { return x ^ x >> 7; }
__attribute__((noinline)) static u64 f2(u64 x) { return x + (x << 5); }
__attribute__((noinline)) static u64 f3(u64 x) { return ~x; }

static long icall(long rounds)
{
    function volatile table[4] = {f0, f1, f2, f3};
    u64 x = 1;
    for (long i = 0; i < rounds; i++) {
        x = table[(x >> 3 ^ i) & 3](x);
    }
    return (long)x;
}

static int numbers[1 << 14];

static void sort(int *a, long n)
{
    while (n > 1) {
        int pivot = a[n / 2];
        long i = 0, j = n - 1;
        while (i <= j) {
            while (a[i] < pivot) i++;
            while (a[j] > pivot) j--;
            if (i <= j) {
                int t = a[i];
                a[i++] = a[j];
                a[j--] = t;
            }
        }
        sort(a, j + 1);
        a += i;
        n -= i;
    }
}

static long quicksort(long rounds)
{
    u32 x = 12345;
    long sum = 0;
    for (long round = 0; round < rounds; round++) {
        for (int i = 0; i < 1 << 14; i++) {
            x = x * 1664525 + 1013904223;
            numbers[i] = (int)(x >> 8);
        }
        sort(numbers, 1 << 14);
        for (int i = 1; i < 1 << 14; i++) {
            sum += numbers[i] >= numbers[i - 1];
        }
    }
    return sum;
}

long entry(long which, long rounds)
{
    switch (which) {
    case 0: return sha256(rounds);
    case 1: return sieve(rounds);
    case 2: return icall(rounds);
    default: return quicksort(rounds);
    }
}
