# SPDX-License-Identifier: Apache-2.0
# A whole ELF program that waits for ever: what a process being restored is before anything is in it.
# Assembled to raw bytes, loaded at 0x10000.
        .text
        .globl  _start
base    = 0x10000
_start: .byte   0x7f, 0x45, 0x4c, 0x46, 2, 1, 1, 0
        .quad   0
        .word   2, 62
        .long   1
        .quad   base + (code - _start)
        .quad   header - _start
        .quad   0
        .long   0
        .word   64, 56, 1, 64, 0, 0
header: .long   1, 7
        .quad   0, base, base, end - _start, end - _start, 4096
code:   mov     $34, %eax
        syscall
        jmp     code
end:
