"""The checks of scripts/smoke_test.py; docs/smoke-test.md says what each proves."""
