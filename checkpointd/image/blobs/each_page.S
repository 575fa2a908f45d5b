# SPDX-License-Identifier: Apache-2.0
# void each_page(XXH128_hash_t (*hash)(const void *, size_t, XXH64_hash_t seed), const void *pages, size_t nr_pages,
#                XXH64_hash_t seed, unsigned char (*out)[16])
#
# The canonical digest of each 4 KiB page: the high word, then the low one, each big-endian.
        .text
        .globl  _start
_start: push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14                    # the stack is aligned for calls now
        mov     %rdi, %rbx
        mov     %rsi, %rbp
        mov     %rdx, %r12
        mov     %rcx, %r13
        mov     %r8, %r14
next:   test    %r12, %r12
        jz      done
        mov     %rbp, %rdi
        mov     $4096, %esi
        mov     %r13, %rdx
        call    *%rbx                   # low word in rax, high word in rdx
        bswap   %rdx
        bswap   %rax
        mov     %rdx, (%r14)
        mov     %rax, 8(%r14)
        add     $4096, %rbp
        add     $16, %r14
        dec     %r12
        jmp     next
done:   pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret
