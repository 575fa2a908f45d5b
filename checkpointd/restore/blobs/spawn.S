# SPDX-License-Identifier: Apache-2.0
# long spawn(struct clone_args *args, long size, struct entry *child_table, long nr, struct entry *grandchild, long nr)
#
# clone3(args); the parent returns its result.  The child, on a stack of its own that it never uses, makes the calls
# of its table and exits with 0, or with 1 when one failed.  A clone3 inside the table that returns 0 (the
# grandchild) goes on with the grandchild's table instead.
#
# struct entry: u32 nr, u32 ignore_error, u64 args[6], s64 result.
        .text
        .globl  _start
_start: push    %rbx
        push    %r12
        push    %r13
        push    %r14
        mov     %rdx, %rbx
        mov     %rcx, %r12
        mov     %r8, %r13
        mov     %r9, %r14
        mov     $435, %eax
        syscall
        test    %rax, %rax
        jz      next
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbx
        ret
next:   test    %r12, %r12
        jz      good
        mov     (%rbx), %eax
        mov     8(%rbx), %rdi
        mov     16(%rbx), %rsi
        mov     24(%rbx), %rdx
        mov     32(%rbx), %r10
        mov     40(%rbx), %r8
        mov     48(%rbx), %r9
        syscall
        cmpl    $435, (%rbx)
        jne     keep
        test    %rax, %rax
        jnz     keep
        mov     %r13, %rbx
        mov     %r14, %r12
        jmp     next
keep:   mov     %rax, 56(%rbx)
        cmpl    $0, 4(%rbx)
        jne     skip
        cmp     $-4095, %rax
        jae     bad
skip:   add     $64, %rbx
        dec     %r12
        jmp     next
good:   xor     %edi, %edi
        jmp     leave
bad:    mov     $1, %edi
leave:  mov     $60, %eax
        syscall
        jmp     leave
