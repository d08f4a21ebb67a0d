/* A case as both sides of the differential tests see it; Python reads this text through cffi. Integers and structs only. */
#pragma once
#include <stdint.h>

#define CODE_LINEAR 0x20000000     /* two pages that can be executed and read; unmapped around them */
#define CODE_SIZE 0x2000
#define DATA_LINEAR 0x30000000     /* four pages, the third read-only; unmapped around them */
#define DATA_SIZE 0x4000
#define READONLY 0x2000            /* offset of the read-only page */
#define ENDLESS 255                /* in `vector`: the case went on for seconds */
#define PATCHES 3
#define HOST_LDT 1                 /* segments with a base can be had, and 16-bit code */
#define HOST_FSGSBASE 2            /* RDFSBASE and its like work in user mode */
#define PATCH_SIZE 1088

struct state {
    uint64_t gpr[16];              /* RAX RCX RDX RBX RSP RBP RSI RDI R8... */
    uint64_t rip, rflags;
    uint16_t cs, ss, ds, es, fs, gs, pad[2];
    uint64_t fs_base, gs_base;
    uint8_t fx[512];               /* FXSAVE image, 64-bit format; SDM vol. 1 table 10-2 */
};

struct patch { uint64_t at; uint32_t size, pad; uint8_t bytes[PATCH_SIZE]; };

struct test_case {
    struct state before;
    struct patch patch[PATCHES];   /* bytes of data, size 0: none; `at` counts from DATA_LINEAR */
    uint32_t code_at, code_size;   /* from CODE_LINEAR; all else there is INT3 */
    uint8_t code[128];
    /* what came of it */
    struct state after;
    uint32_t vector, error;
    uint64_t cr2;
    uint8_t data[DATA_SIZE];
};
