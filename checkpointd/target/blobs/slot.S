# SPDX-License-Identifier: Apache-2.0
# The slot: bootstrap of an injection, and the way home without help.  See ../slot.py for the story.
#
# Read-only for the target: it is executed and read in place, nothing is pushed and nothing stored.
# The tracer fills the data, then sets rip to `entry` with the arguments of the first system call in registers.
        .text
        .globl _start
_start: .ascii "CKPTslt1"

entry:  syscall                         # mmap of the runner, or any one call
        mov     %rax, %r12
        mov     $234, %eax              # tgkill(pid, tid, sig): rendezvous A
        mov     pid(%rip), %edi
        mov     tid(%rip), %esi
        mov     sig(%rip), %edx
        syscall
undo:   mov     $11, %eax               # munmap(r12, len): fails harmlessly when there is nothing
        mov     %r12, %rdi
        mov     len(%rip), %rsi
        syscall
        mov     $234, %eax              # tgkill(pid, tid, sig): rendezvous B
        mov     pid(%rip), %edi
        mov     tid(%rip), %esi
        mov     sig(%rip), %edx
        syscall
restore:
        mov     $14, %eax               # rt_sigprocmask(SIG_BLOCK, all): no signal frame while rsp is ours
        xor     %edi, %edi
        lea     allones(%rip), %rsi
        xor     %edx, %edx
        mov     $8, %r10d
        syscall
        lea     flags(%rip), %rsp
        popfq
        mov     r_rsp(%rip), %rsp
        mov     $14, %eax               # rt_sigprocmask(SIG_SETMASK, mask): from here on no flag may change
        mov     $2, %edi
        lea     mask(%rip), %rsi
        mov     $0, %edx
        mov     $8, %r10d
        syscall
        mov     r_rax(%rip), %rax
        mov     r_rbx(%rip), %rbx
        mov     r_rcx(%rip), %rcx
        mov     r_rdx(%rip), %rdx
        mov     r_rsi(%rip), %rsi
        mov     r_rdi(%rip), %rdi
        mov     r_rbp(%rip), %rbp
        mov     r_r8(%rip), %r8
        mov     r_r9(%rip), %r9
        mov     r_r10(%rip), %r10
        mov     r_r11(%rip), %r11
        mov     r_r12(%rip), %r12
        mov     r_r13(%rip), %r13
        mov     r_r14(%rip), %r14
        mov     r_r15(%rip), %r15
        jmp     *r_rip(%rip)

        .balign 8, 0
data:
r_rax:  .quad 0
r_rbx:  .quad 0
r_rcx:  .quad 0
r_rdx:  .quad 0
r_rsi:  .quad 0
r_rdi:  .quad 0
r_rbp:  .quad 0
r_r8:   .quad 0
r_r9:   .quad 0
r_r10:  .quad 0
r_r11:  .quad 0
r_r12:  .quad 0
r_r13:  .quad 0
r_r14:  .quad 0
r_r15:  .quad 0
r_rsp:  .quad 0
r_rip:  .quad 0
flags:  .quad 0
mask:   .quad 0
len:    .quad 0
pid:    .long 0
tid:    .long 0
sig:    .long 0
        .long 0
allones: .quad -1
end:
