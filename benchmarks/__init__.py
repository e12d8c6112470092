"""Benchmarks that write the records under results/; docs/gpu.md, cpu.md and caches.md say how."""
