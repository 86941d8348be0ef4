"""Runs compiled CuTe DSL kernels on the CPU: their own host code launches, their own PTX is interpreted.

    device.py   `run` of sm90/, sm100/ and sm120/ on an emulated device
    host.py     a kernel's object file, linked to a stand-in for the CUDA runtime that hands each launch over
    ptx.py      the PTX of a kernel: parser, and warps that execute it 32 lanes at a time
    alu.py      what instructions compute on registers alone
    instructions.py, tensor_memory.py    instructions that reach memory, wait, or use the tensor cores
    memory.py   the host's memory, shared addresses, mbarriers, TMA descriptors
    mma.py, warpgroup.py    what Blackwell's and Hopper's tensor cores compute, from the operands' addresses
    machine.py  grids, clusters, CTAs: whose turn it is, and when asynchronous work is done

It is written from the PTX manual, not from CuTe: an address that a kernel gets wrong is wrong here. Asynchronous work
(TMA, tcgen05) is done at once, or as late as the kernel's own waiting allows. What it does not know it refuses.
"""
