"""Apply, check and lint the patch series."""
