"""Computes the parts of a memory on CPU by kernels in C++, where XLA would run them on one core.

`calls` has a function of arrays for each kernel. Callers do not choose between a kernel and the JAX function
that does the same: they name both, and `dispatch.native_or` takes the kernel if the program is for a CPU, if
`native.is_on()` and if the kernel serves the arguments.

The library is built at first use (`build`) with the system's C++ compiler (`compiler`), checked in a process
of its own (`self_check`) and loaded (`native`). Without a compiler, after a failure or with
`ULTRAMEM_NATIVE=0`, JAX's functions run. A line in the log says which.
"""
