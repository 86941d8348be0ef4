"""GPU kernels prove themselves on the device they find, before they serve."""
