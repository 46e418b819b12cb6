// Stacks to switch between: what emulated threads run on.
//
// A switch saves the registers that a called function must keep, and takes the other stack's: no system call, and nothing
// of the C library, which may check jumps between stacks and end the program. Where there is no such code for the
// processor, or something keeps account of stacks (an address sanitizer, a shadow stack), the switch is swapcontext's.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MSA_HF_WATCHED_STACKS 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || (defined(__SHSTK__) && __SHSTK__)
#define MSA_HF_WATCHED_STACKS 1
#endif
#if defined(__x86_64__) && defined(__linux__) && !defined(MSA_HF_WATCHED_STACKS)
#define MSA_HF_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulated {

#ifdef MSA_HF_OWN_SWITCH

struct Context {
  void* top = nullptr;  // of its stack, while it does not run
};

}  // namespace emulated

extern "C" void msa_hf_switch_stacks(void** from, void* to);
asm(R"(
  .text
  .p2align 4
  .type msa_hf_switch_stacks, @function
msa_hf_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size msa_hf_switch_stacks, . - msa_hf_switch_stacks
)");

namespace emulated {

inline void switch_to(Context& from, Context& to) { msa_hf_switch_stacks(&from.top, to.top); }

// A context that runs `entry`, which must not return, on a stack of its own.
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  const uintptr_t end = reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16;
  void** top = reinterpret_cast<void**>(end);
  *--top = nullptr;  // where `entry` would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the registers
  context.top = top;
}

#else

struct Context {
  ucontext_t saved;
};

inline void switch_to(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}

#endif

}  // namespace emulated
