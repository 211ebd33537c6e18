"""The benchmark suite: ``pytest benchmarks/ --benchmark-only``; CONTRIBUTING.md says how."""
