"""PTX instructions as Gluon functions, for kernels that allocate registers and copies by hand.

Every operand is a tensor `[32 * warps]`: one element is one register of one thread.  What Triton's
layouts would decide is decided by the caller, so that a fragment travels from memory into tensor
cores without being exchanged between threads.
"""
