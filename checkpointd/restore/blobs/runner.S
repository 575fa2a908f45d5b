# SPDX-License-Identifier: Apache-2.0
# Runs a table of system calls in a process being restored; ends in int3.
#
# rbx: the table, r12: how many.  struct entry: u32 nr, u32 ignore_error, u64 args[6], s64 result.  Bit 30 of nr: the
# first argument is the address of an earlier result.  Stops behind the first failed entry that may not fail.
#
# amx: uses a tile once, so that the kernel makes room for tile data.  rbx: 64 bytes of tile configuration.
# one: a single system call, for PTRACE_SYSCALL.
        .text
        .globl  _start
_start:
run:    test    %r12, %r12
        jz      done
        mov     (%rbx), %eax
        mov     8(%rbx), %rdi
        mov     16(%rbx), %rsi
        mov     24(%rbx), %rdx
        mov     32(%rbx), %r10
        mov     40(%rbx), %r8
        mov     48(%rbx), %r9
        btr     $30, %eax
        jnc     call
        mov     (%rdi), %rdi
call:   syscall
        mov     %rax, 56(%rbx)
        add     $64, %rbx
        dec     %r12
        cmpl    $0, -60(%rbx)
        jne     run
        cmp     $-4095, %rax
        jb      run
done:   int3
        .balign 64
amx:    ldtilecfg (%rbx)
        tilezero %tmm0
        tilerelease
        int3
        .balign 64
one:    syscall
        int3
        .balign 64
