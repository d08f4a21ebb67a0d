/* Floating point: planets with SSE2 doubles, a polynomial with x87 at 80 bits. Only operations that
 * IEEE 754 defines to the last bit (+ - * / square root), so that the results can be compared. */
#include <stddef.h>
#include <string.h>

#include "bench.h"

/* --- nbody: five bodies under gravity --------------------------------------------------------------- */

enum { BODIES = 5, NBODY_STEPS = 900000 };

struct body {
    double x, y, z, vx, vy, vz, mass;
};

static double square_root(double value)
{
    __asm__("sqrtsd %0, %0" : "+x"(value));
    return value;
}

static void advance(struct body *bodies, double dt)
{
    for (int i = 0; i < BODIES; i++) {
        struct body *a = &bodies[i];
        for (int j = i + 1; j < BODIES; j++) {
            struct body *b = &bodies[j];
            double dx = a->x - b->x, dy = a->y - b->y, dz = a->z - b->z;
            double square = dx * dx + dy * dy + dz * dz + 0.01;
            double pull = dt / (square * square_root(square));
            a->vx -= dx * b->mass * pull;
            a->vy -= dy * b->mass * pull;
            a->vz -= dz * b->mass * pull;
            b->vx += dx * a->mass * pull;
            b->vy += dy * a->mass * pull;
            b->vz += dz * a->mass * pull;
        }
    }
    for (int i = 0; i < BODIES; i++) {
        bodies[i].x += dt * bodies[i].vx;
        bodies[i].y += dt * bodies[i].vy;
        bodies[i].z += dt * bodies[i].vz;
    }
}

static uint64_t nbody_run(void)
{
    struct body bodies[BODIES];
    for (int i = 0; i < BODIES; i++) /* a sun and four planets on tilted orbits of growing radius */
        bodies[i] = (struct body){
            .x = 4.0 * i, .y = 0.25 * i * i, .z = -0.125 * i,
            .vx = 0.0, .vy = i ? 3.0 / i : 0.0, .vz = 0.0625 * i, .mass = i ? 0.03 / i : 39.5,
        };
    for (int step = 0; step < NBODY_STEPS; step++)
        advance(bodies, 0.001);
    uint64_t check = 0, bits;
    for (int i = 0; i < BODIES; i++) {
        memcpy(&bits, &bodies[i].x, 8);
        check = mix(check, bits);
    }
    return check;
}

/* --- x87: long double arithmetic ----------------------------------------------------------------------- */

enum { X87_STEPS = 3000000 };

static long double x87_root(long double value)
{
    __asm__("fsqrt" : "+t"(value));
    return value;
}

static uint64_t x87_run(void)
{
    long double x = 0.5L, sum = 0.0L;
    for (int step = 1; step <= X87_STEPS; step++) {
        x = 3.9L * x * (1.0L - x); /* the logistic map: an error in the last bit soon shows */
        sum += x * (2.0L + x * (0.5L - x * 0.25L));
        if (step % 16 == 0)
            sum = x87_root(sum * sum + 1.0L) / 1.5L;
    }
    uint64_t check;
    memcpy(&check, &sum, 8); /* the significand */
    return check;
}

const struct kernel float_kernels[] = {
    {"nbody", "SSE2 double", NULL, nbody_run},
    {"x87", "80-bit floating point", NULL, x87_run},
    {0},
};
