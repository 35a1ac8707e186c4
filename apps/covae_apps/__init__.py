"""The top floor: the demo and the benchmarks, the only place that may import every other."""
