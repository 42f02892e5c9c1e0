# The micro guest: what a host must be able to run before we call it an accelerator.
#
# A Linux "bzImage" of 1 KiB, so that it starts the way our guests start (direct kernel boot). It walks
# the road of every x86-64 kernel and writes one letter to the debug console at each milestone:
#   R real mode   P protected mode   G paging on   L long mode   I interrupt table
#   W twenty million rounds of arithmetic   T ten timer interrupts
# and then leaves through the debug-exit device with status 3.
#
# W is there since a hypervisor can run all of the rest by interpreting one instruction after the
# other. Measured on such a host: everything but W in 3 s; W at 1.6 million instructions a second, so
# a stock kernel seems to hang. Hardware virtualisation takes 20 ms for W, TCG 30 ms.
#
# The bytes in microguest.py are made from this file; a unit test assembles it and compares:
#   as microguest.S -o m.o && ld -m elf_x86_64 --oformat binary -Ttext 0 -e 0 m.o -o m.bin

.code16
start:
        .org 0x1f1              # the Linux x86 boot protocol's header, version 2.03
        .byte 1                 # setup_sects
        .word 0
        .long 32                # syssize, in 16-byte units
        .word 0, 0, 0
        .word 0xaa55
        .byte 0xeb, setup - 1f  # entered here with CS = base + 0x20
1:      .ascii "HdrS"
        .word 0x0203
        .long 0
        .word 0, 0
        .byte 0xff, 1           # loader type, LOADED_HIGH
        .word 0
        .long 0x100000          # code32_start
        .long 0, 0, 0
        .word 0
        .byte 0, 0
        .long 0
        .long 0x7fffffff        # initrd_addr_max

setup:  cli
        mov     $'R', %al
        out     %al, $0xe9
        mov     %cs, %ax
        sub     $0x20, %ax
        mov     %ax, %ds
        xor     %ebx, %ebx
        mov     %ax, %bx
        shl     $4, %ebx        # linear address of start
        lea     gdt(%ebx), %eax
        mov     %eax, gdtr + 2
        lea     pm(%ebx), %eax
        mov     %eax, target
        lgdtl   gdtr
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   *target

        .balign 8
gdt:    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff, 0x00af9a000000ffff
gdtr:   .word 31
        .long 0
target: .long 0
        .word 8

.code32
pm:     mov     $16, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $0x300000, %esp
        mov     $'P', %al
        out     %al, $0xe9
        mov     $0x200000, %edi # page tables: 1 GiB mapped one to one in 2 MiB pages
        xor     %eax, %eax
        mov     $3072, %ecx
        cld
        rep stosl
        movl    $0x201003, 0x200000
        movl    $0x202003, 0x201000
        mov     $0x202000, %edi
        mov     $0x83, %eax
        mov     $512, %ecx
2:      mov     %eax, (%edi)
        add     $0x200000, %eax
        add     $8, %edi
        loop    2b
        mov     %cr4, %eax
        or      $0x20, %eax     # PAE
        mov     %eax, %cr4
        mov     $0x200000, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx
        rdmsr
        or      $0x100, %eax    # EFER.LME
        wrmsr
        mov     %cr0, %eax
        or      $0x80000000, %eax
        mov     %eax, %cr0
        mov     $'G', %al
        out     %al, $0xe9
        call    3f
3:      pop     %eax
        add     $lm - 3b, %eax
        pushl   $24
        push    %eax
        lret

.code64
lm:     mov     $'L', %al
        out     %al, $0xe9
        lea     isr(%rip), %rax
        mov     $0x203000, %edi # interrupt table: one gate, vector 32
        mov     %ax, 0x200(%rdi)
        movw    $24, 0x202(%rdi)
        movw    $0x8e00, 0x204(%rdi)
        shr     $16, %rax
        mov     %ax, 0x206(%rdi)
        movq    $0, 0x208(%rdi)
        lidt    idtr(%rip)
        mov     $'I', %al
        out     %al, $0xe9
        xor     %eax, %eax
        cpuid
        mov     $20000000, %ecx
4:      add     %rcx, %rax
        rol     $7, %rax
        dec     %ecx
        jnz     4b
        mov     $'W', %al
        out     %al, $0xe9
        mov     $0x11, %al      # interrupt controller: vectors from 32, timer only
        out     %al, $0x20
        mov     $0x20, %al
        out     %al, $0x21
        mov     $4, %al
        out     %al, $0x21
        mov     $1, %al
        out     %al, $0x21
        mov     $0xfe, %al
        out     %al, $0x21
        mov     $0x34, %al      # timer: every 4096 ticks of 1.193 MHz, 3.4 ms
        out     %al, $0x43
        mov     $0, %al
        out     %al, $0x40
        mov     $0x10, %al
        out     %al, $0x40
        xor     %r15, %r15
        sti
5:      hlt
        cmp     $10, %r15
        jb      5b
        mov     $'T', %al
        out     %al, $0xe9
        mov     $1, %al
        out     %al, $0xf4      # debug exit: (1 << 1) | 1 = 3
6:      hlt
        jmp     6b

isr:    push    %rax
        inc     %r15
        mov     $0x20, %al
        out     %al, $0x20
        pop     %rax
        iretq
idtr:   .word 0xfff
        .quad 0x203000
        .org 1024
        .fill 512
