"""The demo: a task, the chain that learns it, and the programs that run and measure it."""
