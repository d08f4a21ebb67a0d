/*
 * Entry by multiboot 1 (32-bit protected mode, paging off), page tables, long mode; the same for the
 * other processors from their SIPI on; and the 256 interrupt stubs.
 * The image is flat and says its addresses in the header, so that any multiboot loader takes it.
 */
#define MULTIBOOT_MAGIC 0x1BADB002
#define MULTIBOOT_ADDRESSES 0x10000
#define AP_START 0x8000 /* the SIPI vector's page; low memory is otherwise not used */
#define CR0_LONG 0x80010011 /* PG WP ET PE */
#define CR4_LONG 0x620 /* OSXMMEXCPT OSFXSR PAE */
#define EFER 0xC0000080
#define EFER_LME_NXE 0x900
#define GIGABYTES 8

        .section .header, "a"
        .align 4
header:
        .long MULTIBOOT_MAGIC, MULTIBOOT_ADDRESSES, -(MULTIBOOT_MAGIC + MULTIBOOT_ADDRESSES)
        .long header, image_start, image_end, bss_end, start

        .text
        .code32
        .globl start
start:
        cli
        cld
        movl $bsp_stack_top, %esp
        /* one PML4 entry, GIGABYTES page directories of 2 MiB pages, one to one */
        movl $pdpt + 3, pml4
        movl $page_directories + 3, %eax
        movl $pdpt, %edi
        movl $GIGABYTES, %ecx
1:      movl %eax, (%edi)
        addl $4096, %eax
        addl $8, %edi
        loop 1b
        movl $0x83, %eax
        xorl %edx, %edx
        movl $page_directories, %edi
        movl $GIGABYTES * 512, %ecx
1:      movl %eax, (%edi)
        movl %edx, 4(%edi)
        addl $0x200000, %eax
        adcl $0, %edx
        addl $8, %edi
        loop 1b
        movl $enter_long_end - enter_long, %ecx
        movl $enter_long, %esi
        movl $AP_START + 0x100, %edi
        rep movsb
        movl $ap_real_end - ap_real, %ecx
        movl $ap_real, %esi
        movl $AP_START, %edi
        rep movsb
        lgdt gdt_pointer
        movl $bsp_long, %ebx
        jmp enter_long

/* 32-bit: to long mode and to the 64-bit code at ebx. Position independent: it is copied. */
enter_long:
        movl $CR4_LONG, %eax
        movl %eax, %cr4
        movl $pml4, %eax
        movl %eax, %cr3
        movl $EFER, %ecx
        movl $EFER_LME_NXE, %eax
        xorl %edx, %edx
        wrmsr
        movl $CR0_LONG, %eax
        movl %eax, %cr0
        pushl $0x08
        pushl %ebx
        lret
enter_long_end:

/* Real mode, at AP_START: to 32 bits by the descriptor table that the first processor left. */
        .code16
ap_real:
        cli
        xorw %ax, %ax
        movw %ax, %ds
        lgdtl AP_START + (ap_gdt_pointer - ap_real)
        movl %cr0, %eax
        orb $1, %al
        movl %eax, %cr0
        ljmpl $0x18, $AP_START + (ap_protected - ap_real)
ap_gdt_pointer:
        .word gdt_end - gdt - 1
        .long gdt
        .code32
ap_protected:
        movw $0x10, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movl ap_stack, %esp
        movl $ap_long, %ebx
        movl $AP_START + 0x100, %eax
        jmp *%eax
ap_real_end:

        .code64
bsp_long:
        movw $0x10, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movq $bsp_stack_top, %rsp
        xorl %ebp, %ebp
        call guest_start
1:      hlt
        jmp 1b
ap_long:
        movq ap_stack, %rsp
        xorl %ebp, %ebp
        call ap_main
1:      hlt
        jmp 1b

/* ---- interrupts: every vector gets an error code, and ends in interrupt(struct frame *) ---- */
#define HAS_ERROR(v) ((v) == 8 || ((v) >= 10 && (v) <= 14) || (v) == 17)
        .globl stubs
        .align 16
stubs:
        .set vector, 0
        .rept 256
        .align 16
        .if !HAS_ERROR(vector)
        pushq $0
        .endif
        pushq $vector
        jmp common
        .set vector, vector + 1
        .endr
common:
        pushq %rax
        pushq %rcx
        pushq %rdx
        pushq %rbx
        pushq %rbp
        pushq %rsi
        pushq %rdi
        pushq %r8
        pushq %r9
        pushq %r10
        pushq %r11
        pushq %r12
        pushq %r13
        pushq %r14
        pushq %r15
        movq %rsp, %rdi
        movq %rsp, %rbx
        andq $-16, %rsp
        cld
        call interrupt
        movq %rbx, %rsp
        popq %r15
        popq %r14
        popq %r13
        popq %r12
        popq %r11
        popq %r10
        popq %r9
        popq %r8
        popq %rdi
        popq %rsi
        popq %rbp
        popq %rbx
        popq %rdx
        popq %rcx
        popq %rax
        addq $16, %rsp
        iretq

        .data
        .align 16
        .globl gdt
gdt:
        .quad 0
        .quad 0x00AF9B000000FFFF /* 08: 64-bit code */
        .quad 0x00CF93000000FFFF /* 10: data */
        .quad 0x00CF9B000000FFFF /* 18: 32-bit code */
gdt_end:
gdt_pointer:
        .word gdt_end - gdt - 1
        .long gdt
        .globl ap_stack
        .align 8
ap_stack:
        .quad 0

        .bss
        .globl pml4, pdpt, page_directories
        .align 4096
pml4:   .skip 4096
pdpt:   .skip 4096
page_directories:
        .skip GIGABYTES * 4096
bsp_stack:
        .skip 32768
bsp_stack_top:
