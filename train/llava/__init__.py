"""LLaVA-1.5's projector on a frozen tower (`train llava`), for the benchmarks of lmms-eval."""
