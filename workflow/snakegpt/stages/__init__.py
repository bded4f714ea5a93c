"""One module a stage: arguments in, files out. Each runs alone; none imports another."""
