"""Measurements that take longer than a test: each is one command, and docs/reference_runs/ keeps what came out."""
