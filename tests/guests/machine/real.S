/*
 * A firmware of 64 KiB in real mode: F0000h-FFFFFh below 1 MiB, the reset vector at its end. What it shows: the state after
 * reset, A20 by port 92h and by the keyboard controller, and F0000h changing from ROM to RAM under running code
 * (82441FX, register 59h: bit 4 reads, bit 5 writes go to memory).
 */
#define COM1 0x3f8
#define CONFIG_ADDRESS 0xcf8
#define PAM0_PORT 0xcfd
#define PAM0_SELECT 0x80000058
#define DEBUG_EXIT 0xf4

        .code16
        .text
base:
start:
        cli
        cld
        movw %cs, %ax
        movw %ax, %ds
        xorw %ax, %ax
        movw %ax, %ss
        movw $0x7c00, %sp
        movl %cr0, %eax
        cmpl $0x60000010, %eax
        movw $name_reset, %si
        call verdict

/* ---- A20: 0000:0500 and FFFF:0510 are the same byte while the line is held ---- */
        movb $0, %bl
        movb $0, %al                    /* port 92h bit 1 = 0; the other gate, at the keyboard controller, too */
        call keyboard_a20
        outb %al, $0x92
        call is_wrapped
        jne 1f
        incb %bl
1:      movb $2, %al
        outb %al, $0x92
        call is_wrapped
        je 1f
        incb %bl
1:      cmpb $2, %bl
        movw $name_92, %si
        call verdict
        movb $0, %bl
        movb $0, %al
        outb %al, $0x92
        call is_wrapped
        jne 1f
        incb %bl
1:      movb $2, %al
        call keyboard_a20
        call is_wrapped
        je 1f
        incb %bl
1:      cmpb $2, %bl
        movw $name_keyboard, %si
        call verdict

/* ---- PAM ---- */
        movl $PAM0_SELECT, %eax
        movw $CONFIG_ADDRESS, %dx
        outl %eax, %dx
        movb $0x20, %al                 /* reads from ROM, writes to RAM: copied onto itself */
        call pam0
        movw %cs, %ax
        movw %ax, %es
        xorw %si, %si
        xorw %di, %di
        movw $0x8000, %cx
        rep movsw
        movb $0x30, %al                 /* all RAM; this code goes on in the copy */
        call pam0
        call answer
        cmpw $0x1234, %ax
        jne 1f
        movw $0x4321, answer + 1        /* now it can be written */
        call answer
        cmpw $0x4321, %ax
1:      movw $name_copy, %si
        call verdict
        movw $300, %cx
        movb $0, %bl
2:      movb $0x00, %al                 /* ROM */
        call pam0
        call answer
        cmpw $0x1234, %ax
        je 1f
        incb %bl
1:      movb $0x30, %al                 /* RAM */
        call pam0
        call answer
        cmpw $0x4321, %ax
        je 1f
        incb %bl
1:      loop 2b
        movb $0x10, %al                 /* RAM is read, writes go nowhere */
        call pam0
        movw $0x5555, answer + 1
        call answer
        cmpw $0x4321, %ax
        je 1f
        incb %bl
1:      cmpb $0, %bl
        movw $name_running, %si
        call verdict
        movb %ss:0x600, %al
        addb $0x10, %al
        outb %al, $DEBUG_EXIT
1:      hlt
        jmp 1b

pam0:
        movw $PAM0_PORT, %dx
        outb %al, %dx
        ret

        .balign 16
answer:
        movw $0x1234, %ax
        ret

/* ZF: 0000:0500 and FFFF:0510 are one */
is_wrapped:
        pushw %ds
        pushw %es
        xorw %ax, %ax
        movw %ax, %ds
        decw %ax
        movw %ax, %es
        movb $0x5a, %ds:0x500
        movb $0xa5, %es:0x510
        cmpb $0xa5, %ds:0x500
        popw %es
        popw %ds
        ret

/* A20 of the controller's output port = bit 1 of al; the CPU's reset pin (bit 0) stays high */
keyboard_a20:
        pushw %ax
        movb %al, %ah
        orb $0xcd, %ah
        call keyboard_ready
        movb $0xd1, %al
        outb %al, $0x64
        call keyboard_ready
        movb %ah, %al
        outb %al, $0x60
        call keyboard_ready
        popw %ax
        ret
keyboard_ready:
        inb $0x64, %al
        testb $2, %al
        jnz keyboard_ready
        ret

/* ZF: it holds. si: its name */
verdict:
        pushw %ax
        pushw %si
        movw $ok, %si
        jz 1f
        movw $fail, %si
        movb $1, %ss:0x600
1:      call say
        popw %si
        call say
        movw $end_of_line, %si
        call say
        popw %ax
        ret
say:
        movw $COM1, %dx
1:      lodsb
        testb %al, %al
        jz 2f
        outb %al, %dx
        jmp 1b
2:      ret

ok:     .asciz "ok "
fail:   .asciz "FAIL "
end_of_line: .asciz "\n"
name_reset: .asciz "reset"
name_92: .asciz "a20_port92"
name_keyboard: .asciz "a20_keyboard"
name_copy: .asciz "pam_copy"
name_running: .asciz "pam_under_running_code"

        .org 0xfff0
        ljmp $0xf000, $start
        .org 0xfffe
        .word 0x00fc
