"""The checks of scripts/smoke_test; docs/smoke-test.md says what each proves."""
