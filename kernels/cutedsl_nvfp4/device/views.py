"""Views of operands that TMA loads."""

import cutlass.cute as cute
from cutlass import AddressSpace, Int64
from cutlass._mlir.dialects import cute as cute_ir
from cutlass._mlir.dialects import cute_nvgpu
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import dsl_user_op

DESCRIPTOR_BYTES = 128  # of a TMA descriptor
DESCRIPTOR_ALIGNMENT = 64


def partition_loads(
    atom: cute.CopyAtom,
    shared: cute.Tensor,
    tiles: cute.Tensor,
    modes: int,
    member: int = 0,
    members: int = 1,
):
    """(shared by stage, global by tile) views of one TMA load whose box is the first `modes` modes."""
    return cpasync.tma_partition(
        atom,
        member,
        cute.make_layout(members),
        cute.group_modes(shared, 0, modes),
        cute.group_modes(tiles, 0, modes),
    )


def _descriptor_pointer():
    kind = cute_nvgpu.TmaDescriptorTiledType.get()
    return cute_ir.PtrType.get(kind, AddressSpace.generic, DESCRIPTOR_ALIGNMENT)


@dsl_user_op
def descriptor_address(atom: cute.CopyAtom, *, loc=None, ip=None) -> Int64:
    """Where an atom's TMA descriptor is: among the kernel's parameters."""
    executable = cute_nvgpu.atom_make_exec_tma(atom._trait.value, loc=loc, ip=ip)
    pointer = cute_nvgpu.get_tma_desc_addr(_descriptor_pointer(), executable, loc=loc, ip=ip)
    return pointer.toint(loc=loc, ip=ip)


@dsl_user_op
def descriptor_at(address: Int64, *, loc=None, ip=None) -> cute.Pointer:
    """`descriptor_address` -> the descriptor that cute.copy takes instead of its atom's own (`tma_desc_ptr`)."""
    aligned = cute_ir.ConstrainedIntType.get(DESCRIPTOR_ALIGNMENT, 64)
    address = cute_ir.assume(aligned, address.ir_value(loc=loc, ip=ip), loc=loc, ip=ip)
    return cute_ir.inttoptr(_descriptor_pointer(), address, loc=loc, ip=ip)
