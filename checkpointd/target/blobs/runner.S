# SPDX-License-Identifier: Apache-2.0
# The runner: runs tables of system calls between rendezvous.  First page of the injected mapping, r-x; the
# pages behind it are r-w.  Position independent, no stack.  See ../inject.py for the tables.
#
# r15 = header of the bank in use.  The tracer sets it together with rip, in one SETREGS: at any instant either
# the old bank's undo table or the new bank's work table (and then its undo table) is what happens next.
#
# header: 0 u32 nr_work, 4 u32 nr_undo, 8 u64 undo table, 16 u64 slot.undo, 24 u32 pid, 28 u32 tid, 32 u32 sig
# entries behind the header (64 bytes): u64 nr, u64 args[6], u64 result
        .text
        .globl _start
_start:
first:  syscall                         # mprotect(pages 1.., read|write), set up by the tracer
        mov     %rax, %r14              # its result, to be looked at before anything is stored
run:    mov     0(%r15), %ebx
        lea     64(%r15), %rbp
        xor     %r13d, %r13d            # 0: work, 1: undo
loop:   test    %ebx, %ebx
        je      done
        mov     0(%rbp), %rax
        mov     8(%rbp), %rdi
        mov     16(%rbp), %rsi
        mov     24(%rbp), %rdx
        mov     32(%rbp), %r10
        mov     40(%rbp), %r8
        mov     48(%rbp), %r9
        btr     $29, %eax               # a fork: the child must never run the target's code
        setc    %r14b
        btr     $30, %eax               # the first argument is the result of an earlier call
        jnc     1f
        mov     (%rdi), %rdi
1:      syscall
        test    %r14b, %r14b
        je      3f
        test    %rax, %rax
        jne     3f
2:      mov     $231, %eax              # exit_group(99): tells our copies from the program's own children
        mov     $99, %edi
        syscall
        jmp     2b
3:      mov     %rax, 56(%rbp)
        add     $64, %rbp
        dec     %ebx
        jmp     loop
done:   test    %r13d, %r13d
        jne     leave
        mov     $234, %eax              # tgkill(pid, tid, sig): rendezvous R
        mov     24(%r15), %edi
        mov     28(%r15), %esi
        mov     32(%r15), %edx
        syscall
rdv:    mov     4(%r15), %ebx           # nobody answered, or we are sent home
        mov     8(%r15), %rbp
        inc     %r13d
        jmp     loop
leave:  lea     first(%rip), %r12
        jmp     *16(%r15)
end:
