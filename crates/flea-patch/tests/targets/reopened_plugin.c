/* The plug-in of reopened.c. Five bytes can be replaced that are one instruction. */
long plugin_step(long);
asm(".text\n.p2align 4\n.globl plugin_step\n.type plugin_step, @function\n"
    "plugin_step: mov $1,%eax; add %rdi,%rax; ret\n.size plugin_step, .-plugin_step\n");
