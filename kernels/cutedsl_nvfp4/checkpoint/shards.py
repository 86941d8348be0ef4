"""Write one output shard: read, convert and place every tensor, then let the file appear whole under its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..format import check_block_scales
from . import quantize
from .conversion import QUANTIZE, RELABEL, WIDEN, Job, Output, Shard
from .dialects import Linear
from .folder import PARTIAL
from .headers import CheckpointError, Tensor

COPY_BYTES = 1 << 24
SAMPLED = 16  # the error is measured on one chunk of rows of this many


@dataclass
class Measured:
    """Sums over one kind of linears: energy of the weights and of their error on the sampled rows, and counts."""

    linears: int = 0
    signal: float = 0.0
    noise: float = 0.0
    lossy_codes: int = 0  # of MXFP4 blocks below e4m3's range

    def add(self, other: Measured) -> None:
        self.linears += other.linears
        self.signal += other.signal
        self.noise += other.noise
        self.lossy_codes += other.lossy_codes


@dataclass
class ShardWriter:
    """Converts the jobs of one shard. `progress` is told the source bytes that were dealt with."""

    source: Path
    destination: Path
    search: bool
    device: torch.device
    progress: Callable[[int], None]
    measured: dict[str, Measured] = field(default_factory=dict)

    def write(self, shard: Shard) -> None:
        """Write `shard` under a name of this process's own, flush it to disk, rename it."""
        partial = self.destination / f"{shard.file}.{os.getpid()}{PARTIAL}"
        with partial.open("wb") as self._out:
            os.truncate(self._out.fileno(), shard.nbytes)
            self._write_at(0, shard.header)
            for job in shard.jobs:
                self._run(job)
                self.progress(job.source_bytes)
            self._out.flush()
            os.fsync(self._out.fileno())
        partial.rename(self.destination / shard.file)

    # --- bytes ---

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(self._out.fileno(), view, offset)
            offset += written
            view = view[written:]

    def _put(self, output: Output, tensor: torch.Tensor, first_row: int = 0) -> None:
        """Place `tensor`, or the rows of it that begin at `first_row`, where `output` belongs."""
        flat = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        row = output.nbytes // output.shape[0] if output.shape else 0
        self._write_at(output.offset + first_row * row, flat.data)

    def _read(self, tensor: Tensor) -> torch.Tensor:
        """The tensor's elements on the device; integers and e8m0 as uint8 bytes."""
        buffer = bytearray(tensor.nbytes)
        with (self.source / tensor.file).open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            view = memoryview(buffer)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(
                        f"{tensor.file} ends early; it was changed or cut off during the conversion"
                    )
                view = view[count:]
        dtype = quantize.TORCH_DTYPES[tensor.dtype]
        return torch.frombuffer(buffer, dtype=dtype).view(tensor.shape).to(self.device)

    def _copy(self, tensor: Tensor, output: Output) -> None:
        if tensor.nbytes != output.nbytes:
            raise AssertionError(f"{output.name}: {tensor.nbytes} bytes to copy into {output.nbytes}")
        with (self.source / tensor.file).open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            done = 0
            while done < tensor.nbytes:
                block = file.read(min(COPY_BYTES, tensor.nbytes - done))
                if not block:
                    raise CheckpointError(
                        f"{tensor.file} ends early; it was changed or cut off during the conversion"
                    )
                self._write_at(output.offset + done, block)
                done += len(block)

    # --- jobs ---

    def _run(self, job: Job) -> None:
        outputs = {output.name: output for output in job.outputs}
        if job.copied is not None:
            self._copy(job.copied, job.outputs[0])
        elif job.action == QUANTIZE:
            self._quantize(job.linears, outputs)
        elif job.action == RELABEL:
            self._relabel(job.linears, outputs)
        elif job.action == WIDEN:
            self._widen(job.linears[0], outputs)
        else:
            self._copy_linear(job.linears[0], outputs)

    def _rows(self, linear: Linear) -> quantize.Rows:
        scale = None if linear.scale is None else self._read(linear.scale)
        return quantize.Rows(linear, self._read(linear.weight), scale)

    def _quantize(self, linears: tuple[Linear, ...], outputs: dict[str, Output]) -> None:
        rows = [self._rows(linear) for linear in linears]
        scale = quantize.global_scale(max(part.amax() for part in rows)).to(self.device)
        for linear, part in zip(linears, rows):
            signal = noise = sampled = 0.0
            for number, (first, values) in enumerate(part.chunks()):
                codes, block_scales = quantize.quantize_chunk(values, scale, self.search)
                self._put(outputs[f"{linear.name}.weight"], codes, first)
                self._put(outputs[f"{linear.name}.weight_scale"], block_scales, first)
                if number % SAMPLED == 0:
                    error = values - quantize.dequantize_chunk(codes, block_scales, scale)
                    signal += float(values.square().sum())
                    noise += float(error.square().sum())
                    sampled += values.shape[0]
            self._put(outputs[f"{linear.name}.weight_scale_2"], scale)
            self._count(linear, Measured(1, signal * linear.n / sampled, noise * linear.n / sampled))

    def _relabel(self, linears: tuple[Linear, ...], outputs: dict[str, Output]) -> None:
        exponents = [self._read(linear.scale) for linear in linears]
        power = quantize.mxfp4_global_power(max(map(quantize.check_mxfp4, linears, exponents)))
        for linear, exponent in zip(linears, exponents):
            codes, lossy = quantize.shift_codes(self._read(linear.weight), exponent, power)
            self._put(outputs[f"{linear.name}.weight"], codes)
            self._put(outputs[f"{linear.name}.weight_scale"], quantize.relabel_scales(exponent, power))
            self._put(outputs[f"{linear.name}.weight_scale_2"], torch.tensor(2.0**power))
            self._count(linear, Measured(linears=1, lossy_codes=lossy))

    def _widen(self, linear: Linear, outputs: dict[str, Output]) -> None:
        rows = self._rows(linear)
        rows.amax()  # refuses NaN
        for first, values in rows.chunks():
            self._put(outputs[f"{linear.name}.weight"], values.bfloat16(), first)

    def _copy_linear(self, linear: Linear, outputs: dict[str, Output]) -> None:
        if linear.format != "nvfp4":
            self._rows(linear).amax()  # refuses NaN
        self._copy(linear.weight, outputs[f"{linear.name}.weight"])
        if linear.format != "nvfp4":
            if linear.scale is not None:
                self._copy(linear.scale, outputs[f"{linear.name}.scale"])
            return
        block_scales = self._read(linear.scale)
        try:
            check_block_scales(block_scales, f"{linear.name}.weight_scale")
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        self._put(outputs[f"{linear.name}.weight_scale"], block_scales)
        for leaf, scale in (("weight_scale_2", linear.global_scale), ("input_scale", linear.input_scale)):
            if scale is not None:
                value = self._read(scale)
                if not bool(torch.isfinite(value).all() and (value > 0).all()):
                    raise CheckpointError(
                        f"{linear.name}.{leaf} is {value.item()}; it must be finite and positive"
                    )
                self._put(outputs[f"{linear.name}.{leaf}"], 1.0 / value if linear.divisors else value)

    def _count(self, linear: Linear, measured: Measured) -> None:
        self.measured.setdefault(linear.kind, Measured()).add(measured)
