/*
 * Instruction decoder: prefixes, opcode, ModRM, SIB, displacement, immediates (SDM vol. 2 chapter 2), led by
 * the tables that optable.py generates.
 */
#include "decode.h"

struct cursor {
    const uint8_t *bytes;
    unsigned at, avail;
    bool over;                   /* asked for more than there is */
};

static uint64_t take(struct cursor *s, unsigned n)
{
    uint64_t v = 0;
    if (s->at + n > s->avail) {
        s->over = true;
        s->at = s->avail;
        return 0;
    }
    memcpy(&v, s->bytes + s->at, n);
    s->at += n;
    return v;
}

static int64_t take_signed(struct cursor *s, unsigned n)
{
    uint64_t v = take(s, n);
    unsigned shift = 64 - 8 * n;
    return (int64_t)(v << shift) >> shift;
}

struct prefixes {
    uint8_t rex, seg, rep;
    bool osz, asz, lock;
};

static void take_prefixes(struct cursor *s, unsigned mode, struct prefixes *p)
{
    *p = (struct prefixes){.seg = SEG_NONE};
    while (s->at < s->avail) {
        uint8_t b = s->bytes[s->at];
        uint8_t rex = 0;
        switch (b) {
        case 0x26: case 0x2e: case 0x36: case 0x3e:
            if (!(mode & MODE_64)) {
                p->seg = (b >> 3) & 3;
            }
            break;
        case 0x64: p->seg = FS; break;
        case 0x65: p->seg = GS; break;
        case 0x66: p->osz = true; break;
        case 0x67: p->asz = true; break;
        case 0xf0: p->lock = true; break;
        case 0xf2: case 0xf3: p->rep = b; break;
        default:
            if (!(mode & MODE_64) || (b & 0xf0) != 0x40) {
                return;
            }
            rex = b;
        }
        p->rex = rex; /* a REX that is not the last prefix is ignored */
        s->at++;
    }
}

/* 16-bit addressing, SDM vol. 2 table 2-1 */
static void take_memory16(struct cursor *s, unsigned mod, unsigned rm, struct uop *u)
{
    static const uint8_t base[8] = {RBX, RBX, RBP, RBP, RSI, RDI, RBP, RBX};
    static const uint8_t index[8] = {RSI, RDI, RSI, RDI, R_ZERO, R_ZERO, R_ZERO, R_ZERO};
    u->base = base[rm];
    u->index = index[rm];
    if (mod == 0 && rm == 6) {
        u->base = R_ZERO;
        u->disp = (int32_t)take_signed(s, 2);
    } else if (mod) {
        u->disp = (int32_t)take_signed(s, mod);
    }
    u->seg = u->base == RBP ? SS : DS;
}

/* 32- and 64-bit addressing, SDM vol. 2 tables 2-2 and 2-3. Returns whether it is relative to rip. */
static bool take_memory(struct cursor *s, unsigned mode, uint8_t rex, unsigned mod, unsigned rm, struct uop *u)
{
    bool rip_relative = false;
    unsigned base = rm;
    if (rm == 4) {
        unsigned sib = (unsigned)take(s, 1);
        unsigned index = ((sib >> 3) & 7) | ((rex & 2u) << 2);
        base = sib & 7;
        u->scale = (uint8_t)(sib >> 6);
        u->index = (uint8_t)(index == RSP ? R_ZERO : index);
    }
    if (mod == 0 && base == 5) {
        rip_relative = rm == 5 && (mode & MODE_64);
        u->base = rip_relative ? R_RIP : R_ZERO;
        u->disp = (int32_t)take_signed(s, 4);
    } else {
        u->base = (uint8_t)(base | ((rex & 1u) << 3));
        u->disp = mod == 1 ? (int32_t)take_signed(s, 1) : mod == 2 ? (int32_t)take_signed(s, 4) : 0;
    }
    u->seg = u->base == RSP || u->base == RBP ? SS : DS;
    return rip_relative;
}

static bool row_fits(const struct oprow *row, const struct prefixes *p, unsigned mode, unsigned modrm)
{
    if (row->bits & (mode & MODE_64 ? OPF_I64 : OPF_O64)) {
        return false;
    }
    switch (row->prefix) {
    case OPP_NP: if (p->rep || p->osz) { return false; } break;
    case OPP_66: if (p->rep || !p->osz) { return false; } break;
    case OPP_F3: if (p->rep != 0xf3) { return false; } break;
    case OPP_F2: if (p->rep != 0xf2) { return false; } break;
    default: break;
    }
    if (row->w != 2 && row->w != ((p->rex >> 3) & 1)) {
        return false;
    }
    if (!(row->bits & OPF_MODRM)) {
        return true;
    }
    bool memory = modrm < 0xc0 && !(row->bits & OPF_MOD3);
    return (row->ext == 0xff || row->ext == ((modrm >> 3) & 7)) && (row->rm == 0xff || row->rm == (modrm & 7)) &&
           (row->mod == OPM_ANY || (row->mod == OPM_MEM) == memory);
}

/* 8-bit registers: without REX, 4-7 are AH CH DH BH */
static uint8_t byte_register(unsigned r, uint8_t rex) { return (uint8_t)(rex || r < 4 ? r * 8 : (r - 4) * 8 + 1); }

static void take_immediate(struct cursor *s, unsigned kind, unsigned bytes, struct uop *u)
{
    switch (kind) {
    case IMM_B: u->imm = take(s, 1); break;
    case IMM_BS: u->imm = (uint64_t)take_signed(s, 1); break;
    case IMM_W: u->imm = take(s, 2); break;
    case IMM_Z:
    case IMM_JZ: u->imm = (uint64_t)take_signed(s, bytes == 2 ? 2 : 4); break;
    case IMM_V: u->imm = take(s, bytes); break;
    case IMM_JB: u->imm = (uint64_t)take_signed(s, 1); break;
    case IMM_O: u->imm = take(s, u->mode & UOP_ASZ16 ? 2 : u->mode & UOP_ASZ32 ? 4 : 8); break;
    case IMM_AP:
        u->imm = take(s, bytes == 2 ? 2 : 4);
        u->imm |= take(s, 2) << 32;
        break;
    default: break;
    }
}

static unsigned operand_bytes(const struct oprow *row, const struct prefixes *p, unsigned mode)
{
    if (!(mode & MODE_64)) {
        return !(mode & MODE_D) != p->osz ? 2 : 4;
    }
    if (row->bits & OPF_F64 || p->rex & 8) {
        return 8;
    }
    return p->osz ? 2 : row->bits & OPF_D64 ? 8 : 4;
}

unsigned decode(const uint8_t *bytes, unsigned avail, uint64_t rip, unsigned ioff, unsigned mode, struct uop *u, struct decoded *d)
{
    struct cursor s = {bytes, 0, avail, false};
    struct prefixes p;
    *u = (struct uop){.base = R_ZERO, .index = R_ZERO, .seg = DS, .ioff = (uint16_t)ioff};
    *d = (struct decoded){0};

    take_prefixes(&s, mode, &p);
    unsigned opcode = (unsigned)take(&s, 1), map = 0;
    if (opcode == 0x0f) {
        opcode = (unsigned)take(&s, 1);
        map = 1;
        if (opcode == 0x38 || opcode == 0x3a) {
            map = opcode == 0x38 ? 2 : 3;
            opcode = (unsigned)take(&s, 1);
        }
    }
    if (s.over) {
        return 0;
    }
    const struct opindex *index = &opindex[map][opcode];
    const struct oprow *row = &oprows[index->first], *end = row + index->count;
    unsigned modrm = 0;
    if (row != end && row->bits & OPF_MODRM) {
        modrm = (unsigned)take(&s, 1);
        if (s.over) {
            return 0;
        }
    }
    while (row != end && !row_fits(row, &p, mode, modrm)) {
        row++;
    }
    if (row == end) {
        return s.at;
    }

    unsigned size = operand_bytes(row, &p, mode);
    u->mode = (uint8_t)((size == 2 ? UOP_OSZ16 : size == 8 ? UOP_OSZ64 : 0) | (p.lock ? UOP_LOCK : 0) | (p.rex ? UOP_REX : 0) |
                        (p.rep == 0xf3 ? UOP_REP : p.rep == 0xf2 ? UOP_REPNE : 0));
    if (mode & MODE_64) {
        u->mode |= p.asz ? UOP_ASZ32 : 0;
    } else {
        u->mode |= !(mode & MODE_D) != p.asz ? UOP_ASZ16 : UOP_ASZ32;
    }
    u->aux = row->aux;

    bool memory = false, rip_relative = false;
    if (row->bits & OPF_MODRM) {
        unsigned mod = row->bits & OPF_MOD3 ? 3 : modrm >> 6, rm = modrm & 7, reg = ((modrm >> 3) & 7) | ((p.rex & 4u) << 1);
        u->reg = row->bits & OPF_REG_BYTE ? byte_register(reg, p.rex) : (uint8_t)reg;
        if (mod == 3) {
            rm |= (p.rex & 1u) << 3;
            u->rm = row->bits & OPF_RM_BYTE ? byte_register(rm, p.rex) : (uint8_t)rm;
        } else {
            memory = true;
            u->rm = RM_MEM;
            if (u->mode & UOP_ASZ16) {
                take_memory16(&s, mod, rm, u);
            } else {
                rip_relative = take_memory(&s, mode, p.rex, mod, rm, u);
            }
        }
    } else if (row->bits & OPF_RM_OPCODE) {
        unsigned rm = (opcode & 7) | ((p.rex & 1u) << 3);
        u->rm = row->bits & OPF_RM_BYTE ? byte_register(rm, p.rex) : (uint8_t)rm;
    }
    if (p.seg != SEG_NONE) {
        u->seg = p.seg;
    }
    take_immediate(&s, row->imm, row->bits & OPF_BYTE ? 1 : size, u);
    if (row->imm2 != IMM_NONE) {
        u->aux = (uint16_t)take(&s, 1); /* ENTER's level */
    }
    if (s.over) {
        return 0;
    }
    if (p.lock && !(memory && row->bits & OPF_LOCK)) {
        return s.at;
    }

    u->len = (uint8_t)s.at;
    if (rip_relative) {
        u->disp = (int32_t)((uint32_t)u->disp + ioff + s.at);
    }
    if (row->imm == IMM_JB || row->imm == IMM_JZ) {
        u->imm += rip + s.at;
        u->imm = mode & MODE_64 ? u->imm : size == 2 ? (uint16_t)u->imm : (uint32_t)u->imm;
    }
    unsigned log2 = row->bits & OPF_BYTE ? 0 : size == 8 ? 3 : size == 2 ? 1 : 2;
    unsigned form = !memory ? OPFORM_R : p.lock ? OPFORM_L
                  : (mode & MODE_64) && !p.asz && u->seg != FS && u->seg != GS ? OPFORM_F : OPFORM_M;
    u->fn = ophandlers[row->handlers][form][log2];
    if (u->fn) {
        d->row = row;
        d->nf = memory ? NULL : ophandlers[row->handlers][OPFORM_NF][log2];
    }
    return s.at;
}
