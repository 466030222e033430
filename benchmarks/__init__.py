"""Speed and accuracy against what users run today. ``python -m benchmarks.throughput`` runs it; docs/benchmarks.md."""
